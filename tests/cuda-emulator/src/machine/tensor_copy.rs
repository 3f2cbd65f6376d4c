//! Boxes of tensors in global memory, by tensor map: their bytes as they lie in shared memory, and the way back.

use super::access::{Region, addresses};
use super::block::Block;
use super::bulk::Piece;
use super::step::lanes32;
use super::warp::Warp;
use crate::checks::{Fault, Kind};
use crate::memory::tensor_map::{BYTES, Swizzle, TensorMap};
use crate::program::{Address, Reg};
use crate::ptx::types::{Space, Type};

/// A tensor operand: the map's address, its space, and the coordinates.
type Tensor = (Address, Space, Vec<Reg>);

/// The type of a map's elements, for reductions.
pub fn element_type(map: &TensorMap) -> Type {
    match map.data_type {
        0 => Type::U8,
        1 => Type::U16,
        3 => Type::S32,
        4 => Type::U64,
        5 => Type::S64,
        6 => Type::F16,
        7 | 10..=12 => Type::F32,
        8 => Type::F64,
        9 => Type::BF16,
        _ => Type::U32,
    }
}

impl Block<'_> {
    /// The tensor map at a lane's operand.
    pub fn tensor_map(&mut self, warp: &mut Warp, tensor: &Tensor, lane: u32) -> Result<TensorMap, Fault> {
        let at = addresses(warp, &self.program().constants, &tensor.0);
        self.aligned(&at, 1 << lane, 64)?;
        let span = self.span(warp, tensor.1, &at, 1 << lane, BYTES as u32)?;
        let from = span.host(at[lane as usize], lane).cast::<[u8; BYTES]>();
        // SAFETY: `span` checked the bytes.
        let bytes = unsafe { from.read() };
        let map = TensorMap::decode(&bytes);
        let place = at[lane as usize];
        let Some(map) = map else {
            let detail = "these 128 bytes are no tensor map of cuTensorMapEncodeTiled";
            return Err(Fault::at(Kind::IllegalInstruction, lane, place, detail));
        };
        if !matches!(span.region, Region::Param | Region::Global(_)) {
            let detail = "a tensor map must lie in parameter, constant or global memory";
            return Err(Fault::at(Kind::IllegalInstruction, lane, place, detail));
        }
        if map.dims.len() != tensor.2.len() {
            let detail = format!("{} coordinates for a tensor map of {} dimensions", tensor.2.len(), map.dims.len());
            return Err(Fault::at(Kind::IllegalInstruction, lane, place, detail));
        }
        Ok(map)
    }

    fn coordinates(&self, warp: &Warp, tensor: &Tensor, lane: u32) -> Vec<i32> {
        let constants = &self.program().constants;
        tensor.2.iter().map(|r| lanes32(warp, constants, *r)[lane as usize] as i32).collect()
    }

    /// The bytes of a box as they lie in shared memory from address `to`: chunks by their offset from there. One chunk,
    /// unless rows are shorter than the swizzle's pattern.
    pub fn read_box(
        &mut self,
        warp: &mut Warp,
        map: &TensorMap,
        tensor: &Tensor,
        lane: u32,
        to: u32,
    ) -> Result<Vec<(u32, Vec<u8>)>, Fault> {
        let coordinates = self.coordinates(warp, tensor, lane);
        let (pitch, row_bytes, element) = (map.pitch(), map.row_bytes(), map.element() as usize);
        let mut plain = vec![0u8; (map.rows() * row_bytes) as usize];
        if map.nan_fill {
            let fill = map.fill();
            plain.chunks_exact_mut(element).for_each(|e| e.copy_from_slice(&fill[..element]));
        }
        self.counters.global_loads.requests += u64::from(self.config().count);
        for (row, address, first, bytes) in map.parts(&coordinates) {
            let at = [address; 32];
            let span = self.span(warp, Space::Global, &at, 1 << lane, bytes)?;
            if self.config().check {
                self.check_read(warp, &span, &at, bytes, false);
            }
            self.count_row(address, bytes, false);
            let place = (row * row_bytes + first) as usize;
            // SAFETY: `span` checked the bytes; `parts` keeps inside the box.
            unsafe {
                plain[place..place + bytes as usize].as_mut_ptr().copy_from(span.host(address, lane), bytes as usize)
            };
        }
        if map.swizzle == Swizzle::None {
            return Ok(vec![(0, plain)]);
        }
        let chunks = (0..map.rows()).flat_map(|row| (0..row_bytes).step_by(16).map(move |b| (row, b)));
        let moved = chunks.map(|(row, b)| {
            let from = (row * row_bytes + b) as usize;
            (map.swizzle.apply(to + row * pitch + b, 0) - to, &plain[from..from + 16])
        });
        if row_bytes < pitch {
            return Ok(moved.map(|(at, chunk)| (at, chunk.to_vec())).collect());
        }
        let mut out = vec![0u8; plain.len()];
        moved.for_each(|(at, chunk)| out[at as usize..at as usize + 16].copy_from_slice(chunk));
        Ok(vec![(0, out)])
    }

    /// Where the parts of a box in shared memory from offset `from` go in global memory.
    pub fn write_box(
        &mut self,
        warp: &mut Warp,
        map: &TensorMap,
        tensor: &Tensor,
        lane: u32,
        from: u32,
        update: bool,
    ) -> Result<Vec<Piece>, Fault> {
        let coordinates = self.coordinates(warp, tensor, lane);
        let mut pieces = Vec::new();
        self.counters.global_stores.requests += u64::from(self.config().count);
        for (row, address, first, bytes) in map.parts(&coordinates) {
            let at = [address; 32];
            let span = self.span(warp, Space::Global, &at, 1 << lane, bytes)?;
            let to = self.global_target(warp, &span, &at, bytes, update)?;
            self.count_row(address, bytes, true);
            let mut done = 0;
            while done < bytes {
                let byte = first + done;
                // Chunks of 16 bytes stay whole.
                let n = if map.swizzle == Swizzle::None { bytes } else { (16 - byte % 16).min(bytes - done) };
                let place = map.swizzle.apply(from + row * map.pitch() + byte, 0);
                pieces.push(Piece { from: place, to: to.wrapping_add(done as usize), bytes: n });
                done += n;
            }
        }
        Ok(pieces)
    }

    fn count_row(&mut self, address: u64, bytes: u32, store: bool) {
        if self.config().count {
            let traffic = if store { &mut self.counters.global_stores } else { &mut self.counters.global_loads };
            traffic.bytes += u64::from(bytes);
            traffic.sectors += (address + u64::from(bytes)).div_ceil(32) - address / 32;
            self.launch.cache(&[address; 32], 1, bytes, store);
        }
    }
}
