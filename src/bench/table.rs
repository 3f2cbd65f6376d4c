//! The report of `bench overhead` for people: Markdown tables.

use std::fmt::Write as _;

use super::methods::TALLREC;
use super::report::{Overhead, Report, Summary, WholeRun};
use super::worker::{Mode, Phase};

fn table(text: &mut String, head: &[&str], rows: Vec<Vec<String>>) {
    let width =
        |i: usize| rows.iter().map(|r| r[i].chars().count()).chain([head[i].chars().count()]).max().unwrap_or(0);
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let mut line = |cells: Vec<&str>| {
        let cells = cells.iter().zip(&widths).map(|(c, &w)| format!("{c:<w$}"));
        _ = writeln!(text, "| {} |", cells.collect::<Vec<_>>().join(" | "));
    };
    line(head.to_vec());
    let rules: Vec<String> = widths.iter().map(|&w| "-".repeat(w)).collect();
    line(rules.iter().map(String::as_str).collect());
    rows.iter().for_each(|r| line(r.iter().map(String::as_str).collect()));
    text.push('\n');
}

fn percent(x: f64) -> String {
    format!("{:+.1} %", 100.0 * x)
}

fn maybe(x: Option<f64>, show: impl Fn(f64) -> String) -> String {
    x.map_or("not counted".into(), show)
}

impl std::fmt::Display for Report {
    /// Markdown tables.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let named = |s: &dyn std::fmt::Debug| format!("{s:?}").to_lowercase();
        let rounds = self.configurations.first().map_or(0, |c| c.batches.len());
        let mut text = format!(
            "{} on {}, {}, {} threads, {}; medians of {rounds} rounds in turns, quartiles in brackets\n\n",
            self.llm, self.data, self.device, self.threads, self.instructions
        );
        let head = ["phase", "mode", "method", "ms a row", "tokens", "computed", "GFLOP a row", "GFLOP/s", "peak GiB"];
        let row = |s: &Summary| {
            let ms = |x: f64| format!("{:.1}", 1e3 * x);
            let t = s.seconds_per_row;
            vec![
                named(&s.phase),
                named(&s.mode),
                s.method.clone(),
                format!("{} [{}, {}]", ms(t.median), ms(t.q1), ms(t.q3)),
                format!("{:.1}", s.prompt_tokens_per_row),
                maybe(s.computed_tokens_per_row, |x| format!("{x:.1}")),
                maybe(s.gflop_per_row, |x| format!("{x:.2}")),
                maybe(s.gflop_per_second, |x| format!("{x:.0}")),
                format!("{:.2}", s.peak_bytes / f64::from(1 << 30)),
            ]
        };
        table(&mut text, &head, self.summaries.iter().map(row).collect());

        let head = ["beyond TALLRec", "mode", "method", "time", "prompt tokens", "computed", "arithmetic", "paper"];
        let row = |o: &Overhead| {
            let t = o.time;
            vec![
                named(&o.phase),
                named(&o.mode),
                o.method.clone(),
                format!("{} [{}, {}]", percent(t.median), percent(t.q1), percent(t.q3)),
                percent(o.prompt_tokens),
                maybe(o.computed_tokens, percent),
                maybe(o.arithmetic, percent),
                percent(o.paper),
            ]
        };
        table(&mut text, &head, self.overheads.iter().map(row).collect());

        let time = |mode: Mode, method: &str, phase: Phase| {
            let found = self.summaries.iter().find(|s| s.method == method && (s.mode, s.phase) == (mode, phase));
            found.map_or(f64::NAN, |s| s.seconds_per_row.median)
        };
        let head = ["paper mode's time over engine mode's", "method", "itself", "TALLRec in paper mode"];
        let engine = self.summaries.iter().filter(|s| s.mode == Mode::Engine);
        let row = |s: &Summary| {
            let over = |method: &str| format!("{:.2}", time(Mode::Paper, method, s.phase) / s.seconds_per_row.median);
            vec![named(&s.phase), s.method.clone(), over(&s.method), over(TALLREC)]
        };
        table(&mut text, &head, engine.map(row).collect());

        let head =
            ["whole run, hours", "method", "collaborative", "stage 1", "judged", "stage 2", "judged", "all", "beyond"];
        let row = |w: &WholeRun| {
            let parts = [w.collaborative, w.stage1, w.stage1_evaluation, w.stage2, w.stage2_evaluation, w.total];
            let hours = parts.map(|s| format!("{:.3}", s / 3600.0));
            [vec![named(&w.mode), w.method.clone()], hours.to_vec(), vec![percent(w.overhead)]].concat()
        };
        table(&mut text, &head, self.whole_runs.iter().map(row).collect());

        let counted: Vec<&Summary> = self.summaries.iter().filter(|s| !s.operations.is_empty()).collect();
        if let Some(first) = counted.first() {
            let head: Vec<&str> = ["% of the time", "mode", "method"]
                .into_iter()
                .chain(first.operations.iter().map(|o| o.name))
                .collect();
            let row = |s: &&Summary| {
                let all: f64 = s.operations.iter().map(|o| o.seconds_per_row).sum();
                let share = s.operations.iter().map(|o| format!("{:.1}", 100.0 * o.seconds_per_row / all));
                [vec![named(&s.phase), named(&s.mode), s.method.clone()], share.collect()].concat()
            };
            table(&mut text, &head, counted.iter().map(row).collect());
        }
        self.notes.iter().for_each(|n| _ = writeln!(text, "- {n}"));
        f.write_str(&text)
    }
}
