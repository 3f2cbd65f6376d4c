//! Vector clocks of the warps of a cluster: which accesses of other warps are ordered before now.
//!
//! A warp's own clock counts the synchronisations it took part in. An access carries the clock of its warp; it is ordered
//! before a later access of another warp if a chain of barriers carried that clock there. A second set of clocks tells
//! which writes have passed a proxy fence on the way: only those are visible to the asynchronous proxy (bulk copies and
//! `wgmma`).

/// Clocks of the 32 warps of one block.
type Row = [u32; 32];

/// Clock entries of all warps of a cluster, a row for each block; rows that are missing are zero.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Entries {
    known: Vec<Row>,
    fenced: Vec<Row>,
}

impl Entries {
    /// Elementwise maximum.
    pub fn join(&mut self, from: &Entries) {
        merge(&mut self.known, &from.known);
        merge(&mut self.fenced, &from.fenced);
    }
}

fn raise(into: &mut Row, from: &Row) {
    for (a, b) in into.iter_mut().zip(from) {
        *a = (*a).max(*b);
    }
}

fn merge(into: &mut Vec<Row>, from: &[Row]) {
    if into.len() < from.len() {
        into.resize(from.len(), [0; 32]);
    }
    for (into, from) in into.iter_mut().zip(from) {
        raise(into, from);
    }
}

/// The clock of one warp: what it knows of warp v of block r is the last clock whose accesses are ordered before its next.
#[derive(Debug, Clone)]
pub struct Clock {
    /// Rank of the warp's block in its cluster.
    pub rank: usize,
    /// This warp's number.
    pub warp: usize,
    /// This warp's present clock, from 1.
    pub now: u32,
    /// What is known of the own block: nearly all questions are about it.
    own: Row,
    entries: Entries,
}

impl Clock {
    /// The clock at a warp's start.
    pub fn new(rank: usize, warp: usize) -> Self {
        let entries = Entries { known: vec![[0; 32]; rank + 1], fenced: vec![[0; 32]; rank + 1] };
        Clock { rank, warp, now: 1, own: [0; 32], entries }
    }

    /// The last clock of a warp that is ordered before now.
    #[inline]
    pub fn known(&self, rank: usize, warp: usize) -> u32 {
        if rank == self.rank {
            return self.own[warp];
        }
        self.entries.known.get(rank).map_or(0, |row| row[warp])
    }

    /// The last clock of a warp whose writes the asynchronous proxy sees.
    #[inline]
    pub fn fenced(&self, rank: usize, warp: usize) -> u32 {
        self.entries.fenced.get(rank).map_or(0, |row| row[warp])
    }

    /// Publishes everything done so far into a synchronisation object and begins a new interval.
    pub fn release(&mut self, object: &mut Entries) {
        self.tick();
        self.entries.known[self.rank] = self.own;
        object.join(&self.entries);
    }

    /// Takes over what a synchronisation object carries.
    pub fn acquire(&mut self, object: &Entries) {
        self.entries.join(object);
        raise(&mut self.own, &self.entries.known[self.rank]);
    }

    /// The lanes of this warp synchronised among themselves.
    pub fn tick(&mut self) {
        self.own[self.warp] = self.now;
        self.now += 1;
    }

    /// A proxy fence: all that is ordered before now becomes visible to the asynchronous proxy. A fence of some lanes counts
    /// for the warp. It does not order the lanes, so what is known stays as it is.
    pub fn fence_proxy(&mut self) {
        let Entries { known, fenced } = &mut self.entries;
        merge(fenced, known);
        raise(&mut fenced[self.rank], &self.own);
        fenced[self.rank][self.warp] = self.now;
        self.now += 1;
    }
}
