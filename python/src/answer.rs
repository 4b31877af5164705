//! `stb.Generation`: an answer, piece by piece.

use std::ops::ControlFlow;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use stb_runtime::scheduler::{Event, Job, Scheduler, SubmitError, Ticket, Usage};
use stb_runtime::{Error, Finish, SamplerOptions, SamplingRange, random_seed};

use crate::errors::exception;
use crate::options::{OneOrMany, Options};
use crate::waiting::{TICK, hold};

/// An answer that is being generated: an iterator of pieces of text.
///
/// The model computes in the background, also while nobody reads; ``close()``, the end of a ``with`` block and dropping
/// the object stop it.
#[pyclass(frozen, module = "stb")]
pub(crate) struct Generation {
    scheduler: Arc<Scheduler>,
    ticket: Ticket,
    /// `None` after the last event.
    events: Mutex<Option<Receiver<Event>>>,
    /// What has been received.
    so_far: Mutex<Received>,
}

#[derive(Default)]
struct Received {
    text: String,
    tokens: Vec<u32>,
    finish: Option<&'static str>,
    usage: Option<Usage>,
}

/// What came next.
enum Step {
    Event(Event),
    /// Nothing yet.
    Waiting,
    /// There is nothing more.
    Ended,
    /// The thread that computes is gone.
    Lost,
}

impl Generation {
    /// Queues the answer to a prompt.
    pub fn start(scheduler: Arc<Scheduler>, job: Job) -> PyResult<Self> {
        let (sender, events) = channel();
        let sink = move |event| match sender.send(event) {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        };
        let ticket = scheduler.submit(job, Box::new(sink)).map_err(|e| match e {
            SubmitError::Invalid(e) => exception(&e),
            SubmitError::Busy | SubmitError::Closed => {
                exception(&Error::Internal { what: e.to_string() })
            }
        })?;
        let (events, so_far) = (Mutex::new(Some(events)), Mutex::default());
        Ok(Self { scheduler, ticket, events, so_far })
    }

    fn stop(&self) {
        self.scheduler.cancel(self.ticket);
        *hold(&self.events) = None;
    }

    /// Waits a moment for the next event.
    fn wait(&self) -> Step {
        let events = hold(&self.events);
        let Some(events) = &*events else { return Step::Ended };
        match events.recv_timeout(TICK) {
            Ok(event) => Step::Event(event),
            Err(RecvTimeoutError::Timeout) => Step::Waiting,
            Err(RecvTimeoutError::Disconnected) => Step::Lost,
        }
    }

    /// The next piece of text that is not empty. `None` at the end.
    fn next_piece(&self, py: Python<'_>) -> PyResult<Option<String>> {
        loop {
            let step = py.detach(|| self.wait());
            let piece = match step {
                Step::Ended => return Ok(None),
                Step::Waiting => String::new(),
                Step::Event(event) => self.receive(event)?,
                Step::Lost => {
                    self.stop();
                    let what = "the thread of the model has ended".to_owned();
                    return Err(exception(&Error::Internal { what }));
                }
            };
            if let Err(signal) = py.check_signals() {
                self.stop();
                return Err(signal);
            }
            if !piece.is_empty() {
                return Ok(Some(piece));
            }
        }
    }

    /// Keeps what an event says, and returns its text.
    fn receive(&self, event: Event) -> PyResult<String> {
        let mut so_far = hold(&self.so_far);
        let text = match event {
            Event::Token { token, text, .. } => {
                so_far.tokens.push(token);
                text
            }
            Event::Done { finish, text, usage } => {
                *hold(&self.events) = None;
                so_far.finish = Some(finish_reason(finish));
                so_far.usage = Some(usage);
                text
            }
            Event::Failed(error) => {
                *hold(&self.events) = None;
                return Err(exception(&error));
            }
        };
        so_far.text.push_str(&text);
        Ok(text)
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        self.stop();
    }
}

#[pymethods]
impl Generation {
    fn __iter__(this: PyRef<'_, Self>) -> PyRef<'_, Self> {
        this
    }

    fn __next__(&self, py: Python<'_>) -> PyResult<Option<String>> {
        self.next_piece(py)
    }

    fn __enter__(this: PyRef<'_, Self>) -> PyRef<'_, Self> {
        this
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, _exception: &Bound<'_, pyo3::types::PyTuple>) {
        self.stop();
    }

    /// Waits for the end of the answer and returns its whole text, with the pieces that were read before.
    fn complete(&self, py: Python<'_>) -> PyResult<String> {
        while self.next_piece(py)?.is_some() {}
        Ok(hold(&self.so_far).text.clone())
    }

    /// Stops the answer. The iterator ends.
    fn close(&self) {
        self.stop();
    }

    /// The text so far.
    #[getter]
    fn text(&self) -> String {
        hold(&self.so_far).text.clone()
    }

    /// The ids of the generated tokens so far, without the end token.
    #[getter]
    fn tokens(&self) -> Vec<u32> {
        hold(&self.so_far).tokens.clone()
    }

    /// Why the answer has ended: ``stop`` (an end token or a stop text), ``length`` (``max_tokens``), ``context`` (the
    /// context is full); None before, and if it was stopped.
    #[getter]
    fn finish_reason(&self) -> Option<&'static str> {
        hold(&self.so_far).finish
    }

    /// Token counts and seconds of the finished answer: ``prompt_tokens``, ``cached_tokens``, ``completion_tokens``,
    /// ``prefill_seconds`` and ``decode_seconds``; None before.
    #[getter]
    fn usage<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyDict>>> {
        let Some(usage) = hold(&self.so_far).usage else { return Ok(None) };
        let dict = PyDict::new(py);
        dict.set_item("prompt_tokens", usage.prompt_tokens)?;
        dict.set_item("cached_tokens", usage.cached_tokens)?;
        dict.set_item("completion_tokens", usage.completion_tokens)?;
        dict.set_item("prefill_seconds", usage.timings.prefill.as_secs_f64())?;
        dict.set_item("decode_seconds", usage.timings.decode.as_secs_f64())?;
        Ok(Some(dict))
    }
}

fn finish_reason(finish: Finish) -> &'static str {
    match finish {
        Finish::Length => "length",
        Finish::Context => "context",
        // The scheduler reports no answer that its client has stopped.
        Finish::Stop | Finish::Interrupted => "stop",
    }
}

/// Applies the arguments of `generate()` and `chat()` to `job`.
///
/// # Errors
/// `ValueError` for values out of range, `TypeError` for values of another type.
pub(crate) fn apply_options(job: &mut Job, options: &Options<'_>) -> PyResult<()> {
    for range in SamplingRange::ALL {
        if let Some(value) = options.take::<f32>(range.name)? {
            if let Some(problem) = range.refuse(value) {
                return Err(PyValueError::new_err(problem));
            }
            if let Some(field) = field(&mut job.sampler, range.name) {
                *field = value;
            }
        }
    }
    if let Some(top_k) = options.take::<i64>("top_k")? {
        job.sampler.top_k = match top_k {
            -1 => 0,
            k => usize::try_from(k).map_err(|_| {
                PyValueError::new_err(format!("`top_k` is {k}, but must be at least -1"))
            })?,
        };
    }
    job.sampler.seed = options.take("seed")?.unwrap_or_else(random_seed);
    job.max_tokens = match options.take::<i64>("max_tokens")? {
        None | Some(-1) => None,
        Some(n) => Some(usize::try_from(n).map_err(|_| {
            PyValueError::new_err(format!(
                "`max_tokens` is {n}, but must be at least 0 (or -1: no limit)"
            ))
        })?),
    };
    job.stop = match options.take("stop")? {
        None => Vec::new(),
        Some(OneOrMany::One(text)) => vec![text],
        Some(OneOrMany::Many(texts)) => texts,
    };
    // An empty text would stop every answer at once.
    job.stop.retain(|text| !text.is_empty());
    job.ignore_end = options.take("ignore_eos")?.unwrap_or(false);
    Ok(())
}

/// A field of the sampler by its name.
fn field<'s>(sampler: &'s mut SamplerOptions, name: &str) -> Option<&'s mut f32> {
    Some(match name {
        "temperature" => &mut sampler.temperature,
        "top_p" => &mut sampler.top_p,
        "min_p" => &mut sampler.min_p,
        "repeat_penalty" => &mut sampler.repeat_penalty,
        "presence_penalty" => &mut sampler.presence_penalty,
        "frequency_penalty" => &mut sampler.frequency_penalty,
        _ => return None,
    })
}
