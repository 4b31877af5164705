//! Progress: a bar on terminals, and lines for logs elsewhere.

use std::io::IsTerminal;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use stb_convert::Progress;

use super::output::note;

/// The time between lines of a log, unless a layer is finished.
const LINE_EVERY: Duration = Duration::from_secs(60);

/// Shows progress with an estimate of the time left and the error of each layer.
pub(super) struct Bar {
    bar: ProgressBar,
    quiet: bool,
    /// For a log; `None` on a terminal, and if nothing is to be printed.
    log: Option<Mutex<Log>>,
}

impl Bar {
    pub fn new(quiet: bool) -> Self {
        let target =
            if quiet { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
        let bar = ProgressBar::with_draw_target(Some(1), target);
        let style = ProgressStyle::with_template("{bar:30} {percent:>3}% {eta:>5} left  {msg}");
        if let Ok(style) = style {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(250));
        let is_log = !quiet && !std::io::stderr().is_terminal();
        let log = is_log.then(|| Mutex::new(Log::new(Instant::now())));
        Self { bar, quiet, log }
    }

    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }

    /// Writes what `line` makes of the log, if there is one.
    fn write_log(&self, line: impl FnOnce(&mut Log) -> Option<String>) {
        let Some(log) = &self.log else { return };
        if let Some(line) = line(&mut log.lock().unwrap_or_else(PoisonError::into_inner)) {
            note(line);
        }
    }
}

impl Progress for Bar {
    fn step(&self, done: u64, all: u64, what: &str) {
        if done < self.bar.position() {
            // A new phase has begun.
            self.bar.reset_eta();
        }
        self.bar.set_length(all);
        self.bar.set_position(done);
        self.bar.set_message(what.to_owned());
        self.write_log(|log| log.step(Instant::now(), done, all, what));
    }

    fn layer(&self, index: usize, all: usize, error: f64, encoding: &str, seconds: f64) {
        let line = format!(
            "layer {:>3} of {all}  {encoding:<18} relative error {error:.4}  {seconds:.1} s",
            index + 1
        );
        self.write_log(|log| Some(log.layer(Instant::now(), &line, all - index - 1, all)));
        self.bar.println(line);
    }

    fn note(&self, text: &str) {
        if !self.quiet {
            // Notes are printed without a terminal, too.
            self.bar.suspend(|| note(text));
        }
    }
}

/// What a log has been told, to estimate the time left.
struct Log {
    /// When the phase began: work is counted from 0 in each.
    began: Instant,
    /// The work that was done then: a resumed conversion begins later.
    first: u64,
    done: u64,
    last_line: Instant,
}

impl Log {
    fn new(now: Instant) -> Self {
        Self { began: now, first: 0, done: 0, last_line: now }
    }

    /// `done` of `all` units of work are done. Returns a line if there has been none for a while.
    fn step(&mut self, now: Instant, done: u64, all: u64, what: &str) -> Option<String> {
        if done < self.done || done == 0 {
            (self.began, self.first) = (now, done);
        }
        self.done = done;
        if now.duration_since(self.last_line) < LINE_EVERY {
            return None;
        }
        self.last_line = now;
        let left = self.left(now, all.saturating_sub(done));
        Some(format!("{:>3} %{left}  {what}", 100 * done / all.max(1)))
    }

    /// A line for a finished layer; `left` of `all` layers are to be done.
    fn layer(&mut self, now: Instant, line: &str, left: usize, all: usize) -> String {
        self.last_line = now;
        // Steps count layers in smaller units.
        let finished = (all - left).max(1) as u64;
        let units = left as u64 * self.done.max(1).div_ceil(finished);
        format!("{line}{}", self.left(now, units))
    }

    /// The time for `units` of work, as a part of a line; nothing if it cannot be known.
    fn left(&self, now: Instant, units: u64) -> String {
        let done = self.done.saturating_sub(self.first);
        if done == 0 || units == 0 {
            return String::new();
        }
        let seconds = now.duration_since(self.began).as_secs_f64() * units as f64 / done as f64;
        let minutes = (seconds / 60.0).ceil() as u64;
        match minutes {
            0..=1 => format!(", about {seconds:.0} s left"),
            2..=119 => format!(", about {minutes} min left"),
            _ => format!(", about {} h {} min left", minutes / 60, minutes % 60),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_has_a_line_per_layer_and_one_per_minute_otherwise() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut log = Log::new(start);
        assert_eq!(log.step(at(0), 0, 40, "layer 1: q"), None);
        assert_eq!(log.step(at(30), 5, 40, "layer 1: o"), None);
        // Ten units have taken 50 seconds, and 30 are left.
        assert_eq!(log.step(at(50), 10, 40, "layer 2: q"), None);
        assert_eq!(log.layer(at(50), "layer 1", 3, 4), "layer 1, about 3 min left");
        assert_eq!(log.step(at(100), 12, 40, "x"), None);
        let line = log.step(at(120), 20, 40, "layer 3: q").unwrap();
        assert_eq!(line, " 50 %, about 2 min left  layer 3: q");
        assert_eq!(log.step(at(170), 40, 40, "x"), None);
        assert_eq!(log.layer(at(180), "layer 4", 0, 4), "layer 4");
        // Another phase, whose end is far.
        assert_eq!(log.step(at(200), 0, 1000, "step"), None);
        let line = log.step(at(300), 10, 1000, "step 11").unwrap();
        assert_eq!(line, "  1 %, about 2 h 45 min left  step 11");
    }
}
