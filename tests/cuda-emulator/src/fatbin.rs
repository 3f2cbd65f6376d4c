//! Module images: PTX text, fatbins (plain, LZ4, ZSTD), their wrapper; a cubin is recognised and holds nothing to run.
//!
//! A fatbin is a header (magic, version, header size, total size) and entries: kind (1 PTX, 2 ELF), header size, size,
//! compressed size, architecture, flags (0x8000 ZSTD, 0x2000 LZ4), uncompressed size.

use std::io::Read;

/// What an image holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Image {
    /// PTX texts with the architecture that the container names (0 for bare text).
    Ptx(Vec<(u32, String)>),
    /// Machine code only.
    CubinOnly,
    /// Not an image.
    Invalid,
}

const ELF: u32 = 0x464c_457f;
const WRAPPER: u32 = 0x4662_43b1;
const FATBIN: u32 = 0xba55_ed50;
/// No PTX text is larger: a guard for sizes that a broken image claims.
const MAX_TEXT: usize = 1 << 30;

/// Reads the image at an address.
///
/// # Safety
/// `image` points to what `cuModuleLoadData` takes: NUL-terminated text, or a whole container.
pub unsafe fn read(image: *const u8) -> Image {
    if image.is_null() {
        return Image::Invalid;
    }
    // SAFETY: the caller's promise; each container carries its size, text ends in NUL. Text shorter than four bytes ends
    // within them, so bytes are read one by one.
    unsafe {
        let mut first = [0u8; 4];
        for (i, byte) in first.iter_mut().enumerate() {
            *byte = *image.add(i);
            if *byte == 0 {
                break;
            }
        }
        match u32::from_le_bytes(first) {
            ELF => Image::CubinOnly,
            WRAPPER => read(image.add(8).cast::<*const u8>().read_unaligned()),
            FATBIN => {
                let header = usize::from(image.add(6).cast::<u16>().read_unaligned());
                let total = image.add(8).cast::<u64>().read_unaligned();
                match usize::try_from(total).ok().and_then(|t| t.checked_add(header)) {
                    Some(size) if size <= MAX_TEXT => container(std::slice::from_raw_parts(image, size), header),
                    _ => Image::Invalid,
                }
            }
            _ => match std::ffi::CStr::from_ptr(image.cast()).to_str() {
                Ok(text) if text.contains(".version") => Image::Ptx(vec![(0, text.to_string())]),
                _ => Image::Invalid,
            },
        }
    }
}

/// Entries of a container, header included.
pub fn container(bytes: &[u8], header: usize) -> Image {
    let (mut at, mut texts, mut machine_code) = (header, Vec::new(), false);
    let number = |at: usize, n: usize| -> Option<usize> {
        let field = bytes.get(at..at.checked_add(n)?)?;
        let mut all = [0u8; 8];
        all[..n].copy_from_slice(field);
        usize::try_from(u64::from_le_bytes(all)).ok()
    };
    while at < bytes.len() {
        let entry = (|| {
            let kind = number(at, 2)?;
            let (entry_header, size, compressed) = (number(at + 4, 4)?, number(at + 8, 8)?, number(at + 16, 4)?);
            let (arch, flags, raw) = (number(at + 28, 4)?, number(at + 40, 8)?, number(at + 56, 8)?);
            let body = at.checked_add(entry_header)?;
            let end = body.checked_add(size)?;
            let data = bytes.get(body..end)?;
            Some((kind, arch, flags, raw, if compressed > 0 { data.get(..compressed)? } else { data }, end))
        })();
        let Some((kind, arch, flags, raw, data, end)) = entry else { return Image::Invalid };
        if end <= at {
            return Image::Invalid;
        }
        at = end;
        match kind {
            1 => match decompress(data, flags, raw) {
                Some(text) => {
                    let end = text.iter().position(|c| *c == 0).unwrap_or(text.len());
                    texts.push((arch as u32, String::from_utf8_lossy(&text[..end]).into_owned()));
                }
                None => return Image::Invalid,
            },
            2 => machine_code = true,
            _ => {}
        }
    }
    match (texts.is_empty(), machine_code) {
        (false, _) => Image::Ptx(texts),
        (true, true) => Image::CubinOnly,
        _ => Image::Invalid,
    }
}

fn decompress(data: &[u8], flags: usize, raw: usize) -> Option<Vec<u8>> {
    if flags & 0x8000 != 0 {
        let mut out = Vec::new();
        let decoder = ruzstd::decoding::StreamingDecoder::new(data).ok()?;
        decoder.take(MAX_TEXT as u64).read_to_end(&mut out).ok()?;
        return Some(out);
    }
    if flags & 0x2000 != 0 {
        return if raw <= MAX_TEXT { lz4_flex::block::decompress(data, raw).ok() } else { None };
    }
    Some(data.to_vec())
}

/// The texts that a card may run, the newest architecture first.
pub fn runnable(mut texts: Vec<(u32, String)>, sm: u32) -> Vec<String> {
    for (arch, text) in &mut texts {
        if *arch == 0 {
            *arch = target(text).map_or(0, |(sm, _)| sm);
        }
    }
    texts.retain(|(arch, text)| match target(text) {
        Some((target, suffix)) => match suffix {
            Some('a') => target == sm,
            Some('f') => target / 10 == sm / 10 && target <= sm,
            _ => target <= sm && *arch <= sm,
        },
        // Without a target the parser says what is wrong.
        None => true,
    });
    texts.sort_by_key(|(arch, _)| std::cmp::Reverse(*arch));
    texts.into_iter().map(|(_, text)| text).collect()
}

/// The `.target` of a text: number and letter.
pub fn target(text: &str) -> Option<(u32, Option<char>)> {
    let line = text.lines().map(str::trim).find(|l| l.starts_with(".target"))?;
    let name = line[".target".len()..].split(',').map(str::trim).find_map(|t| t.strip_prefix("sm_"))?;
    let digits: String = name.chars().take_while(char::is_ascii_digit).collect();
    Some((digits.parse().ok()?, name[digits.len()..].chars().next()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(kind: u16, arch: u32, flags: u64, raw: usize, data: &[u8]) -> Vec<u8> {
        let padded = data.len().next_multiple_of(8);
        let mut e = vec![0u8; 64];
        e[0..2].copy_from_slice(&kind.to_le_bytes());
        e[4..8].copy_from_slice(&64u32.to_le_bytes());
        e[8..16].copy_from_slice(&(padded as u64).to_le_bytes());
        e[16..20].copy_from_slice(&(if flags == 0 { 0 } else { data.len() as u32 }).to_le_bytes());
        e[28..32].copy_from_slice(&arch.to_le_bytes());
        e[40..48].copy_from_slice(&flags.to_le_bytes());
        e[56..64].copy_from_slice(&(raw as u64).to_le_bytes());
        e.extend_from_slice(data);
        e.resize(64 + padded, 0);
        e
    }

    #[test]
    fn entries_of_every_compression_and_their_choice() {
        let text = |sm: &str| format!(".version 7.0\n.target sm_{sm}\n.address_size 64\n{}", "// padding ".repeat(20));
        let lz4 = lz4_flex::block::compress(text("86").as_bytes());
        let zstd =
            ruzstd::encoding::compress_to_vec(text("90a").as_bytes(), ruzstd::encoding::CompressionLevel::Fastest);
        let mut bytes = vec![0u8; 16];
        bytes.extend(entry(2, 80, 0, 0, b"\x7fELF"));
        bytes.extend(entry(1, 80, 0, 0, text("80").as_bytes()));
        bytes.extend(entry(1, 86, 0x2000, text("86").len(), &lz4));
        bytes.extend(entry(1, 90, 0x8000, text("90a").len(), &zstd));
        let Image::Ptx(texts) = container(&bytes, 16) else { panic!() };
        assert_eq!(texts.iter().map(|t| t.0).collect::<Vec<_>>(), [80, 86, 90]);
        let first = |sm| target(&runnable(texts.clone(), sm)[0]);
        assert_eq!(first(80), Some((80, None)));
        assert_eq!(first(89), Some((86, None)));
        assert_eq!(first(90), Some((90, Some('a'))));
        assert_eq!(first(100), Some((86, None)), "90a runs on 9.0 only");
        assert!(runnable(texts.clone(), 75).is_empty());
        for cut in 17..bytes.len() {
            container(&bytes[..cut], 16);
        }
        assert_eq!(container(&bytes[..16 + 72], 16), Image::CubinOnly);
    }
}
