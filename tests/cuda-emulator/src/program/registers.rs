//! Which registers an instruction reads and writes.

use super::{Address, Op, Reg, WarpKind, WgmmaA};

impl Op {
    /// Tells each register that is read, and each that is written; arguments of calls lie in memory. Registers that an
    /// operation does not use may be told as constants.
    pub fn registers(&self, mut read: impl FnMut(Reg), mut write: impl FnMut(Reg)) {
        let base = |address: &Address| address.base.unwrap_or(Reg::NONE);
        match self {
            Op::Lane { d, a, b, c, .. } | Op::Lop3 { d, a, b, c, .. } => {
                [*a, *b, *c].into_iter().for_each(read);
                write(*d);
            }
            Op::Compare { a, b, .. } => [*a, *b].into_iter().for_each(read),
            Op::NonZero { a, .. } => read(*a),
            Op::Select { d, a, b, .. } => {
                [*a, *b].into_iter().for_each(read);
                write(*d);
            }
            Op::BranchIndexed { index, .. } => read(*index),
            Op::Clock { d, .. } | Op::ActiveMask(d) => write(*d),
            Op::Load(load) => {
                read(base(&load.address));
                load.dest.iter().flatten().for_each(|(d, _)| write(*d));
            }
            Op::Store(store) => {
                read(base(&store.address));
                store.source.iter().for_each(|(s, _)| read(*s));
            }
            Op::Atomic(atomic) => {
                read(base(&atomic.address));
                read(atomic.c);
                atomic.b.iter().copied().for_each(read);
                atomic.dest.iter().copied().for_each(write);
            }
            Op::IsSpace(is) => read(is.a),
            Op::CopyAsync(copy) => {
                [base(&copy.to), base(&copy.from)].into_iter().chain(copy.source_bytes).for_each(read);
            }
            Op::Mbarrier(op) => {
                [base(&op.address)].into_iter().chain(op.operand).for_each(read);
                op.dest.into_iter().for_each(write);
            }
            Op::Bulk(bulk) => {
                [base(&bulk.to), base(&bulk.from), bulk.bytes].into_iter().for_each(&mut read);
                bulk.barrier.iter().map(base).chain(bulk.multicast).for_each(&mut read);
                if let Some((map, _, coordinates)) = &bulk.tensor {
                    read(base(map));
                    coordinates.iter().copied().for_each(read);
                }
            }
            Op::Barrier(barrier) => {
                [barrier.id].into_iter().chain(barrier.count).for_each(read);
                barrier.d.into_iter().for_each(write);
            }
            Op::Warp(op) => {
                op.members.into_iter().for_each(&mut read);
                match op.kind {
                    WarpKind::Shuffle { d, a, b, c, .. } => {
                        [a, b, c].into_iter().for_each(read);
                        d.into_iter().for_each(write);
                    }
                    WarpKind::Vote { d, .. } | WarpKind::Elect { d, .. } => d.into_iter().for_each(write),
                    WarpKind::Match { d, a, .. } => {
                        read(a);
                        d.into_iter().for_each(write);
                    }
                    WarpKind::Reduce { d, a, .. } => {
                        read(a);
                        write(d);
                    }
                    WarpKind::Sync => {}
                }
            }
            Op::Matrix(matrix) => {
                read(base(&matrix.address));
                if matrix.load {
                    matrix.registers.iter().copied().for_each(write);
                } else {
                    matrix.registers.iter().copied().for_each(read);
                }
            }
            Op::Mma(mma) => {
                mma.a.iter().chain(&mma.b).chain(&mma.c).copied().for_each(read);
                mma.d.iter().copied().for_each(write);
            }
            Op::MapCluster(map) => {
                [map.a, map.b].into_iter().for_each(read);
                write(map.d);
            }
            Op::Wgmma(op) => {
                read(op.b);
                match &op.a {
                    WgmmaA::Descriptor(a) => read(*a),
                    WgmmaA::Registers(all) => all.iter().copied().for_each(read),
                }
                op.d.iter().copied().for_each(write);
            }
            Op::Logic { .. }
            | Op::Branch(_)
            | Op::Call(_)
            | Op::Return { .. }
            | Op::Exit
            | Op::Trap
            | Op::Nop
            | Op::Runtime(_)
            | Op::CopyLocal(_)
            | Op::Fence { .. }
            | Op::CommitGroup
            | Op::WaitGroup(_)
            | Op::ClusterBarrier { .. }
            | Op::WgmmaSync(_) => {}
        }
    }
}
