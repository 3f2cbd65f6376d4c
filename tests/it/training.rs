//! Training end to end on a tiny model: it learns, it resumes with the same bits after SIGKILL, it ends in order on Ctrl-C.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use crate::common::{command, fails, ok, path, run, tiny_data, tiny_model};
use collm_engine::checkpoint::{Tensor, read_tensors};
use collm_engine::rng::Rng;

/// Settings of a run of a few seconds.
const SETTINGS: [&str; 14] = [
    "prompt.style.max_history=2",
    "prompt.style.max_tokens=512",
    "collab.mf.dim=8",
    "collab.mf.learning_rate=0.05",
    "collab.mf.max_epochs=120",
    "collab.mf.min_epochs=10",
    "collab.mf.patience=20",
    "stage1.batch_rows=4",
    "stage1.steps_per_epoch=6",
    "stage1.max_epochs=2",
    "stage2.batch_rows=4",
    "stage2.steps_per_epoch=6",
    "stage2.max_epochs=2",
    "checkpoint.every_steps=2",
];

fn train_args<'a>(data: &'a Path, model: &'a Path, run: &'a Path, extra: &[&'a str]) -> Vec<&'a str> {
    let mut args = vec!["train", "--data", path(data), "--llm", path(model), "--run", path(run)];
    for setting in SETTINGS.iter().chain(&["eval.valid_rows=12", "eval.test_rows=20"]) {
        args.extend(["--set", setting]);
    }
    args.extend(extra);
    args
}

/// Everything a run ends in. Tensors, not files: the order of a header's metadata is the library's to choose.
fn results(run: &Path) -> (Vec<Vec<Tensor>>, String) {
    let files = ["adapter/adapter_model.safetensors", "cie.safetensors", "collab/mf.safetensors"];
    let tensors = files.iter().map(|f| read_tensors(&run.join(f)).unwrap().0).collect();
    (tensors, std::fs::read_to_string(run.join("results.json")).unwrap())
}

fn assert_same_results(a: &Path, b: &Path) {
    let (a, b) = (results(a), results(b));
    for (a, b) in a.0.iter().flatten().zip(b.0.iter().flatten()) {
        assert_eq!(a.name, b.name);
        assert!(a == b, "{} differs", a.name);
    }
    assert_eq!(a.1, b.1);
}

/// metrics.jsonl without what depends on the clock.
fn curve(run: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    text.lines().map(|l| l.split(",\"rows_per_s\"").next().unwrap().to_string()).collect()
}

#[test]
fn a_killed_run_ends_in_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let (data, model) = (tiny_data(dir.path()), tiny_model(dir.path()));
    let whole = dir.path().join("whole");
    ok(&train_args(&data, &model, &whole, &[]));
    let killed = dir.path().join("killed");
    kill_and_resume(&data, &model, &killed, &[], 12);
    assert_same_results(&killed, &whole);
    assert_eq!(curve(&killed), curve(&whole));
}

const REUSE: [&str; 4] = ["--set", "stage1.group=shuffle-groups", "--set", "stage2.group=shuffle-groups"];

/// With shuffled groups and a prefix cache: on disk and killed, or in memory in one piece, and on any number of threads.
#[test]
fn what_is_reused_changes_no_bit_of_a_killed_run() {
    let dir = tempfile::tempdir().unwrap();
    let (data, model) = (tiny_data(dir.path()), tiny_model(dir.path()));
    let with = |place: &'static str| [&REUSE[..], &["--set", place]].concat();
    let whole = dir.path().join("whole");
    ok(&train_args(&data, &model, &whole, &[with("stage2.prefix_cache=memory"), vec!["--threads", "1"]].concat()));
    let killed = dir.path().join("killed");
    kill_and_resume(&data, &model, &killed, &with("stage2.prefix_cache=disk"), 6);
    assert!(killed.join("stage2/prefixes.kv").metadata().unwrap().len() > 100_000);
    assert_same_results(&killed, &whole);
    assert_eq!(curve(&killed), curve(&whole));

    // Without a cache, the curve is the same up to the rounding of what is kept; without groups, it is another.
    let exact = dir.path().join("exact");
    ok(&train_args(&data, &model, &exact, &REUSE));
    let losses = |run: &Path| -> Vec<f64> {
        let lines = curve(run).into_iter().filter(|l| l.contains("\"phase\":\"train\""));
        lines.map(|l| l.split("\"loss\":").nth(1).unwrap().split(',').next().unwrap().parse().unwrap()).collect()
    };
    let (kept, exact) = (losses(&whole), losses(&exact));
    assert_eq!(kept.len(), 24);
    assert_eq!(kept[..12], exact[..12], "stage 1 has no cache");
    assert_ne!(kept[12..], exact[12..], "the cache was not used");
    for (kept, exact) in kept.iter().zip(&exact) {
        assert!((kept - exact).abs() < 2e-3 * exact, "{kept} with the cache, {exact} without");
    }
    let apart = dir.path().join("apart");
    ok(&train_args(&data, &model, &apart, &["--no-test"]));
    assert_ne!(losses(&apart)[..12], exact[..12], "groups were not shuffled");
}

/// Runs and kills, `most` times, until a run ends.
fn kill_and_resume(data: &Path, model: &Path, killed: &Path, settings: &[&str], most: u32) {
    // Moments of death differ from run to run of this test; what must come out does not.
    let seed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64;
    println!("seed {seed}");
    let mut rng = Rng::new(seed, 0);
    let mut deaths = 0;
    loop {
        let resume = ["--resume"];
        let extra = if killed.join("config.toml").exists() { &resume[..] } else { &[] };
        let mut child = command(&train_args(data, model, killed, &[settings, extra].concat()))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let patience = if deaths < most { 50 + u64::from(rng.below(900)) } else { 600_000 };
        let began = std::time::Instant::now();
        let status = loop {
            match child.try_wait().unwrap() {
                Some(status) => break Some(status),
                None if began.elapsed() > Duration::from_millis(patience) => break None,
                None => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        match status {
            Some(status) => {
                assert!(status.success(), "after {deaths} deaths");
                break;
            }
            None => {
                child.kill().unwrap(); // SIGKILL
                child.wait().unwrap();
                deaths += 1;
            }
        }
    }
    println!("{deaths} deaths");
}

#[test]
fn one_thread_and_two_threads_give_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let (data, model) = (tiny_data(dir.path()), tiny_model(dir.path()));
    let runs = ["1", "2"].map(|threads| {
        let run = dir.path().join(threads);
        ok(&train_args(&data, &model, &run, &["--threads", threads]));
        run
    });
    assert_same_results(&runs[0], &runs[1]);
}

#[cfg(unix)]
#[test]
fn ctrl_c_saves_and_exits_130() {
    let dir = tempfile::tempdir().unwrap();
    let (data, model) = (tiny_data(dir.path()), tiny_model(dir.path()));
    let run_dir = dir.path().join("run");
    let long = ["--set", "stage1.max_epochs=2000", "--set", "stage1.patience=0"];
    let mut child = command(&train_args(&data, &model, &run_dir, &long)).stderr(Stdio::piped()).spawn().unwrap();
    let last = run_dir.join("stage1/checkpoints/last/state.json");
    for _ in 0..1200 {
        if last.exists() {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(last.exists(), "no checkpoint within a minute");
    let interrupted = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(interrupted.success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let other = fails(&train_args(&data, &model, &run_dir, &["--resume"]));
    assert!(other.contains("stage1.max_epochs was 2000, is 2"), "{other}");
}

/// Stage 2 scores what stage 1 and MF know together; a user of the test checks the whole path by scores in and out.
#[test]
fn scores_eval_and_exports() {
    let dir = tempfile::tempdir().unwrap();
    let (data, model) = (tiny_data(dir.path()), tiny_model(dir.path()));
    let run_dir = dir.path().join("run");
    let table = ok(&train_args(&data, &model, &run_dir, &["--set", "eval.test_rows=0"]));
    assert!(table.contains("| CoLLM-MF |") && table.contains("| TALLRec (stage 1) |"), "{table}");
    for name in [
        "config.toml",
        "metrics.jsonl",
        "adapter/adapter_config.json",
        "stage1/checkpoints/last/optimizer.safetensors",
        "stage2/checkpoints/best/state.json",
    ] {
        assert!(run_dir.join(name).exists(), "{name}");
    }
    let csv = dir.path().join("scores.csv");
    ok(&["score", "--run", path(&run_dir), "--split", "test", "--out", path(&csv)]);
    let judged = ok(&["eval", "--scores", path(&csv), "--data", path(&data)]);
    let row = |text: &str, name: &str| {
        text.lines().find(|l| l.starts_with(&format!("| {name} |"))).unwrap().split_once(" | ").unwrap().1.to_string()
    };
    assert_eq!(row(&judged, "scores"), row(&table, "CoLLM-MF"), "scores written and read back judge the same");
    // The same rows as a request file give the same scores, in CSV and in Parquet.
    let again = dir.path().join("again.csv");
    ok(&["score", "--run", path(&run_dir), "--rows", path(&csv), "--out", path(&again)]);
    assert_eq!(std::fs::read(&csv).unwrap(), std::fs::read(&again).unwrap());
    let parquet = dir.path().join("scores.parquet");
    ok(&["score", "--run", path(&run_dir), "--rows", path(&csv), "--out", path(&parquet), "--stage", "stage1"]);
    let from_parquet = ok(&["score", "--run", path(&run_dir), "--rows", path(&parquet), "--out", "-"]);
    assert_eq!(from_parquet.as_bytes(), std::fs::read(&csv).unwrap());
    rank_and_score_agree(dir.path(), &run_dir);
    let requests = dir.path().join("bad.csv");
    std::fs::write(&requests, "uid,iid\n1,2\n1,x\n").unwrap();
    let e = fails(&["score", "--run", path(&run_dir), "--rows", path(&requests), "--out", path(&again)]);
    assert!(e.contains("bad.csv: line 3: uid \"1\", iid \"x\"; expected two ids"), "{e}");
    std::fs::write(&requests, "uid,iid\n1,999\n").unwrap();
    let e = fails(&["score", "--run", path(&run_dir), "--rows", path(&requests), "--out", path(&again)]);
    assert!(e.contains("item 999"), "{e}");
    assert_eq!(std::fs::read(&csv).unwrap(), std::fs::read(&again).unwrap(), "a failed run leaves the old file");
    let out = run(&["eval", "--run", path(&run_dir)]);
    assert!(out.status.success());
}

/// Models whose vectors depend on the history, from training to scores: a row's score is the same in a split and among candidates.
#[test]
fn sasrec_and_din_end_to_end() {
    let dir = tempfile::tempdir().unwrap();
    let (data, model) = (tiny_data(dir.path()), tiny_model(dir.path()));
    for (name, title, settings) in [
        ("sasrec", "SASRec", ["dim=8", "max_length=6", "batch_size=64", "max_epochs=4"]),
        ("din", "DIN", ["dim=12", "max_length=4", "batch_size=64", "max_epochs=4"]),
    ] {
        let run_dir = dir.path().join(name);
        let settings = settings.map(|s| format!("collab.{name}.{s}"));
        let chosen = format!("collab.model={name}");
        let mut extra = vec!["--set", &chosen];
        settings.iter().for_each(|s| extra.extend(["--set", s]));
        let table = ok(&train_args(&data, &model, &run_dir, &extra));
        assert!(table.contains(&format!("| {title} |")) && table.contains(&format!("| CoLLM-{title} |")), "{table}");
        assert!(run_dir.join("collab").join(format!("{name}.safetensors")).exists());
        let again = ok(&["eval", "--run", path(&run_dir)]);
        assert_eq!(again, table, "read back, the model judges the same");
        let csv = dir.path().join(format!("{name}.csv"));
        ok(&["score", "--run", path(&run_dir), "--split", "test", "--out", path(&csv)]);
        let rows = dir.path().join(format!("{name}-rows.csv"));
        ok(&["score", "--run", path(&run_dir), "--rows", path(&csv), "--out", path(&rows)]);
        assert_eq!(std::fs::read(&csv).unwrap(), std::fs::read(&rows).unwrap());
        let ranking = ok(&["rank", "--run", path(&run_dir), "--user", "3", "--top", "5", "--out", "-"]);
        assert_eq!(ranking.lines().count(), 6, "{ranking}");
    }
}

/// A user's ranking is their candidates' scores in order; what they like is left out unless asked for.
fn rank_and_score_agree(dir: &Path, run_dir: &Path) {
    let lines = |text: &str| -> Vec<Vec<f64>> {
        text.lines().skip(1).map(|l| l.split(',').map(|x| x.parse().unwrap()).collect()).collect()
    };
    let all = ok(&["rank", "--run", path(run_dir), "--user", "3,5", "--top", "100", "--keep-liked", "--out", "-"]);
    assert!(all.starts_with("uid,rank,iid,score\n"), "{all}");
    let all = lines(&all);
    assert_eq!(all.len(), 2 * 30, "30 items for each of two users");
    for user in all.chunks(30) {
        assert!(user.windows(2).all(|w| w[0][3] >= w[1][3] && w[0][1] + 1.0 == w[1][1]), "best first");
    }
    let fewer = ok(&["rank", "--run", path(run_dir), "--user", "3", "--top", "100", "--out", "-"]);
    let fewer = lines(&fewer);
    assert!(!fewer.is_empty() && fewer.len() < 30, "liked items are left out: {}", fewer.len());
    let kept: Vec<&Vec<f64>> = all[..30].iter().filter(|r| fewer.iter().any(|f| f[2] == r[2])).collect();
    assert_eq!(kept.iter().map(|r| r[2]).collect::<Vec<_>>(), fewer.iter().map(|r| r[2]).collect::<Vec<_>>());
    // One candidate alone has the score that it has among others, to rounding.
    let pairs = dir.join("pairs.csv");
    std::fs::write(&pairs, format!("uid,iid\n3,{}\n", fewer[2][2])).unwrap();
    let alone = lines(&ok(&["rank", "--run", path(run_dir), "--pairs", path(&pairs), "--out", "-"]));
    assert!((alone[0][3] - fewer[2][3]).abs() < 1e-5, "{alone:?} {:?}", fewer[2]);
    let e = fails(&[
        "rank",
        "--run",
        path(run_dir),
        "--user",
        "3",
        "--candidates",
        path(&pairs.with_extension("none")),
        "--out",
        "-",
    ]);
    assert!(e.contains("pairs.none"), "{e}");
    assert!(fails(&["rank", "--run", path(run_dir), "--out", "-"]).contains("no users: pass --user"));
}
