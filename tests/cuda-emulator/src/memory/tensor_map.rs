//! Tensor maps: what `cuTensorMapEncodeTiled` hides in the 128 bytes of a `CUtensorMap`.
//!
//! The bytes are opaque to programs, so the encoding here is the emulator's own; the rules are those of the driver's manual
//! and the geometry that of the PTX manual ("Tensors"). Im2col and interleaved maps are not supported.

/// Bytes of a map.
pub const BYTES: usize = 128;
/// Largest box, bytes: more than any card's shared memory.
const MAX_BOX: u64 = 1 << 20;
const MAGIC: u32 = 0x50414d54;

/// How 16-byte chunks of shared memory are exchanged: the bits of the address above the chunk, by the bits from 7 up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Swizzle {
    None,
    B32,
    B64,
    B128,
}

impl Swizzle {
    const ALL: [Swizzle; 4] = [Swizzle::None, Swizzle::B32, Swizzle::B64, Swizzle::B128];

    /// Bytes of a row of the pattern; 16 without.
    pub fn span(self) -> u32 {
        16 << self as u32
    }

    /// Where the byte at an address of the plain layout lies: address bits 4 to 6 (as far as the span reaches) are changed
    /// by bits 7 to 9, which count from `origin` in units of 128 bytes.
    pub fn apply(self, address: u32, origin: u32) -> u32 {
        address ^ (address.wrapping_sub(origin << 7) >> 3 & (self.span() - 16))
    }
}

/// A tensor in global memory and the box that one copy moves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorMap {
    /// `CUtensorMapDataType`.
    pub data_type: u8,
    /// First byte.
    pub address: u64,
    /// Elements of each dimension, innermost first.
    pub dims: Vec<u64>,
    /// Bytes from one index to the next, of each dimension but the innermost.
    pub strides: Vec<u64>,
    /// Box in elements of the tensor.
    pub box_dims: Vec<u32>,
    /// Every how many elements of the box are taken.
    pub element_strides: Vec<u32>,
    /// Layout in shared memory.
    pub swizzle: Swizzle,
    /// Elements outside the tensor are NaN rather than zero.
    pub nan_fill: bool,
}

impl TensorMap {
    /// A map of a packed tensor with no swizzle, all strides 1.
    pub fn packed(data_type: u8, address: u64, dims: &[u64], box_dims: &[u32]) -> Self {
        let mut map = TensorMap {
            data_type,
            address,
            dims: dims.to_vec(),
            strides: Vec::new(),
            box_dims: box_dims.to_vec(),
            element_strides: vec![1; dims.len()],
            swizzle: Swizzle::None,
            nan_fill: false,
        };
        let mut bytes = u64::from(map.element());
        for n in &dims[..dims.len().saturating_sub(1)] {
            bytes *= n;
            map.strides.push(bytes);
        }
        map
    }

    /// With a layout in shared memory.
    pub fn swizzled(self, swizzle: Swizzle) -> Self {
        TensorMap { swizzle, ..self }
    }

    /// Bytes of an element; 0 for an unknown type.
    pub fn element(&self) -> u32 {
        match self.data_type {
            0 => 1,
            1 | 6 | 9 => 2,
            2 | 3 | 7 | 10..=12 => 4,
            4 | 5 | 8 => 8,
            _ => 0,
        }
    }

    /// Elements that a copy moves along a dimension.
    pub fn count(&self, dim: usize) -> u32 {
        // The innermost dimension knows no stride.
        let stride = if dim == 0 { 1 } else { self.element_strides[dim] };
        self.box_dims[dim].div_ceil(stride)
    }

    /// Bytes of a row of the box.
    pub fn row_bytes(&self) -> u32 {
        self.count(0) * self.element()
    }

    /// Bytes from one row of the box to the next in shared memory.
    pub fn pitch(&self) -> u32 {
        if self.swizzle == Swizzle::None { self.row_bytes() } else { self.swizzle.span() }
    }

    /// Rows of the box.
    pub fn rows(&self) -> u32 {
        (1..self.dims.len()).map(|d| self.count(d)).product()
    }

    /// Why the driver refuses it, if it does.
    pub fn problem(&self) -> Option<String> {
        let rank = self.dims.len();
        if !(1..=5).contains(&rank) {
            return Some(format!("rank {rank}: 1 to 5"));
        }
        if self.strides.len() != rank - 1 || self.box_dims.len() != rank || self.element_strides.len() != rank {
            return Some("strides and boxes for each dimension".to_string());
        }
        if self.element() == 0 {
            return Some(format!("data type {} is not supported", self.data_type));
        }
        if !self.address.is_multiple_of(16) {
            return Some(format!("address {:#x} is not a multiple of 16", self.address));
        }
        if let Some(n) = self.dims.iter().find(|n| **n == 0 || **n > 1 << 32) {
            return Some(format!("a dimension of {n} elements: 1 to 2^32"));
        }
        if let Some(n) = self.strides.iter().find(|n| !n.is_multiple_of(16) || **n >= 1 << 40) {
            return Some(format!("a stride of {n} bytes: multiples of 16 below 2^40"));
        }
        if let Some(n) = self.box_dims.iter().find(|n| !(1..=256).contains(*n)) {
            return Some(format!("a box dimension of {n} elements: 1 to 256"));
        }
        if let Some(n) = self.element_strides.iter().find(|n| !(1..=8).contains(*n)) {
            return Some(format!("an element stride of {n}: 1 to 8"));
        }
        let bytes = self.box_dims.iter().map(|n| u64::from(*n)).product::<u64>() * u64::from(self.element());
        if bytes > MAX_BOX {
            return Some(format!("a box of {bytes} bytes: no shared memory has that much"));
        }
        let row = self.row_bytes();
        if !row.is_multiple_of(16) {
            return Some(format!("rows of the box have {row} bytes: a multiple of 16 is needed"));
        }
        if self.swizzle != Swizzle::None && row > self.swizzle.span() {
            return Some(format!("rows of the box have {row} bytes: the swizzle allows {}", self.swizzle.span()));
        }
        if self.nan_fill && !matches!(self.data_type, 6..=12) {
            return Some("NaN fill of a type that is not floating".to_string());
        }
        None
    }

    /// The 128 bytes of a `CUtensorMap`, or why there are none.
    pub fn encode(&self) -> Result<[u8; BYTES], String> {
        if let Some(problem) = self.problem() {
            return Err(problem);
        }
        let mut out = [0u8; BYTES];
        let mut at = 0;
        let mut put = |bytes: &[u8]| {
            out[at..at + bytes.len()].copy_from_slice(bytes);
            at += bytes.len();
        };
        put(&MAGIC.to_le_bytes());
        put(&[self.data_type, self.dims.len() as u8, self.swizzle as u8, u8::from(self.nan_fill)]);
        put(&self.address.to_le_bytes());
        for i in 0..5 {
            // 2^32 elements, the most there may be, take 33 bits: one less is kept.
            put(&(self.dims.get(i).map_or(0, |n| n - 1) as u32).to_le_bytes());
            put(&self.strides.get(i).unwrap_or(&0).to_le_bytes());
            put(&[self.box_dims.get(i).map_or(0, |n| n - 1) as u8, *self.element_strides.get(i).unwrap_or(&0) as u8]);
        }
        Ok(out)
    }

    /// The map in 128 bytes, if it is one.
    pub fn decode(bytes: &[u8; BYTES]) -> Option<Self> {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        let rank = usize::from(bytes[5]);
        if word(0) != MAGIC || !(1..=5).contains(&rank) {
            return None;
        }
        let of = |i: usize| 16 + 14 * i;
        let map = TensorMap {
            data_type: bytes[4],
            address: long(8),
            dims: (0..rank).map(|i| u64::from(word(of(i))) + 1).collect(),
            strides: (0..rank - 1).map(|i| long(of(i) + 4)).collect(),
            box_dims: (0..rank).map(|i| u32::from(bytes[of(i) + 12]) + 1).collect(),
            element_strides: (0..rank).map(|i| u32::from(bytes[of(i) + 13])).collect(),
            swizzle: *Swizzle::ALL.get(usize::from(bytes[6]))?,
            nan_fill: bytes[7] != 0,
        };
        map.problem().is_none().then_some(map)
    }

    /// The bytes of an element outside the tensor.
    pub fn fill(&self) -> [u8; 8] {
        match (self.nan_fill, self.element()) {
            (false, _) => [0; 8],
            (true, 2) => 0x7fffu64.to_le_bytes(),
            (true, 4) => 0x7fff_ffffu64.to_le_bytes(),
            (true, _) => 0x7fff_ffff_ffff_ffffu64.to_le_bytes(),
        }
    }

    /// For each row of the box at the coordinates: its number, and the part of it that lies inside the tensor, as global
    /// address, first byte in the row and bytes.
    pub fn parts(&self, coordinates: &[i32]) -> Vec<(u32, u64, u32, u32)> {
        let element = i64::from(self.element());
        let first = i64::from(coordinates[0]);
        let low = (-first).clamp(0, i64::from(self.count(0)));
        let high = (self.dims[0] as i64 - first).clamp(low, i64::from(self.count(0)));
        let mut parts = Vec::new();
        if low == high {
            return parts;
        }
        'rows: for row in 0..self.rows() {
            let mut rest = row;
            let mut address = self.address.wrapping_add_signed((first + low) * element);
            for (d, coordinate) in coordinates.iter().enumerate().skip(1) {
                let index = rest % self.count(d) * self.element_strides[d];
                rest /= self.count(d);
                let at = i64::from(*coordinate) + i64::from(index);
                if at < 0 || at >= self.dims[d] as i64 {
                    continue 'rows;
                }
                address = address.wrapping_add((at as u64).wrapping_mul(self.strides[d - 1]));
            }
            parts.push((row, address, (low * element) as u32, ((high - low) * element) as u32));
        }
        parts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_survive_their_encoding_and_bad_ones_are_refused() {
        let mut map = TensorMap::packed(9, 0x7_0000_0000, &[1 << 32, 100, 7], &[64, 256, 1]).swizzled(Swizzle::B128);
        map.element_strides = vec![1, 2, 8];
        assert_eq!(TensorMap::decode(&map.encode().unwrap()), Some(map.clone()));
        assert_eq!(TensorMap::decode(&[7; BYTES]), None);
        let refused = |change: fn(&mut TensorMap)| {
            let mut bad = map.clone();
            change(&mut bad);
            bad.encode().unwrap_err()
        };
        assert!(refused(|m| m.address += 8).contains("multiple of 16"));
        assert!(refused(|m| m.strides[0] = 24).contains("stride"));
        assert!(refused(|m| m.box_dims[0] = 72).contains("swizzle allows 128"));
        assert!(refused(|m| m.box_dims[0] = 4).contains("8 bytes"));
        assert!(refused(|m| m.box_dims[1] = 257).contains("256"));
        assert!(refused(|m| m.box_dims = vec![64, 256, 256]).contains("shared memory"));
        assert!(refused(|m| m.data_type = 14).contains("data type"));
    }

    #[test]
    fn swizzles_are_those_of_the_manual() {
        // 128B: chunk c of row r of 128 bytes goes to chunk c xor (r mod 8).
        for row in 0..16 {
            for chunk in 0..8 {
                let to = row * 128 + (chunk ^ (row % 8)) * 16;
                assert_eq!(Swizzle::B128.apply(row * 128 + chunk * 16 + 5, 0), to + 5);
            }
        }
        // 64B: two rows of 64 bytes share a line of 128; 32B: four.
        assert_eq!(Swizzle::B64.apply(2 * 64, 0), 2 * 64 + 16);
        assert_eq!(Swizzle::B64.apply(6 * 64 + 48, 0), 6 * 64);
        assert_eq!(Swizzle::B64.apply(9 * 64 + 16, 0), 9 * 64 + 16, "the pattern repeats after 512 bytes");
        assert_eq!(Swizzle::B32.apply(4 * 32, 0), 4 * 32 + 16);
        assert_eq!(Swizzle::B32.apply(3 * 32, 0), 3 * 32);
        assert_eq!(Swizzle::None.apply(999, 3), 999);
        assert_eq!(Swizzle::B128.apply(3 * 128, 3), 3 * 128, "a pattern that begins there");
    }

    #[test]
    fn parts_of_ragged_boxes() {
        let map = TensorMap::packed(7, 4096, &[12, 3], &[8, 2]);
        assert_eq!(map.parts(&[8, 1]), [(0, 4096 + 48 + 32, 0, 16), (1, 4096 + 96 + 32, 0, 16)]);
        assert_eq!(map.parts(&[-4, 2]), [(0, 4096 + 96, 16, 16)]);
        assert_eq!(map.parts(&[12, 0]), []);
        assert_eq!(map.parts(&[0, -1]), [(1, 4096, 0, 32)]);
    }
}
