//! Vector clocks of the warps of a block: which accesses of other warps are ordered before now.
//!
//! A warp's own clock counts the synchronisations it took part in. An access carries the clock of its warp; it is ordered
//! before a later access of another warp if a chain of barriers carried that clock there.

/// Clock entries of all warps of a block.
pub type Entries = [u32; 32];

/// The clock of one warp: `known[v]` is the last clock of warp v whose accesses are ordered before this warp's next.
#[derive(Debug, Clone)]
pub struct Clock {
    /// This warp's number.
    pub warp: usize,
    /// This warp's present clock, from 1.
    pub now: u32,
    /// Clocks known of every warp.
    pub known: Entries,
}

impl Clock {
    /// The clock at a warp's start.
    pub fn new(warp: usize) -> Self {
        Clock { warp, now: 1, known: [0; 32] }
    }

    /// Publishes everything done so far into a synchronisation object and begins a new interval.
    pub fn release(&mut self, object: &mut Entries) {
        self.tick();
        join(object, &self.known);
    }

    /// Takes over what a synchronisation object carries.
    pub fn acquire(&mut self, object: &Entries) {
        join(&mut self.known, object);
    }

    /// The lanes of this warp synchronised among themselves.
    pub fn tick(&mut self) {
        self.known[self.warp] = self.now;
        self.now += 1;
    }
}

/// Elementwise maximum.
pub fn join(into: &mut Entries, from: &Entries) {
    for (a, b) in into.iter_mut().zip(from) {
        *a = (*a).max(*b);
    }
}
