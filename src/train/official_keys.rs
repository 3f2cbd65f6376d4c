//! Keys of the official yaml files: the numbers that keep their meaning, and those without a counterpart here, with what each did
//! there and what to do here. The rest needs more than a table: [`super::import`].

/// Numbers that keep their meaning: official key, ours (`stage` is the stage's), is it a count, remark.
pub const NUMBERS: [(&str, &str, bool, &str); 14] = [
    ("run.seed", "seed", true, "there seed + rank of the process"),
    (
        "model.max_txt_len",
        "prompt.style.max_tokens",
        true,
        "there the end was cut, here the oldest titles are left out",
    ),
    ("model.proj_token_num", "prompt.style.tokens_per_vector", true, ""),
    ("model.lora_config.r", "lora.rank", true, ""),
    ("model.lora_config.alpha", "lora.alpha", false, ""),
    ("model.lora_config.dropout", "lora.dropout", false, ""),
    ("model.proj_mid_times", "cie.mid_times", true, ""),
    ("run.init_lr", "stage.learning_rate", false, ""),
    ("run.min_lr", "stage.min_lr", false, ""),
    ("run.warmup_lr", "stage.warmup_lr", false, ""),
    ("run.warmup_steps", "stage.warmup_steps", true, ""),
    ("run.weight_decay", "stage.weight_decay", false, ""),
    ("run.iters_per_epoch", "stage.steps_per_epoch", true, "steps between two evaluations"),
    ("run.max_epoch", "stage.max_epochs", true, ""),
];

/// What `model.rec_config` says of a collaborative model: key, ours below `collab`, is it a count.
pub fn sizes(model: &str) -> &'static [(&'static str, &'static str, bool)] {
    match model {
        "mf" => &[("embedding_size", "mf.dim", true)],
        "lightgcn" => &[("embed_size", "lightgcn.dim", true), ("gcn_layers", "lightgcn.layers", true)],
        "sasrec" => &[
            ("hidden_units", "sasrec.dim", true),
            ("num_blocks", "sasrec.blocks", true),
            // PARITY: the heads with which CoLLM reads the model, not those it was trained with.
            ("num_heads", "sasrec.collm_heads", true),
            ("dropout_rate", "sasrec.dropout", false),
            ("maxlen", "sasrec.max_length", true),
        ],
        "din" => {
            &[("embedding_size", "din.dim", true), ("drop", "din.dropout", false), ("maxlen", "din.max_length", true)]
        }
        _ => &[],
    }
}

/// The sentence for a key without a counterpart; `None` for a key that the official files do not have.
pub fn unmatched(key: &str) -> Option<&'static str> {
    // Below `datasets` comes the name of a loader.
    let parts: Vec<&str> = key.split('.').collect();
    let key = match parts[..] {
        ["datasets", _, ref rest @ ..] => format!("datasets.*.{}", rest.join(".")),
        _ => key.to_string(),
    };
    UNMATCHED.iter().find(|(keys, _)| keys.contains(&key.as_str())).map(|u| u.1)
}

/// (keys, what they did and what to do).
const UNMATCHED: &[(&[&str], &str)] = &[
    (
        &["model.arch", "model.model_type"],
        "named a class and its defaults; here llm.dir/config.json tells the architecture",
    ),
    (&["model.proj_drop"], "was read and never used; the mapping has no dropout"),
    (&["model.end_sym"], "ended answers in a mode that was not used"),
    (
        &["model.ans_type", "run.mode"],
        "chose between drafts of the answer's form; v2 (the logit of Yes) is what stageN.loss does",
    ),
    (
        &["model.user_num", "model.item_num", "model.rec_config.user_num", "model.rec_config.item_num"],
        "was a placeholder; sizes are counted in the data, there as here",
    ),
    (
        &["model.low_resource", "model.device_8bit"],
        "loaded the LLM in 8 bits; here weights stay in the precision of their file",
    ),
    (&["model.rec_config.dataset"], "named a dataset for messages"),
    (
        &["model.rec_config.embedding_size", "model.rec_config.embed_size"],
        "repeated a width that another key gives, or that of a model which is not here",
    ),
    (
        &["model.rec_config.keep_prob", "model.rec_config.dropout"],
        "dropped edges of LightGCN's graph, which was off; here there is none",
    ),
    (&["model.rec_config.A_n_fold", "model.rec_config.A_split"], "cut LightGCN's matrix into pieces; not needed here"),
    (
        &["model.rec_config.pretrain", "model.rec_config.init_emb"],
        "began LightGCN with N(0, init_emb); here it begins with N(0, 0.1)",
    ),
    (
        &[
            "model.rec_config.gcn_layers",
            "model.rec_config.hidden_units",
            "model.rec_config.num_blocks",
            "model.rec_config.num_heads",
            "model.rec_config.dropout_rate",
            "model.rec_config.drop",
            "model.rec_config.maxlen",
            "model.rec_config.pretrained_path",
        ],
        "set up a collaborative model that this program does not have, or that has no such setting",
    ),
    (&["model.rec_config.l2_emb"], "was never used"),
    (&["datasets.*.path"], "was not read: build_info.storage was"),
    (&["datasets.*.data_type"], "was a label without effect"),
    (&["run.task"], "named the training loop; there is one here: collm-engine train"),
    (&["run.batch_size_eval"], "rows scored at once, without effect on scores; here eval.batch_tokens bounds tokens"),
    (&["run.num_workers"], "processes that read data; here prompts are tokenised once and kept (threads: --threads)"),
    (&["run.output_dir"], "where results went; here: collm-engine train --run DIR"),
    (
        &["run.amp", "run.use_amp"],
        "fp16 autocast with a scaled loss; here the device tells: float32 on the CPU, bf16 with float32 sums on cards",
    ),
    (&["run.resume_ckpt_path"], "went on from a checkpoint; here: collm-engine train --run DIR --resume"),
    (
        &["run.train_splits", "run.valid_splits"],
        "named splits; here stages train on train and select on valid_small, which the official loaders mean by valid",
    ),
    (
        &["run.test_splits"],
        "named splits to judge; here test is judged at the end, as a whole and its warm and cold rows",
    ),
    (&["run.device"], "where to compute; here: --device cpu, cuda or cuda:N"),
    (
        &["run.world_size", "run.dist_url", "run.distributed", "run.gpu", "run.rank", "run.dist_backend"],
        "set up torchrun's processes (it overrides world_size); one process here, --processes told how many there were",
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_listed_once_and_found() {
        let all: Vec<&str> = UNMATCHED.iter().flat_map(|u| u.0.iter().copied()).collect();
        let distinct: std::collections::BTreeSet<_> = all.iter().collect();
        assert_eq!(distinct.len(), all.len());
        assert!(unmatched("datasets.movie_ood.data_type").is_some_and(|s| s.contains("label")));
        assert!(
            unmatched("run.task").is_some() && unmatched("run.tasks").is_none() && unmatched("datasets.x").is_none()
        );
    }
}
