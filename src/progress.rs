//! Progress: bars with ETA on a terminal, plain lines otherwise, nothing in tests.

use std::io::IsTerminal;
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// Where progress goes.
#[derive(Clone)]
pub struct Progress(Kind);

#[derive(Clone)]
enum Kind {
    Bars(MultiProgress),
    Lines,
    Silent,
}

/// The bars on the terminal, for [`note`].
static BARS: OnceLock<MultiProgress> = OnceLock::new();

/// A line on stderr from where no [`Progress`] is at hand; bars stay whole.
pub fn note(text: &str) {
    match BARS.get() {
        // As in `Progress::line`.
        Some(bars) => _ = bars.println(text),
        None => eprintln!("{text}"),
    }
}

/// Seconds between two lines of one task.
const LINE_EVERY: Duration = Duration::from_secs(15);

impl Progress {
    /// Bars if stderr is a terminal, else lines on stderr.
    pub fn auto() -> Self {
        if !std::io::stderr().is_terminal() {
            return Progress(Kind::Lines);
        }
        Progress(Kind::Bars(BARS.get_or_init(MultiProgress::new).clone()))
    }

    /// Nothing.
    pub fn silent() -> Self {
        Progress(Kind::Silent)
    }

    /// A line of its own.
    pub fn line(&self, text: &str) {
        match &self.0 {
            // Printing fails only when stderr is gone: nobody is there to be told.
            Kind::Bars(bars) => _ = bars.println(text),
            Kind::Lines => eprintln!("{text}"),
            Kind::Silent => {}
        }
    }

    /// Begins a task of `total` units.
    pub fn task(&self, name: &str, total: u64) -> Task {
        let bar = match &self.0 {
            Kind::Bars(bars) => {
                let style = ProgressStyle::with_template("{prefix:<22} {bar:30} {pos}/{len} {elapsed} ETA {eta} {msg}");
                let bar = bars.add(ProgressBar::new(total).with_prefix(name.to_string()));
                Some(bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar())))
            }
            _ => None,
        };
        let now = Instant::now();
        let lines = matches!(self.0, Kind::Lines).then(|| Mutex::new(now));
        Task { name: name.into(), total, start: now, first: Mutex::new(None), bar, lines }
    }
}

/// Progress of one task. May be moved on from any thread.
pub struct Task {
    name: String,
    total: u64,
    start: Instant,
    /// Units that were done before this process began (a resumed run): they say nothing about speed.
    first: Mutex<Option<u64>>,
    bar: Option<ProgressBar>,
    lines: Option<Mutex<Instant>>,
}

impl Task {
    /// `done` units are done.
    pub fn set(&self, done: u64) {
        self.report(done, "");
    }

    /// `done` units are done; `message` says how it stands.
    pub fn report(&self, done: u64, message: &str) {
        if let Some(bar) = &self.bar {
            bar.set_position(done);
            if !message.is_empty() {
                bar.set_message(message.to_string());
            }
        }
        let Some(last) = &self.lines else { return };
        let first = *lock(&self.first).get_or_insert(done);
        let mut last = lock(last);
        if last.elapsed() < LINE_EVERY || self.total == 0 {
            return;
        }
        *last = Instant::now();
        let share = (done.saturating_sub(first)) as f64 / (self.total.saturating_sub(first)).max(1) as f64;
        let elapsed = self.start.elapsed().as_secs_f64();
        let eta = if share > 0.0 { format!(", {:.0} s to go", elapsed / share - elapsed) } else { String::new() };
        let percent = 100.0 * done as f64 / self.total as f64;
        eprintln!("{}: {done}/{} ({percent:.0} %{eta}) {message}", self.name, self.total);
    }

    /// The task is done; `message` is what came out.
    pub fn finish(self, message: &str) {
        if let Some(bar) = &self.bar {
            bar.finish_with_message(message.to_string());
        }
        if self.lines.is_some() {
            eprintln!("{}: done in {:.1} s {message}", self.name, self.start.elapsed().as_secs_f64());
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
