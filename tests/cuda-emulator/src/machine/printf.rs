//! The device runtime that kernels call: `vprintf` and `__assertfail`.

use super::block::Block;
use super::warp::{Warp, lanes};
use crate::checks::{Fault, Kind};
use crate::program::{RuntimeCall, RuntimeFunction};
use crate::ptx::types::Space;

/// Longest string that is read for a message.
const MAX_TEXT: u64 = 4096;

impl Block<'_> {
    /// Runs a call of the runtime, lane by lane.
    pub fn runtime(&mut self, warp: &mut Warp, active: u32, call: &RuntimeCall) -> Result<(), Fault> {
        let local_bytes = self.program().local_bytes;
        for lane in lanes(active) {
            let argument = |warp: &Warp, i: usize| -> u64 {
                let Some(&at) = call.arguments.get(i) else { return 0 };
                let at = (lane * local_bytes + at) as usize;
                warp.local.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
            };
            match call.function {
                RuntimeFunction::AssertFail => {
                    let message = self.text(warp, lane, argument(warp, 0))?;
                    let file = self.text(warp, lane, argument(warp, 1))?;
                    let line = argument(warp, 2) as u32;
                    return Err(Fault::new(Kind::Assert, lane, format!("`{message}` at {file}:{line}")));
                }
                RuntimeFunction::Printf => {
                    let format = self.text(warp, lane, argument(warp, 0))?;
                    let values = argument(warp, 1);
                    let text = self.format(warp, lane, &format, values)?;
                    self.printed.push_str(&text);
                    if let Some(at) = call.result {
                        let at = (lane * local_bytes + at) as usize;
                        warp.local[at..at + 4].copy_from_slice(&1u32.to_le_bytes());
                    }
                }
            }
        }
        Ok(())
    }

    fn byte_at(&mut self, warp: &mut Warp, lane: u32, address: u64) -> Result<u8, Fault> {
        let at = [address; 32];
        let span = self.span(warp, Space::Generic, &at, 1 << lane, 1)?;
        // SAFETY: `span` checked the byte.
        Ok(unsafe { span.host(address, lane).read() })
    }

    fn text(&mut self, warp: &mut Warp, lane: u32, address: u64) -> Result<String, Fault> {
        let mut bytes = Vec::new();
        for i in 0..MAX_TEXT {
            match self.byte_at(warp, lane, address + i)? {
                0 => break,
                b => bytes.push(b),
            }
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn value(&mut self, warp: &mut Warp, lane: u32, address: u64, bytes: u64) -> Result<u64, Fault> {
        let mut value = 0;
        for i in 0..bytes {
            value |= u64::from(self.byte_at(warp, lane, address + i)?) << (8 * i);
        }
        Ok(value)
    }

    /// The conversions of C's printf; arguments lie one after the other, each aligned to its size.
    fn format(&mut self, warp: &mut Warp, lane: u32, format: &str, mut at: u64) -> Result<String, Fault> {
        let mut out = String::new();
        let mut chars = format.chars().peekable();
        while let Some(c) = chars.next() {
            if c != '%' {
                out.push(c);
                continue;
            }
            let (mut flags, mut width, mut precision, mut long) = (String::new(), 0usize, None, 0);
            while let Some(f) = chars.next_if(|c| "-+ #0".contains(*c)) {
                flags.push(f);
            }
            while let Some(d) = chars.next_if(char::is_ascii_digit) {
                width = width * 10 + d as usize - '0' as usize;
            }
            if chars.next_if_eq(&'.').is_some() {
                let mut n = 0usize;
                while let Some(d) = chars.next_if(char::is_ascii_digit) {
                    n = n * 10 + d as usize - '0' as usize;
                }
                precision = Some(n.min(400));
            }
            while let Some(l) = chars.next_if(|c| "lhzjt".contains(*c)) {
                long += u32::from(l != 'h');
            }
            let Some(kind) = chars.next() else { break };
            if kind == '%' {
                out.push('%');
                continue;
            }
            let size = if long > 0 || "fFeEgGaAsp".contains(kind) { 8 } else { 4 };
            at = at.next_multiple_of(size);
            let raw = self.value(warp, lane, at, size)?;
            at += size;
            let signed = if size == 8 { raw as i64 } else { i64::from(raw as i32) };
            let digits = precision.unwrap_or(6);
            let body = match kind {
                'd' | 'i' => signed.to_string(),
                'u' => raw.to_string(),
                'x' => format!("{raw:x}"),
                'X' => format!("{raw:X}"),
                'o' => format!("{raw:o}"),
                'c' => char::from(raw as u8).to_string(),
                'p' => format!("{raw:#x}"),
                's' => self.text(warp, lane, raw)?,
                'e' | 'E' => exponent_form(f64::from_bits(raw), digits),
                'g' | 'G' => format!("{}", f64::from_bits(raw)),
                'f' | 'F' => format!("{:.digits$}", f64::from_bits(raw)),
                other => format!("%{other}"),
            };
            let body = if flags.contains('+') && "dife".contains(kind) && !body.starts_with('-') {
                format!("+{body}")
            } else {
                body
            };
            let width = width.min(400);
            out += &if flags.contains('-') {
                format!("{body:<width$}")
            } else if flags.contains('0') && body.len() < width {
                let (sign, rest) = body.split_at(usize::from(body.starts_with(['-', '+'])));
                format!("{sign}{rest:0>fill$}", fill = width - sign.len())
            } else {
                format!("{body:>width$}")
            };
        }
        Ok(out)
    }
}

/// C's `%e`: at least two digits of exponent, with its sign.
fn exponent_form(value: f64, digits: usize) -> String {
    let text = format!("{value:.digits$e}");
    match text.split_once('e') {
        Some((mantissa, exponent)) => {
            let exponent: i32 = exponent.parse().unwrap_or(0);
            format!("{mantissa}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
        }
        None => text,
    }
}
