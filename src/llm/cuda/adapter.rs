//! A LoRA adapter on the card: float32 masters, the packed elements that the kernels read, float32 gradients.

use crate::device::cuda::gemm::Masked;
use crate::device::cuda::lora::{Adapter, Lora, MAX_RANK, Pack};
use crate::device::cuda::memory::Elements;
use crate::device::cuda::optimizer::Trained;
use crate::device::cuda::{Buffer, Cuda, Precision, Rows};
use crate::llm::Error;
use crate::llm::peft::{LoraPair, LoraTensors, Target};

/// The products of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Product {
    Qkv,
    O,
    GateUp,
    Down,
}

impl Product {
    pub const ALL: [Product; 4] = [Product::Qkv, Product::O, Product::GateUp, Product::Down];

    /// The linear layers that the product is made of, in the order of its columns.
    pub fn targets(self) -> &'static [Target] {
        match self {
            Product::Qkv => &[Target::Q, Target::K, Target::V],
            Product::O => &[Target::O],
            Product::GateUp => &[Target::Gate, Target::Up],
            Product::Down => &[Target::Down],
        }
    }
}

/// One pair.
#[derive(Clone, Debug)]
pub(super) struct Pair {
    pub target: Target,
    /// Float offsets of A and B in masters and gradients.
    pub a: usize,
    pub b: usize,
    pub in_features: usize,
    /// Address of packed B.
    pub packed_b: u64,
}

/// The adapters of one product of one block, in the order of its targets.
#[derive(Debug, Default)]
pub(super) struct Group {
    pub pairs: Vec<Pair>,
    /// Packed A, `[pairs · rank, in]`.
    a: Option<Elements>,
    /// Packed B of each pair, one after another; of gate and up, one matrix in turn.
    /// Only held: `packed_b` names places in it.
    _b: Option<Elements>,
}

impl Group {
    /// Place of a target among the pairs.
    pub fn place(&self, target: Target) -> Option<usize> {
        self.pairs.iter().position(|p| p.target == target)
    }
}

/// The whole adapter.
#[derive(Debug)]
pub(super) struct DeviceAdapter {
    /// What it was made for.
    shape: Vec<((usize, Target), usize, usize)>,
    pub rank: usize,
    /// Rounded up to a multiple of 8.
    pub padded: usize,
    pub scaling: f32,
    layers: Vec<[Group; 4]>,
    masters: Buffer<f32>,
    pub gradients: Buffer<f32>,
    table: Buffer<Pack>,
    staging: Vec<f32>,
}

fn shape(lora: &LoraTensors) -> Vec<((usize, Target), usize, usize)> {
    lora.tensors.iter().map(|(&at, p)| (at, p.a.len(), p.b.len())).collect()
}

impl DeviceAdapter {
    pub fn new(cuda: &Cuda, lora: &LoraTensors, n_layers: usize) -> Result<Self, Error> {
        let (rank, padded) = (lora.rank, lora.rank.next_multiple_of(8));
        if padded > MAX_RANK {
            return Err(Error::Shape {
                what: format!("LoRA's rank is {rank}; the CUDA kernels take up to {MAX_RANK}"),
            });
        }
        let total: usize = lora.tensors.values().map(|p| p.a.len() + p.b.len()).sum();
        let masters = Buffer::zeros(cuda, total, "LoRA's masters")?;
        let gradients = Buffer::zeros(cuda, total, "LoRA's gradients")?;
        let size = cuda.precision().bytes();
        let scaling = lora.scaling();
        let (mut layers, mut table) = (Vec::new(), Vec::new());
        // Masters lie in the order of the adapter's tensors: A before B.
        let mut at = 0;
        let mut offsets = std::collections::BTreeMap::new();
        for (&key, pair) in &lora.tensors {
            offsets.insert(key, at);
            at += pair.a.len() + pair.b.len();
        }
        for l in 0..n_layers {
            let mut groups: [Group; 4] = Default::default();
            for (group, product) in groups.iter_mut().zip(Product::ALL) {
                let found = product.targets().iter().filter_map(|&t| Some((t, lora.tensors.get(&(l, t))?)));
                let found: Vec<_> = found.collect();
                let Some((_, first)) = found.first() else { continue };
                let (count, in_features) = (found.len(), first.a.len() / rank);
                let a: Elements = Buffer::zeros(cuda, count * padded * in_features * size, "packed LoRA A")?;
                let in_turn = product == Product::GateUp;
                let outs: usize = found.iter().map(|(_, p)| p.b.len() / rank).sum();
                // Transposed, [rank, out] of each pair; of gate and up, [pairs · rank, 2 · out] with zeros in the other's columns.
                let columns_b = if in_turn { 2 * (first.b.len() / rank) * count } else { outs };
                let b: Elements = Buffer::zeros(cuda, columns_b * padded * size, "packed LoRA B")?;
                let mut column_b = 0;
                for (i, (target, pair)) in found.iter().enumerate() {
                    let out_features = pair.b.len() / rank;
                    let master = offsets[&(l, *target)];
                    table.push(Pack {
                        from: masters.at(master),
                        to: a.at(i * padded * in_features * size),
                        rows: rank as i32,
                        columns: in_features as i32,
                        rows_padded: padded as i32,
                        columns_padded: in_features as i32,
                        row_step: in_features as i32,
                        column_step: 1,
                        offset: 0,
                        scale: 1.0,
                    });
                    let (step, width, offset, to) = if in_turn {
                        (
                            2,
                            2 * out_features,
                            usize::from(*target == Target::Up),
                            b.at(i * padded * 2 * out_features * size),
                        )
                    } else {
                        (1, out_features, 0, b.at(column_b * padded * size))
                    };
                    table.push(Pack {
                        from: masters.at(master + pair.a.len()),
                        to,
                        rows: out_features as i32,
                        columns: rank as i32,
                        rows_padded: out_features as i32,
                        columns_padded: padded as i32,
                        row_step: step,
                        column_step: width as i32,
                        offset: offset as i32,
                        scale: scaling,
                    });
                    group.pairs.push(Pair {
                        target: *target,
                        a: master,
                        b: master + pair.a.len(),
                        in_features,
                        packed_b: if in_turn { b.address() } else { to },
                    });
                    column_b += out_features;
                }
                (group.a, group._b) = (Some(a), Some(b));
            }
            layers.push(groups);
        }
        let table = Buffer::from_host(cuda, &table, "LoRA's table")?;
        let (shape, staging) = (shape(lora), Vec::with_capacity(total));
        Ok(DeviceAdapter { shape, rank, padded, scaling, layers, masters, gradients, table, staging })
    }

    /// Bytes of an adapter on a card.
    pub fn bytes(lora: &LoraTensors, precision: Precision) -> usize {
        let padded = lora.rank.next_multiple_of(8);
        let packed = |(&(_, target), p): (&(usize, Target), &LoraPair)| {
            // B of gate and up lies with zeros in the other's columns.
            let columns = if Product::GateUp.targets().contains(&target) { 2 } else { 1 };
            (p.a.len() + columns * p.b.len()) / lora.rank * padded * precision.bytes() + 2 * size_of::<Pack>()
        };
        // Masters and gradients in float32.
        lora.n_params() * 8 + lora.tensors.iter().map(packed).sum::<usize>()
    }

    /// True if an adapter has the shapes that this was made for.
    pub fn fits(&self, lora: &LoraTensors) -> bool {
        self.rank == lora.rank && self.scaling == lora.scaling() && self.shape == shape(lora)
    }

    /// Copies the masters.
    pub fn load(&mut self, cuda: &Cuda, lora: &LoraTensors) -> Result<(), Error> {
        self.staging.clear();
        lora.tensors.values().for_each(|p| {
            self.staging.extend_from_slice(&p.a);
            self.staging.extend_from_slice(&p.b);
        });
        Ok(self.masters.upload(cuda, &self.staging)?)
    }

    /// Makes elements of the masters for the kernels.
    pub fn pack(&self, cuda: &Cuda, ops: &Lora) -> Result<(), Error> {
        Ok(ops.pack(cuda, &self.table)?)
    }

    /// The masters, into an adapter of the same shape.
    pub fn read(&self, cuda: &Cuda, lora: &mut LoraTensors) -> Result<(), Error> {
        let all = self.masters.download(cuda, self.masters.len())?;
        let mut rest = all.as_slice();
        for slice in lora.slices_mut() {
            let (own, after) = rest.split_at(slice.len());
            slice.copy_from_slice(own);
            rest = after;
        }
        Ok(())
    }

    /// What an optimizer changes: every A and B in the adapter's order.
    pub fn trained(&self, decay: f64) -> Vec<Trained> {
        let mut at = 0;
        let mut tensor = |len: usize| {
            let (weights, gradient) = (self.masters.at(at), self.gradients.at(at));
            at += len;
            Trained { weights, gradient, len, decay }
        };
        self.shape.iter().flat_map(|&(_, a, b)| [a, b]).map(&mut tensor).collect()
    }

    pub fn group(&self, l: usize, product: Product) -> &Group {
        &self.layers[l][product as usize]
    }

    /// Columns that the adapters of a product add to its rows.
    pub fn tail(&self, l: usize, product: Product) -> usize {
        self.group(l, product).pairs.len() * self.padded
    }

    /// Packed A of pairs `first..first + count` of a group.
    pub fn a(&self, cuda: &Cuda, l: usize, product: Product, first: usize, count: usize) -> Option<Rows> {
        let group = self.group(l, product);
        let a = group.a.as_ref().filter(|_| count > 0)?;
        let rows = Rows::new(a, cuda.precision(), group.pairs.len() * self.padded, group.pairs[0].in_features);
        Some(rows.rows(first * self.padded, count * self.padded))
    }

    /// The adapter of one target, whose u lies at `column` of its product's rows.
    pub fn adapter(&self, l: usize, product: Product, target: Target, column: usize) -> Option<Adapter> {
        let group = self.group(l, product);
        let place = group.place(target)?;
        Some(Adapter::new(column, self.padded, group.pairs[place].packed_b))
    }

    /// Gate and up as one adapter.
    pub fn gate_up(&self, l: usize, column: usize) -> Option<Adapter> {
        let group = self.group(l, Product::GateUp);
        let first = group.pairs.first()?;
        Some(Adapter::new(column, group.pairs.len() * self.padded, first.packed_b))
    }

    /// Adapter columns from `column` on with the masks of pairs `first..first + masks.len()`.
    pub fn masked(&self, column: usize, masks: &[u64]) -> Vec<Masked> {
        let place = |i: usize| column + i * self.padded;
        masks.iter().enumerate().map(|(i, &mask)| Masked { first: place(i), count: self.padded, mask }).collect()
    }

    /// All gradients, in the order of the adapter's tensors.
    pub fn read_gradients(&mut self, cuda: &Cuda) -> Result<&[f32], Error> {
        self.staging.resize(self.gradients.len(), 0.0);
        self.gradients.download_to(cuda, &mut self.staging)?;
        Ok(&self.staging)
    }
}
