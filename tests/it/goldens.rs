//! Whole models against Hugging Face + PEFT: every golden model's logits, losses and gradients.

use crate::common::{GOLDEN_MODELS, fixture, ok, path, shared};
use collm_engine::device::Device;
use collm_engine::llm::verify::verify;

#[test]
fn every_golden_model() {
    for name in GOLDEN_MODELS {
        let dir = fixture("golden").join(name);
        let report = verify(&dir, Some(&dir.join("adapter")), &dir.join("golden.safetensors"), Device::Cpu).unwrap();
        assert!(report.unchecked.is_empty(), "{name}: {:?}", report.unchecked);
        assert!(report.comparisons.len() >= 41, "{name}: {} tensors", report.comparisons.len());
        for c in &report.comparisons {
            assert!(c.passes(), "{name}: {} is off by {:e}, limit {:e}", c.name, c.error, c.limit);
        }
    }
}

/// A wrong weight must not pass: the check can fail.
#[test]
fn a_changed_weight_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let from = fixture("golden/qwen2");
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(from.join(name), dir.path().join(name)).unwrap();
    }
    let weights = dir.path().join("model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    let n = bytes.len();
    // The high byte of one number in the middle of the data.
    bytes[(n / 2) | 1] ^= 0x41;
    std::fs::write(&weights, bytes).unwrap();
    let report =
        verify(dir.path(), Some(&from.join("adapter")), &from.join("golden.safetensors"), Device::Cpu).unwrap();
    assert!(!report.passes());
}

#[test]
fn the_command_prints_every_tensor() {
    let dir = fixture("golden/qwen2");
    let out = ok(&["verify", "--model", path(&dir), "--against", path(&dir.join("golden.safetensors"))]);
    assert!(out.contains("cie.grad.cie_vectors") && out.contains("49 tensors compared, 0 failed (cpu)"), "{out}");
}

/// Other goldens of the same form, where they are at hand.
#[test]
fn goldens_beside_the_repository() {
    let Some(dir) = shared("golden") else { return };
    for entry in std::fs::read_dir(dir).unwrap().flatten().filter(|e| e.path().join("config.json").exists()) {
        let dir = entry.path();
        let report = verify(&dir, Some(&dir.join("adapter")), &dir.join("golden.safetensors"), Device::Cpu).unwrap();
        assert!(report.passes(), "{}", dir.display());
    }
}
