//! `prepare amazon-book` on generated files of the 2018 form: time and peak memory beside the floor, which is unpacking alone.
//!
//! `cargo bench --bench amazon -- [REVIEWS] [METAS] [DIR]` (2,000,000 and 400,000; files are made in DIR once and kept, default
//! `target/amazon-bench`). About 750 bytes a review and 2,000 a meta, packed to a third; a sixth of the reviews in 2017.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use collm_engine::data::{Window, prepare_amazon};
use collm_engine::rng::Rng;
use flate2::Compression;
use flate2::bufread::MultiGzDecoder;
use flate2::write::GzEncoder;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let number = |at: usize, or: u64| args.get(at).map_or(or, |a| a.parse().expect("a number"));
    let (n_reviews, n_metas) = (number(0, 2_000_000), number(1, 400_000));
    let dir = args.get(2).map_or_else(|| PathBuf::from("target/amazon-bench"), PathBuf::from);
    std::fs::create_dir_all(&dir).expect("a directory");
    let reviews = dir.join(format!("reviews-{n_reviews}.json.gz"));
    let metas = dir.join(format!("meta-{n_metas}.json.gz"));
    if !reviews.exists() {
        generate(&reviews, n_reviews, |text, _, random| review(text, random, n_reviews as u32 / 20, n_metas as u32));
    }
    if !metas.exists() {
        generate(&metas, n_metas, meta);
    }
    let megabytes = |path: &Path| path.metadata().expect("a file").len() as f64 / 1e6;
    for path in [&reviews, &metas] {
        let (bytes, took) = timed(|| unpack(path));
        println!("unpacking {}: {:.0} MB to {:.0} MB in {took}", path.display(), megabytes(path), bytes as f64 / 1e6);
    }
    let (_, took) = timed(|| rayon::join(|| unpack(&reviews), || unpack(&metas)));
    println!("floor, both unpacked at once: {took}; peak memory so far {}", peak());
    let pair = (reviews.as_path(), metas.as_path());
    let prepare = || prepare_amazon("bench", pair, Window::default(), &dir.join("out"), false).expect("prepared");
    let (manifest, took) = timed(prepare);
    let (users, items, train) = (manifest.n_users - 1, manifest.n_items - 1, manifest.splits.train.rows);
    println!("prepare: {took}; peak memory {}; {users} users, {items} items, {train} train rows", peak());
}

/// The result of `f`, and seconds by the clock and of processor time.
fn timed<T>(f: impl FnOnce() -> T) -> (T, String) {
    let (start, cpu) = (Instant::now(), cpu_seconds());
    let result = f();
    (result, format!("{:.2} s ({:.2} s of processor time)", start.elapsed().as_secs_f64(), cpu_seconds() - cpu))
}

/// Bytes of the unpacked file.
fn unpack(path: &Path) -> u64 {
    let mut unpacked = MultiGzDecoder::new(BufReader::with_capacity(1 << 18, File::open(path).expect("a file")));
    let (mut block, mut bytes) = (vec![0; 1 << 20], 0);
    loop {
        match unpacked.read(&mut block).expect("gzip") {
            0 => return bytes,
            n => bytes += n as u64,
        }
    }
}

/// Peak resident memory, and seconds of processor time, where the system tells.
fn peak() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    status.lines().find_map(|l| l.strip_prefix("VmHWM:")).map_or("unknown".into(), |l| l.trim().into())
}

fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<f64> = stat.split(' ').filter_map(|f| f.parse().ok()).collect();
    // User and system ticks of 10 ms are the fields 14 and 15; two of those before are not numbers.
    fields.get(11..13).map_or(f64::NAN, |ticks| ticks.iter().sum::<f64>() / 100.0)
}

/// Below `n`; small numbers are drawn more often.
fn skewed(random: &mut Rng, n: u32) -> u32 {
    let (a, b) = (random.uniform(), random.uniform());
    (a * a * b * f64::from(n)) as u32
}

fn generate(path: &Path, lines: u64, line: impl Fn(&mut String, u64, &mut Rng)) {
    let file = BufWriter::new(File::create(path).expect("a file"));
    let mut packed = GzEncoder::new(file, Compression::new(4));
    let (mut text, mut random) = (String::new(), Rng::new(2018, 0));
    for n in 0..lines {
        text.clear();
        line(&mut text, n, &mut random);
        packed.write_all(text.as_bytes()).expect("written");
    }
    packed.finish().expect("written").flush().expect("written");
}

fn words(text: &mut String, random: &mut Rng, n: u32) {
    const SYLLABLES: [&str; 16] =
        ["the", "re", "a", "in", "to", "con", "ver", "sto", "ly", "book", "ing", "of", "er", "pa", "ti", "ch"];
    for _ in 0..n {
        let word = skewed(random, 4096) as usize;
        text.push_str(SYLLABLES[word % 16]);
        if word > 40 {
            text.push_str(SYLLABLES[word / 16 % 16]);
        }
        text.push_str(if word > 900 { SYLLABLES[word / 256] } else { "" });
        text.push(' ');
    }
}

fn asin(item: u32) -> String {
    format!("{:010}", u64::from(item) * 2_654_435_761 % 10_000_000_000)
}

fn review(text: &mut String, random: &mut Rng, users: u32, items: u32) {
    let (user, item) = (skewed(random, users), asin(skewed(random, items)));
    let day = if random.below(6) == 0 { 17_167 + random.below(365) } else { 10_000 + random.below(7_000) };
    let stars = [5, 5, 5, 5, 4, 4, 3, 2, 1][random.below(9) as usize];
    text.push_str(&format!(
        "{{\"overall\": {stars}.0, \"verified\": true, \"reviewTime\": \"01 1, 2017\", \"reviewerID\": \"A{user:013X}\", \"asin\": \
         \"{item}\", \"style\": {{\"Format:\": \" Hardcover\"}}, \"reviewerName\": \"Reader {user}\", \"reviewText\": \""
    ));
    let length = 10 + skewed(random, 450);
    words(text, random, length);
    text.push_str("\\n\\n\", \"summary\": \"");
    words(text, random, 4);
    text.push_str(&format!("\", \"unixReviewTime\": {}}}\n", day * 86_400));
}

fn meta(text: &mut String, n: u64, random: &mut Rng) {
    let item = asin(n as u32);
    text.push_str("{\"category\": [\"Books\", \"Literature &amp; Fiction\"], \"tech1\": \"\", \"description\": [\"");
    words(text, random, 200);
    text.push_str("\"], \"fit\": \"\", \"title\": \"");
    words(text, random, 6);
    text.push_str("\", \"also_buy\": [");
    for _ in 0..40 {
        text.push_str(&format!("\"{}\", ", asin(random.below(400_000))));
    }
    text.push_str(&format!(
        "\"0000000000\"], \"rank\": \"1,349,781 in Books (\", \"price\": \"$39.94\", \"asin\": \"{item}\"}}\n"
    ));
}
