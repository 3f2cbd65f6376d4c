//! A `tokenizer.json` from GGUF metadata.
//!
//! GGUF names its pre-tokenizer by a word; the words are known here one by one, and an unknown one is an error: a guess
//! would give token ids that are almost right.

use std::collections::HashMap;

use serde_json::{Value as Json, json};

use super::Error;
use super::gguf::{Gguf, Value};

/// Token types of `tokenizer.ggml.token_type`.
const UNKNOWN: i128 = 2;
const CONTROL: i128 = 3;
const USER_DEFINED: i128 = 4;
const BYTE: i128 = 6;

/// The tokenizer as the `tokenizers` library reads it.
pub fn tokenizer_json(file: &Gguf) -> Result<Json, Error> {
    let tokens = texts(file, "tokenizer.ggml.tokens")?;
    let types: Vec<i128> = match file.get("tokenizer.ggml.token_type") {
        Some(Value::List(list)) => list.iter().map(|v| if let Value::Int(i) = v { *i } else { 1 }).collect(),
        _ => vec![1; tokens.len()],
    };
    if types.len() != tokens.len() {
        return Err(file.error(format!("{} token types for {} tokens", types.len(), tokens.len())));
    }
    let added: Vec<Json> = tokens
        .iter()
        .zip(&types)
        .enumerate()
        .filter(|(_, (_, kind))| matches!(**kind, UNKNOWN | CONTROL | USER_DEFINED))
        .map(|(id, (content, kind))| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": *kind != USER_DEFINED})
        })
        .collect();
    let vocab: serde_json::Map<String, Json> =
        tokens.iter().enumerate().map(|(id, t)| (t.to_string(), id.into())).collect();
    if vocab.len() != tokens.len() {
        return Err(file.error("tokenizer.ggml.tokens holds the same token twice"));
    }
    let parts = match file.text("tokenizer.ggml.model")? {
        "gpt2" => byte_level(file, vocab)?,
        "llama" => sentence_piece(file, &tokens, &types, vocab)?,
        other => {
            return Err(file.error(format!("tokenizer.ggml.model {other:?} is not supported; supported: gpt2, llama")));
        }
    };
    Ok(json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": parts.normalizer, "pre_tokenizer": parts.pre_tokenizer, "post_processor": null,
        "decoder": parts.decoder, "model": parts.model,
    }))
}

/// The few entries of `tokenizer_config.json` that Hugging Face needs.
pub fn tokenizer_config(file: &Gguf) -> Result<Json, Error> {
    let tokens = texts(file, "tokenizer.ggml.tokens")?;
    let token = |key: &str| Ok::<_, Error>(file.size(key)?.and_then(|id| tokens.get(id)).map(|t| t.to_string()));
    Ok(json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token("tokenizer.ggml.bos_token_id")?,
        "eos_token": token("tokenizer.ggml.eos_token_id")?,
        "unk_token": token("tokenizer.ggml.unknown_token_id")?,
        "pad_token": token("tokenizer.ggml.padding_token_id")?,
        "clean_up_tokenization_spaces": false,
    }))
}

struct Parts {
    normalizer: Json,
    pre_tokenizer: Json,
    decoder: Json,
    model: Json,
}

fn texts<'a>(file: &'a Gguf, key: &str) -> Result<Vec<&'a str>, Error> {
    let text = |v: &'a Value| {
        if let Value::Text(s) = v {
            Ok(s.as_str())
        } else {
            Err(file.error(format!("{key} holds {v:?}; expected text")))
        }
    };
    file.list(key)?.iter().map(text).collect()
}

fn byte_level(file: &Gguf, vocab: serde_json::Map<String, Json>) -> Result<Parts, Error> {
    let merges: Result<Vec<[&str; 2]>, Error> = texts(file, "tokenizer.ggml.merges")?
        .into_iter()
        .map(|merge| {
            let (a, b) = merge.split_once(' ').ok_or_else(|| file.error(format!("merge {merge:?} is not a pair")))?;
            let known = vocab.contains_key(a) && vocab.contains_key(b) && vocab.contains_key(&format!("{a}{b}"));
            if known {
                Ok([a, b])
            } else {
                Err(file.error(format!("merge {merge:?} uses a token that is not in the vocabulary")))
            }
        })
        .collect();
    let merges = merges?;
    let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
    let split = |pattern: &str| {
        json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false}, bytes(false)]})
    };
    let words = |digits: &str| {
        format!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
    };
    let mut normalizer = Json::Null;
    let mut ignore_merges = false;
    let pre_tokenizer = match file.text("tokenizer.ggml.pre").unwrap_or("default") {
        "smollm" => {
            json!({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true}, bytes(true)]})
        }
        "qwen2" => {
            normalizer = json!({"type": "NFC"});
            split(&words(r"\p{N}"))
        }
        "llama-bpe" | "llama3" | "llama-v3" => {
            ignore_merges = true;
            split(&words(r"\p{N}{1,3}"))
        }
        "gpt-2" | "default" => bytes(true),
        other => {
            return Err(file.error(format!(
                "tokenizer.ggml.pre {other:?} is not supported; supported: smollm, qwen2, llama-bpe, gpt-2"
            )));
        }
    };
    Ok(Parts {
        normalizer,
        pre_tokenizer,
        decoder: bytes(true),
        model: json!({"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": ignore_merges,
            "merges": merges, "vocab": vocab}),
    })
}

/// SentencePiece BPE: the merges follow from the vocabulary and its scores, as Hugging Face's converter derives them.
fn sentence_piece(
    file: &Gguf,
    tokens: &[&str],
    types: &[i128],
    vocab: serde_json::Map<String, Json>,
) -> Result<Parts, Error> {
    let score = |v: &Value| if let Value::Float(x) = v { *x } else { 0.0 };
    let scores: Vec<f64> = file.list("tokenizer.ggml.scores")?.iter().map(score).collect();
    if scores.len() != tokens.len() {
        return Err(file.error(format!("{} scores for {} tokens", scores.len(), tokens.len())));
    }
    let ids: HashMap<&str, usize> = tokens.iter().enumerate().map(|(i, t)| (*t, i)).collect();
    let mut merges: Vec<(f64, usize, [usize; 2], [&str; 2])> = Vec::new();
    for (id, token) in tokens.iter().enumerate() {
        // Text is never merged into a token such as `<s>`: what a title says must not become a control token.
        if matches!(types[id], UNKNOWN | CONTROL | BYTE) {
            continue;
        }
        for (at, _) in token.char_indices().skip(1) {
            let (a, b) = token.split_at(at);
            if let (Some(&left), Some(&right)) = (ids.get(a), ids.get(b)) {
                merges.push((scores[id], id, [left, right], [a, b]));
            }
        }
    }
    merges.sort_by(|x, y| y.0.total_cmp(&x.0).then((x.1, x.2).cmp(&(y.1, y.2))));
    let merges: Vec<[&str; 2]> = merges.into_iter().map(|m| m.3).collect();
    let replace = |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
    let mut normalizers = vec![replace(" ", "▁")];
    if file.flag("tokenizer.ggml.add_space_prefix").unwrap_or(true) {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
    }
    Ok(Parts {
        normalizer: json!({"type": "Sequence", "normalizers": normalizers}),
        pre_tokenizer: Json::Null,
        decoder: json!({"type": "Sequence", "decoders": [replace("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}),
        model: json!({"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "merges": merges, "vocab": vocab}),
    })
}
