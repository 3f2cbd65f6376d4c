//! Text from outside never panics or hangs the parser and decoder: cut, spliced and mutated real modules.

mod common;

use cuda_emulator::memory::Memory;
use cuda_emulator::{Module, ptx};
use proptest::prelude::*;

fn source(name: &str) -> String {
    std::fs::read_to_string(format!("{}/tests/kernels/{name}.ptx", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

/// Some kernels of Hopper: `wgmma`, tensor maps, clusters.
fn hopper() -> String {
    let text = source("hopper");
    let mut parts = text.split(".visible .entry ");
    let mut out = parts.next().unwrap_or_default().to_string();
    let wanted = ["wgmma_bf16_n8(", "box_of(", "box_add(", "multicast_0(", "cluster_arrive_0("];
    for part in parts.filter(|p| wanted.iter().any(|w| p.starts_with(w))) {
        out += ".visible .entry ";
        out += part;
    }
    out
}

/// Errors are fine, panics are not.
fn load(text: &str) {
    let memory = Memory::new(1 << 30, false);
    if let Ok(module) = Module::parse(text, &memory) {
        module.unload(&memory);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn mutated_modules(which in 0..3usize, cuts in prop::collection::vec((any::<prop::sample::Index>(), 0..12usize, "[ -~\\n]{0,6}"), 1..6)) {
        let mut text = if which == 2 { hopper() } else { source(["basics", "bugs"][which]) };
        for (at, remove, insert) in cuts {
            let at = at.index(text.len());
            text.replace_range(at..(at + remove).min(text.len()), &insert);
        }
        load(&text);
    }

    #[test]
    fn shuffled_lines(seed in any::<u64>()) {
        let mut numbers = common::Numbers(seed);
        let text = if seed % 2 == 0 { source("bugs") } else { hopper() };
        let lines: Vec<&str> = text.lines().collect();
        let mut out = String::from(".version 8.0\n.target sm_90a\n.address_size 64\n");
        for _ in 0..60 {
            out += lines[(numbers.bits() % lines.len() as u64) as usize];
            out.push('\n');
        }
        load(&out);
    }

    #[test]
    fn arbitrary_text(text in "\\PC{0,200}") {
        load(&text);
        load(&format!(".version 7.0\n.target sm_80\n.address_size 64\n.entry k() {{ {text} }}"));
    }
}

#[test]
fn unknown_instructions_name_their_line() {
    let text = ".version 7.0\n.target sm_80\n.address_size 64\n.entry k() {\n.reg .b32 r;\nadd.u32 r, r, 1;\nfrobnicate.u32 r, r;\n}";
    let problem = Module::parse(text, &Memory::new(1 << 20, false)).unwrap_err().to_string();
    assert_eq!(problem, "PTX line 7: instruction `frobnicate.u32` is not supported with these operands");
    assert_eq!(ptx::parse("nonsense").unwrap_err().line, 1);
}

#[test]
fn nests_and_sizes_that_would_exhaust_the_stack_or_memory_are_refused() {
    let entry =
        |body: &str| format!(".version 7.0\n.target sm_80\n.address_size 64\n.entry k() {{\n.reg .b32 r;\n{body}\n}}");
    load(&entry(&format!("mov.u32 r, {}1;", "-".repeat(100_000))));
    load(&entry(&format!("mov.b32 r, {};", "{".repeat(100_000))));
    load(&entry(&"{".repeat(100_000)));
    load(&entry(".shared .b8 s[99999999999]; mov.u32 r, s;"));
    load(&entry(".local .b8 s[99999999999]; mov.u32 r, s;"));
    load(".version 7.0\n.target sm_80\n.address_size 64\n.global .b8 g[99999999999];");
    let nested: String = (0..2000).map(|i| format!("L{i}:\n")).collect::<String>()
        + &(0..2000).rev().map(|i| format!("@p bra L{i};\n")).collect::<String>();
    load(&entry(&format!(".reg .pred p;\n{nested}")));
}
