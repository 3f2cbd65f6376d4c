//! Calls and returns. Functions own their registers and local memory for good; a call of one that may be active already
//! saves them first, lane by lane.

use super::block::Block;
use super::step::lanes64;
use super::warp::{Frame, Group, Wait, Warp, lanes};
use crate::checks::{Fault, Kind};
use crate::memory::layout;
use crate::program::{Call, CallTarget, FunctionInfo};

/// Frames of recursive calls that a warp may hold, over all lanes.
const MAX_FRAMES: usize = 1 << 16;

impl Block<'_> {
    /// Sends each active lane to its own target.
    pub fn split(
        &mut self,
        warp: &mut Warp,
        active: u32,
        target: impl Fn(u32) -> Result<u32, Fault>,
    ) -> Result<(), Fault> {
        let first = target(active.trailing_zeros())?;
        let mut rest = 0;
        for lane in lanes(active) {
            rest |= u32::from(target(lane)? != first) << lane;
        }
        self.counters.branches += 1;
        if rest == 0 && active == warp.active {
            warp.pc = first;
            return Ok(());
        }
        self.counters.divergent_branches += 1;
        let idle = warp.active & !active;
        if idle != 0 {
            warp.others.push(Group { pc: warp.pc + 1, mask: idle, wait: Wait::No });
        }
        warp.active = 0;
        let mut left = active;
        while left != 0 {
            let pc = target(left.trailing_zeros())?;
            let mut mask = 0;
            for lane in lanes(left) {
                mask |= u32::from(target(lane)? == pc) << lane;
            }
            warp.others.push(Group { pc, mask, wait: Wait::No });
            left &= !mask;
        }
        warp.schedule();
        Ok(())
    }

    /// `call`: arguments are copied to the function's parameters, the return address to its slot.
    pub fn call(&mut self, warp: &mut Warp, active: u32, call: &Call) -> Result<(), Fault> {
        let program = self.program();
        let addresses = match call.target {
            CallTarget::Direct(_) => [0; 32],
            CallTarget::Indirect(reg) => lanes64(warp, &program.constants, reg),
        };
        let function_of = |lane: u32| -> Result<u32, Fault> {
            if let CallTarget::Direct(function) = call.target {
                return Ok(function);
            }
            let address = addresses[lane as usize];
            let index = address.wrapping_sub(layout::FUNCTION) / 16;
            if address < layout::FUNCTION || address % 16 != 0 || index >= program.functions.len() as u64 {
                return Err(Fault::at(
                    Kind::IllegalInstruction,
                    lane,
                    address,
                    "call of an address that is no function",
                ));
            }
            Ok(index as u32)
        };
        let back = warp.pc + 1;
        let local_bytes = program.local_bytes as usize;
        for lane in lanes(active) {
            let function = function_of(lane)?;
            let info = &program.functions[function as usize];
            if info.recursive {
                save(warp, program.local_bytes, info, function, lane)?;
            }
            for (&(from, bytes), &(to, room)) in call.arguments.iter().zip(&info.params) {
                let base = lane as usize * local_bytes;
                let (from, bytes) = (base + from as usize, bytes.min(room) as usize);
                warp.local.copy_within(from..from + bytes, base + to as usize);
            }
            warp.slots[info.return_address as usize].0[lane as usize] = back;
        }
        self.split(warp, active, |lane| function_of(lane).map(|f| program.functions[f as usize].entry))
    }

    /// `ret` of a function: returned values go to the buffer that callers read.
    pub fn ret(&mut self, warp: &mut Warp, active: u32, function: u32) -> Result<(), Fault> {
        let program = self.program();
        let info = &program.functions[function as usize];
        let back = warp.slots[info.return_address as usize].0;
        for lane in lanes(active) {
            let base = (lane * program.local_bytes) as usize;
            let mut to = base + program.return_buffer as usize;
            for &(from, bytes) in &info.returns {
                let from = base + from as usize;
                warp.local.copy_within(from..from + bytes as usize, to);
                to += bytes.next_multiple_of(16) as usize;
            }
            if info.recursive {
                restore(warp, program.local_bytes, info, function, lane);
            }
        }
        self.split(warp, active, |lane| Ok(back[lane as usize]))
    }
}

fn save(warp: &mut Warp, local_bytes: u32, info: &FunctionInfo, function: u32, lane: u32) -> Result<(), Fault> {
    if warp.frames.len() >= MAX_FRAMES {
        return Err(Fault::new(Kind::OutOfBounds, lane, "the call stack of recursive functions is full"));
    }
    let at = (lane * local_bytes + info.local.0) as usize;
    warp.frames.push(Frame {
        function,
        lane,
        narrow: (0..info.narrow.1).map(|i| warp.slots[(info.narrow.0 + i) as usize].0[lane as usize]).collect(),
        wide: (0..info.wide.1).map(|i| wide_lane(warp, info.wide.0 + 2 * i, lane)).collect(),
        preds: (0..info.preds.1).map(|i| warp.preds[(info.preds.0 + i) as usize] >> lane & 1 == 1).collect(),
        local: warp.local[at..at + info.local.1 as usize].to_vec(),
    });
    Ok(())
}

fn restore(warp: &mut Warp, local_bytes: u32, info: &FunctionInfo, function: u32, lane: u32) {
    let Some(at) = warp.frames.iter().rposition(|f| f.function == function && f.lane == lane) else { return };
    let frame = warp.frames.remove(at);
    for (i, value) in frame.narrow.into_iter().enumerate() {
        warp.slots[info.narrow.0 as usize + i].0[lane as usize] = value;
    }
    for (i, value) in frame.wide.into_iter().enumerate() {
        let words = [value as u32, (value >> 32) as u32];
        for (half, word) in words.into_iter().enumerate() {
            let index = lane as usize * 2 + half;
            warp.slots[info.wide.0 as usize + 2 * i + index / 32].0[index % 32] = word;
        }
    }
    for (i, value) in frame.preds.into_iter().enumerate() {
        let pred = &mut warp.preds[info.preds.0 as usize + i];
        *pred = *pred & !(1 << lane) | u32::from(value) << lane;
    }
    let to = (lane * local_bytes + info.local.0) as usize;
    warp.local[to..to + frame.local.len()].copy_from_slice(&frame.local);
}

/// A lane of a 64-bit register: two consecutive words of its two slots.
fn wide_lane(warp: &Warp, slot: u32, lane: u32) -> u64 {
    let word = |half: u32| {
        let index = lane * 2 + half;
        u64::from(warp.slots[(slot + index / 32) as usize].0[(index % 32) as usize])
    };
    word(0) | word(1) << 32
}
