//! Dropout masks: every bit against the definition, one Philox word at a time.

use super::Outcome;
use super::gemm::factor;
use crate::device::cuda::mask::{Mask, Numbers, mask_words};
use crate::device::cuda::{Buffer, Cuda, Result};
use crate::device::ops::Dropout;

/// All cases.
pub fn cases(cuda: &Cuda) -> Result<Vec<Outcome>> {
    let mask = Mask::new(cuda)?;
    let mut outcomes = Vec::new();
    for p in [0.0, 0.05, 0.5, 0.999] {
        for (rows, width) in [(1, 8), (3, 72), (2, 128), (5, 136), (2, 2056)] {
            outcomes.push(case(cuda, &mask, p, rows, width)?);
        }
    }
    // More rows than a grid has blocks across.
    outcomes.push(case(cuda, &mask, 0.1, 65_537, 8)?);
    Ok(outcomes)
}

fn case(cuda: &Cuda, mask: &Mask, p: f32, rows: usize, width: usize) -> Result<Outcome> {
    const SENTINEL: u32 = 0x5a5a_5a5a;
    let dropout = Dropout { p, seed: 0x1234_5678_9abc_def0, step: 41 };
    let (first, module) = (3, 7);
    let tokens: Vec<u32> = (0..(first + rows) as u32).map(|t| t.wrapping_mul(0x9e37_79b9)).collect();
    let words = mask_words(width);
    let d_tokens = Buffer::from_host(cuda, &tokens, "tokens")?;
    let out = Buffer::from_host(cuda, &vec![SENTINEL; rows * words + 64], "a mask")?;
    let numbers = Numbers::upload(cuda, &dropout)?;
    mask.run(cuda, &numbers, module, &d_tokens, first, rows, width, &out)?;
    let bits = out.download(cuda, out.len())?;
    let (quarter, section_words) = (width.div_ceil(4), words / 4);
    let mut wrong = 0;
    for row in 0..rows {
        for feature in 0..width {
            let (section, bit) = (feature / quarter, feature % quarter);
            let word = bits[(section * section_words + bit / 32) * rows + row];
            let kept = word >> (bit % 32) & 1 == 1;
            wrong += usize::from(kept != (factor(&dropout, module, tokens[first + row], feature, width) > 0.0));
        }
    }
    let contained = bits[rows * words..].iter().all(|&w| w == SENTINEL);
    let error = wrong as f64 / (rows * width) as f64;
    Ok(Outcome { operation: "mask", case: format!("p {p} rows {rows} width {width}"), error, limit: 0.0, contained })
}
