//! The CUDA operations beside the LLM, on the emulator: their cases apart, and PyTorch's results.

use collm_engine::device::cpu::optimizer::Decay;
use collm_engine::device::cuda::optimizer::{Optimizer, Step, Trained};
use collm_engine::device::cuda::{Buffer, Precision};
use collm_engine::selftest::{self, Outcome};
use safetensors::{Dtype, SafeTensors};

use crate::cuda::cuda;

fn passed(outcomes: &[Outcome]) {
    for o in outcomes {
        println!("{} {}: {:.2e} of {:.2e}", o.operation, o.case, o.error, o.limit);
    }
    for o in outcomes {
        assert!(o.passed(), "{} {}: {:e} of {:e}, contained {}", o.operation, o.case, o.error, o.limit, o.contained);
    }
}

fn floats(file: &SafeTensors, name: &str) -> Vec<f32> {
    let t = file.tensor(name).unwrap();
    match t.dtype() {
        Dtype::F64 => bytemuck::pod_collect_to_vec::<u8, f64>(t.data()).iter().map(|&x| x as f32).collect(),
        _ => bytemuck::pod_collect_to_vec(t.data()),
    }
}

fn close(got: &[f32], want: &[f32], limit: f32, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let largest = want.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    for (g, w) in got.iter().zip(want) {
        assert!((g - w).abs() <= limit * largest, "{what}: {g} against {w}");
    }
}

#[test]
fn optimizer() {
    for precision in [Precision::F32, Precision::Bf16] {
        passed(&selftest::optimizer::cases(&cuda(precision)).unwrap());
    }
}

/// Steps of torch.optim.AdamW and torch.optim.Adam.
#[test]
fn optimizer_agrees_with_pytorch() {
    let cuda = cuda(Precision::Bf16);
    let bytes = include_bytes!("../fixtures/golden/collab-optim/golden.safetensors");
    let file = SafeTensors::deserialize(bytes).unwrap();
    let buffer = |name: &str| Buffer::from_host(&cuda, &floats(&file, name), name).unwrap();
    let (w, b) = (buffer("w0"), buffer("b0"));
    let (mut gw, mut gb) = (buffer("gw0"), buffer("gb0"));
    let trained = [Trained::new(&w, &gw, 1e-3), Trained::new(&b, &gb, 0.0)];
    let mut optimizer = Optimizer::new(&cuda, Decay::Decoupled, &trained).unwrap();
    let step = |lr: f64| Step { lr, scale: 1.0, max_norm: f64::INFINITY, zero_gradients: true };
    for t in 0..6 {
        gw.upload(&cuda, &floats(&file, &format!("gw{t}"))).unwrap();
        gb.upload(&cuda, &floats(&file, &format!("gb{t}"))).unwrap();
        optimizer.step(&cuda, step(floats(&file, &format!("lr{t}"))[0].into())).unwrap();
        for (got, name) in [(&w, "w"), (&b, "b")] {
            let want = floats(&file, &format!("{name}{}", t + 1));
            close(&got.download(&cuda, want.len()).unwrap(), &want, 1e-6, name);
        }
    }
    let w = buffer("w0");
    let mut optimizer = Optimizer::new(&cuda, Decay::Coupled, &[Trained::new(&w, &gw, 1e-4)]).unwrap();
    for t in 0..6 {
        gw.upload(&cuda, &floats(&file, &format!("gw{t}"))).unwrap();
        optimizer.step(&cuda, step(1e-3)).unwrap();
    }
    close(&w.download(&cuda, w.len()).unwrap(), &floats(&file, "adam_l2.w6"), 1e-6, "Adam with L2");
}
