//! A process that writes checkpoints is killed (SIGKILL) at random moments, again and again: what it leaves is always one whole
//! checkpoint, no older than the last save that returned.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use collm_engine::checkpoint::{Checkpoint, Tensor};
use collm_engine::rng::Rng;

const DIR: &str = "COLLM_TEST_KILLED_DIR";

/// All parts of the checkpoint of a step hold the step.
fn checkpoint(step: u64) -> Checkpoint<u64> {
    let tensor = |name: &str| Tensor::new(name, vec![64, 64], vec![step as f32; 64 * 64]);
    Checkpoint { model: vec![tensor("a"), tensor("b")], optimizer: vec![tensor("m"), tensor("v")], state: step }
}

fn load(dir: &Path) -> Option<u64> {
    let found = Checkpoint::<u64>::load(dir, "last").expect("a whole checkpoint")?;
    let step = found.state;
    assert!(found == checkpoint(step), "the parts of step {step} are of different steps");
    Some(step)
}

/// Not a test of its own: the process that is killed. It goes on from what it finds and notes every save that returned.
#[test]
fn killed_process() {
    let Some(dir) = std::env::var_os(DIR).map(PathBuf::from) else { return };
    let mut notes = std::fs::OpenOptions::new().create(true).append(true).open(dir.join("notes")).unwrap();
    for step in load(&dir).unwrap_or(0) + 1.. {
        checkpoint(step).save(&dir, "last").unwrap();
        writeln!(notes, "{step}").unwrap();
    }
}

#[test]
fn killing_at_random_moments_leaves_a_whole_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let noted = || -> u64 {
        let text = std::fs::read_to_string(dir.path().join("notes")).unwrap_or_default();
        let whole = text.rsplit_once('\n').map_or("", |(lines, _)| lines);
        whole.lines().last().map_or(0, |l| l.parse().unwrap())
    };
    let mut rng = Rng::new(std::process::id().into(), 1);
    for round in 0..25 {
        let before = noted();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "kill::killed_process"])
            .env(DIR, dir.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        // Into the middle of the work: wait for a save of this process, then for a random while.
        let patience = Instant::now();
        while noted() == before {
            assert!(child.try_wait().unwrap().is_none(), "round {round}: the process ended by itself");
            assert!(patience.elapsed() < Duration::from_secs(60), "round {round}: no checkpoint in a minute");
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_micros(rng.below(30_000).into()));
        child.kill().unwrap();
        child.wait().unwrap();
        let (noted, found) = (noted(), load(dir.path()).expect("a checkpoint"));
        assert!(found == noted || found == noted + 1, "round {round}: step {noted} was saved, {found} was found");
    }
    let last = load(dir.path()).unwrap();
    checkpoint(last + 1).save(dir.path(), "last").unwrap();
    let left = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name());
    let mut left: Vec<_> = left.map(|n| n.to_string_lossy().into_owned()).collect();
    left.sort();
    assert_eq!(left, ["last", "notes"], "nothing stays behind");
}
