//! Products by cuBLASLt, whose place a stand-in takes (`tests/cublaslt-standin`): every operation against float64, a golden model,
//! who is chosen, and what is said where the library is missing.

use std::path::PathBuf;
use std::process::{Command, Output};

use crate::common::{command, fixture, path};
use crate::cuda::{beside_the_tests, link_emulator, load_emulator};
use crate::model::{LABELS, adapter, weights};
use collm_engine::device::Device;
use collm_engine::device::cuda::{Cuda, GemmChoice, Precision};
use collm_engine::llm::cuda::Demand;
use collm_engine::llm::model::Model;
use collm_engine::selftest::bench;
use collm_engine::selftest::gemm::cublaslt_cases;

const VARIABLE: &str = "COLLM_CUBLASLT";

fn standin() -> PathBuf {
    beside_the_tests("libcublaslt_standin.so")
}

/// In a process that `again` started.
fn is_again() -> bool {
    std::env::var_os(VARIABLE).is_some_and(|name| name == standin().as_os_str())
}

/// This program again with the stand-in named, for tests that call the library of this repository.
fn again(test: &str, environment: &[(&str, &str)]) -> Output {
    let mut again = Command::new(std::env::current_exe().unwrap());
    again.args(["--exact", "--nocapture", test]).env(VARIABLE, standin()).envs(environment.iter().copied());
    again.output().unwrap()
}

fn said(out: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
}

/// In the process that `again` starts; in any other, starts it.
#[test]
fn every_case_agrees_with_float64() {
    if !is_again() {
        let out = again("cublaslt::every_case_agrees_with_float64", &[]);
        assert!(out.status.success() && said(&out).contains("1 passed"), "{}", said(&out));
        assert!(said(&out).contains("cuBLASLt 99.0.0"), "{}", said(&out));
        assert!(!said(&out).contains("refused"), "{}", said(&out));
        // Products with the wrong sign are seen, all but those that stay ours: so the stand-in's were judged.
        let out = again(
            "cublaslt::every_case_agrees_with_float64",
            &[("CUBLASLT_STANDIN_WRONG", "1"), ("CUEMU_CHECK", "off")],
        );
        assert!(said(&out).contains("40 of 46 failed"), "{}", said(&out));
        return;
    }
    load_emulator();
    for precision in [Precision::F32, Precision::Bf16] {
        let cuda = Cuda::open(0, precision).unwrap().with_gemm(GemmChoice::CublasLt);
        let outcomes = cublaslt_cases(&cuda).unwrap();
        let bad: Vec<_> = outcomes.iter().filter(|o| !o.passed()).collect();
        assert!(bad.is_empty(), "{} of {} failed, {precision:?}: {bad:#?}", bad.len(), outcomes.len());
    }
}

#[test]
fn the_plan_counts_the_workspace() {
    if !is_again() {
        let out = again("cublaslt::the_plan_counts_the_workspace", &[]);
        assert!(out.status.success() && said(&out).contains("1 passed"), "{}", said(&out));
        return;
    }
    load_emulator();
    let device = Device::cuda(0, Precision::Bf16);
    let on = |gemm: GemmChoice| Model::on(device.with_gemm(gemm), weights(16), 7, 9, 64).unwrap();
    let (ours, theirs) = (on(GemmChoice::Ours), on(GemmChoice::Auto));
    let lora = adapter(&ours);
    let demand = Demand {
        lora: Some(&lora),
        tokens: 64,
        prompts: LABELS.len(),
        frozen: false,
        dropout: true,
        score_tokens: 0,
        score_prompts: 0,
        vectors: 0,
        state: 0,
    };
    let plan = |model: &Model| model.cuda_plan(&demand).unwrap().unwrap();
    assert_eq!(plan(&ours).cublaslt, 0);
    let plan = plan(&theirs);
    assert_eq!(plan.cublaslt, 4 << 20, "an A100's");
    assert!(plan.to_string().contains("cuBLASLt 4.000"), "{plan}");
    assert_eq!(theirs.cuda_allocated() - ours.cuda_allocated(), plan.cublaslt);
}

#[test]
fn rates_are_shown_side_by_side() {
    if !is_again() {
        let out = again("cublaslt::rates_are_shown_side_by_side", &[("CUEMU_CHECK", "off")]);
        assert!(out.status.success() && said(&out).contains("1 passed"), "{}", said(&out));
        return;
    }
    load_emulator();
    let cuda = Cuda::open(0, Precision::Bf16).unwrap().with_gemm(GemmChoice::Auto);
    for row in bench::cuda(&cuda).unwrap().rows {
        let both = row.operation.starts_with("gemm") && !row.operation.contains("SwiGLU backward");
        assert_eq!(row.cublaslt.is_some(), both, "{row:?}");
    }
}

/// `verify` of a golden model on the emulated card.
fn verify(device: &str, name: &str, arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    let libraries = tempfile::tempdir().unwrap();
    link_emulator(libraries.path());
    let model = fixture("golden").join(name);
    let (adapter, golden) = (model.join("adapter"), model.join("golden.safetensors"));
    let mut all = vec!["verify", "--model", path(&model), "--adapter", path(&adapter), "--against", path(&golden)];
    all.extend(["--device", device]);
    all.extend(arguments);
    let mut command = command(&all);
    command.env("LD_LIBRARY_PATH", libraries.path()).env(VARIABLE, standin()).envs(environment.iter().copied());
    command.output().unwrap()
}

#[test]
fn golden_models_by_cublaslt() {
    for (name, device) in [("qwen2", "cuda:0:f32"), ("llama-gqa", "cuda:0:f32"), ("qwen2", "cuda")] {
        let out = verify(device, name, &["--gemm", "cublaslt"], &[]);
        let text = said(&out);
        assert!(out.status.success() && text.contains("0 failed"), "{name} {device}: {text}");
        assert!(text.contains("its wherever it can") && !text.contains("refused"), "{name} {device}: {text}");
    }
    let wrong = &[("CUBLASLT_STANDIN_WRONG", "1"), ("CUEMU_CHECK", "off")];
    let out = verify("cuda:0:f32", "qwen2", &["--gemm", "cublaslt"], wrong);
    assert!(!out.status.success(), "wrong products were not noticed: {}", said(&out));
    let out = verify("cuda:0:f32", "qwen2", &["--gemm", "ours"], wrong);
    assert!(out.status.success() && !said(&out).contains("cuBLASLt"), "ours alone: {}", said(&out));
}

/// A line for each shape that was timed, and who was taken.
fn chosen(text: &str) -> Vec<&str> {
    text.lines().filter(|l| l.starts_with("products: ") && l.contains(" us, cuBLASLt ")).collect()
}

#[test]
fn auto_takes_the_faster() {
    // On the emulator a function on the host is the faster, unless it sleeps. Checks are off for time's sake.
    for (delay, taken, of_ten) in [("0", ": cuBLASLt", 3), ("100000", ": ours", 7)] {
        let out = verify(
            "cuda:0:f32",
            "qwen2",
            &["--gemm", "auto"],
            &[("CUBLASLT_STANDIN_DELAY_US", delay), ("CUEMU_CHECK", "off")],
        );
        let text = said(&out);
        assert!(out.status.success() && text.contains("0 failed"), "{text}");
        let lines = chosen(&text);
        assert!(lines.len() >= 8, "{text}");
        let fit = lines.iter().filter(|l| l.ends_with(taken)).count();
        // Of products this small one or the other may be late on a busy machine.
        assert!(10 * fit >= of_ten * lines.len(), "delay {delay}: {lines:#?}");
        for wanted in ["x Wᵀ", "d_y W", "residual", "bias"] {
            assert!(lines.iter().any(|l| l.contains(wanted)), "no line says {wanted}: {lines:#?}");
        }
        assert!(text.contains("products: ours where SwiGLU's backward"), "{text}");
        // Once a shape.
        let shapes: std::collections::BTreeSet<_> = lines.iter().map(|l| l.split(": ours").next().unwrap()).collect();
        assert!(2 * shapes.len() >= lines.len(), "{lines:#?}");
    }
}

#[test]
fn a_library_without_an_algorithm_or_without_a_file() {
    let out = verify(
        "cuda:0:f32",
        "qwen2",
        &["--gemm", "cublaslt"],
        &[("CUBLASLT_STANDIN_NONE", "1"), ("CUEMU_CHECK", "off")],
    );
    assert!(out.status.success() && said(&out).contains("has no algorithm for it"), "{}", said(&out));
    let missing = &[(VARIABLE, "/nonexistent/libcublasLt.so"), ("CUEMU_CHECK", "off")];
    let out = verify("cuda:0:f32", "qwen2", &[], missing);
    let text = said(&out);
    assert!(out.status.success(), "{text}");
    assert_eq!(text.lines().filter(|l| l.starts_with("products: ours; ")).count(), 1, "one line: {text}");
    let out = verify("cuda:0:f32", "qwen2", &["--gemm", "cublaslt"], missing);
    assert_eq!(out.status.code(), Some(1));
    let text = said(&out);
    assert!(text.contains("error: no cuBLASLt could be opened (/nonexistent/libcublasLt.so: cannot open"), "{text}");
    assert!(!text.contains("panicked"), "{text}");
    let out = verify("cuda", "qwen2", &["--gemm", "mine"], &[]);
    assert_eq!(out.status.code(), Some(2));
    assert!(said(&out).contains("is none of ours, cublaslt, auto"), "{}", said(&out));
}
