//! `ldmatrix` and `stmatrix`, and `mapa`.

use super::access::{addresses, is_space};
use super::block::Block;
use super::step::{lanes32, lanes64, set32, set64};
use super::warp::Warp;
use crate::checks::Fault;
use crate::memory::layout;
use crate::program::{MapCluster, Matrix};
use crate::ptx::types::Space;

impl Block<'_> {
    /// `ldmatrix`, `stmatrix`: lanes 8m..8m+7 hold the row addresses of matrix m, each row is 16 bytes; lane l holds the
    /// elements 2(l%4), 2(l%4)+1 of row l/4 (of the transpose with `.trans`).
    pub fn matrix(&mut self, warp: &mut Warp, op: &Matrix, active: u32) -> Result<(), Fault> {
        warp.work += 1;
        let constants = &self.program().constants;
        let at = addresses(warp, constants, &op.address);
        let n = op.registers.len();
        let rows = if n == 4 { u32::MAX } else { (1 << (8 * n)) - 1 };
        self.aligned(&at, rows, 16)?;
        let space = if op.generic { Space::Generic } else { Space::Shared };
        // data[row][byte], rows of all matrices one after the other
        let mut data = [[0u8; 16]; 32];
        if !op.load {
            for (m, reg) in op.registers.iter().enumerate() {
                let values = lanes32(warp, constants, *reg);
                for (lane, value) in values.into_iter().enumerate() {
                    let (i, j) = (lane / 4, lane % 4 * 2);
                    for (k, half) in [value as u16, (value >> 16) as u16].into_iter().enumerate() {
                        let (row, column) = if op.transposed { (j + k, i) } else { (i, j + k) };
                        data[m * 8 + row][column * 2..column * 2 + 2].copy_from_slice(&half.to_le_bytes());
                    }
                }
            }
        }
        let mut left = rows;
        while left != 0 {
            let span = self.span(warp, space, &at, left, 16)?;
            left &= !span.lanes;
            if self.config().check {
                if op.load {
                    self.check_read(warp, &span, &at, 16, false);
                } else {
                    self.check_write(warp, &span, &at, 16, false, |lane, byte| data[lane as usize][byte as usize]);
                }
            }
            self.count_access(&span, &at, 16, !op.load);
            for row in super::warp::lanes(span.lanes) {
                let host = span.host(at[row as usize], row).cast::<[u8; 16]>();
                // SAFETY: `span` checked 16 bytes at each row.
                unsafe { if op.load { data[row as usize] = *host } else { *host = data[row as usize] } }
            }
        }
        if op.load {
            for (m, reg) in op.registers.iter().enumerate() {
                let rows = &data[m * 8..m * 8 + 8];
                let element = |row: usize, column: usize| {
                    u32::from(u16::from_le_bytes([rows[row][column * 2], rows[row][column * 2 + 1]]))
                };
                let out = std::array::from_fn(|lane| {
                    let (i, j) = (lane / 4, lane % 4 * 2);
                    if op.transposed {
                        element(j, i) | element(j + 1, i) << 16
                    } else {
                        element(i, j) | element(i, j + 1) << 16
                    }
                });
                set32(warp, *reg, &out, active);
            }
        }
        Ok(())
    }

    /// `mapa`: the address of the same place in another block's shared memory; `getctarank`: the rank of an address.
    pub fn map_cluster(&mut self, warp: &mut Warp, op: &MapCluster, active: u32) {
        let constants = &self.program().constants;
        let base = if op.generic { layout::SHARED } else { 0 };
        let wide = |warp: &Warp, reg| {
            if op.wide { lanes64(warp, constants, reg) } else { lanes32(warp, constants, reg).map(u64::from) }
        };
        let a = wide(warp, op.a);
        let mask = (1u64 << layout::CLUSTER_SHIFT) - 1;
        if op.rank_of {
            let own = self.cluster_rank();
            let out = a.map(|a| {
                let block = (a.wrapping_sub(base) >> layout::CLUSTER_SHIFT) as u32;
                if op.generic && !is_space(a, Space::SharedCluster) || block == 0 { own } else { block - 1 }
            });
            set32(warp, op.d, &out, active);
            return;
        }
        let rank = lanes32(warp, constants, op.b);
        let out: [u64; 32] = std::array::from_fn(|i| {
            base + ((a[i].wrapping_sub(base) & mask) | (u64::from(rank[i]) + 1) << layout::CLUSTER_SHIFT)
        });
        if op.wide { set64(warp, op.d, &out, active) } else { set32(warp, op.d, &out.map(|v| v as u32), active) }
    }

    /// This block's rank in its cluster.
    pub fn cluster_rank(&self) -> u32 {
        let c = self.launch.cluster;
        let at: [u32; 3] = std::array::from_fn(|i| self.id[i] % c[i]);
        at[0] + c[0] * (at[1] + c[1] * at[2])
    }
}
