//! Matrix factorisation (`kernels/mf.cu`): scores, loss and the gradient of both tables, as [`crate::collab::mf`] has them on the CPU.
//!
//! The host sorts a batch's rows by id ([`BatchLists`]), so that each table row sums its own terms in the order of the batch.

use super::context::Cuda;
use super::error::{Result, require};
use super::launch::{Kernel, arguments};
use super::memory::Buffer;

const THREADS: usize = 256;

/// log2 of the lanes that a row of `dim` values fills, 16 bytes each; at most a warp.
pub(super) fn lanes(dim: usize) -> u32 {
    (dim / 4).next_power_of_two().trailing_zeros().min(5)
}

/// A batch on the device, and its rows sorted by user and by item. Made once for the largest batch.
#[derive(Debug)]
pub struct BatchLists {
    n_users: usize,
    n_items: usize,
    n: usize,
    users: Buffer<u32>,
    items: Buffer<u32>,
    labels: Buffer<f32>,
    /// Of users, then of items: where an id's rows begin, `[ids + 1]`, and the rows, `[n]`.
    starts: [Buffer<u32>; 2],
    order: [Buffer<u32>; 2],
    host: Lists,
}

/// What is uploaded, kept to be used again.
#[derive(Debug, Default)]
struct Lists {
    starts: Vec<u32>,
    order: Vec<u32>,
    labels: Vec<f32>,
}

impl Lists {
    /// Rows in the order of their ids, rows of one id in theirs: a stable counting sort.
    fn sort(&mut self, ids: &[u32], n_ids: usize) {
        self.starts.clear();
        self.starts.resize(n_ids + 1, 0);
        ids.iter().for_each(|&id| self.starts[id as usize + 1] += 1);
        for i in 1..=n_ids {
            self.starts[i] += self.starts[i - 1];
        }
        self.order.resize(ids.len(), 0);
        for (row, &id) in ids.iter().enumerate() {
            let at = &mut self.starts[id as usize];
            self.order[*at as usize] = row as u32;
            *at += 1;
        }
        // Each start has moved to the next one's place.
        self.starts.copy_within(..n_ids, 1);
        self.starts[0] = 0;
    }
}

impl BatchLists {
    /// For batches of up to `rows` rows.
    pub fn new(cuda: &Cuda, n_users: usize, n_items: usize, rows: usize) -> Result<Self> {
        let ids = |n: usize, what: &str| Buffer::new(cuda, n, what);
        Ok(BatchLists {
            n_users,
            n_items,
            n: 0,
            users: ids(rows, "users of a batch")?,
            items: ids(rows, "items of a batch")?,
            labels: Buffer::new(cuda, rows, "labels of a batch")?,
            starts: [ids(n_users + 1, "lists of users")?, ids(n_items + 1, "lists of items")?],
            order: [ids(rows, "lists of users")?, ids(rows, "lists of items")?],
            host: Lists::default(),
        })
    }

    /// Sorts and uploads a batch: ids of users and items, labels 0 or 1.
    pub fn set(&mut self, cuda: &Cuda, users: &[u32], items: &[u32], labels: &[u8]) -> Result<()> {
        let n = labels.len();
        let fits = users.len() == n && items.len() == n && n <= self.labels.len();
        let within = |ids: &[u32], n: usize| ids.iter().all(|&id| (id as usize) < n);
        require(fits && within(users, self.n_users) && within(items, self.n_items), "mf", || {
            format!(
                "{} users, {} items, {n} labels; at most {} rows with ids below {} and {}",
                users.len(),
                items.len(),
                self.labels.len(),
                self.n_users,
                self.n_items
            )
        })?;
        self.n = n;
        self.host.labels.clear();
        self.host.labels.extend(labels.iter().map(|&l| f32::from(l)));
        self.users.upload(cuda, users)?;
        self.items.upload(cuda, items)?;
        self.labels.upload(cuda, &self.host.labels)?;
        for (side, (ids, n_ids)) in [(users, self.n_users), (items, self.n_items)].into_iter().enumerate() {
            self.host.sort(ids, n_ids);
            self.starts[side].upload(cuda, &self.host.starts)?;
            self.order[side].upload(cuda, &self.host.order)?;
        }
        Ok(())
    }

    /// Rows of the batch.
    pub fn len(&self) -> usize {
        self.n
    }

    /// True before the first batch.
    pub fn is_empty(&self) -> bool {
        self.n == 0
    }
}

/// Both tables, or gradients of them: users `[n_users, dim]`, items `[n_items, dim]`.
#[derive(Clone, Copy, Debug)]
pub struct Tables {
    dim: usize,
    n_users: usize,
    n_items: usize,
    users: u64,
    items: u64,
}

impl Tables {
    /// In a buffer each. `dim` is a multiple of 4.
    pub fn new(dim: usize, n_users: usize, n_items: usize, users: &Buffer<f32>, items: &Buffer<f32>) -> Result<Self> {
        let fits = users.len() >= n_users * dim && items.len() >= n_items * dim;
        require(fits && dim.is_multiple_of(4) && dim > 0, "mf", || {
            let (users, items) = (users.len(), items.len());
            format!("{users} and {items} values for {n_users} and {n_items} rows of {dim} (a multiple of 4)")
        })?;
        Ok(Tables { dim, n_users, n_items, users: users.address(), items: items.address() })
    }

    /// In one buffer, users first, as the nodes of a graph.
    pub fn joined(dim: usize, n_users: usize, n_items: usize, nodes: &Buffer<f32>) -> Result<Self> {
        let fits = nodes.len() >= (n_users + n_items) * dim;
        require(fits && dim.is_multiple_of(4) && dim > 0, "mf", || {
            format!("{} values for {n_users} + {n_items} rows of {dim} (a multiple of 4)", nodes.len())
        })?;
        Ok(Tables { dim, n_users, n_items, users: nodes.address(), items: nodes.at(n_users * dim) })
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Score {
    users: u64,
    items: u64,
    batch_users: u64,
    batch_items: u64,
    labels: u64,
    scores: u64,
    losses: u64,
    d_scores: u64,
    n: i32,
    dim: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Side {
    gradient: u64,
    other: u64,
    ids: u64,
    starts: u64,
    order: u64,
    rows: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Gradient {
    sides: [Side; 2],
    d_scores: u64,
    dim: i32,
    lanes: i32,
    padding: i32,
}

/// The kernels' handles and a batch's intermediate values.
#[derive(Debug)]
pub struct Mf {
    score: Kernel,
    gradient: Kernel,
    loss: Kernel,
    scores: Buffer<f32>,
    losses: Buffer<f32>,
    d_scores: Buffer<f32>,
    mean_loss: Buffer<f64>,
}

impl Mf {
    /// For batches of up to `rows` rows.
    pub fn new(cuda: &Cuda, rows: usize) -> Result<Self> {
        let kernel = |name| cuda.kernel("mf", name, THREADS as u32, 0);
        Ok(Mf {
            score: kernel("mf_score")?,
            gradient: kernel("mf_gradient")?,
            loss: kernel("mf_loss")?,
            scores: Buffer::new(cuda, rows, "scores")?,
            losses: Buffer::new(cuda, rows, "losses")?,
            d_scores: Buffer::new(cuda, rows, "gradients of scores")?,
            mean_loss: Buffer::zeros(cuda, 1, "loss")?,
        })
    }

    /// Scores of pairs: `users` and `items` hold `n` ids below the tables' rows each; `scores: [n]`.
    pub fn scores(
        &self,
        cuda: &Cuda,
        tables: Tables,
        n: usize,
        users: &Buffer<u32>,
        items: &Buffer<u32>,
        scores: &Buffer<f32>,
    ) -> Result<()> {
        require(users.len() >= n && items.len() >= n && scores.len() >= n, "mf", || {
            format!("{n} pairs in {} users, {} items and {} scores", users.len(), items.len(), scores.len())
        })?;
        let batch = (users.address(), items.address());
        self.launch_score(cuda, tables, n, batch, scores.address(), None)
    }

    /// Loss of the batch ([`Self::loss`]) and the gradient of both tables, which is overwritten: zero for ids that do not occur,
    /// and, with `padding`, for id 0.
    pub fn loss_and_gradient(
        &self,
        cuda: &Cuda,
        tables: Tables,
        batch: &BatchLists,
        gradient: Tables,
        padding: bool,
    ) -> Result<()> {
        let shape = |t: &Tables| (t.dim, t.n_users, t.n_items);
        let same =
            shape(&tables) == shape(&gradient) && (tables.n_users, tables.n_items) == (batch.n_users, batch.n_items);
        require(same && batch.n <= self.scores.len(), "mf", || {
            format!("{tables:?}, {gradient:?}, {} rows for {}", batch.n, self.scores.len())
        })?;
        let ids = (batch.users.address(), batch.items.address());
        self.launch_score(cuda, tables, batch.n, ids, self.scores.address(), Some(batch.labels.address()))?;
        let side = |i: usize, gradient: u64, other: u64, ids: u64, rows: usize| Side {
            gradient,
            other,
            ids,
            starts: batch.starts[i].address(),
            order: batch.order[i].address(),
            rows: rows as i32,
        };
        let lanes = lanes(tables.dim);
        let g = Gradient {
            sides: [
                side(0, gradient.users, tables.items, ids.1, batch.n_users),
                side(1, gradient.items, tables.users, ids.0, batch.n_items),
            ],
            d_scores: self.d_scores.address(),
            dim: tables.dim as i32,
            lanes: lanes as i32,
            padding: padding.into(),
        };
        let blocks = (batch.n_users.max(batch.n_items) << lanes).div_ceil(THREADS);
        let (losses, mean, n) = (self.losses.address(), self.mean_loss.address(), batch.n as i32);
        // SAFETY: the arguments are the kernels'; tables, gradients and lists were checked to hold all ids of the batch.
        unsafe {
            cuda.launch(self.gradient, [blocks, 2, 1], arguments![g])?;
            cuda.launch(self.loss, [1, 1, 1], arguments![losses, mean, n])
        }
    }

    /// Mean loss of the last batch; waits for it.
    pub fn loss(&self, cuda: &Cuda) -> Result<f64> {
        Ok(self.mean_loss.download(cuda, 1)?[0])
    }

    fn launch_score(
        &self,
        cuda: &Cuda,
        tables: Tables,
        n: usize,
        (batch_users, batch_items): (u64, u64),
        scores: u64,
        labels: Option<u64>,
    ) -> Result<()> {
        let score = Score {
            users: tables.users,
            items: tables.items,
            batch_users,
            batch_items,
            labels: labels.unwrap_or(0),
            scores,
            losses: self.losses.address(),
            d_scores: self.d_scores.address(),
            n: n as i32,
            dim: tables.dim as i32,
        };
        // SAFETY: the struct is the kernel's, and its buffers were checked to hold n rows; ids lie within the tables.
        unsafe { cuda.launch(self.score, [(32 * n).div_ceil(THREADS), 1, 1], arguments![score]) }
    }
}
