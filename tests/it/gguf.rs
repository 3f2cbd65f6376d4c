//! A GGUF file written here, converted, and compared with the model it was written from.

use std::collections::BTreeMap;
use std::path::Path;

use collm_engine::device::Device;
use collm_engine::llm::convert::convert_gguf;
use collm_engine::llm::verify::verify;
use collm_engine::llm::weights::ModelWeights;
use collm_engine::llm::{Architecture, ModelConfig, RopeScaling};
use collm_engine::prompt::{LlmTokenizer, Stretch};
use proptest::prelude::*;

use crate::common::{fixture, tokenizer_json};

enum Meta<'a> {
    Text(&'a str),
    U32(u32),
    F32(f32),
    Texts(Vec<String>),
    F32s(Vec<f32>),
    I32s(Vec<i32>),
}

fn text(s: &str) -> Vec<u8> {
    [&(s.len() as u64).to_le_bytes()[..], s.as_bytes()].concat()
}

type Metadata<'a> = Vec<(&'a str, Meta<'a>)>;

/// (name, shape as in Hugging Face, type number, bytes)
type Tensor = (String, Vec<usize>, u32, Vec<u8>);

fn gguf(metadata: &[(&str, Meta)], tensors: &[Tensor]) -> Vec<u8> {
    let mut out = b"GGUF\x03\0\0\0".to_vec();
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    let list = |kind: u32, n: usize| [&9u32.to_le_bytes()[..], &kind.to_le_bytes(), &(n as u64).to_le_bytes()].concat();
    for (key, value) in metadata {
        out.extend(text(key));
        match value {
            Meta::Text(s) => out.extend([8u32.to_le_bytes().to_vec(), text(s)].concat()),
            Meta::U32(x) => out.extend([4u32.to_le_bytes(), x.to_le_bytes()].concat()),
            Meta::F32(x) => out.extend([6u32.to_le_bytes(), x.to_le_bytes()].concat()),
            Meta::Texts(l) => out.extend([list(8, l.len()), l.iter().flat_map(|s| text(s)).collect()].concat()),
            Meta::F32s(l) => out.extend([list(6, l.len()), l.iter().flat_map(|x| x.to_le_bytes()).collect()].concat()),
            Meta::I32s(l) => out.extend([list(5, l.len()), l.iter().flat_map(|x| x.to_le_bytes()).collect()].concat()),
        }
    }
    let mut offset = 0u64;
    for (name, shape, kind, data) in tensors {
        out.extend(text(name));
        out.extend((shape.len() as u32).to_le_bytes());
        shape.iter().rev().for_each(|&d| out.extend((d as u64).to_le_bytes()));
        out.extend(kind.to_le_bytes());
        out.extend(offset.to_le_bytes());
        offset += data.len().next_multiple_of(32) as u64;
    }
    out.resize(out.len().next_multiple_of(32), 0);
    for (.., data) in tensors {
        out.extend(data);
        out.resize(out.len().next_multiple_of(32), 0);
    }
    out
}

/// Rows of q or k in the order GGUF keeps them for LLaMA: the two halves of a head interleaved.
fn interleave(values: &[f32], rows: usize, heads: usize) -> Vec<f32> {
    let (width, half) = (values.len() / rows, rows / heads / 2);
    let mut out = Vec::new();
    for h in 0..heads {
        for i in 0..half {
            for j in 0..2 {
                let row = h * 2 * half + j * half + i;
                out.extend_from_slice(&values[row * width..(row + 1) * width]);
            }
        }
    }
    out
}

fn write_model(from: &Path, to: &Path, arch: &str) {
    write_changed(from, to, arch, |_, _| ());
}

/// The same with something changed before it is written.
fn write_changed(from: &Path, to: &Path, arch: &str, change: impl FnOnce(&mut Metadata, &mut Vec<Tensor>)) {
    let w = ModelWeights::load(from).unwrap();
    let c: &ModelConfig = &w.config;
    let mut tensors: Vec<Tensor> = Vec::new();
    let mut push = |name: String, shape: Vec<usize>, values: Vec<f32>| {
        // f32 for vectors, bf16 (exact or rounded) for matrices, as real files do.
        let (kind, bytes): (u32, Vec<u8>) = match shape.len() {
            1 => (0, values.iter().flat_map(|x| x.to_le_bytes()).collect()),
            _ => (30, values.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect()),
        };
        tensors.push((name, shape, kind, bytes));
    };
    let llama = c.architecture == Architecture::Llama;
    push("token_embd.weight".into(), vec![c.vocab_size, c.hidden_size], w.embed_tokens.to_f32());
    push("output_norm.weight".into(), vec![c.hidden_size], w.final_norm.clone());
    if let Some(head) = &w.lm_head {
        push("output.weight".into(), vec![c.vocab_size, c.hidden_size], head.to_f32());
    }
    for (l, layer) in w.layers.iter().enumerate() {
        push(format!("blk.{l}.attn_norm.weight"), vec![c.hidden_size], layer.input_norm.clone());
        push(format!("blk.{l}.ffn_norm.weight"), vec![c.hidden_size], layer.post_norm.clone());
        let names = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"];
        let matrices = [&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down];
        for (i, (name, m)) in names.into_iter().zip(matrices).enumerate() {
            let values = match i {
                0 if llama => interleave(&m.to_f32(), m.rows(), c.n_heads),
                1 if llama => interleave(&m.to_f32(), m.rows(), c.n_kv_heads),
                _ => m.to_f32(),
            };
            push(format!("blk.{l}.{name}.weight"), vec![m.rows(), m.cols()], values);
            if let Some(bias) = &layer.biases[i] {
                push(format!("blk.{l}.{name}.bias"), vec![bias.len()], bias.clone());
            }
        }
    }
    let tokenizer: serde_json::Value = serde_json::from_str(&tokenizer_json()).unwrap();
    let vocab: BTreeMap<u64, String> = tokenizer["model"]["vocab"]
        .as_object()
        .unwrap()
        .iter()
        .map(|(t, i)| (i.as_u64().unwrap(), t.clone()))
        .collect();
    let mut tokens: Vec<String> = vocab.into_values().collect();
    let mut types = vec![1; tokens.len()];
    tokens.push("<unk>".into());
    types.push(3);
    tokens.extend((tokens.len()..c.vocab_size).map(|i| format!("<pad{i}>")));
    types.resize(tokens.len(), 5);
    let key = |name: &str| format!("{arch}.{name}");
    let keys = [
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "rope.freq_base",
        "attention.layer_norm_rms_epsilon",
    ]
    .map(key);
    let n = |x: usize| Meta::U32(x as u32);
    let values = [
        n(c.n_layers),
        n(c.max_position_embeddings),
        n(c.hidden_size),
        n(c.intermediate_size),
        n(c.n_heads),
        n(c.n_kv_heads),
        n(c.head_dim),
        Meta::F32(c.rope_theta as f32),
        Meta::F32(c.rms_norm_eps as f32),
    ];
    let mut metadata: Metadata = keys.iter().map(String::as_str).zip(values).collect();
    let merges = ["Y e", "Ye s", "N o"].map(String::from).to_vec();
    metadata.extend([
        ("general.architecture", Meta::Text(arch)),
        ("tokenizer.ggml.model", Meta::Text("gpt2")),
        ("tokenizer.ggml.pre", Meta::Text("gpt-2")),
        ("tokenizer.ggml.tokens", Meta::Texts(tokens)),
        ("tokenizer.ggml.token_type", Meta::I32s(types)),
        ("tokenizer.ggml.merges", Meta::Texts(merges)),
    ]);
    change(&mut metadata, &mut tensors);
    std::fs::write(to, gguf(&metadata, &tensors)).unwrap();
}

#[test]
fn qwen2_in_bf16_comes_back_exactly() {
    let dir = tempfile::tempdir().unwrap();
    let (file, out) = (dir.path().join("m.gguf"), dir.path().join("out"));
    let golden = fixture("golden/qwen2");
    write_model(&golden, &file, "qwen2");
    convert_gguf(&file, &out, false).unwrap();
    // Its weights are bf16, so the converted model must pass its golden.
    let report = verify(&out, Some(&golden.join("adapter")), &golden.join("golden.safetensors"), Device::Cpu).unwrap();
    assert!(report.passes(), "{:?}", report.comparisons.iter().filter(|c| !c.passes()).collect::<Vec<_>>());
    let tokenizer = LlmTokenizer::from_dir(&out).unwrap();
    assert_eq!(tokenizer.answer_ids().unwrap(), (257, 258));
    assert_eq!(tokenizer.encode("No, Yes").unwrap(), [258, 44, 32, 257]);
    assert_eq!(tokenizer.placeholder_id(), 259);
}

#[test]
fn llama_rows_are_put_back_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let (file, out) = (dir.path().join("m.gguf"), dir.path().join("out"));
    let golden = fixture("golden/llama-gqa");
    write_model(&golden, &file, "llama");
    convert_gguf(&file, &out, false).unwrap();
    let (want, got) = (ModelWeights::load(&golden).unwrap(), ModelWeights::load(&out).unwrap());
    let mut config = got.config.clone();
    config.architecture = want.config.architecture;
    assert_eq!(config, want.config);
    let rounded = |v: Vec<f32>| v.into_iter().map(|x| half::bf16::from_f32(x).to_f32()).collect::<Vec<_>>();
    for (g, w) in got.layers.iter().zip(&want.layers) {
        for (g, w) in [
            (&g.q, &w.q),
            (&g.k, &w.k),
            (&g.v, &w.v),
            (&g.o, &w.o),
            (&g.gate, &w.gate),
            (&g.up, &w.up),
            (&g.down, &w.down),
        ] {
            assert_eq!(g.to_f32(), rounded(w.to_f32()));
        }
        assert_eq!(g.input_norm, rounded(w.input_norm.clone()));
    }
}

/// SentencePiece BPE: merges follow from scores, spaces become ▁, unknown bytes fall back.
#[test]
fn sentence_piece_tokenizers_convert() {
    let dir = tempfile::tempdir().unwrap();
    let (file, out) = (dir.path().join("m.gguf"), dir.path().join("out"));
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).to_vec();
    tokens.extend((0..256).map(|b| format!("<0x{b:02X}>")));
    let pieces = ["▁", "Y", "e", "s", "N", "o", "es", "▁N", "▁Y", "▁No", "▁Yes", "<", ">", "s>"];
    tokens.extend(pieces.map(String::from));
    let mut types = vec![2, 3, 3];
    types.extend([6; 256]);
    types.resize(tokens.len(), 1);
    let mut scores = vec![0.0; 259];
    scores.extend([-90.0, -91.0, -92.0, -93.0, -94.0, -95.0, -3.0, -2.0, -5.0, -1.0, -4.0, -96.0, -97.0, -6.0]);
    let (vocab, hidden) = (tokens.len(), 4);
    let matrix =
        |name: &str, rows: usize, cols: usize| (name.to_string(), vec![rows, cols], 0, vec![0u8; 4 * rows * cols]);
    let vector = |name: &str| (name.to_string(), vec![hidden], 0, vec![0u8; 4 * hidden]);
    let mut tensors = vec![matrix("token_embd.weight", vocab, hidden), vector("output_norm.weight")];
    tensors.extend(["attn_norm", "ffn_norm"].map(|n| vector(&format!("blk.0.{n}.weight"))));
    tensors.extend(
        ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
            .map(|n| matrix(&format!("blk.0.{n}.weight"), hidden, hidden)),
    );
    let metadata = [
        ("general.architecture", Meta::Text("llama")),
        ("llama.block_count", Meta::U32(1)),
        ("llama.context_length", Meta::U32(64)),
        ("llama.embedding_length", Meta::U32(hidden as u32)),
        ("llama.feed_forward_length", Meta::U32(hidden as u32)),
        ("llama.attention.head_count", Meta::U32(2)),
        ("llama.attention.layer_norm_rms_epsilon", Meta::F32(1e-5)),
        ("tokenizer.ggml.model", Meta::Text("llama")),
        ("tokenizer.ggml.tokens", Meta::Texts(tokens)),
        ("tokenizer.ggml.token_type", Meta::I32s(types)),
        ("tokenizer.ggml.scores", Meta::F32s(scores)),
    ];
    std::fs::write(&file, gguf(&metadata, &tensors)).unwrap();
    convert_gguf(&file, &out, false).unwrap();
    let tokenizer = LlmTokenizer::from_dir(&out).unwrap();
    assert_eq!(tokenizer.answer_ids().unwrap(), (269, 268), "▁Yes and ▁No, as LLaMA has them");
    assert_eq!(tokenizer.encode("No Yes").unwrap(), [268, 269]);
    assert_eq!(tokenizer.encode("é").unwrap(), [259, 3 + 0xc3, 3 + 0xa9], "bytes of what is not in the vocabulary");
    // "<" and "s>" would merge into the control token if merges into it were derived.
    assert_eq!(tokenizer.encode("<s>").unwrap(), [259, 270, 272], "in a title it is text");
    let stretches = [Stretch::Text("Yes"), Stretch::Token("<s>", 1), Stretch::Token("<unk>", 0), Stretch::Text("No")];
    assert_eq!(tokenizer.split_added("Yes<s><unk>No"), stretches, "in a template it is the token");
    assert_eq!(tokenizer.placeholder_id(), 0);
}

#[test]
fn files_that_do_not_fit_together_are_named() {
    fn set<'a>(metadata: &mut Metadata<'a>, key: &'a str, value: Meta<'a>) {
        metadata.retain(|(k, _)| *k != key);
        metadata.push((key, value));
    }
    let dir = tempfile::tempdir().unwrap();
    let (file, out) = (dir.path().join("m.gguf"), dir.path().join("out"));
    let message = |change: &dyn Fn(&mut Metadata, &mut Vec<Tensor>)| {
        write_changed(&fixture("golden/llama-gqa"), &file, "llama", |m, t| change(m, t));
        let message = convert_gguf(&file, &out, false).unwrap_err().to_string();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left behind");
        assert!(message.starts_with(file.to_str().unwrap()), "{message}");
        message
    };
    let tensor = |e: &dyn Fn(&mut Vec<Tensor>)| message(&|_, t| e(t));
    let e = tensor(&|t| t.retain(|t| t.0 != "blk.1.attn_q.weight" && t.0 != "output_norm.weight"));
    assert!(e.contains("2 problem(s)") && e.contains("missing tensor output_norm.weight, shape ["), "{e}");
    assert!(e.contains("missing tensor blk.1.attn_q.weight"), "{e}");
    let e = tensor(&|t| t.iter_mut().find(|t| t.0 == "blk.0.ffn_up.weight").unwrap().1.reverse());
    assert!(e.contains("blk.0.ffn_up.weight has shape") && e.contains("the metadata needs"), "{e}");
    let e = tensor(&|t| t.push(("blk.0.ffn_gate_inp.weight".into(), vec![1], 0, vec![0; 4])));
    assert!(e.contains("unexpected tensor blk.0.ffn_gate_inp.weight"), "{e}");
    let e = tensor(&|t| t.push(("output_norm.weight".into(), vec![1], 0, vec![0; 4])));
    assert!(e.contains("tensor output_norm.weight occurs twice"), "{e}");
    let e = tensor(&|t| t[0].1 = vec![]);
    assert!(e.contains("tensor token_embd.weight has 0 dimensions"), "{e}");
    let e = tensor(&|t| t[0].1 = vec![0, 32]);
    assert!(e.contains("tensor token_embd.weight of shape [0, 32] is empty"), "{e}");

    let entry = |key: &'static str, value: fn() -> Meta<'static>| message(&|m, _| set(m, key, value()));
    let e = entry("llama.block_count", || Meta::U32(1 << 20));
    assert!(e.contains("1048576 layers, but only"), "{e}");
    let e = entry("llama.attention.head_count", || Meta::U32(0));
    assert!(e.contains("num_attention_heads is 0"), "{e}");
    let e = entry("llama.rope.dimension_count", || Meta::U32(2));
    assert!(e.contains("rotary embedding of 2 of a head's"), "{e}");
    let e = entry("llama.rope.scaling.type", || Meta::Text("yarn"));
    assert!(e.contains("yarn"), "{e}");
    let e = entry("tokenizer.ggml.model", || Meta::Text("bert"));
    assert!(e.contains("tokenizer.ggml.model \"bert\" is not supported; supported: gpt2, llama"), "{e}");
    let e = entry("tokenizer.ggml.pre", || Meta::Text("tekken"));
    assert!(e.contains("tokenizer.ggml.pre \"tekken\" is not supported"), "{e}");
    let e = entry("tokenizer.ggml.merges", || Meta::Texts(vec!["Ye".into()]));
    assert!(e.contains("merge \"Ye\" is not a pair"), "{e}");
    let e = entry("tokenizer.ggml.merges", || Meta::Texts(vec!["Y q".into()]));
    assert!(e.contains("merge \"Y q\" uses a token that is not in the vocabulary"), "{e}");
    let e = entry("tokenizer.ggml.token_type", || Meta::I32s(vec![1]));
    assert!(e.contains("1 token types for"), "{e}");
    let e = entry("tokenizer.ggml.tokens", || Meta::Texts((0..9999).map(|i| i.to_string()).collect()));
    assert!(e.contains("9999 tokens, but token_embd.weight has"), "{e}");
}

#[test]
fn mistral_travels_as_llama_with_a_window() {
    let dir = tempfile::tempdir().unwrap();
    let (file, out) = (dir.path().join("m.gguf"), dir.path().join("out"));
    write_changed(&fixture("golden/llama-gqa"), &file, "llama", |m, _| {
        m.push(("llama.attention.sliding_window", Meta::U32(48)));
        m.push(("llama.rope.scale_linear", Meta::F32(4.0)));
    });
    convert_gguf(&file, &out, false).unwrap();
    let config = ModelConfig::from_dir(&out).unwrap();
    assert_eq!((config.architecture, config.sliding_window), (Architecture::Mistral, Some(48)));
    assert_eq!(config.rope_scaling, RopeScaling::Linear { factor: 4.0 });
}

#[test]
fn force_replaces_a_model_directory_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let (file, out) = (dir.path().join("m.gguf"), dir.path().join("out"));
    write_model(&fixture("golden/qwen2"), &file, "qwen2");
    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("precious"), "x").unwrap();
    let e = convert_gguf(&file, &out, true).unwrap_err().to_string();
    assert!(e.contains("is not a model directory (no config.json), so --force does not replace it"), "{e}");
    assert!(out.join("precious").exists());
    std::fs::write(out.join("config.json"), "an older model's").unwrap();
    convert_gguf(&file, &out, true).unwrap();
    assert!(ModelWeights::load(&out).is_ok() && !out.join("precious").exists());
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "only the file and the directory");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let mode = std::fs::metadata(out.join("model.safetensors")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o644, "colleagues may read it");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// A cut file is always refused, a changed one never crashes the reader.
    #[test]
    fn damaged_files_never_panic(at in 0.0f64..1.0, byte: u8, cut: bool) {
        let dir = tempfile::tempdir().unwrap();
        let (file, out) = (dir.path().join("m.gguf"), dir.path().join("out"));
        write_model(&fixture("golden/qwen2"), &file, "qwen2");
        let mut bytes = std::fs::read(&file).unwrap();
        // Cuts anywhere; changes in the header, which ends before the first tensor's data.
        let header = 12_000;
        let at = (at * if cut { bytes.len() as f64 - 32.0 } else { f64::from(header) }) as usize;
        if cut {
            bytes.truncate(at);
        } else {
            bytes[at] = byte;
        }
        std::fs::write(&file, bytes).unwrap();
        let result = convert_gguf(&file, &out, false);
        prop_assert!(!(cut && result.is_ok()));
        prop_assert_eq!(result.is_ok(), out.exists());
    }
}
