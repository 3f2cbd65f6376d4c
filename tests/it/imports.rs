//! Official files from end to end: a yaml configuration becomes a TOML one that resolves, a `.pth` becomes a run's collaborative
//! model.

use std::path::Path;

use crate::common::{fails, fixture, ok, path, tiny_data, tiny_model};
use collm_engine::checkpoint::read_tensors;
use collm_engine::train::config::Config;
use collm_engine::train::import::import;
use collm_engine::train::schedule::ScheduleKind;

fn imported(name: &str) -> (String, Config) {
    let file = fixture("yaml").join(name);
    let toml = import(&std::fs::read_to_string(&file).unwrap(), name, 2).unwrap().toml;
    let out = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(out.path(), &toml).unwrap();
    let config = Config::resolve(None, Some(out.path()), &[]).unwrap_or_else(|e| panic!("{e}\n{toml}"));
    (toml, config)
}

/// The comments on keys that became no setting.
fn unmatched(toml: &str) -> Vec<&str> {
    toml.lines().filter_map(|l| l.strip_prefix("# line ")).collect()
}

#[test]
fn a_stage_two_file() {
    let (toml, c) = imported("stage2_lightgcn.yaml");
    assert_eq!((c.collab.model.as_str(), c.collab.lightgcn.dim, c.collab.lightgcn.layers), ("lightgcn", 64, 3));
    assert_eq!(c.collab.pretrained, "/models/lgcn_d64.pth");
    assert_eq!((c.prompt.stage2.as_str(), c.prompt.style.max_tokens), ("collm_movie", 512));
    let s = &c.stage2;
    assert_eq!((s.train_lora, s.train_cie, s.frozen_lora_dropout), (false, true, true));
    assert_eq!((s.learning_rate, s.min_lr, s.warmup_lr, s.weight_decay), (2e-3, 7e-5, 2e-5, 1e-2));
    assert_eq!((s.warmup_steps, s.max_epochs, s.steps_per_epoch, s.batch_rows), (150, 120, 40, 2 * 12));
    assert_eq!(s.schedule, ScheduleKind::Official);
    assert_eq!((c.lora.rank, c.lora.alpha, c.lora.dropout, c.cie.mid_times, c.seed), (4, 32.0, 0.1, 12, 7));
    assert_eq!(c.lora.targets, ["q_proj", "v_proj", "o_proj"]);
    assert_eq!((c.llm.dir.as_str(), c.data.dir.as_str()), ("/models/vicuna/", "/data/ml-1m/"));
    assert_eq!(c.stage1, Config::default().stage1, "what the file does not say keeps its default");
    let lines = unmatched(&toml);
    for want in [
        "3: model.arch = mini_gpt4rec_v2: named a class",
        "5: model.freeze_rec = True: froze the collaborative model; here it is frozen",
        "12: model.end_sym = \"###\":",
        "30: model.rec_config.keep_prob = 0.6: dropped edges",
        "41: model.ckpt = /runs/stage1/best.pth: began from these weights; here stage 2 begins from stage 1",
        "58: run.mode = \"v2\": chose between drafts",
        "77: run.test_splits = [\"test\", \"valid\"]:",
        "74: run.evaluate = True: only judged",
        "79: run.device = \"cuda\":",
        "83: run.my_own_key = 1: is not a key of the official files",
    ] {
        assert!(lines.iter().any(|l| l.starts_with(want)), "{want}\n{toml}");
    }
    assert!(
        toml.contains("batch_rows = 24  # run.batch_size_train, line 63: 12 rows on each of 2 process(es)"),
        "{toml}"
    );
    // Every key of the file is in the result, as a setting's source or as a line.
    let number = |text: &str| text.chars().take_while(char::is_ascii_digit).collect::<String>().parse::<usize>();
    let sources = toml.lines().filter_map(|l| number(l.rsplit_once(", line ")?.1).ok());
    let told: Vec<usize> = sources.chain(lines.iter().filter_map(|l| number(l).ok())).collect();
    let text = std::fs::read_to_string(fixture("yaml/stage2_lightgcn.yaml")).unwrap();
    let mut leaves = 0;
    for (n, line) in (1..).zip(text.lines().map(str::trim)) {
        if !line.starts_with('#') && line.split(" #").next().unwrap().trim_end().contains(": ") {
            leaves += 1;
            assert!(told.contains(&n), "line {n}: {line}\n{toml}");
        }
    }
    assert!(leaves > 55, "{leaves}");
}

/// What a stage-2 file trains, and from where, is its method and strategy.
#[test]
fn methods_and_strategies_of_files() {
    use collm_engine::train::method::{Method, Strategy};
    let text = std::fs::read_to_string(fixture("yaml/stage2_lightgcn.yaml")).unwrap();
    let read = |changes: &[(&str, &str)]| {
        let text = changes.iter().fold(text.clone(), |text, (from, to)| {
            assert!(text.contains(from), "{from}");
            text.replacen(from, to, 1)
        });
        let out = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(out.path(), import(&text, "a.yaml", 2).unwrap().toml).unwrap();
        let c = Config::resolve(None, Some(out.path()), &[]).unwrap();
        (c.method, c.strategy, c.stage2.train_lora)
    };
    let (tuned, random) = (("freeze_rec: True", "freeze_rec: False"), ("/models/lgcn_d64.pth", "not_have"));
    let (joint, fresh) = (("freeze_lora: True", "freeze_lora: False"), ("ckpt: /runs/stage1/best.pth", "ckpt:"));
    let soft = ("rec_model: \"lightgcn\"", "rec_model: \"soft_prompt\"");
    assert_eq!(read(&[]), (Method::Collm, Strategy::Default, false));
    assert_eq!(read(&[tuned]), (Method::Collm, Strategy::T1, false));
    assert_eq!(read(&[tuned, random]), (Method::Collm, Strategy::T2, false));
    assert_eq!(read(&[joint, fresh]), (Method::Collm, Strategy::T3, true));
    assert_eq!(read(&[joint, fresh, soft]), (Method::Prompt4nr, Strategy::T3, true));
    assert_eq!(read(&[joint, soft]), (Method::Prompt4nr, Strategy::Default, true));
    let tokens = (soft.0, "rec_model: \"personlized_prompt\"");
    assert_eq!(read(&[tokens]), (Method::UiToken, Strategy::Default, false));
}

#[test]
fn a_stage_one_file() {
    let (toml, c) = imported("stage1_mf.yaml");
    assert_eq!((c.prompt.stage1.as_str(), c.prompt.stage2.as_str()), ("tallrec_amazon", "collm_movie"));
    assert_eq!((c.stage1.train_lora, c.stage1.train_cie, c.stage1.batch_rows), (true, false, 16));
    assert_eq!((c.collab.model.as_str(), c.collab.mf.dim, c.collab.pretrained.as_str()), ("mf", 128, ""));
    let lines = unmatched(&toml);
    for want in
        ["4: model.freeze_proj = False: trained a mapping", "13: model.rec_config.pretrained_path = not_have: began"]
    {
        assert!(lines.iter().any(|l| l.starts_with(want)), "{want}\n{toml}");
    }
}

#[test]
fn mistakes_are_told_with_file_and_line() {
    let text = std::fs::read_to_string(fixture("yaml/stage1_mf.yaml")).unwrap();
    let with = |from: &str, to: &str| {
        assert!(text.contains(from), "{from}");
        import(&text.replace(from, to), "a.yaml", 2).unwrap_err().to_string()
    };
    let e = with("freeze_lora: False", "freeze_lora: 0.5");
    assert_eq!(e, "a.yaml:5: model.freeze_lora is 0.5; expected True or False");
    assert_eq!(with("init_lr: 1e-4", "init_lr: fast"), "a.yaml:24: run.init_lr is fast; expected a number");
    let e = with("batch_size_train: 8", "batch_size_train: 0");
    assert_eq!(e, "a.yaml:29: run.batch_size_train: stage1.batch_rows is 0; expected at least 1");
    let e = with("target_modules: [\"q_proj\"]", "target_modules: [\"lm_head\"]");
    assert!(
        e.starts_with("a.yaml:9: model.lora_config.target_modules: lora.targets holds \"lm_head\"; known: q_proj"),
        "{e}"
    );
    let e = with("tallrec_amazon.txt", "mine.txt");
    assert!(
        e.starts_with("a.yaml:6: model.prompt_path: template prompts/mine.txt: neither a built-in template"),
        "{e}"
    );
    assert!(with("  min_lr: 8e-5", "  init_lr: 8e-5").starts_with("a.yaml:25: init_lr is given twice"));
    assert!(with("run:", "run: [").starts_with("a.yaml:"), "{}", with("run:", "run: ["));
    assert!(with("prompt_path", "prompt_paht").starts_with("a.yaml: model.prompt_path is missing"));
    let e = import("a: 1\n", "a.yaml", 2).unwrap_err().to_string();
    assert!(e.starts_with("a.yaml: holds none of the tables model, datasets and run"), "{e}");
    assert!(import("", "a.yaml", 2).is_err());
}

#[test]
fn the_commands() {
    let dir = tempfile::tempdir().unwrap();
    let (yaml, out) = (fixture("yaml/stage1_mf.yaml"), dir.path().join("x.toml"));
    let text = ok(&["config", "import", path(&yaml), "--processes", "3", "--out", path(&out)]);
    assert!(text.contains("x.toml: ") && text.contains(" keys without a counterpart"), "{text}");
    let shown = ok(&["config", "show", "--config", path(&out), "--set", "seed=9"]);
    assert!(shown.contains("seed = 9\n") && shown.contains("batch_rows = 24\n"), "{shown}");
    assert!(ok(&["config", "import", path(&yaml)]).contains("[stage1]"));
    assert!(fails(&["config", "import", path(&yaml), "--out", path(&out)]).contains("x.toml exists"));
    std::fs::write(dir.path().join("b.yaml"), b"model:\n  arch: \xff\n").unwrap();
    assert!(
        fails(&["config", "import", path(&dir.path().join("b.yaml"))]).contains("b.yaml:2: text that is not UTF-8")
    );
    assert!(fails(&["config", "import", "/none.yaml"]).contains("/none.yaml: No such file"));
}

fn train(data: &Path, model: &Path, run: &Path, settings: &[&str], extra: &[&str]) -> Vec<String> {
    let base = [
        "prompt.style.max_history=2",
        "prompt.style.max_tokens=512",
        "stage1.batch_rows=4",
        "stage1.steps_per_epoch=2",
        "stage1.max_epochs=1",
        "stage2.batch_rows=4",
        "stage2.steps_per_epoch=2",
        "stage2.max_epochs=1",
        "eval.valid_rows=8",
        "eval.test_rows=8",
    ];
    let mut args = vec!["train", "--data", path(data), "--llm", path(model), "--run", path(run)];
    base.iter().chain(settings).for_each(|s| args.extend(["--set", s]));
    args.extend(extra);
    args.into_iter().map(String::from).collect()
}

/// An official file is the collaborative model of a run, whose stage 2 is then trained alone on top of its stage 1.
#[test]
fn a_pth_file_is_a_runs_collaborative_model() {
    let dir = tempfile::tempdir().unwrap();
    let (data, model) = (tiny_data(dir.path()), tiny_model(dir.path()));
    let strs = |v: &[String]| v.iter().map(|s| s.to_string()).collect::<Vec<_>>();
    let run_it = |args: Vec<String>| ok(&strs(&args).iter().map(String::as_str).collect::<Vec<_>>());
    let fails_it = |args: Vec<String>| fails(&args.iter().map(String::as_str).collect::<Vec<_>>());

    let pth = format!("collab.pretrained={}", path(&fixture("torch/mf.pth")));
    let run = dir.path().join("mf");
    run_it(train(&data, &model, &run, &[&pth, "collab.mf.dim=8"], &["--only", "collab,stage1"]));
    let table = run_it(train(&data, &model, &run, &[&pth, "collab.mf.dim=8"], &["--resume", "--only", "stage2"]));
    assert!(table.contains("| MF |") && table.contains("| CoLLM-MF |"), "{table}");
    let (tensors, facts) = read_tensors(&run.join("collab/mf.safetensors")).unwrap();
    assert_eq!(facts["imported_from"], path(&fixture("torch/mf.pth")));
    let items = tensors.iter().find(|t| t.name == "item_embedding.weight").unwrap();
    assert_eq!((items.shape.as_slice(), items.values[8]), (&[31, 8][..], 2.0 / 64.0));

    // The file of that run for another run; LightGCN's tables are propagated over the data's own graph.
    let own = format!("collab.pretrained={}", path(&run.join("collab/mf.safetensors")));
    let second = dir.path().join("second");
    run_it(train(&data, &model, &second, &[&own, "collab.mf.dim=8"], &["--only", "collab"]));
    assert_eq!(read_tensors(&second.join("collab/mf.safetensors")).unwrap().0, tensors);
    let gcn = format!("collab.pretrained={}", path(&fixture("torch/lightgcn.pth")));
    let third = dir.path().join("third");
    let settings = [&*gcn, "collab.model=lightgcn", "collab.lightgcn.dim=8"];
    run_it(train(&data, &model, &third, &settings, &["--only", "collab"]));
    let (tensors, _) = read_tensors(&third.join("collab/lightgcn.safetensors")).unwrap();
    let get = |name: &str| &tensors.iter().find(|t| t.name == name).unwrap().values;
    assert_eq!(get("embedding_user.weight")[8], 1.0 / 64.0);
    assert_ne!(get("user_vectors"), get("embedding_user.weight"));

    // What does not fit leaves no model behind.
    let fourth = dir.path().join("fourth");
    let e = fails_it(train(&data, &model, &fourth, &[&pth, "collab.mf.dim=16"], &["--only", "collab"]));
    assert!(
        e.contains(
            "mf.pth: user_embedding.weight has shape [25, 8]; expected [25, 16]: collab.mf.dim is 16; set it to 8"
        ),
        "{e}"
    );
    assert!(!fourth.join("collab/mf.safetensors").exists());
    // A run keeps the model it began with.
    let e = fails_it(train(&data, &model, &run, &[&own, "collab.mf.dim=8"], &["--resume", "--only", "collab"]));
    assert!(e.contains("collab"), "{e}");
}
