//! The emulated card: its limits, and its published rates from `cards.json`, and the time that these model for a launch.

use std::sync::OnceLock;

use serde_json::Value;

use super::counters::Counters;
use crate::program::{Class, Program};

/// A card. Rates in flop/s, bandwidth in bytes/s, clock in Hz, sizes in bytes.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub struct Card {
    pub name: String,
    pub key: String,
    pub sm: u32,
    pub sm_count: u32,
    pub clock: f64,
    pub bandwidth: f64,
    pub tensor_16bit: f64,
    pub tensor_tf32: f64,
    pub tensor_int8: f64,
    pub tensor_f64: f64,
    pub float32: f64,
    pub half: f64,
    pub float64: f64,
    pub memory: u64,
    pub l2: u32,
    pub shared_per_sm: u32,
    pub shared_per_block: u32,
    pub source: String,
}

/// The time that a card's rates model for a launch, seconds: the largest part is the estimate.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Modelled {
    /// Distinct bytes (sectors moved if those were not counted) over the memory bandwidth.
    pub memory: f64,
    /// Tensor-core flops over their rate.
    pub tensor: f64,
    /// Plain arithmetic over its rates.
    pub arithmetic: f64,
    /// Passes of shared memory, one a cycle and multiprocessor.
    pub shared: f64,
}

impl Modelled {
    /// The estimate.
    pub fn seconds(&self) -> f64 {
        self.memory.max(self.tensor).max(self.arithmetic).max(self.shared)
    }
    /// Which part it is.
    pub fn bound(&self) -> &'static str {
        let parts = [
            (self.memory, "memory"),
            (self.tensor, "tensor"),
            (self.arithmetic, "arithmetic"),
            (self.shared, "shared"),
        ];
        parts.into_iter().fold((f64::NEG_INFINITY, ""), |best, part| if part.0 > best.0 { part } else { best }).1
    }
}

/// All cards of the data file.
pub fn cards() -> &'static [Card] {
    static CARDS: OnceLock<Vec<Card>> = OnceLock::new();
    CARDS.get_or_init(|| {
        let file: Value = serde_json::from_str(include_str!("cards.json")).unwrap_or_default();
        file["cards"].as_array().map(|all| all.iter().map(read).collect()).unwrap_or_default()
    })
}

fn read(card: &Value) -> Card {
    let text = |key: &str| card[key].as_str().unwrap_or_default().to_string();
    let number = |key: &str| card[key].as_f64().unwrap_or_default();
    Card {
        name: text("name"),
        key: text("key"),
        sm: number("sm") as u32,
        sm_count: number("sm_count") as u32,
        clock: number("clock"),
        bandwidth: number("bandwidth"),
        tensor_16bit: number("tensor_16bit"),
        tensor_tf32: number("tensor_tf32"),
        tensor_int8: number("tensor_int8"),
        tensor_f64: number("tensor_f64"),
        float32: number("float32"),
        half: number("half"),
        float64: number("float64"),
        memory: number("memory") as u64,
        l2: number("l2") as u32,
        shared_per_sm: number("shared_per_sm") as u32,
        shared_per_block: number("shared_per_block") as u32,
        source: text("source"),
    }
}

impl Card {
    /// The card of a name (`A100`, `RTX4090`, `H100`, `B200`) or compute capability (`80`, `sm_90`).
    pub fn find(name: &str) -> Option<&'static Card> {
        let wanted = name.trim().trim_start_matches("sm_");
        let plain = |s: &str| s.to_ascii_uppercase().replace([' ', '_', '-'], "");
        cards().iter().find(|c| plain(&c.key) == plain(wanted) || c.sm.to_string() == wanted)
    }

    /// Threads that a multiprocessor holds at once.
    pub fn threads_per_sm(&self) -> u32 {
        match self.sm {
            86..=89 | 120 => 1536,
            _ => 2048,
        }
    }

    /// Models a launch from its counters.
    pub fn model(&self, program: &Program, counters: &Counters) -> Modelled {
        let classes = counters.by_class(program.code.iter().map(|i| i.class));
        let flops = |class: Class| (classes[class as usize].lanes * class.flops()) as f64;
        let single = flops(Class::Float32) + flops(Class::Fma32);
        let half = flops(Class::Half) + flops(Class::HalfPacked) + flops(Class::HalfFma) + flops(Class::HalfPackedFma);
        let double = flops(Class::Float64) + flops(Class::Fma64);
        // Integer, conversion and the rest issue at the rate of single instructions, half the rate in flops.
        let others = [Class::Integer, Class::Compare, Class::Move, Class::Convert, Class::Control, Class::Special];
        let issue: f64 = others.iter().map(|c| classes[*c as usize].lanes as f64).sum::<f64>() * 2.0;
        let distinct = (counters.distinct_read + counters.distinct_written) as f64;
        let sectors = (counters.global_loads.sectors + counters.global_stores.sectors) as f64 * 32.0;
        let tensor = |kind: TensorKind| counters.tensor_by_kind[kind as usize] as f64;
        Modelled {
            memory: if distinct > 0.0 { distinct } else { sectors } / self.bandwidth,
            tensor: tensor(TensorKind::Sixteen) / self.tensor_16bit
                + tensor(TensorKind::Tf32) / self.tensor_tf32
                + tensor(TensorKind::Int8) / self.tensor_int8
                + tensor(TensorKind::F64) / self.tensor_f64,
            arithmetic: (single + issue) / self.float32 + half / self.half + double / self.float64,
            shared: counters.shared_passes as f64 / (f64::from(self.sm_count) * self.clock),
        }
    }
}

/// Kinds of tensor-core arithmetic that have rates of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TensorKind {
    /// f16 and bf16.
    Sixteen,
    /// tf32.
    Tf32,
    /// 8-bit integers and floats.
    Int8,
    /// f64.
    F64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_card_is_whole_and_found_by_its_names() {
        assert_eq!(cards().len(), 4);
        for card in cards() {
            assert!(
                card.bandwidth > 1e11
                    && card.float32 > 1e12
                    && card.tensor_16bit > card.float32
                    && !card.source.is_empty()
            );
            assert_eq!(Card::find(&card.key), Some(card));
            assert_eq!(Card::find(&format!("sm_{}", card.sm)), Some(card));
        }
        assert_eq!(Card::find("rtx 4090").map(|c| c.sm), Some(89));
    }
}
