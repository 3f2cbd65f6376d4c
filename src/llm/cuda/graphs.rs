//! Passes as CUDA graphs, one for each shape that comes again.
//!
//! A shape that is new is run kernel by kernel; when it comes a second time its work is collected, and from then on it is one call
//! to the driver. Batches are filled up ([`super::filling`]) so that few shapes are met. What a graph names must not have moved: as
//! soon as anything was allocated on the card, all graphs are dropped. They take only memory that is left when all buffers are
//! there; the longest unused make room for new ones.

use crate::device::cuda::Cuda;
use crate::device::cuda::graph::Graph;
use crate::device::ops::Loss;
use crate::llm::Error;

use super::plan::Recompute;

/// Most shapes that are remembered.
const MOST: usize = 32;
/// What a kernel of a graph takes of the card's memory at most: what drivers before 550 were reported to; later ones take less.
const NODE_BYTES: usize = 64 << 10;

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Work {
    /// Scores; `mapped`: the slots' vectors are computed on the card.
    Score { loss: Loss, mapped: bool },
    /// Forward and backward.
    Train { loss: Loss, lora: bool, mapped: bool, d_vectors: bool },
    /// The optimizer's step.
    Step,
}

/// All that the launches of a pass depend on, other than what lies in buffers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Key {
    pub work: Work,
    /// Rows, frozen rows, prompts, vectors.
    pub rows: [usize; 4],
    /// Tiles of attention, of all blocks but the last and of the last.
    pub tiles: [[usize; 3]; 2],
    /// Probability of dropout.
    pub dropout: Option<f32>,
    pub lora: bool,
    pub recompute: Recompute,
}

impl Key {
    pub const STEP: Key = Key {
        work: Work::Step,
        rows: [0; 4],
        tiles: [[0; 3]; 2],
        dropout: None,
        lora: false,
        recompute: Recompute::Nothing,
    };
}

#[derive(Debug)]
struct Known {
    key: Key,
    graph: Option<(Graph, usize)>,
    /// There was no memory for its graph.
    refused: bool,
}

/// How often work was done kernel by kernel, was collected, and was one call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Kernel by kernel.
    pub plain: usize,
    /// Graphs made.
    pub made: usize,
    /// Runs of graphs.
    pub replayed: usize,
}

/// The graphs of one set of buffers.
#[derive(Debug, Default)]
pub(super) struct Graphs {
    /// The longest unused first.
    known: Vec<Known>,
    /// Of the card, when the graphs were made.
    allocations: usize,
    pub counts: Counts,
}

impl Graphs {
    /// Does the work of `key`.
    pub fn run(&mut self, cuda: &Cuda, key: Key, work: impl Fn() -> Result<(), Error>) -> Result<(), Error> {
        if !cuda.uses_graphs() {
            return work();
        }
        if self.allocations != cuda.allocations() {
            self.known.clear();
            self.allocations = cuda.allocations();
        }
        let place = self.known.iter().position(|k| k.key == key);
        let known = match place {
            Some(i) => self.known.remove(i),
            None => {
                if self.known.len() == MOST {
                    self.known.remove(0);
                }
                Known { key, graph: None, refused: false }
            }
        };
        self.known.push(known);
        if place.is_some() {
            self.make(cuda, &work)?;
        }
        match self.known.last().and_then(|k| k.graph.as_ref()) {
            Some((graph, _)) => {
                self.counts.replayed += 1;
                // SAFETY: nothing was allocated since the graph was made, so all buffers are where they were: they are replaced, but
                // not taken away, while the owner of the graphs lives.
                Ok(unsafe { cuda.run(graph) }?)
            }
            None => {
                self.counts.plain += 1;
                work()
            }
        }
    }

    /// A graph of the work of the last entry, if it has none and memory allows.
    fn make(&mut self, cuda: &Cuda, work: impl Fn() -> Result<(), Error>) -> Result<(), Error> {
        let Some((last, others)) = self.known.split_last_mut() else { return Ok(()) };
        if last.graph.is_some() || last.refused {
            return Ok(());
        }
        let collected = cuda.collect(work)?;
        let bytes = collected.nodes() * NODE_BYTES;
        let (free, total) = cuda.memory()?;
        // As much stays free as the plan leaves.
        let reserve = total / 32;
        let mut left = free;
        for other in others {
            if left >= bytes + reserve {
                break;
            }
            left += other.graph.take().map_or(0, |(_, bytes)| bytes);
        }
        last.refused = left < bytes + reserve;
        if !last.refused {
            last.graph = Some((cuda.instantiate(collected)?, bytes));
            self.counts.made += 1;
        }
        Ok(())
    }
}
