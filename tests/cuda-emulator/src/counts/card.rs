//! The emulated card: its limits, and its published rates from `cards.json`, and the time that these model for a launch.
//! Where each figure comes from stands beside it in that file.

use std::sync::OnceLock;

use serde_json::Value;

use super::counters::Counters;
use crate::program::{Class, Program};

/// A card. Rates in flop/s, bandwidth in bytes/s, clocks in Hz, bus width in bits, sizes in bytes.
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
    pub memory_clock: f64,
    pub bus_width: u32,
    pub l2: u32,
    pub shared_per_sm: u32,
    pub shared_per_block: u32,
    pub threads_per_sm: u32,
    pub blocks_per_sm: u32,
    pub copy_engines: u32,
    pub ecc: bool,
    /// The titles of the documents that the figures come from.
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
        let file = file();
        let sources = &file["sources"];
        file["cards"].as_array().map(|all| all.iter().map(|card| read(card, sources)).collect()).unwrap_or_default()
    })
}

fn file() -> Value {
    serde_json::from_str(include_str!("cards.json")).unwrap_or_default()
}

fn read(card: &Value, sources: &Value) -> Card {
    let figures = &card["figures"];
    let number = |key: &str| figures[key]["value"].as_f64().unwrap_or_default();
    let mut titles: Vec<&str> = Vec::new();
    for figure in figures.as_object().into_iter().flat_map(|all| all.values()) {
        for (key, _) in places(figure) {
            if let Some(title) = sources[key]["title"].as_str()
                && !titles.contains(&title)
            {
                titles.push(title);
            }
        }
    }
    Card {
        name: figures["name"]["value"].as_str().unwrap_or_default().to_string(),
        key: card["key"].as_str().unwrap_or_default().to_string(),
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
        memory_clock: number("memory_clock"),
        bus_width: number("bus_width") as u32,
        l2: number("l2") as u32,
        shared_per_sm: number("shared_per_sm") as u32,
        shared_per_block: number("shared_per_block") as u32,
        threads_per_sm: number("threads_per_sm") as u32,
        blocks_per_sm: number("blocks_per_sm") as u32,
        copy_engines: number("copy_engines") as u32,
        ecc: number("ecc") != 0.0,
        source: titles.join("; "),
    }
}

/// The parts of a figure's source: a key of the sources table (or `derived`, `none found`), and the place in it.
fn places(figure: &Value) -> impl Iterator<Item = (&str, &str)> {
    figure["source"].as_str().unwrap_or_default().split("; ").filter_map(|part| part.split_once(": "))
}

impl Card {
    /// The card of a name (`A100`, `RTX4090`, `H100`, `B200`) or compute capability (`80`, `sm_90`).
    pub fn find(name: &str) -> Option<&'static Card> {
        let wanted = name.trim().trim_start_matches("sm_");
        let plain = |s: &str| s.to_ascii_uppercase().replace([' ', '_', '-'], "");
        cards().iter().find(|c| plain(&c.key) == plain(wanted) || c.sm.to_string() == wanted)
    }

    /// Blocks of `threads` threads and `shared` bytes of shared memory that a multiprocessor holds at once; registers are
    /// not in it, because PTX does not tell them.
    pub fn resident_blocks(&self, threads: u32, shared: u64) -> u32 {
        // A kilobyte of each block's shared memory belongs to the system.
        let by_shared = (u64::from(self.shared_per_sm) / (shared + 1024)) as u32;
        (self.threads_per_sm / threads.max(1).next_multiple_of(32)).min(by_shared).min(self.blocks_per_sm)
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
    fn every_card_is_found_by_its_names() {
        assert_eq!(cards().len(), 4);
        for card in cards() {
            assert_eq!(Card::find(&card.key), Some(card));
            assert_eq!(Card::find(&format!("sm_{}", card.sm)), Some(card));
        }
        assert_eq!(Card::find("rtx 4090").map(|c| c.sm), Some(89));
        assert_eq!(Card::find("70"), None);
    }

    #[test]
    fn every_figure_has_a_value_and_names_its_source() {
        let file = file();
        let sources = file["sources"].as_object().unwrap();
        for (key, source) in sources {
            let text = |field: &str| source[field].as_str().unwrap_or_default();
            assert!(!text("title").is_empty() && !text("read").is_empty(), "{key}");
            assert!(text("url").starts_with("https://"), "{key}");
        }
        for card in file["cards"].as_array().unwrap() {
            let figures = card["figures"].as_object().unwrap();
            assert_eq!(figures.len(), 22, "{}: as many figures as fields of Card, less key and source", card["key"]);
            for (name, figure) in figures {
                let what = format!("{} {name}: {figure}", card["key"]);
                assert!(figure["value"].is_number() || name == "name", "{what}");
                let (first, place) = places(figure).next().unwrap_or_else(|| panic!("{what}"));
                assert!(sources.contains_key(first) || ["derived", "none found"].contains(&first), "{what}");
                assert!(place.len() > 2, "{what}");
            }
        }
        for card in cards() {
            assert!(card.source.contains("CUDA C++ Programming Guide"), "{}: {}", card.key, card.source);
        }
    }

    /// Rates follow from the units of a multiprocessor and the clock, bandwidth from the memory's: a slip in either shows.
    #[test]
    fn figures_agree_with_each_other() {
        for card in cards() {
            // Results a cycle and multiprocessor, from the Best Practices Guide: float32, float64.
            let (single, double) = match card.sm {
                80 => (64.0, 32.0),
                89 => (128.0, 2.0),
                90 | 100 => (128.0, 64.0),
                other => panic!("sm_{other}"),
            };
            let rate = |results: f64| f64::from(card.sm_count) * results * 2.0 * card.clock;
            let near = |a: f64, b: f64, what: &str| assert!((a / b - 1.0).abs() < 0.01, "{} {what}: {a} {b}", card.key);
            near(card.float32, rate(single), "float32");
            near(card.float64, rate(double), "float64");
            near(card.tensor_tf32 * 2.0, card.tensor_16bit, "tf32");
            // Every card but GeForce ones, which halve the 16-bit rate where sums are of 32 bits.
            let ratio = if card.key == "RTX4090" { 4.0 } else { 2.0 };
            near(card.tensor_int8, card.tensor_16bit * ratio, "int8");
            near(card.bandwidth, 2.0 * card.memory_clock * f64::from(card.bus_width) / 8.0, "bandwidth");
            assert_eq!(card.shared_per_sm, card.shared_per_block + 1024, "{}", card.key);
        }
    }

    #[test]
    fn resident_blocks_are_bound_by_threads_shared_memory_and_number() {
        let resident = |card: &str, threads, shared| Card::find(card).unwrap().resident_blocks(threads, shared);
        assert_eq!(resident("A100", 256, 0), 8);
        assert_eq!(resident("RTX4090", 256, 0), 6);
        assert_eq!(resident("A100", 33, 0), 32);
        assert_eq!(resident("RTX4090", 32, 0), 24);
        assert_eq!(resident("H100", 128, 113 * 1024), 2);
        assert_eq!(resident("H100", 128, 227 * 1024), 1);
    }
}
