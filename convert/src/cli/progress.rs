//! A progress bar on terminals, silence elsewhere.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use stb_convert::Progress;

use super::output::note;

/// Shows progress with an estimate of the time left and the error of each layer.
pub(super) struct Bar {
    bar: ProgressBar,
    quiet: bool,
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
        Self { bar, quiet }
    }

    pub fn finish(&self) {
        self.bar.finish_and_clear();
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
    }

    fn layer(&self, index: usize, all: usize, error: f64, encoding: &str, seconds: f64) {
        self.bar.println(format!(
            "layer {:>3} of {all}  {encoding:<18} relative error {error:.4}  {seconds:.1} s",
            index + 1
        ));
    }

    fn note(&self, text: &str) {
        if !self.quiet {
            // Notes are printed without a terminal, too.
            self.bar.suspend(|| note(text));
        }
    }
}
