//! The report of `bench overhead` as a picture: a bar for each configuration's time a row, in SVG.

use std::fmt::Write as _;

use super::methods::TALLREC;
use super::report::{Report, Summary};
use super::worker::{Mode, Phase};

/// Pixels.
const WIDTH: f64 = 860.0;
const LEFT: f64 = 230.0;
/// Longest bar.
const BAR: f64 = 400.0;
const LINE: f64 = 24.0;

/// A whole SVG file.
pub fn svg(report: &Report) -> String {
    let mut body = String::new();
    let mut y = 56.0;
    for (phase, title) in
        [(Phase::Training, "Training (forward, backward, optimizer)"), (Phase::Inference, "Inference")]
    {
        let of_phase: Vec<&Summary> = report.summaries.iter().filter(|s| s.phase == phase).collect();
        let longest = of_phase.iter().map(|s| s.seconds_per_row.q3).fold(f64::MIN_POSITIVE, f64::max);
        _ = writeln!(body, r#"<text x="20" y="{y}" font-weight="bold">{title}: milliseconds a row</text>"#);
        y += LINE;
        for mode in [Mode::Paper, Mode::Engine] {
            for s in of_phase.iter().filter(|s| s.mode == mode) {
                bar(&mut body, report, s, y, BAR / longest);
                y += LINE;
            }
            y += LINE / 3.0;
        }
        y += LINE / 2.0;
    }
    let layers = report.layers.map_or(String::new(), |l| format!(", {} blocks extrapolated from {}", l.full, l.few));
    let caption = [
        format!("{}{layers}, {}, {} threads, {}", report.llm, report.device, report.threads, report.instructions),
        format!(
            "Data: {}. Bars are medians, lines the quartiles, percentages what CoLLM takes beyond TALLRec.",
            report.data
        ),
        "paper: padded batches, all vocabulary logits, nothing shared. engine: what collm-engine does.".into(),
    ];
    for line in &caption {
        _ = writeln!(body, r##"<text x="20" y="{y}" font-size="12" fill="#555">{}</text>"##, escaped(line));
        y += 18.0;
    }
    format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}" font-family="sans-serif" font-size="14">
<rect width="100%" height="100%" fill="white"/>
<text x="20" y="28" font-size="18" font-weight="bold">What collaborative vectors cost: CoLLM beside TALLRec</text>
{body}</svg>
"##
    )
}

fn bar(body: &mut String, report: &Report, s: &Summary, y: f64, scale: f64) {
    let t = s.seconds_per_row;
    let (mode, colour) = match (s.mode, s.method == TALLREC) {
        (Mode::Paper, true) => ("paper", "#bbbbbb"),
        (Mode::Paper, false) => ("paper", "#888888"),
        (Mode::Engine, true) => ("engine", "#9ecae1"),
        (Mode::Engine, false) => ("engine", "#3182bd"),
    };
    let overhead = report.overheads.iter().find(|o| (o.mode, o.phase, &o.method) == (s.mode, s.phase, &s.method));
    let beyond = overhead.map_or(String::new(), |o| format!(" ({:+.1} %)", 100.0 * o.time.median));
    let (width, base) = (t.median * scale, y + 4.0);
    _ = writeln!(
        body,
        r##"<text x="{}" y="{base}" text-anchor="end">{mode}, {}</text>
<rect x="{LEFT}" y="{}" width="{width:.1}" height="16" fill="{colour}"/>
<line x1="{:.1}" x2="{:.1}" y1="{y}" y2="{y}" stroke="#222"/>
<text x="{:.1}" y="{base}">{:.1}{beyond}</text>"##,
        LEFT - 10.0,
        escaped(&s.method),
        y - 8.0,
        LEFT + t.q1 * scale,
        LEFT + t.q3 * scale,
        LEFT + t.q3.max(t.median) * scale + 8.0,
        1e3 * t.median,
    );
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
