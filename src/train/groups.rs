//! What is told before a stage begins: every group of tensors, its size, and whether and how it is trained.

use super::config::StageConfig;
use super::trainable::Trainable;
use crate::collab::Collaborative;
use crate::collab::slots::Tuned;
use crate::llm::ModelConfig;

/// A group of tensors.
struct Group {
    name: String,
    parameters: usize,
    trained: bool,
    /// Some of its tensors (biases) have no weight decay.
    matrices_only: bool,
}

/// What fills the slots of a stage.
pub(super) enum Filling<'a> {
    /// Nothing: a template of text alone.
    Nothing,
    /// A model that does not change.
    Frozen(&'a str, &'a Collaborative),
    /// A model that is trained.
    Trained(&'a str, &'a dyn Tuned),
}

/// The table, line by line.
pub(super) fn table(
    name: &str,
    config: &StageConfig,
    model: &ModelConfig,
    start: &Trainable,
    filling: Filling,
) -> Vec<String> {
    let group = |name: &str, parameters, trained, matrices_only| Group {
        name: name.into(),
        parameters,
        trained,
        matrices_only,
    };
    let mut groups = vec![
        group("LLM", model.parameters(), false, false),
        group("adapter (LoRA)", start.lora.n_params(), config.train_lora, false),
    ];
    if let Some(cie) = &start.cie {
        groups.push(group("mapping", cie.tensors.iter().map(Vec::len).sum(), config.train_cie, true));
    }
    match filling {
        Filling::Nothing => {}
        Filling::Frozen(name, model) => groups.push(group(name, model.parameters(), false, false)),
        Filling::Trained(name, model) => {
            let parameters = model.tensors().iter().map(|t| t.values.len()).sum();
            groups.push(group(name, parameters, true, false));
        }
    }
    let width = groups.iter().map(|g| g.name.len()).max().unwrap_or(0);
    let row = |g: &Group| {
        let how = match (g.trained, g.matrices_only) {
            (false, _) => "frozen".into(),
            (true, matrices_only) => {
                let note = if matrices_only && config.weight_decay > 0.0 { " (biases: 0)" } else { "" };
                let (lr, decay) = (config.learning_rate, config.weight_decay);
                format!("trained, learning rate up to {lr}, weight decay {decay}{note}")
            }
        };
        format!("{name}:   {:width$}  {:>15} parameters  {how}", g.name, thousands(g.parameters))
    };
    groups.iter().map(row).collect()
}

fn thousands(n: usize) -> String {
    let digits = n.to_string();
    let parts: Vec<&str> = digits.as_bytes().rchunks(3).rev().map(|c| std::str::from_utf8(c).unwrap_or("")).collect();
    parts.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cie::{FreeTokens, Mapping};
    use crate::collab::mf::Mf;
    use crate::llm::peft::{LoraTensors, Target};

    #[test]
    fn every_group_has_its_line() {
        let json = r#"{"model_type":"qwen2","vocab_size":50,"hidden_size":40,"intermediate_size":56,"num_hidden_layers":3,
            "num_attention_heads":4,"num_key_value_heads":2,"rms_norm_eps":1e-5,"max_position_embeddings":64}"#;
        let model = ModelConfig::from_json(json, "config.json".as_ref()).unwrap();
        let lora = LoraTensors::init(&model, &[Target::named("q_proj").unwrap()], 4, 6.0, 0.0, 1);
        let start = Trainable { lora, cie: Some(Mapping::zeros(8, 80, 40)) };
        let collab = Collaborative::Tables(Mf::init(25, 31, 8, 1));
        let config = StageConfig { train_cie: true, ..StageConfig::default() };
        let lines = table("stage2", &config, &model, &start, Filling::Frozen("MF", &collab));
        // Embeddings and head (50 · 40 each), three blocks of matrices, two norms each, biases of q, k, v; the last norm.
        let block = 40 * (2 * 40 + 2 * 20 + 3 * 56) + 2 * 40 + 40 + 2 * 20;
        assert_eq!(model.parameters(), 2 * 50 * 40 + 3 * block + 40);
        assert_eq!(
            lines,
            [
                "stage2:   LLM                      39,320 parameters  frozen".replace("39,320", &thousands(model.parameters())),
                "stage2:   adapter (LoRA)              960 parameters  frozen".into(),
                "stage2:   mapping                   3,960 parameters  trained, learning rate up to 0.001, weight decay 0.001 (biases: 0)".into(),
                "stage2:   MF                          448 parameters  frozen".into(),
            ]
        );
        let tokens = FreeTokens::shared(120, 1);
        let lines = table("stage2", &config, &model, &start, Filling::Trained("soft tokens", &tokens));
        assert!(
            lines[3].ends_with("240 parameters  trained, learning rate up to 0.001, weight decay 0.001"),
            "{}",
            lines[3]
        );
        assert_eq!([thousands(0), thousands(1_000), thousands(1_234_567)], ["0", "1,000", "1,234,567"]);
    }
}
