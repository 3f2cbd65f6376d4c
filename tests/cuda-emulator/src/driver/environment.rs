//! What the environment variables ask for.

use std::path::PathBuf;
use std::time::Duration;

use crate::counts::Card;
use crate::counts::card::cards;
use crate::machine::Config;
use crate::numerics::tensor::Accumulation;

/// The settings.
#[derive(Debug, Clone)]
pub struct Environment {
    /// `CUEMU_CARD`: A100 (the default), RTX4090, H100, B200, or a compute capability such as 90.
    pub card: &'static Card,
    /// How kernels run.
    pub config: Config,
    /// `CUEMU_REPORT=file.json`.
    pub report: Option<PathBuf>,
    /// `CUEMU_TABLE=1`: a line for each launch on stderr.
    pub table: bool,
    /// `CUEMU_TRACE=1`: driver calls on stderr.
    pub trace: bool,
    /// `CUEMU_PTX_VERSION=7.7`: PTX above it is refused, as an older driver would.
    pub ptx_version: Option<(u32, u32)>,
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|v| !v.is_empty())
}

fn number(name: &str) -> Option<u64> {
    let text = variable(name)?;
    let value = text.parse().ok();
    if value.is_none() {
        eprintln!("[cuda-emulator] {name}={text} is not a number and is ignored");
    }
    value
}

/// `24GiB`, `900KiB`, `65536`.
fn bytes(name: &str) -> Option<u64> {
    let text = variable(name)?;
    let units = [("GiB", 30), ("MiB", 20), ("KiB", 10), ("", 0)];
    let (digits, shift) = units.iter().find_map(|(unit, shift)| Some((text.strip_suffix(unit)?, shift)))?;
    let value = digits.trim().parse::<u64>().ok().and_then(|n| n.checked_mul(1 << shift));
    if value.is_none() {
        eprintln!("[cuda-emulator] {name}={text} is no number of bytes, KiB, MiB or GiB and is ignored");
    }
    value
}

fn is_on(name: &str) -> bool {
    variable(name).is_some_and(|v| !matches!(v.as_str(), "0" | "off" | "no"))
}

impl Environment {
    /// Reads the environment; a value that means nothing is named on stderr and ignored.
    pub fn read() -> Self {
        let fallback = &cards()[0];
        let card = match variable("CUEMU_CARD") {
            Some(name) => Card::find(&name).unwrap_or_else(|| {
                let known: Vec<&str> = cards().iter().map(|c| c.key.as_str()).collect();
                eprintln!(
                    "[cuda-emulator] CUEMU_CARD={name} is unknown ({}); {} it is",
                    known.join(", "),
                    fallback.key
                );
                fallback
            }),
            None => fallback,
        };
        let card = match number("CUEMU_SMS") {
            // Once a process: the card lives as long.
            Some(n) if n > 0 => Box::leak(Box::new(Card { sm_count: n as u32, ..card.clone() })),
            _ => card,
        };
        let card = match bytes("CUEMU_MEMORY") {
            Some(memory) if memory > 0 => Box::leak(Box::new(Card { memory, ..card.clone() })),
            _ => card,
        };
        let report = variable("CUEMU_REPORT").map(PathBuf::from);
        let table = is_on("CUEMU_TABLE");
        let check = variable("CUEMU_CHECK").is_none_or(|v| !matches!(v.as_str(), "0" | "off" | "no"));
        let config = Config {
            check,
            count: check || report.is_some() || table,
            threads: number("CUEMU_THREADS").unwrap_or(0) as usize,
            seed: number("CUEMU_SEED"),
            eager_copies: variable("CUEMU_COPIES").is_some_and(|v| v == "eager"),
            accumulation: match variable("CUEMU_MMA").as_deref() {
                Some("ampere") => Accumulation::Ampere,
                Some("hopper") => Accumulation::Hopper,
                _ => Accumulation::Exact,
            },
            l2: if is_on("CUEMU_L2") { u64::from(card.l2) } else { 0 },
            timeout: Duration::from_secs(number("CUEMU_TIMEOUT").unwrap_or(600)),
            ..Config::default()
        };
        let ptx_version = variable("CUEMU_PTX_VERSION").and_then(|v| {
            let (major, minor) = v.split_once('.')?;
            Some((major.parse().ok()?, minor.parse().ok()?))
        });
        Environment { card, config, report, table, trace: is_on("CUEMU_TRACE"), ptx_version }
    }
}
