//! Lines of a text file, gzipped or not: a thread of its own unpacks blocks of whole lines while the caller parses the last
//! ones. Memory stays at a few blocks, however long the file. What a line means is left to the caller.

use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Read};
use std::path::Path;
use std::sync::mpsc::sync_channel;

use flate2::bufread::MultiGzDecoder;

use super::Error;

/// Bytes unpacked at once.
const BLOCK_BYTES: usize = 1 << 20;
/// Blocks between the two threads.
const BLOCKS_AHEAD: usize = 4;
/// A line beyond this is no line: the file is something else.
const LONGEST_LINE_BYTES: usize = 64 << 20;

/// Beginnings of files that are neither text nor gzip.
const OTHER_FORMATS: [(&[u8], &str); 6] = [
    (b"\xff\xfe", "UTF-16 text; expected UTF-8"),
    (b"\xfe\xff", "UTF-16 text; expected UTF-8"),
    (b"PK\x03\x04", "a zip archive; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd; unpack it, or compress it with gzip"),
    (b"BZh", "compressed with bzip2; unpack it, or compress it with gzip"),
    (b"\xfd7zXZ", "compressed with xz; unpack it, or compress it with gzip"),
];

/// Opens a text file; gzip is known by its first bytes, whatever the name, and may have several members.
fn open(path: &Path) -> Result<Box<dyn BufRead + Send>, Error> {
    let file = File::open(path).map_err(Error::io(path))?;
    let mut reader = BufReader::with_capacity(BLOCK_BYTES / 4, file);
    let start = reader.fill_buf().map_err(Error::io(path))?;
    if let Some((_, what)) = OTHER_FORMATS.iter().find(|(magic, _)| start.starts_with(magic)) {
        return Err(Error::file(path, format!("is {what}")));
    }
    if start.starts_with(b"\x1f\x8b") {
        return Ok(Box::new(BufReader::new(MultiGzDecoder::new(reader))));
    }
    Ok(Box::new(reader))
}

/// What was wrong with the bytes behind line `line`.
fn broken(path: &Path, line: u64, e: &std::io::Error) -> Error {
    let what = match e.kind() {
        ErrorKind::UnexpectedEof => "the gzip data break off: the file is cut short, fetch it again".into(),
        _ => e.to_string(),
    };
    Error::file(path, format!("cannot be read beyond line {line}: {what}"))
}

/// The first line that is not blank.
pub fn first_line(path: &Path) -> Result<String, Error> {
    let mut source = open(path)?.take(LONGEST_LINE_BYTES as u64);
    let mut line = Vec::new();
    while line.iter().all(u8::is_ascii_whitespace) {
        line.clear();
        if source.read_until(b'\n', &mut line).map_err(|e| broken(path, 0, &e))? == 0 {
            return Err(Error::file(path, "is empty; expected lines of JSON"));
        }
    }
    Ok(String::from_utf8_lossy(&line).trim_start_matches('\u{feff}').trim().to_string())
}

/// Calls `f` with number (from 1) and text of every line that is not blank; the text of a line that is not UTF-8 is `Err`, with
/// marks where it is not. A byte order mark is dropped.
pub fn for_lines(path: &Path, mut f: impl FnMut(u64, Result<&str, String>) -> Result<(), Error>) -> Result<(), Error> {
    let mut source = open(path)?;
    std::thread::scope(|scope| {
        let (sender, blocks) = sync_channel::<std::io::Result<Vec<u8>>>(BLOCKS_AHEAD);
        scope.spawn(move || {
            let mut rest = Vec::new();
            loop {
                let mut block = std::mem::take(&mut rest);
                let known = block.len();
                let read = source.by_ref().take(BLOCK_BYTES as u64).read_to_end(&mut block);
                let newline = || block[known..].iter().rposition(|&b| b == b'\n');
                let whole = if matches!(read, Ok(0)) { block.len() } else { newline().map_or(0, |at| known + at + 1) };
                rest = block.split_off(whole);
                // A failed send means that the caller has given up.
                if !block.is_empty() && sender.send(Ok(block)).is_err() {
                    return;
                }
                match read {
                    Ok(0) => return,
                    Ok(_) if rest.len() <= LONGEST_LINE_BYTES => {}
                    Ok(_) => {
                        let what = format!("a line of more than {LONGEST_LINE_BYTES} bytes");
                        let _ = sender.send(Err(std::io::Error::other(what)));
                        return;
                    }
                    Err(e) => {
                        let _ = sender.send(Err(e));
                        return;
                    }
                }
            }
        });
        let mut line = 0;
        for block in blocks {
            let block = block.map_err(|e| broken(path, line, &e))?;
            let mut block = block.strip_suffix(b"\n").unwrap_or(&block);
            if line == 0 {
                block = block.strip_prefix(b"\xef\xbb\xbf").unwrap_or(block);
            }
            match std::str::from_utf8(block) {
                Ok(text) => text.split('\n').try_for_each(|text| {
                    line += 1;
                    if text.trim_ascii().is_empty() { Ok(()) } else { f(line, Ok(text)) }
                })?,
                Err(_) => block.split(|&b| b == b'\n').try_for_each(|bytes| {
                    line += 1;
                    match std::str::from_utf8(bytes) {
                        Ok(text) if text.trim_ascii().is_empty() => Ok(()),
                        Ok(text) => f(line, Ok(text)),
                        Err(_) => f(line, Err(String::from_utf8_lossy(bytes).into_owned())),
                    }
                })?,
            }
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::GzEncoder;

    use super::*;

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    /// Lines with their numbers, and the error at the end.
    fn read(bytes: &[u8]) -> (Vec<(u64, String)>, Option<String>) {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        let mut lines = Vec::new();
        let result = for_lines(file.path(), |line, text| {
            lines.push((line, text.map_or_else(|lossy| format!("lossy {lossy}"), str::to_string)));
            Ok(())
        });
        (lines, result.err().map(|e| e.to_string()))
    }

    #[test]
    fn lines_keep_their_numbers() {
        let text = b"\xef\xbb\xbfa\n\n  \r\nb\r\nk\xe9\nc";
        let want: Vec<(u64, String)> =
            [(1, "a"), (4, "b\r"), (5, "lossy k\u{fffd}"), (6, "c")].map(|(n, t)| (n, t.to_string())).to_vec();
        assert_eq!(read(text), (want.clone(), None));
        // Two members, the boundary inside a line.
        let two = [gzip(&text[..8]), gzip(&text[8..])].concat();
        assert_eq!(read(&two), (want, None));
        assert_eq!(read(b""), (vec![], None));
    }

    #[test]
    fn lines_longer_than_a_block_and_blocks_of_many_lines() {
        let long = "x".repeat(3 * BLOCK_BYTES + 5);
        let mut text = String::new();
        for i in 0..300_000 {
            text += &format!("{i}\n");
        }
        let (lines, e) = read(&gzip(format!("{text}{long}\nend\n").as_bytes()));
        assert_eq!((lines.len(), e), (300_002, None));
        assert!(lines[..300_000].iter().enumerate().all(|(i, l)| *l == (i as u64 + 1, i.to_string())));
        assert_eq!((lines[300_000].1.len(), lines[300_001].clone()), (long.len(), (300_002, "end".into())));
        let (_, e) = read(&gzip(&vec![b'x'; LONGEST_LINE_BYTES + 2 * BLOCK_BYTES]));
        assert!(e.unwrap().contains("beyond line 0: a line of more than 67108864 bytes"));
    }

    #[test]
    fn broken_files_say_where() {
        let text: String = (0..50_000).map(|i| format!("line number {i}\n")).collect();
        let whole = gzip(text.as_bytes());
        for cut in [whole.len() / 2, whole.len() - 3] {
            let (lines, e) = read(&whole[..cut]);
            let e = e.unwrap();
            let want = format!("cannot be read beyond line {}: the gzip data break off", lines.len());
            assert!(e.contains(&want) && lines.len() > 1000, "{want}\n{e}");
        }
        let mut flipped = whole.clone();
        let crc = flipped.len() - 6;
        flipped[crc] ^= 1;
        assert!(read(&flipped).1.unwrap().contains("beyond line 50000: "));
        assert!(read(&[&whole[..], b"tail"].concat()).1.unwrap().contains("beyond line 50000: "));
        assert!(read(b"PK\x03\x04...").1.unwrap().contains("is a zip archive"));
        assert!(read(b"\xff\xfea\0").1.unwrap().contains("is UTF-16 text; expected UTF-8"));
    }

    #[test]
    fn a_caller_may_stop() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "a\n".repeat(20 * BLOCK_BYTES)).unwrap();
        let mut n = 0;
        let stopped = for_lines(file.path(), |_, _| {
            n += 1;
            if n == 3 { Err(Error::Argument("enough".into())) } else { Ok(()) }
        });
        assert_eq!((n, stopped.unwrap_err().to_string()), (3, "enough".into()));
    }
}
