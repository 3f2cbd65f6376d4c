//! Presets that are another preset with a few settings changed: methods, strategies and Amazon-Book (reference, sections 4 and 5.2).
//!
//! Official batches are per process, of which there were two: 8 rows are 16 here, 16 are 32.

/// A preset, the one that it is based on (empty: the defaults), and what it changes, as TOML.
pub(super) type Variant = (&'static str, &'static str, &'static str);

/// Soft tokens: three for each of the two places.
macro_rules! prompt4nr {
    ($template:literal, $rest:literal) => {
        concat!(
            "method = \"prompt4nr\"\nprompt.stage2 = \"",
            $template,
            "\"\nprompt.style.tokens_per_vector = 3\nstage2.train_lora = true\nstage2.max_epochs = 1000\n",
            $rest
        )
    };
}

/// All of them.
pub(super) const VARIANTS: &[Variant] = &[
    ("ml-1m/icl", "ml-1m/collm-mf", "method = \"icl\""),
    ("ml-1m/tallrec", "ml-1m/collm-mf", "method = \"tallrec\""),
    ("ml-1m/collm-mf-t1", "ml-1m/collm-mf", "strategy = \"t1\""),
    ("ml-1m/collm-mf-t2", "ml-1m/collm-mf", "strategy = \"t2\""),
    ("ml-1m/collm-mf-t3", "ml-1m/collm-mf", "strategy = \"t3\""),
    ("ml-1m/collm-lightgcn-t1", "ml-1m/collm-lightgcn", "strategy = \"t1\""),
    ("ml-1m/collm-lightgcn-t2", "ml-1m/collm-lightgcn", "strategy = \"t2\""),
    ("ml-1m/collm-lightgcn-t3", "ml-1m/collm-lightgcn", "strategy = \"t3\""),
    (
        "ml-1m/ui-token",
        "ml-1m/collm-mf",
        "method = \"ui-token\"\nstage2.learning_rate = 1e-2\nstage2.max_epochs = 1000",
    ),
    // soft_prompt_ood.yaml has no start: adapter and tokens from scratch.
    ("ml-1m/prompt4nr", "ml-1m/collm-mf", prompt4nr!("softprompt", "strategy = \"t3\"\nstage2.learning_rate = 1e-4")),
    // No yaml has Vicuna's stage 1 on Book; these are Qwen2's values (0924-tallrec-qwen-book, 0924-collm-qwen-book).
    (
        "amazon-book/collm-mf",
        "",
        r#"data.dir = "data/amazon-book"
llm.dir = "models/smollm2-135m"
prompt.stage1 = "tallrec_amazon"
prompt.stage2 = "collm_amazon"
collab.mf.weight_decay = 1e-6
collab.mf.batch_size = 10240
collab.lightgcn.dim = 256
collab.lightgcn.learning_rate = 1e-4
collab.lightgcn.weight_decay = 1e-7
collab.lightgcn.batch_size = 10240
stage1.learning_rate = 1e-4
stage1.batch_rows = 16
stage1.steps_per_epoch = 100
stage1.max_epochs = 1000
stage2.learning_rate = 1e-2
stage2.batch_rows = 16
stage2.steps_per_epoch = 100
stage2.max_epochs = 1000
"#,
    ),
    ("amazon-book/icl", "amazon-book/collm-mf", "method = \"icl\""),
    ("amazon-book/tallrec", "amazon-book/collm-mf", "method = \"tallrec\""),
    ("amazon-book/collm-mf-t1", "amazon-book/collm-mf", "strategy = \"t1\""),
    ("amazon-book/collm-mf-t2", "amazon-book/collm-mf", "strategy = \"t2\""),
    ("amazon-book/collm-mf-t3", "amazon-book/collm-mf", "strategy = \"t3\""),
    ("amazon-book/collm-lightgcn", "amazon-book/collm-mf", "collab.model = \"lightgcn\"\nstage2.max_epochs = 200"),
    ("amazon-book/ui-token", "amazon-book/collm-mf", "method = \"ui-token\"\nstage2.learning_rate = 1e-4"),
    // soft_prompt_ood_amazon.yaml begins from stage 1.
    ("amazon-book/prompt4nr", "amazon-book/collm-mf", prompt4nr!("softprompt_amazon", "stage2.learning_rate = 1e-2")),
];

#[cfg(test)]
mod tests {
    use crate::train::config::Config;
    use crate::train::pipeline::Part::{Collab, Stage1, Stage2};

    #[test]
    fn variants_are_what_their_names_say() {
        let preset = |name| Config::resolve(Some(name), None, &[]).unwrap();
        let parts = |name| preset(name).parts();
        assert!(parts("ml-1m/icl").is_empty());
        assert_eq!(parts("amazon-book/tallrec"), [Stage1]);
        assert_eq!(parts("ml-1m/collm-mf-t1"), [Collab, Stage1, Stage2]);
        assert_eq!(parts("ml-1m/collm-mf-t2"), [Stage1, Stage2]);
        assert_eq!(parts("ml-1m/collm-lightgcn-t3"), [Collab, Stage2]);
        assert_eq!(parts("ml-1m/ui-token"), [Stage1, Stage2]);
        assert_eq!((parts("ml-1m/prompt4nr"), parts("amazon-book/prompt4nr")), (vec![Stage2], vec![Stage1, Stage2]));
        let trained = |name| (preset(name).stage2.train_lora, preset(name).stage2.train_cie);
        assert_eq!(trained("ml-1m/collm-mf"), (false, true));
        assert_eq!(trained("ml-1m/collm-mf-t2"), (false, true));
        assert_eq!(trained("ml-1m/collm-lightgcn-t3"), (true, true));
        assert!(trained("amazon-book/prompt4nr").0);
        let book = preset("amazon-book/collm-lightgcn");
        assert_eq!((book.collab.lightgcn.dim, book.stage1.batch_rows, book.stage2.max_epochs), (256, 16, 200));
        assert_eq!(preset("ml-1m/collm-lightgcn-t1").collab.model, "lightgcn");
    }

    #[test]
    fn a_strategy_that_a_method_does_not_have_is_refused() {
        let error =
            |settings: [&str; 2]| Config::resolve(None, None, &settings.map(String::from)).unwrap_err().to_string();
        assert_eq!(
            error(["method=ui-token", "strategy=t1"]),
            "--set strategy=t1: strategy is t1, which method ui-token does not have; set it to default"
        );
        assert!(error(["method=prompt4nr", "strategy=t2"]).ends_with("set it to default or t3"));
        assert!(error(["method=collm", "strategy=t4"]).contains("unknown variant `t4`"));
    }
}
