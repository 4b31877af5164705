//! `/metrics` in the text format of Prometheus.

use std::collections::BTreeMap;
use std::fmt::{Display, Write};
use std::sync::Mutex;

use super::models::Models;
use crate::scheduler::Statistics;

/// Counts of requests.
#[derive(Default)]
pub(crate) struct Metrics {
    /// Requests and their seconds by path and status.
    requests: Mutex<BTreeMap<(String, u16), (u64, f64)>>,
}

/// A figure of each model: name, type, help and value.
type ModelMetric = (&'static str, &'static str, &'static str, fn(&Statistics) -> f64);

const MODEL_METRICS: [ModelMetric; 14] = [
    ("stb_slots", "gauge", "Sequences that can be computed together.", |s| s.slots as f64),
    ("stb_slots_busy", "gauge", "Sequences that are being computed.", |s| s.busy as f64),
    ("stb_queue_length", "gauge", "Requests that wait for a slot.", |s| s.queued as f64),
    ("stb_answers_completed_total", "counter", "Answers completed.", |s| s.completed as f64),
    ("stb_answers_canceled_total", "counter", "Answers whose client has gone.", |s| {
        s.canceled as f64
    }),
    ("stb_answers_failed_total", "counter", "Answers that failed.", |s| s.failed as f64),
    ("stb_prompt_tokens_total", "counter", "Prompt tokens computed.", |s| {
        s.prefilled_tokens as f64
    }),
    ("stb_cached_tokens_total", "counter", "Prompt tokens from the prefix cache.", |s| {
        s.cached_tokens as f64
    }),
    ("stb_generated_tokens_total", "counter", "Tokens generated.", |s| s.decoded_tokens as f64),
    ("stb_passes_total", "counter", "Passes over the weights.", |s| s.passes as f64),
    ("stb_prefix_hits_total", "counter", "Prompts that began with a cached prefix.", |s| {
        s.prefix_hits as f64
    }),
    ("stb_prefix_misses_total", "counter", "Prompts that did not.", |s| s.prefix_misses as f64),
    ("stb_sequence_bytes", "gauge", "Bytes of keys and values of running sequences.", |s| {
        s.sequence_bytes as f64
    }),
    ("stb_prefix_cache_bytes", "gauge", "Bytes of keys and values in the prefix cache.", |s| {
        s.prefix_bytes as f64
    }),
];

impl Metrics {
    /// Counts a request that is over.
    pub fn request(&self, path: &str, status: u16, seconds: f64) {
        let mut requests = self.requests.lock().unwrap_or_else(|e| e.into_inner());
        let entry = requests.entry((path.to_owned(), status)).or_default();
        entry.0 += 1;
        entry.1 += seconds;
    }

    /// All figures.
    pub fn text(&self, models: &Models) -> String {
        let mut out = String::new();
        let requests = self.requests.lock().unwrap_or_else(|e| e.into_inner()).clone();
        head(&mut out, "stb_http_requests_total", "counter", "Requests by path and status.");
        for ((path, status), (count, _)) in &requests {
            line(&mut out, "stb_http_requests_total", &labels(path, *status), count);
        }
        head(&mut out, "stb_http_request_seconds_total", "counter", "Seconds of requests.");
        for ((path, status), (_, seconds)) in &requests {
            line(&mut out, "stb_http_request_seconds_total", &labels(path, *status), seconds);
        }
        let models: Vec<_> =
            models.ready().map(|m| (escape(&m.name), m.scheduler.statistics())).collect();
        for (name, kind, help, value) in MODEL_METRICS {
            head(&mut out, name, kind, help);
            for (model, statistics) in &models {
                line(&mut out, name, &format!("model=\"{model}\""), value(statistics));
            }
        }
        if let Some(bytes) = memory() {
            head(&mut out, "process_resident_memory_bytes", "gauge", "Memory of the process.");
            let _ = writeln!(out, "process_resident_memory_bytes {bytes}");
        }
        out
    }
}

fn labels(path: &str, status: u16) -> String {
    format!("path=\"{}\",status=\"{status}\"", escape(path))
}

fn escape(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

fn head(out: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

fn line(out: &mut String, name: &str, labels: &str, value: impl Display) {
    let _ = writeln!(out, "{name}{{{labels}}} {value}");
}

/// The memory of this process in bytes; `None` on systems other than Linux.
pub(crate) fn memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with("VmRSS:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}
