//! Buffers of the passes on a card, kept from batch to batch: they grow when a batch needs more than any before.

use super::adapter::{DeviceAdapter, Product};
use super::filling::{filled, filled_segments};
use super::graphs::{Counts, Graphs, Key, Work};
use super::mapping::DeviceMapping;
use super::model::Model;
use super::plan::{Demand, Recompute, Room, Widths};
use crate::device::cpu::splice::Source;
use crate::device::cuda::attention::Tables;
use crate::device::cuda::lora::{Adapter, InputMask, Lora};
use crate::device::cuda::mask::{Numbers, mask_words};
use crate::device::cuda::memory::{Elements, from_elements};
use crate::device::cuda::{Buffer, Cuda, Rows, Scalar};
use crate::device::ops::Dropout;
use crate::llm::Error;
use crate::llm::batch::PackedBatch;
use crate::llm::peft::{LoraTensors, TARGETS, Target};

/// Activations of one block, all rows of the batch (of the last block, query side: one row a prompt).
#[derive(Debug)]
pub(super) struct Saved {
    pub inv_rms: Buffer<f32>,
    /// `[n, q | k | v | u]`, turned; of the last block `[n, k | v | u]`.
    pub qkv: Elements,
    pub attn: Elements,
    pub lse: Buffer<f32>,
    /// Between attention and MLP, `[n_q, hidden + tail]`.
    pub mid: Elements,
    pub mid_inv_rms: Buffer<f32>,
    /// `[n_q, 2 · intermediate + tail]`, gate and up in turn.
    pub gate_up: Elements,
    /// `[n_q, intermediate]`; kept only where down's adapter is trained.
    pub act: Elements,
}

/// Which rows a product runs over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// All tokens.
    All,
    /// The last token of each prompt.
    Last,
}

/// Buffers and the batch they hold.
#[derive(Debug)]
pub struct Workspace {
    pub(super) n: usize,
    /// Those that fill the batch up included.
    pub(super) n_prompts: usize,
    /// Those that were given.
    pub(super) n_given: usize,
    pub(super) first: usize,
    pub(super) dropout: Option<Dropout>,
    /// Vectors that slots may read.
    pub(super) n_vectors: usize,
    recompute: Recompute,
    /// Kept inputs of blocks, and sets of activations, that this pass uses.
    kept: (usize, usize),
    /// Inputs of the blocks, `[n, hidden + tail]`: after the norm has added the last product's adapter, the residual stream whole.
    xs: Vec<Elements>,
    saved: Vec<Saved>,
    pub(super) adapter: Option<DeviceAdapter>,
    has_lora: bool,
    pub(super) tables: Tables,
    pub(super) tables_last: Tables,
    pub(super) sources: Buffer<i32>,
    pub(super) positions: Buffer<u32>,
    pub(super) q_positions: Buffer<u32>,
    tokens: Buffer<u32>,
    q_tokens: Buffer<u32>,
    pub(super) last_rows: Buffer<i32>,
    /// Counted from the first row with a gradient.
    pub(super) last_rows_d: Buffer<i32>,
    /// The row that reads each vector, counted as above; −1: none does.
    pub(super) slot_rows: Buffer<i32>,
    pub(super) vectors: Buffer<f32>,
    pub(super) d_vectors: Buffer<f32>,
    pub(super) labels: Buffer<f32>,
    pub(super) weights: Buffer<f32>,
    pub(super) scores: Buffer<f32>,
    pub(super) losses: Buffer<f32>,
    /// The losses of a step, those of its micro-batches one after another.
    pub(super) step_losses: Buffer<f32>,
    /// How many of them are there.
    n_losses: usize,
    numbers: Buffer<Numbers>,
    masks: [Buffer<u32>; 3],
    pub(super) partials: Buffer<f32>,
    pub(super) delta: Buffer<f32>,
    pub(super) last_x: Elements,
    pub(super) q_last: Elements,
    pub(super) h: Elements,
    pub(super) h_q: Elements,
    pub(super) x_q: Elements,
    pub(super) y: Elements,
    pub(super) d_x: Elements,
    pub(super) d_x_last: Elements,
    pub(super) d_h: Elements,
    pub(super) d_gate_up: Elements,
    pub(super) d_attn: Elements,
    pub(super) d_qkv: Elements,
    pub(super) d_q_last: Elements,
    pub(super) graphs: Graphs,
}

/// What a pass is given.
#[derive(Debug)]
pub(super) struct Input<'a> {
    pub lora: LoraFrom<'a>,
    pub dropout: Option<Dropout>,
    pub batch: &'a PackedBatch,
    pub vectors: Vectors<'a>,
    /// Labels and the factor of each row's gradient; `None` without a backward pass.
    pub train: Option<(&'a [f32], f32)>,
    /// The batch is filled up to one of few sizes.
    pub fill: bool,
}

/// The adapter of a pass.
#[derive(Clone, Copy, Debug)]
pub(super) enum LoraFrom<'a> {
    /// None.
    Nowhere,
    /// The host's: copied and packed for this pass, its gradients start at zero.
    Host(&'a LoraTensors),
    /// The one in the workspace, packed already; gradients are added to what is there.
    Resident,
}

impl<'a> From<Option<&'a LoraTensors>> for LoraFrom<'a> {
    fn from(lora: Option<&'a LoraTensors>) -> Self {
        lora.map_or(LoraFrom::Nowhere, LoraFrom::Host)
    }
}

/// What slots are filled with.
#[derive(Debug)]
pub(super) enum Vectors<'a> {
    /// `[n, hidden]`, ready.
    Ready(&'a [f32]),
    /// Collaborative vectors `[n, dim]`, and what maps them.
    Mapped(&'a mut DeviceMapping, &'a [f32]),
}

/// Losses that there is room for from the start.
pub(super) const LOSSES: usize = 1024;

pub(super) fn grow<T: Scalar>(cuda: &Cuda, buffer: &mut Buffer<T>, len: usize, what: &str) -> Result<(), Error> {
    if buffer.len() < len {
        // Freed first: old and new need not fit side by side.
        *buffer = Buffer::new(cuda, 0, what)?;
        *buffer = Buffer::new(cuda, len, what)?;
    }
    Ok(())
}

impl Workspace {
    /// Empty buffers.
    pub fn new(model: &Model) -> Result<Self, Error> {
        let cuda = &model.cuda;
        macro_rules! empty {
            () => {
                Buffer::new(cuda, 0, "buffers")?
            };
        }
        Ok(Workspace {
            n: 0,
            n_prompts: 0,
            n_given: 0,
            first: 0,
            dropout: None,
            n_vectors: 0,
            recompute: Recompute::Nothing,
            kept: (1, 1),
            xs: Vec::new(),
            saved: Vec::new(),
            adapter: None,
            has_lora: false,
            tables: Tables::default(),
            tables_last: Tables::default(),
            sources: empty!(),
            positions: empty!(),
            q_positions: empty!(),
            tokens: empty!(),
            q_tokens: empty!(),
            last_rows: empty!(),
            last_rows_d: empty!(),
            slot_rows: empty!(),
            vectors: empty!(),
            d_vectors: empty!(),
            labels: empty!(),
            scores: empty!(),
            weights: empty!(),
            losses: empty!(),
            step_losses: empty!(),
            n_losses: 0,
            numbers: Buffer::new(cuda, 1, "buffers")?,
            masks: [empty!(), empty!(), empty!()],
            partials: empty!(),
            delta: empty!(),
            last_x: empty!(),
            q_last: empty!(),
            h: empty!(),
            h_q: empty!(),
            x_q: empty!(),
            y: empty!(),
            d_x: empty!(),
            d_x_last: empty!(),
            d_h: empty!(),
            d_gate_up: empty!(),
            d_attn: empty!(),
            d_qkv: empty!(),
            d_q_last: empty!(),
            graphs: Graphs::default(),
        })
    }

    /// Puts an adapter on the card, unless there is one of its shape. Returns it.
    pub(super) fn place(&mut self, model: &Model, lora: &LoraTensors) -> Result<&mut DeviceAdapter, Error> {
        if !self.adapter.as_ref().is_some_and(|a| a.fits(lora)) {
            self.adapter = None;
            self.adapter = Some(DeviceAdapter::new(&model.cuda, lora, model.layers.len())?);
        }
        Ok(self.adapter.as_mut().expect("just made"))
    }

    /// Makes room for the losses of all rows of a step.
    pub(super) fn begin_step(&mut self, model: &Model, rows: usize) -> Result<(), Error> {
        self.n_losses = 0;
        // Steps differ little in size: the next one should not need more.
        let room = rows.next_power_of_two().max(LOSSES);
        if self.step_losses.len() < rows { grow(&model.cuda, &mut self.step_losses, room, "losses") } else { Ok(()) }
    }

    /// Puts the losses of the batch behind those of the step's others.
    pub(super) fn keep_losses(&mut self, cuda: &Cuda) -> Result<(), Error> {
        self.step_losses.copy_from(cuda, self.n_losses, &self.losses, self.n_given)?;
        self.n_losses += self.n_given;
        Ok(())
    }

    /// Makes room for all passes of a plan with the adapter that was placed, so that none of them allocates.
    pub(super) fn reserve(&mut self, model: &Model, demand: &Demand) -> Result<(), Error> {
        self.has_lora = self.adapter.is_some();
        for room in demand.rooms() {
            self.make_room(model, &room)?;
        }
        self.begin_step(model, LOSSES)
    }

    /// Takes a batch: uploads it, packs the adapter, lists attention's work, makes room.
    pub(super) fn begin(&mut self, model: &Model, input: Input) -> Result<(), Error> {
        let cuda = &model.cuda;
        if !input.batch.given.is_empty() {
            return Err(Error::Shape { what: "keys and values are given, which passes on a card do not take".into() });
        }
        let Input { lora, dropout, batch, vectors, train, fill } = input;
        self.n_given = batch.n_prompts();
        let larger = fill.then(|| filled(batch));
        let batch = larger.as_ref().unwrap_or(batch);
        (self.n, self.n_prompts, self.first) = (batch.n_rows(), batch.n_prompts(), batch.first_gradient);
        self.dropout = dropout.filter(|d| d.p > 0.0);
        self.has_lora = !matches!(lora, LoraFrom::Nowhere);
        if let LoraFrom::Host(lora) = lora {
            let adapter = self.place(model, lora)?;
            adapter.load(cuda, lora)?;
            adapter.pack(cuda, &model.ops.lora)?;
            let len = adapter.gradients.len();
            adapter.gradients.clear(cuda, len)?;
        }
        let hidden = model.config.hidden_size;
        let (p, save) = (self.n_prompts, train.is_some());
        let n_vectors = match &vectors {
            // As many for each prompt that fills up.
            Vectors::Ready(vectors) if p > self.n_given => vectors.len() / hidden / self.n_given.max(1) * p,
            Vectors::Ready(vectors) => vectors.len() / hidden,
            // Each prompt has as many, one that fills up, too.
            Vectors::Mapped(mapping, x) => mapping.count(x) * mapping.out() / hidden / self.n_given.max(1) * p,
        };
        let room = Room {
            n: self.n,
            first: self.first,
            prompts: p,
            vectors: n_vectors,
            segments: if fill { filled_segments(self.n_given) } else { batch.segments.len() },
            train: save,
            dropout: self.dropout.is_some(),
        };
        self.make_room(model, &room)?;
        let mut sources = Vec::with_capacity(self.n);
        let mut slot_rows = vec![-1; n_vectors];
        for (row, source) in batch.sources.iter().enumerate() {
            sources.push(match *source {
                Source::Token(id) => {
                    let vocab = model.config.vocab_size;
                    if id as usize >= vocab {
                        return Err(Error::Shape { what: format!("token {id} of a vocabulary of {vocab}") });
                    }
                    id as i32
                }
                Source::Vector(v) => {
                    if v as usize >= n_vectors {
                        return Err(Error::Shape { what: format!("slot vector {v} of {n_vectors}") });
                    }
                    if row >= self.first {
                        slot_rows[v as usize] = (row - self.first) as i32;
                    }
                    -1 - v as i32
                }
            });
        }
        let gather = |from: &[u32]| -> Vec<u32> { batch.last_rows.iter().map(|&r| from[r]).collect() };
        self.sources.upload(cuda, &sources)?;
        self.positions.upload(cuda, &batch.positions)?;
        self.q_positions.upload(cuda, &gather(&batch.positions))?;
        self.tokens.upload(cuda, &batch.step_tokens)?;
        self.q_tokens.upload(cuda, &gather(&batch.step_tokens))?;
        let last: Vec<i32> = batch.last_rows.iter().map(|&r| r as i32).collect();
        self.last_rows.upload(cuda, &last)?;
        match vectors {
            Vectors::Ready(vectors) if p > self.n_given => {
                let mut vectors = vectors.to_vec();
                vectors.resize(n_vectors * hidden, 0.0);
                self.vectors.upload(cuda, &vectors)?;
            }
            Vectors::Ready(vectors) => self.vectors.upload(cuda, vectors)?,
            Vectors::Mapped(mapping, x) => mapping.load(cuda, x, n_vectors * hidden / mapping.out())?,
        }
        if let Some((labels, weight)) = train {
            let last: Vec<i32> = last.iter().map(|&r| r - self.first as i32).collect();
            self.last_rows_d.upload(cuda, &last)?;
            self.slot_rows.upload(cuda, &slot_rows)?;
            // Rows that fill up have no say.
            let padded = |values: &mut dyn Iterator<Item = f32>| -> Vec<f32> {
                values.chain(std::iter::repeat(0.0)).take(p).collect()
            };
            self.labels.upload(cuda, &padded(&mut labels.iter().copied()))?;
            self.weights.upload(cuda, &padded(&mut std::iter::repeat_n(weight, self.n_given)))?;
        }
        if let Some(dropout) = &self.dropout {
            self.numbers.upload(cuda, &[Numbers::of(dropout)])?;
        }
        self.n_vectors = n_vectors;
        let (last_segments, none) = (batch.last_segments(), Vec::new());
        let (backward, backward_last) =
            if save { (batch.gradient_segments(), &last_segments) } else { (Vec::new(), &none) };
        let first = if save { self.first } else { self.n };
        if fill {
            let most = room.segments;
            self.tables.prepare_filled(cuda, &batch.segments, &backward, first, self.n, most)?;
            self.tables_last.prepare_filled(cuda, &last_segments, backward_last, first, self.n, most)?;
        } else {
            self.tables.prepare(cuda, &batch.segments, &backward, first)?;
            self.tables_last.prepare(cuda, &last_segments, backward_last, first)?;
        }
        Ok(())
    }

    /// What the launches of `work` on the batch depend on.
    pub(super) fn key(&self, work: Work) -> Key {
        let vectors = match work {
            Work::Score { mapped: false, .. } => 0,
            _ => self.n_vectors,
        };
        Key {
            work,
            rows: [self.n, self.first, self.n_prompts, vectors],
            tiles: [self.tables.tiles(), self.tables_last.tiles()],
            dropout: self.dropout.map(|d| d.p),
            lora: self.has_lora,
            recompute: self.recompute,
        }
    }

    /// Does `pass`, which depends on what `key` says alone, kernel by kernel or as a graph.
    pub(super) fn run(
        &mut self,
        cuda: &Cuda,
        key: Key,
        pass: impl Fn(&Workspace) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut graphs = std::mem::take(&mut self.graphs);
        let done = graphs.run(cuda, key, || pass(self));
        self.graphs = graphs;
        done
    }

    /// How passes have been run so far.
    pub fn counts(&self) -> Counts {
        self.graphs.counts
    }

    fn make_room(&mut self, model: &Model, room: &Room) -> Result<(), Error> {
        let cuda = &model.cuda;
        let heads = model.heads();
        let size = model.precision().bytes();
        let Room { n, prompts: p, vectors, train: save, .. } = *room;
        let widths = Widths::new(model, self.lora());
        let Widths { hidden, inter, q_width, qkv, x, mid, gate_up, stream, .. } = widths;
        for buffer in [&mut self.positions, &mut self.tokens] {
            grow(cuda, buffer, n, "a batch")?;
        }
        grow(cuda, &mut self.sources, n, "a batch")?;
        for buffer in [&mut self.q_positions, &mut self.q_tokens] {
            grow(cuda, buffer, p, "a batch")?;
        }
        grow(cuda, &mut self.last_rows, p, "a batch")?;
        grow(cuda, &mut self.scores, p, "scores")?;
        grow(cuda, &mut self.vectors, vectors * hidden, "CIE vectors")?;
        let [all, last] = room.tables();
        self.tables.reserve(cuda, all.0, all.1, room.segments)?;
        self.tables_last.reserve(cuda, last.0, last.1, room.segments)?;
        let (inputs, sets) = self.recompute.kept(save, model.layers.len());
        self.kept = (inputs, sets);
        while self.xs.len() < inputs {
            self.xs.push(Buffer::new(cuda, 0, "activations")?);
        }
        while self.saved.len() < sets {
            let empty = || Buffer::new(cuda, 0, "activations");
            let factors = || Buffer::new(cuda, 0, "activations");
            self.saved.push(Saved {
                inv_rms: factors()?,
                qkv: empty()?,
                attn: empty()?,
                lse: factors()?,
                mid: empty()?,
                mid_inv_rms: factors()?,
                gate_up: empty()?,
                act: empty()?,
            });
        }
        let acts = if save && x > hidden { sets } else { 1 };
        for (l, s) in self.saved.iter_mut().take(sets).enumerate() {
            grow(cuda, &mut s.inv_rms, n, "activations: norm")?;
            grow(cuda, &mut s.qkv, n * qkv * size, "activations: q, k, v")?;
            grow(cuda, &mut s.attn, n * q_width * size, "activations: attention")?;
            grow(cuda, &mut s.lse, n * heads.n_heads, "activations: log-sum-exp")?;
            grow(cuda, &mut s.mid, n * mid * size, "activations: mid")?;
            grow(cuda, &mut s.mid_inv_rms, n, "activations: norm")?;
            grow(cuda, &mut s.gate_up, n * gate_up * size, "activations: gate and up")?;
            if l < acts {
                grow(cuda, &mut s.act, n * inter * size, "activations: act")?;
            }
        }
        self.xs.iter_mut().take(inputs).try_for_each(|b| grow(cuda, b, n * x * size, "activations: x"))?;
        grow(cuda, &mut self.last_x, p * x * size, "activations: last x")?;
        grow(cuda, &mut self.q_last, p * widths.q_last * size, "activations: last q")?;
        grow(cuda, &mut self.h, n * hidden * size, "normed rows")?;
        grow(cuda, &mut self.h_q, p * hidden * size, "normed rows")?;
        grow(cuda, &mut self.x_q, p * hidden * size, "last rows")?;
        grow(cuda, &mut self.y, p * hidden * size, "final rows")?;
        if room.dropout {
            let widest = mask_words(widths.widest_input());
            self.masks.iter_mut().try_for_each(|m| grow(cuda, m, n * widest, "dropout masks"))?;
        }
        if !save {
            return Ok(());
        }
        for buffer in [&mut self.labels, &mut self.weights, &mut self.losses] {
            grow(cuda, buffer, p, "losses")?;
        }
        grow(cuda, &mut self.last_rows_d, p, "a batch")?;
        grow(cuda, &mut self.slot_rows, vectors, "a batch")?;
        grow(cuda, &mut self.d_vectors, vectors * hidden, "CIE gradients")?;
        let d_rows = n - room.first;
        grow(cuda, &mut self.d_x, d_rows * stream * size, "gradients: x")?;
        grow(cuda, &mut self.d_x_last, p * stream * size, "gradients: last x")?;
        let d_h = d_rows.max(p) * hidden;
        grow(cuda, &mut self.d_h, d_h * size, "gradients: normed rows")?;
        grow(cuda, &mut self.d_gate_up, d_rows.max(p) * gate_up * size, "gradients: gate and up")?;
        grow(cuda, &mut self.d_attn, d_rows.max(p) * q_width * size, "gradients: attention")?;
        grow(cuda, &mut self.d_qkv, d_rows * qkv * size, "gradients: q, k, v")?;
        grow(cuda, &mut self.d_q_last, p * widths.q_last * size, "gradients: last q")?;
        grow(cuda, &mut self.delta, d_rows.max(p) * heads.n_heads, "gradients: attention")?;
        if self.has_lora {
            grow(cuda, &mut self.partials, Lora::partials(d_rows.max(p), widths.widest_output()), "gradients: LoRA")?;
        }
        Ok(())
    }

    /// Sets what is kept for backward; buffers follow with the next batch.
    pub(in crate::llm) fn set_recompute(&mut self, recompute: Recompute) {
        self.recompute = recompute;
    }

    /// The adapter of this pass.
    pub(super) fn lora(&self) -> Option<&DeviceAdapter> {
        self.adapter.as_ref().filter(|_| self.has_lora)
    }

    /// Adapter columns of a product's rows.
    pub(super) fn tail(&self, l: usize, product: Product) -> usize {
        self.lora().map_or(0, |a| a.tail(l, product))
    }

    /// Each block must run forward again before it runs backward.
    pub(super) fn recomputes(&self) -> bool {
        self.recompute == Recompute::Blocks
    }

    /// Activations of block `l`.
    pub(super) fn saved(&self, l: usize) -> &Saved {
        &self.saved[l % self.kept.1]
    }

    /// Where block `l`'s act goes.
    pub(super) fn act(&self, l: usize) -> &Elements {
        let own = &self.saved(l).act;
        if own.is_empty() { &self.saved[0].act } else { own }
    }

    /// Input of block `l`, with the columns of the product that made it.
    pub(super) fn x(&self, model: &Model, l: usize) -> Rows {
        let tail = if l == 0 { 0 } else { self.tail(l - 1, Product::Down) };
        Rows::new(&self.xs[l % self.kept.0], model.precision(), self.n, model.config.hidden_size + tail)
    }

    /// Output of the last block.
    pub(super) fn last_x(&self, model: &Model) -> Rows {
        let tail = self.tail(model.layers.len() - 1, Product::Down);
        Rows::new(&self.last_x, model.precision(), self.n_prompts, model.config.hidden_size + tail)
    }

    /// Gradient of the residual stream, all rows that have one.
    pub(super) fn d_x_all(&self, model: &Model) -> Rows {
        let width = self.d_stream(model);
        Rows::new(&self.d_x, model.precision(), self.n - self.first, width).columns(0, model.config.hidden_size)
    }

    /// Gradient of the residual stream of the last block's queries.
    pub(super) fn d_x_last(&self, model: &Model) -> Rows {
        let width = self.d_stream(model);
        Rows::new(&self.d_x_last, model.precision(), self.n_prompts, width).columns(0, model.config.hidden_size)
    }

    fn d_stream(&self, model: &Model) -> usize {
        let tails = (0..model.layers.len()).flat_map(|l| [self.tail(l, Product::O), self.tail(l, Product::Down)]);
        model.config.hidden_size + tails.max().unwrap_or(0)
    }

    /// The adapter of block `l`'s down projection, whose u follows the residual stream that it made.
    pub(super) fn down_adapter(&self, model: &Model, l: usize) -> Option<Adapter> {
        self.lora()?.adapter(l, Product::Down, Target::Down, model.config.hidden_size)
    }

    /// Makes the dropout masks of some targets of block `l` for rows from `first` on, and returns their addresses.
    pub(super) fn masks(
        &self,
        model: &Model,
        l: usize,
        targets: &[(Target, usize)],
        side: Side,
        first: usize,
        rows: usize,
    ) -> Result<Vec<u64>, Error> {
        if self.dropout.is_none() {
            return Ok(Vec::new());
        }
        let tokens = if side == Side::All { &self.tokens } else { &self.q_tokens };
        let mut addresses = Vec::new();
        for (&(target, width), mask) in targets.iter().zip(&self.masks) {
            let module = (l * TARGETS.len() + target as usize) as u32;
            model.ops.mask.run(&model.cuda, &self.numbers, module, tokens, first, rows, width, mask)?;
            addresses.push(mask.address());
        }
        Ok(addresses)
    }

    /// The mask at `index` of the last [`Self::masks`], for gradients of A.
    pub(super) fn input_mask(&self, index: usize) -> Option<InputMask> {
        self.dropout.as_ref().map(|d| InputMask { mask: self.masks[index].address(), scale: d.scale() })
    }

    /// Rows as host numbers, dense: `rows · columns` of them (adapter columns left out by the caller).
    pub(super) fn read(&self, model: &Model, rows: Rows) -> Result<Vec<f32>, Error> {
        let rows = rows.columns(0, model.config.hidden_size.min(rows.columns));
        let bytes = model.cuda.read(rows)?;
        Ok(from_elements(rows.precision, &bytes))
    }

    /// Adds the adapter's gradients.
    pub(super) fn add_gradients(&mut self, model: &Model, d_lora: &mut LoraTensors) -> Result<(), Error> {
        let Some(adapter) = self.adapter.as_mut().filter(|_| self.has_lora) else { return Ok(()) };
        let mut rest = adapter.read_gradients(&model.cuda)?;
        for slice in d_lora.slices_mut() {
            let (own, after) = rest.split_at(slice.len());
            slice.iter_mut().zip(own).for_each(|(d, g)| *d += g);
            rest = after;
        }
        Ok(())
    }
}
