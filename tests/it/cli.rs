//! What a user does wrong, and what they are told: one message, no panic, nothing half-written.

use crate::common::{fails, fixture, ok, path, run, tiny_data, tiny_model};

#[test]
fn help_names_every_command() {
    let text = ok(&["--help"]);
    for name in ["demo", "prepare", "convert", "verify", "config", "train", "eval", "score", "rank", "bench", "devices"]
    {
        assert!(text.contains(name), "{name}");
        assert!(ok(&[name, "--help"]).contains("Usage"));
    }
    assert_eq!(run(&["nonsense"]).status.code(), Some(2));
}

#[test]
fn memory_is_planned_without_card_and_weights() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("vicuna.json");
    let text = r#"{"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048,
        "tie_word_embeddings": false}"#;
    std::fs::write(&config, text).unwrap();
    let plan = |memory: &str, tokens: &str| {
        let set = format!("stage1.micro_batch_tokens={tokens}");
        let out = run(&["devices", "--llm", path(&config), "--memory", memory, "--set", &set]);
        (out.status.success(), String::from_utf8(out.stdout).unwrap())
    };
    let line = |text: &str, part: &str| text.lines().find(|l| l.starts_with(part)).unwrap().to_owned();
    let (ok, text) = plan("24GiB", "1024");
    assert!(ok && text.lines().count() == 4 && !text.contains("recomputed"), "{text}");
    assert!(line(&text, "scoring").contains("weights 12.55 GiB"), "{text}");
    let (ok, text) = plan("24GB", "4096");
    assert!(ok && line(&text, "stage1").contains("(blocks recomputed)"), "{text}");
    assert!(!line(&text, "stage2").contains("recomputed"), "{text}");
    let (ok, text) = plan("16GiB", "8192");
    assert!(!ok && line(&text, "stage1").contains("8192 tokens at once do not fit"), "{text}");
    let e = fails(&["devices", "--llm", path(&config), "--memory", "much"]);
    assert!(e.contains("expected a size such as 24GiB"), "{e}");
    let (ok, text) = plan("16GiB", "1024");
    assert!(ok && line(&text, "stage1").contains("(blocks recomputed)"), "{text}");
}

#[test]
fn damaged_models_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let golden = fixture("golden/llama-gqa/golden.safetensors");
    let verify = |model: &std::path::Path| fails(&["verify", "--model", path(model), "--against", path(&golden)]);
    assert!(verify(dir.path()).contains("config.json: No such file"), "{}", verify(dir.path()));
    let model = tiny_model(dir.path());
    let weights = model.join("model.safetensors");
    let whole = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &whole[..whole.len() - 10]).unwrap();
    assert!(verify(&model).contains("not a whole safetensors file"), "{}", verify(&model));
    std::fs::write(&weights, &whole).unwrap();
    let config = std::fs::read_to_string(model.join("config.json")).unwrap();
    let with = |from: &str, to: &str| {
        assert!(config.contains(from));
        std::fs::write(model.join("config.json"), config.replace(from, to)).unwrap();
        verify(&model)
    };
    let e = with("\"num_hidden_layers\": 3", "\"num_hidden_layers\": 4");
    assert!(
        e.contains("9 problem(s)") && e.contains("missing tensor model.layers.3.mlp.up_proj.weight, shape [192, 96]"),
        "{e}"
    );
    let e = with("\"num_hidden_layers\": 3", "\"num_hidden_layers\": 2");
    assert!(e.contains("unexpected tensor model.layers.2.input_layernorm.weight"), "{e}");
    let e = with("\"intermediate_size\": 192", "\"intermediate_size\": 190");
    assert!(
        e.contains("model.layers.0.mlp.gate_proj.weight has shape [192, 96]; the configuration needs [190, 96]"),
        "{e}"
    );
    assert!(
        with("\"llama\"", "\"gpt_neox\"")
            .contains("model_type \"gpt_neox\" is not supported; supported: llama, mistral, qwen2")
    );
}

#[test]
fn damaged_gguf_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let (file, out) = (dir.path().join("x.gguf"), dir.path().join("out"));
    let convert = |bytes: &[u8]| {
        std::fs::write(&file, bytes).unwrap();
        let e = fails(&["convert", path(&file), path(&out)]);
        assert!(!out.exists() && std::fs::read_dir(dir.path()).unwrap().count() == 1, "nothing is left behind");
        e
    };
    assert!(convert(b"GGML").contains("not a GGUF file"));
    assert!(convert(b"GGUF\x03\0\0\0").contains("cut short at byte 8"));
    assert!(convert(b"GGUF\x09\0\0\0").contains("GGUF version 9 is not supported"));
    let header = |n_tensors: u64, n_entries: u64| {
        let mut b = b"GGUF\x03\0\0\0".to_vec();
        b.extend(n_tensors.to_le_bytes());
        b.extend(n_entries.to_le_bytes());
        b
    };
    let text = |s: &str| [&(s.len() as u64).to_le_bytes()[..], s.as_bytes()].concat();
    assert!(convert(&header(u64::MAX, 0)).contains("the header is damaged"));
    let arch = |name: &str| [text("general.architecture"), 8u32.to_le_bytes().to_vec(), text(name)].concat();
    assert!(
        convert(&[header(0, 1), arch("gpt2")].concat())
            .contains("architecture \"gpt2\" is not supported; supported: llama, qwen2")
    );
    let tensor = |kind: u32, offset: u64| {
        [
            text("output.weight"),
            1u32.to_le_bytes().to_vec(),
            256u64.to_le_bytes().to_vec(),
            kind.to_le_bytes().to_vec(),
            offset.to_le_bytes().to_vec(),
        ]
        .concat()
    };
    assert!(
        convert(&[header(1, 0), tensor(10, 0)].concat())
            .contains("tensor output.weight: type 10 (Q2_K) is not supported")
    );
    assert!(convert(&[header(1, 0), tensor(8, 0)].concat()).contains("tensor output.weight ends beyond the file's"));
    assert!(convert(&[header(1, 0), tensor(8, u64::MAX)].concat()).contains("ends beyond the file"));
    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("precious"), "x").unwrap();
    let e = fails(&["convert", path(&file), path(&out)]);
    assert!(
        e.contains("is not empty; choose another directory or pass --force") && out.join("precious").exists(),
        "{e}"
    );
}

#[test]
fn adapters_that_do_not_fit_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let from = fixture("golden/llama-gqa");
    let golden = from.join("golden.safetensors");
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(from.join("adapter").join(name), dir.path().join(name)).unwrap();
    }
    let verify =
        || fails(&["verify", "--model", path(&from), "--against", path(&golden), "--adapter", path(dir.path())]);
    let file = dir.path().join("adapter_config.json");
    let config = std::fs::read_to_string(&file).unwrap();
    let with = |from: &str, to: &str| {
        assert!(config.contains(from), "{from}");
        std::fs::write(&file, config.replace(from, to)).unwrap();
        verify()
    };
    assert!(with("\"use_dora\": false", "\"use_dora\": true").contains("use_dora = true is not supported"));
    assert!(with("\"r\": 8", "\"r\": 4").contains("has shape [8, 96], expected [4, 96]"));
    assert!(
        with("\"q_proj\"", "\"w_proj\"")
            .contains("target module \"w_proj\" is not supported; supported: q_proj, k_proj")
    );
    assert!(
        with("\"q_proj\"", "\"o_proj\"")
            .contains("missing base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight")
    );
    assert!(with("\"LORA\"", "\"IA3\"").contains("peft_type \"IA3\" is not supported"));
}

#[test]
fn training_refuses_what_cannot_work() {
    let dir = tempfile::tempdir().unwrap();
    let (data, model) = (tiny_data(dir.path()), tiny_model(dir.path()));
    let run_dir = dir.path().join("run");
    let train = |extra: &[&str]| {
        fails(&[&["train", "--data", path(&data), "--llm", path(&model), "--run", path(&run_dir)], extra].concat())
    };
    let cases: [(&[&str], &str); 9] = [
        (&["--set", "lora.rnak=3"], "unknown key lora.rnak; did you mean lora.rank?"),
        (
            &["--preset", "nope"],
            "presets: ml-1m/collm-mf, ml-1m/collm-lightgcn, ml-1m/collm-sasrec, ml-1m/collm-din, ml-100k/collm-mf",
        ),
        (&["--set", "prompt.stage1=nope", "--set", "prompt.style.max_tokens=512"], "neither a built-in template"),
        (
            &[
                "--set",
                "prompt.stage2=tallrec_movie",
                "--set",
                "prompt.style.max_tokens=500",
                "--set",
                "collab.mf.max_epochs=1",
                "--only",
                "stage2",
            ],
            "stage1 has not been trained in this run",
        ),
        (&["--set", "prompt.style.max_tokens=4096"], "this model reads at most 512 tokens; lower it"),
        (&["--set", "stage1.loss=mse"], "unknown variant"),
        (&["--set", "stage1.train_lora=false"], "stage1 trains nothing"),
        (&["--set", "prompt.style.max_tokens=20"], "exceeds prompt.style.max_tokens = 20 even with an empty history"),
        (&["--config", "/nonexistent.toml"], "/nonexistent.toml: No such file"),
    ];
    for (extra, want) in cases {
        let _ = std::fs::remove_dir_all(&run_dir);
        let e = train(extra);
        assert!(e.contains(want), "{extra:?}: {e}");
    }
    let e = fails(&["train", "--llm", path(&model), "--run", path(&dir.path().join("r2"))]);
    assert!(e.contains("data.dir is empty; set it with --set data.dir=DIR"), "{e}");
    let e = fails(&["train", "--data", path(dir.path()), "--llm", path(&model), "--run", path(&dir.path().join("r3"))]);
    assert!(e.contains("train.parquet: is missing; a data directory holds"), "{e}");
}

#[test]
fn scores_from_elsewhere_are_checked() {
    let dir = tempfile::tempdir().unwrap();
    let data = tiny_data(dir.path());
    let file = dir.path().join("s.csv");
    let eval = |text: &str| {
        std::fs::write(&file, text).unwrap();
        fails(&["eval", "--scores", path(&file), "--data", path(&data)])
    };
    assert!(eval("user,iid,score\n").contains("has no column uid; its columns are user, iid, score"));
    assert!(eval("uid,iid,score\n").contains("holds no scores"));
    assert!(eval("uid,iid,score\n1,1,high\n").contains("s.csv:2: \"high\" is not a score"));
    assert!(eval("uid,iid,score\n9999,1,0.5\n").contains("s.csv:2: user 9999 and item 1 are not a row of this split"));
    assert!(fails(&["eval"]).contains("pass --run DIR, or --scores FILE with --data DIR"));
}
