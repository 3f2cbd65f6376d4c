//! `bench overhead` as a user runs it: every field there, every figure follows from the measured batches.

use std::path::Path;

use serde_json::Value;

use crate::common::{command, fails, ok, path, tiny_data, tiny_model};
use crate::cuda::link_emulator;

const METHODS: [&str; 3] = ["TALLRec", "CoLLM-MF", "CoLLM-LightGCN"];

/// The only element of a list with these properties.
fn one<'v>(list: &'v Value, wanted: &[(&str, &str)]) -> &'v Value {
    let fits = |v: &&Value| wanted.iter().all(|(key, value)| v[key] == *value);
    let found: Vec<&Value> = list.as_array().unwrap().iter().filter(fits).collect();
    assert_eq!(found.len(), 1, "{wanted:?}");
    found[0]
}

fn number(v: &Value) -> f64 {
    v.as_f64().unwrap_or_else(|| panic!("{v} is not a number"))
}

/// The sum of something over a configuration's batches.
fn sum(batches: &Value, of: impl Fn(&Value) -> f64) -> f64 {
    batches.as_array().unwrap().iter().map(of).sum()
}

fn near(got: f64, want: f64, what: &str) {
    assert!((got - want).abs() <= 1e-9 * want.abs().max(1.0), "{what}: {got}, expected {want}");
}

/// Two rounds: the median is the mean.
fn mean(batches: &Value, of: impl Fn(&Value) -> f64) -> f64 {
    assert_eq!(batches.as_array().unwrap().len(), 2);
    sum(batches, of) / 2.0
}

#[test]
fn figures_follow_from_the_batches() {
    let dir = tempfile::tempdir().unwrap();
    let (data, model) = (tiny_data(dir.path()), tiny_model(dir.path()));
    let (json, plot) = (dir.path().join("overhead.json"), dir.path().join("overhead.svg"));
    let common = ["bench", "overhead", "--llm", path(&model), "--data", path(&data), "--json", path(&json)];
    let sizes = ["--rounds", "2", "--train-batch", "3", "--eval-batch", "7"];
    let run = ["--rows-stage1", "3200", "--rows-stage2", "1601", "--plot", path(&plot)];
    let text = ok(&[&common[..], &sizes, &run].concat());
    let report: Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();

    assert_eq!(report["configurations"].as_array().unwrap().len(), 12);
    let mut row_seconds = std::collections::BTreeMap::new();
    for (phase, rows, paper) in [("training", 3.0, 0.155), ("inference", 7.0, 0.125)] {
        for mode in ["paper", "engine"] {
            for method in METHODS {
                let here = [("mode", mode), ("method", method), ("phase", phase)];
                let batches = &one(&report["configurations"], &here)["batches"];
                let summary = one(&report["summaries"], &here);
                let per_row = |key: &str| sum(batches, |b| number(&b[key])) / (2.0 * rows);
                let seconds = mean(batches, |b| number(&b["seconds"]) / rows);
                near(number(&summary["seconds_per_row"]["median"]), seconds, "seconds a row");
                row_seconds.insert((mode, method, phase), seconds);
                near(number(&summary["prompt_tokens_per_row"]), per_row("prompt_tokens"), "tokens");
                near(number(&summary["computed_tokens_per_row"]), per_row("computed_tokens"), "computed tokens");
                let flop = |b: &Value| sum(&b["groups"], |g| number(&g["flop"]));
                near(number(&summary["gflop_per_row"]), sum(batches, flop) / (2e9 * rows), "arithmetic");
                assert!(number(&summary["gflop_per_second"]) > 0.0 && number(&summary["peak_bytes"]) > 1e6);
                let inside = sum(&summary["operations"], |o| number(&o["seconds_per_row"]));
                near(inside, per_row("seconds"), "operations and the rest are all of the time");
                // Each batch's prompts are padded to the longest, and have an answer; sharing computes less than the prompts.
                for b in batches.as_array().unwrap() {
                    let (prompts, computed) = (number(&b["prompt_tokens"]), number(&b["computed_tokens"]));
                    match (mode, phase) {
                        ("paper", _) => assert!(computed >= prompts + rows && computed % rows == 0.0, "{b}"),
                        (_, "training") => assert_eq!(computed, prompts),
                        _ => assert!(computed < prompts, "{b}"),
                    }
                }
                let collaborative =
                    number(&one(&summary["operations"], &[("name", "collaborative model")])["gflop_per_row"]);
                assert_eq!(collaborative > 0.0, method == "CoLLM-LightGCN" && mode == "paper");
                if method != "TALLRec" {
                    let base = [("mode", mode), ("method", "TALLRec"), ("phase", phase)];
                    let base = &one(&report["configurations"], &base)["batches"];
                    let overhead = one(&report["overheads"], &here);
                    let ratio = |i: usize| number(&batches[i]["seconds"]) / number(&base[i]["seconds"]);
                    near(number(&overhead["time"]["median"]), (ratio(0) + ratio(1)) / 2.0 - 1.0, "overhead");
                    let tokens = |b: &Value| sum(b, |b| number(&b["prompt_tokens"]));
                    near(number(&overhead["prompt_tokens"]), tokens(batches) / tokens(base) - 1.0, "token overhead");
                    assert_eq!(number(&overhead["paper"]), paper);
                    assert!(number(&overhead["prompt_tokens"]) > 0.0, "a CoLLM prompt is longer");
                }
            }
        }
    }
    // Two evaluations in each stage: after 1,600 rows and at the end.
    let valid = number(&report["assumptions"]["valid_rows"]);
    for mode in ["paper", "engine"] {
        for method in METHODS {
            let whole = one(&report["whole_runs"], &[("mode", mode), ("method", method)]);
            let seconds = |method, phase, rows: f64| rows * row_seconds[&(mode, method, phase)];
            let base = seconds("TALLRec", "training", 3200.0) + seconds("TALLRec", "inference", 2.0 * valid);
            let mut total = base;
            if method != "TALLRec" {
                total += seconds(method, "training", 1601.0) + seconds(method, "inference", 2.0 * valid);
                let own = report["assumptions"]["collaborative_seconds"].as_array().unwrap();
                let own = own.iter().find(|c| c[0] == method).unwrap();
                assert!(number(&own[1]) > 0.0);
                total += number(&own[1]) * number(&own[2]);
            }
            near(number(&whole["total"]), total, "whole run");
            near(number(&whole["overhead"]), total / base - 1.0, "beyond TALLRec");
        }
    }
    for part in ["+15.5 %", "+12.5 %", "CoLLM-LightGCN", "linear layers", "extrapolated", "GFLOP/s", "peak GiB"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let svg = std::fs::read_to_string(&plot).unwrap();
    assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
    assert_eq!(svg.matches("<rect").count(), 13);
    assert!(svg.contains("engine, CoLLM-MF") && svg.contains("milliseconds a row"));
}

fn config(dir: &Path, blocks: usize) -> std::path::PathBuf {
    let file = dir.join(format!("shape-{blocks}.json"));
    let text = format!(
        r#"{{"model_type":"qwen2","vocab_size":100,"hidden_size":48,"intermediate_size":64,"num_hidden_layers":{blocks},
        "num_attention_heads":4,"num_key_value_heads":2,"tie_word_embeddings":true}}"#
    );
    std::fs::write(&file, text).unwrap();
    file
}

/// Arithmetic grows by a block's for every block: what is extrapolated from two and four is what five do.
#[test]
fn a_shape_alone_is_measured_with_random_weights() {
    let dir = tempfile::tempdir().unwrap();
    let (data, model) = (tiny_data(dir.path()), tiny_model(dir.path()));
    let (shape, json) = (config(dir.path(), 5), dir.path().join("overhead.json"));
    let report = |layers: &str| -> Value {
        let common = ["bench", "overhead", "--model-only", path(&shape), "--tokenizer", path(&model)];
        let sizes =
            ["--data", path(&data), "--models", "mf", "--rounds", "1", "--train-batch", "2", "--eval-batch", "2"];
        let text = ok(&[&common[..], &sizes, &["--layers", layers, "--json", path(&json)]].concat());
        assert_eq!(text.contains("5 blocks lie on the line through 2 and 4"), layers == "2", "{text}");
        serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap()
    };
    let (line, whole) = (report("2"), report("3"));
    assert_eq!(line["configurations"].as_array().unwrap().len(), 16);
    let summaries = line["summaries"].as_array().unwrap();
    assert_eq!(summaries.len(), 8);
    for s in summaries {
        let here = ["mode", "method", "phase"].map(|k| (k, s[k].as_str().unwrap()));
        near(
            number(&s["gflop_per_row"]),
            number(&one(&whole["summaries"], &here)["gflop_per_row"]),
            &format!("{here:?}"),
        );
    }
}

#[test]
fn what_cannot_be_measured_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let (data, model) = (tiny_data(dir.path()), tiny_model(dir.path()));
    let overhead = |extra: &[&str]| fails(&[&["bench", "overhead", "--data", path(&data)], extra].concat());
    let e = overhead(&["--llm", path(&model), "--models", "mf,gru"]);
    assert!(e.contains("\"gru\" is not a collaborative model; known: mf, lightgcn"), "{e}");
    let e = overhead(&["--model-only", path(&config(dir.path(), 1))]);
    assert!(e.contains("--model-only needs --tokenizer DIR or --llm DIR"), "{e}");
    let e = overhead(&["--llm", path(&model), "--rounds", "0"]);
    assert!(e.contains("expected a whole number of at least 1"), "{e}");
    let e = overhead(&["--model-only", path(&config(dir.path(), 9)), "--layers", "1"]);
    assert!(e.contains("expected a whole number of at least 2"), "{e}");
    std::fs::remove_file(model.join("tokenizer.json")).unwrap();
    let e = overhead(&["--llm", path(&model)]);
    assert!(e.contains("tokenizer.json: No such file") && e.contains("its message is above"), "{e}");
}

#[test]
fn the_emulated_card_runs_it_too() {
    let dir = tempfile::tempdir().unwrap();
    let (data, model) = (tiny_data(dir.path()), tiny_model(dir.path()));
    link_emulator(dir.path());
    let json = dir.path().join("overhead.json");
    let common = ["--device", "cuda", "bench", "overhead", "--llm", path(&model), "--data", path(&data)];
    let sizes = ["--models", "mf", "--rounds", "1", "--train-batch", "2", "--eval-batch", "2", "--max-history", "1"];
    let mut command = command(&[&common[..], &sizes, &["--json", path(&json)]].concat());
    command.env("LD_LIBRARY_PATH", dir.path()).env("CUEMU_CHECK", "off");
    let out = command.output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let report: Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    let summaries = report["summaries"].as_array().unwrap();
    assert_eq!(summaries.len(), 8);
    assert!(summaries.iter().all(|s| number(&s["seconds_per_row"]["median"]) > 0.0 && s["gflop_per_row"].is_null()));
    assert!(String::from_utf8_lossy(&out.stdout).contains("on a card nothing is counted"));
}
