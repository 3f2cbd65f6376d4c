//! TensorBoard event files: length-framed protobuf records with masked CRC-32C, scalars only.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use prost::Message;

use crate::files::write_atomic;

/// `tensorflow.Event`, as far as scalars need it.
#[derive(Clone, PartialEq, Message)]
struct Event {
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(string, optional, tag = "3")]
    file_version: Option<String>,
    #[prost(message, optional, tag = "5")]
    summary: Option<Summary>,
}

/// `tensorflow.Summary`.
#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<SummaryValue>,
}

/// `tensorflow.Summary.Value`.
#[derive(Clone, PartialEq, Message)]
struct SummaryValue {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(float, tag = "2")]
    simple_value: f32,
}

/// A writer of one event file.
#[derive(Debug)]
pub struct EventFile(File);

impl EventFile {
    /// A new file in `dir`, named so that TensorBoard finds it.
    pub fn create(dir: &Path) -> std::io::Result<Self> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let name = format!("events.out.tfevents.{}.{}.collm-engine", now.as_secs(), std::process::id());
        let mut file = EventFile(OpenOptions::new().create(true).append(true).open(dir.join(name))?);
        file.write(Event {
            wall_time: now.as_secs_f64(),
            file_version: Some("brain.Event:2".into()),
            ..Event::default()
        })?;
        Ok(file)
    }

    /// Appends scalars of a step.
    pub fn scalars(&mut self, step: u64, values: &[(&str, f64)]) -> std::io::Result<()> {
        let wall_time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        let value =
            values.iter().map(|(tag, v)| SummaryValue { tag: tag.to_string(), simple_value: *v as f32 }).collect();
        self.write(Event { wall_time, step: step as i64, file_version: None, summary: Some(Summary { value }) })
    }

    fn write(&mut self, event: Event) -> std::io::Result<()> {
        self.0.write_all(&record(&event))
    }
}

/// Drops scalars of tags that begin with `prefix` beyond step `last` (all of them if `None`) from the event files of `dir`: a
/// resumed run writes them again, and TensorBoard would draw both. To be called before the run writes such scalars itself.
pub fn rewind(dir: &Path, prefix: &str, last: Option<u64>) -> std::io::Result<()> {
    let is_events =
        |p: &PathBuf| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("events.out.tfevents."));
    let files = std::fs::read_dir(dir)?.map(|entry| entry.map(|e| e.path())).collect::<std::io::Result<Vec<_>>>()?;
    for path in files.iter().filter(|p| is_events(p)) {
        let bytes = std::fs::read(path)?;
        let (mut kept, mut changed) = (Vec::new(), false);
        for mut event in records(&bytes) {
            if let Some(summary) = event.summary.as_mut().filter(|_| last.is_none_or(|last| event.step > last as i64)) {
                let before = summary.value.len();
                summary.value.retain(|v| !v.tag.starts_with(prefix));
                changed |= summary.value.len() != before;
                if summary.value.is_empty() {
                    continue;
                }
            }
            kept.extend(record(&event));
        }
        if changed {
            write_atomic(path, |w| w.write_all(&kept))?;
        }
    }
    Ok(())
}

/// An event as a record: length, its CRC, data, its CRC.
fn record(event: &Event) -> Vec<u8> {
    let data = event.encode_to_vec();
    let length = (data.len() as u64).to_le_bytes();
    [&length[..], &masked(&length).to_le_bytes(), &data, &masked(&data).to_le_bytes()].concat()
}

/// The events of a file, up to the first that is not whole (a death cuts the last one short).
fn records(mut bytes: &[u8]) -> Vec<Event> {
    let mut events = Vec::new();
    while let Some((length, rest)) = bytes.split_first_chunk::<8>() {
        let n = usize::try_from(u64::from_le_bytes(*length)).unwrap_or(usize::MAX);
        let Some((crc, rest)) = rest.split_first_chunk::<4>() else { break };
        let Some((data, rest)) = rest.split_at_checked(n) else { break };
        let Some((data_crc, rest)) = rest.split_first_chunk::<4>() else { break };
        if *crc != masked(length).to_le_bytes() || *data_crc != masked(data).to_le_bytes() {
            break;
        }
        let Ok(event) = Event::decode(data) else { break };
        events.push(event);
        bytes = rest;
    }
    events
}

/// TFRecord's mask: a CRC of data that holds CRCs should not be one of them.
fn masked(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_framed_and_read_back() {
        let dir = tempfile::tempdir().unwrap();
        EventFile::create(dir.path()).unwrap().scalars(7, &[("loss", 0.5), ("auc", 0.75)]).unwrap();
        let path = std::fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap().path();
        let mut bytes = std::fs::read(path).unwrap();
        // The framing by hand: TensorFlow's record format.
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        assert_eq!(bytes[8..12], masked(&bytes[..8]).to_le_bytes());
        assert_eq!(bytes[12 + length..16 + length], masked(&bytes[12..12 + length]).to_le_bytes());
        let events = records(&bytes);
        assert_eq!(events.len(), 2);
        assert_eq!(events[0].file_version.as_deref(), Some("brain.Event:2"));
        assert_eq!(events[1].step, 7);
        let values = &events[1].summary.as_ref().unwrap().value;
        assert_eq!((values[1].tag.as_str(), values[1].simple_value), ("auc", 0.75));
        // Of "123456789" the CRC-32C is e3069283.
        assert_eq!(masked(b"123456789"), 0xe306_9283u32.rotate_right(15).wrapping_add(0xa282_ead8));
        // Cut short or damaged: the events before.
        assert_eq!(records(&bytes[..bytes.len() - 1]).len(), 1);
        *bytes.last_mut().unwrap() ^= 1;
        assert_eq!(records(&bytes).len(), 1);
        assert_eq!(records(&[0xff; 40]).len(), 0);
    }

    #[test]
    fn rewinding_drops_the_stages_later_scalars_only() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = EventFile::create(dir.path()).unwrap();
        for step in 1..=4 {
            file.scalars(step, &[("stage1/train/loss", 0.5), ("stage2/train/loss", 0.25)]).unwrap();
        }
        file.scalars(9, &[("stage1/train/loss", 0.5)]).unwrap();
        rewind(dir.path(), "stage1/", Some(2)).unwrap();
        let path = std::fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap().path();
        let seen = || {
            let mut seen = Vec::new();
            for event in records(&std::fs::read(&path).unwrap()) {
                let values = event.summary.into_iter().flat_map(|s| s.value);
                seen.extend(values.map(|v| (event.step, v.tag.starts_with("stage1"))));
            }
            seen
        };
        assert_eq!(seen(), [(1, true), (1, false), (2, true), (2, false), (3, false), (4, false)]);
        rewind(dir.path(), "stage2/", None).unwrap();
        assert_eq!(seen(), [(1, true), (2, true)]);
    }
}
