//! The CUDA operations beside the LLM, on the emulator: PyTorch's results.

use collm_engine::collab::lightgcn::LightGcnConfig;
use collm_engine::collab::mf::MfConfig;
use collm_engine::collab::{self, training};
use collm_engine::data::Dataset;
use collm_engine::device::cpu::lightgcn::Adjacency;
use collm_engine::device::cpu::optimizer::Decay;
use collm_engine::device::cuda::lightgcn::LightGcn;
use collm_engine::device::cuda::mf::{BatchLists, Mf, Tables};
use collm_engine::device::cuda::optimizer::{Optimizer, Step, Trained};
use collm_engine::device::cuda::{Buffer, Cuda, Precision};
use safetensors::{Dtype, SafeTensors};

use crate::common::tiny_data;
use crate::cuda::cuda;
use crate::model::close;

fn floats(file: &SafeTensors, name: &str) -> Vec<f32> {
    let t = file.tensor(name).unwrap();
    match t.dtype() {
        Dtype::F64 => bytemuck::pod_collect_to_vec::<u8, f64>(t.data()).iter().map(|&x| x as f32).collect(),
        _ => bytemuck::pod_collect_to_vec(t.data()),
    }
}

fn ids(file: &SafeTensors, name: &str) -> Vec<u32> {
    let wide: Vec<i64> = bytemuck::pod_collect_to_vec(file.tensor(name).unwrap().data());
    wide.iter().map(|&id| id.try_into().unwrap()).collect()
}

fn labels(file: &SafeTensors) -> Vec<u8> {
    floats(file, "labels").iter().map(|&l| l as u8).collect()
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

/// nn.Embedding with padding, BCEWithLogitsLoss and autograd.
#[test]
fn mf_agrees_with_pytorch() {
    let cuda = cuda(Precision::Bf16);
    let bytes = include_bytes!("../fixtures/golden/collab-mf/golden.safetensors");
    let file = SafeTensors::deserialize(bytes).unwrap();
    let names = ["user_embedding.weight", "item_embedding.weight"];
    let [users, items] = names.map(|name| Buffer::from_host(&cuda, &floats(&file, name), name).unwrap());
    let [d_users, d_items] = [&users, &items].map(|b| Buffer::new(&cuda, b.len(), "gradient").unwrap());
    let (dim, n_users, n_items) = (8, users.len() / 8, items.len() / 8);
    let (batch_users, batch_items, labels) = (ids(&file, "users"), ids(&file, "items"), labels(&file));
    let mut batch = BatchLists::new(&cuda, n_users, n_items, labels.len()).unwrap();
    batch.set(&cuda, &batch_users, &batch_items, &labels).unwrap();
    let mf = Mf::new(&cuda, labels.len()).unwrap();
    let tables = Tables::new(dim, n_users, n_items, &users, &items).unwrap();
    let gradient = Tables::new(dim, n_users, n_items, &d_users, &d_items).unwrap();
    mf.loss_and_gradient(&cuda, tables, &batch, gradient, true).unwrap();
    close(&[mf.loss(&cuda).unwrap() as f32], &floats(&file, "loss"), 1e-6, "loss");
    for (got, name) in [(&d_users, names[0]), (&d_items, names[1])] {
        let want = floats(&file, &format!("grad.{name}"));
        close(&got.download(&cuda, want.len()).unwrap(), &want, 1e-6, name);
    }
    let [pu, pi] = [batch_users, batch_items].map(|ids| Buffer::from_host(&cuda, &ids, "ids").unwrap());
    let scores = Buffer::new(&cuda, labels.len(), "scores").unwrap();
    mf.scores(&cuda, tables, labels.len(), &pu, &pi, &scores).unwrap();
    close(&scores.download(&cuda, labels.len()).unwrap(), &floats(&file, "scores"), 1e-6, "scores");
}

/// The official propagation, dot products and autograd: forward, loss and the gradient all the way back to the tables.
#[test]
fn lightgcn_agrees_with_pytorch() {
    let cuda = cuda(Precision::Bf16);
    let bytes = include_bytes!("../fixtures/golden/collab-lightgcn/golden.safetensors");
    let file = SafeTensors::deserialize(bytes).unwrap();
    let (users, items) = (floats(&file, "embedding_user.weight"), floats(&file, "embedding_item.weight"));
    let dim = 16;
    let (n_users, n_items) = (users.len() / dim, items.len() / dim);
    let edges: Vec<(u32, u32)> = ids(&file, "edge_user").into_iter().zip(ids(&file, "edge_item")).collect();
    let graph = Adjacency::new(n_users, n_items, &edges);
    let layers = ids(&file, "n_layers")[0] as usize;
    let gcn = LightGcn::new(&cuda, &graph, dim).unwrap();
    let nodes = Buffer::from_host(&cuda, &[users, items].concat(), "nodes").unwrap();
    let [mean, d_mean, d_nodes] = [(); 3].map(|()| Buffer::new(&cuda, nodes.len(), "nodes").unwrap());
    gcn.propagate(&cuda, layers, &nodes, &mean).unwrap();
    let all = |users: &str, items: &str| [floats(&file, users), floats(&file, items)].concat();
    close(&mean.download(&cuda, nodes.len()).unwrap(), &all("all_users", "all_items"), 1e-6, "mean of the layers");
    let labels = labels(&file);
    let mut batch = BatchLists::new(&cuda, n_users, n_items, labels.len()).unwrap();
    batch.set(&cuda, &ids(&file, "users"), &ids(&file, "items"), &labels).unwrap();
    let mf = Mf::new(&cuda, labels.len()).unwrap();
    let [tables, gradient] = [&mean, &d_mean].map(|b| Tables::joined(dim, n_users, n_items, b).unwrap());
    mf.loss_and_gradient(&cuda, tables, &batch, gradient, false).unwrap();
    close(&[mf.loss(&cuda).unwrap() as f32], &floats(&file, "loss"), 1e-6, "loss");
    gcn.propagate(&cuda, layers, &d_mean, &d_nodes).unwrap();
    let want = all("grad.embedding_user.weight", "grad.embedding_item.weight");
    close(&d_nodes.download(&cuda, nodes.len()).unwrap(), &want, 1e-6, "gradient of the tables");
}

/// MF and LightGCN trained on the card follow the CPU, epoch by epoch.
#[test]
fn training_follows_the_cpu() {
    let cuda = cuda(Precision::Bf16);
    let dir = tempfile::tempdir().unwrap();
    let data = Dataset::load(&tiny_data(dir.path())).unwrap();
    let curves = |cuda: Option<&Cuda>| {
        let mut curve = Vec::new();
        let mut observe = |_: usize, loss: f64, auc: f64| {
            curve.push((loss, auc));
            true
        };
        let mf = MfConfig { dim: 8, learning_rate: 0.05, batch_size: 64, max_epochs: 5, ..MfConfig::default() };
        let start = collab::mf::Mf::init(data.n_users, data.n_items, mf.dim, mf.seed);
        let a = training::train(&data, start, &mf.recipe(), cuda, None, &mut observe).unwrap();
        let gcn = LightGcnConfig { dim: 8, batch_size: 64, max_epochs: 5, ..LightGcnConfig::default() };
        let start = collab::lightgcn::LightGcn::init(&data, &gcn);
        let b = training::train(&data, start, &gcn.recipe(), cuda, None, &mut observe).unwrap();
        let (a, b) = (a.model, b.model.tables);
        (curve, [a.users, a.items, b.users, b.items])
    };
    let (want, got) = (curves(None), curves(Some(&cuda)));
    assert_eq!(want.0.len(), 10);
    for ((loss, auc), (loss_cpu, auc_cpu)) in got.0.iter().zip(&want.0) {
        assert!((loss - loss_cpu).abs() < 1e-5 * loss_cpu, "loss {loss}, on the CPU {loss_cpu}");
        assert!((auc - auc_cpu).abs() < 2e-3, "AUC {auc}, on the CPU {auc_cpu}");
    }
    for (got, want) in got.1.iter().zip(&want.1) {
        close(got, want, 1e-4, "tables");
    }
}
