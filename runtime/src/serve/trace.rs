//! [`Trace`]: what becomes of a request, for the log and the metrics.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use axum::http::{Method, StatusCode};

use super::error::ApiError;
use super::log::LogLine;
use super::metrics::Metrics;

/// One request. When the last user of the value is gone, the request is over and is logged.
pub(crate) struct Trace {
    metrics: Arc<Metrics>,
    method: Method,
    /// The path, if it is one of the server's.
    path: String,
    started: Instant,
    outcome: Mutex<Outcome>,
}

#[derive(Default)]
struct Outcome {
    /// The status, once the response has begun.
    status: Option<StatusCode>,
    /// Whether the response is sent in pieces, and not complete with its status.
    streams: bool,
    complete: bool,
    counts: Option<(usize, usize)>,
    error: Option<String>,
}

impl Trace {
    pub fn new(metrics: Arc<Metrics>, method: Method, path: String) -> Self {
        Self { metrics, method, path, started: Instant::now(), outcome: Mutex::default() }
    }

    fn change(&self, change: impl FnOnce(&mut Outcome)) {
        change(&mut self.outcome.lock().unwrap_or_else(|e| e.into_inner()));
    }

    /// The response begins. `error` is what it reports.
    pub fn respond(&self, status: StatusCode, streams: bool, error: Option<&ApiError>) {
        self.change(|outcome| {
            outcome.status = Some(status);
            outcome.streams = streams;
            outcome.error = error.map(|e| e.message().to_owned());
        });
    }

    /// All answers are complete, with these numbers of prompt tokens and of tokens generated.
    pub fn complete(&self, counts: (usize, usize)) {
        self.change(|outcome| {
            outcome.complete = true;
            outcome.counts = Some(counts);
        });
    }

    /// A response that had begun has failed.
    pub fn fail(&self, error: &ApiError) {
        self.change(|outcome| {
            outcome.complete = true;
            outcome.error = Some(error.message().to_owned());
        });
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        let outcome = std::mem::take(self.outcome.get_mut().unwrap_or_else(|e| e.into_inner()));
        let gone = outcome.status.is_none() || (outcome.streams && !outcome.complete);
        // The number that nginx logs for clients that have gone.
        let status = if gone { 499 } else { outcome.status.map_or(0, |s| s.as_u16()) };
        let seconds = self.started.elapsed().as_secs_f64();
        self.metrics.request(&self.path, status, seconds);
        // Probes and scrapes would drown the rest.
        if status < 400 && matches!(self.path.as_str(), "/health" | "/metrics") {
            return;
        }
        let line = if status >= 500 { LogLine::error("request") } else { LogLine::info("request") };
        line.field("method", &self.method)
            .field("path", &self.path)
            .field("status", status)
            .field("ms", format_args!("{:.1}", seconds * 1e3))
            .optional("prompt_tokens", outcome.counts.map(|c| c.0))
            .optional("completion_tokens", outcome.counts.map(|c| c.1))
            .optional("error", outcome.error)
            .write();
    }
}
