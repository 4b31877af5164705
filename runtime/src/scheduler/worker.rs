//! The thread of a scheduler: continuous batching.
//!
//! Each pass takes one token of every sequence that generates, and fills up with tokens of prompts. A long prompt
//! therefore does not stall the others, and a sequence that ends makes room before the next pass.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};

use super::job::Event;
use super::options::SchedulerOptions;
use super::prefix::PrefixCache;
use super::queue::{Closing, Queue, Work};
use super::reply::{Reply, Step};
use super::slot::{Purpose, Slot};
use super::statistics::Statistics;
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::generate::Finish;
use crate::kv_cache::PAGE_TOKENS;
use crate::panics;
use crate::pass::{Output, Segment};
use crate::tokenizer::Tokenizer;

/// Prompt tokens per pass while other sequences generate: they wait for these.
const SHARED_PREFILL: usize = 64;

/// What the thread owns.
pub(super) struct Worker {
    pub engine: Arc<Engine>,
    pub tokenizer: Arc<Tokenizer>,
    pub options: SchedulerOptions,
    pub context: usize,
    pub queue: Arc<Queue>,
    pub statistics: Arc<Mutex<Statistics>>,
}

/// The sequences in progress.
struct Running<'t> {
    slots: Vec<Slot<'t>>,
    prefix: PrefixCache,
    outputs: Outputs,
    statistics: Statistics,
    /// Prompt tokens per pass while no sequence generates.
    prefill: usize,
}

/// The outputs of a pass.
#[derive(Default)]
struct Outputs {
    /// The slot of each row of logits.
    slots: Vec<usize>,
    /// [rows, vocab].
    logits: Vec<f32>,
    /// Hidden states of a slot, [n, hidden].
    hidden: Vec<(usize, Vec<f32>)>,
}

/// How a sequence ended.
enum Ending {
    Finished(Finish),
    /// The embedding was sent.
    Embedded,
    /// The client has gone.
    Gone,
    Failed(Error),
}

impl Outputs {
    fn clear(&mut self) {
        self.slots.clear();
        self.logits.clear();
        self.hidden.clear();
    }

    fn receive(&mut self, output: Output<'_>) {
        match output {
            Output::Logits { id, logits, .. } => {
                self.slots.push(id);
                self.logits.extend_from_slice(logits);
            }
            Output::Hidden { id, rows } => self.hidden.push((id, rows.to_vec())),
            // Only a device selects tokens.
            Output::TopK(_) => {}
        }
    }
}

impl Worker {
    /// Runs until the queue is closed.
    pub(super) fn run(self) {
        let page_bytes = PAGE_TOKENS * self.engine.kv_shape().token_bytes();
        let mut running = Running {
            slots: Vec::new(),
            prefix: PrefixCache::new(self.options.prefix_cache_bytes, page_bytes),
            outputs: Outputs::default(),
            statistics: Statistics::new(self.options.slots),
            prefill: self.engine.prefill_size(usize::MAX / 2),
        };
        let mut is_draining = false;
        loop {
            for id in self.queue.take_canceled() {
                if let Some(index) = running.slots.iter().position(|slot| slot.id == id) {
                    running.end(index, Ending::Gone);
                }
            }
            match self.queue.closing() {
                Some(Closing::AtOnce) => return,
                Some(Closing::AfterRunning) => {
                    // A job that came just before the queue was closed runs if a slot is free: its client may
                    // have the head of the stream already.
                    if !is_draining {
                        self.admit(&mut running);
                        is_draining = true;
                    }
                    self.refuse_waiting();
                }
                None => self.admit(&mut running),
            }
            self.publish(&running);
            if !running.slots.is_empty() {
                running.step(&self.engine);
            } else if self.queue.closing().is_some() {
                return;
            } else {
                self.queue.wait();
            }
        }
    }

    fn refuse_waiting(&self) {
        while let Some((_, work)) = self.queue.take() {
            let error = Error::usage("the server is shutting down; send the request again later");
            // A sink that panics is not our concern here.
            let _ = catch_unwind(AssertUnwindSafe(|| match work {
                Work::Answer(_, mut sink) => drop(sink(Event::Failed(error))),
                Work::Embedding(_, sink) => sink(Err(error)),
            }));
        }
    }

    /// Moves jobs from the queue to free slots.
    fn admit<'t>(&'t self, running: &mut Running<'t>) {
        while running.slots.len() < self.options.slots {
            let Some((id, work)) = self.queue.take() else { return };
            let (prompt, purpose) = match work {
                Work::Answer(mut job, sink) => {
                    let prompt = std::mem::take(&mut job.prompt);
                    let vocabulary = self.engine.model.embeddings.rows();
                    let answer = Reply::new(*job, &prompt, sink, (&self.tokenizer, vocabulary));
                    (prompt, Purpose::Answer(Box::new(answer)))
                }
                Work::Embedding(tokens, sink) => {
                    let sum = vec![0.0; self.engine.model.hidden_size()];
                    (tokens, Purpose::Embedding { sum, sink })
                }
            };
            let is_full = matches!(&purpose, Purpose::Answer(answer) if answer.is_full());
            running.slots.push(Slot::new(id, &self.engine, self.context, prompt, purpose));
            if is_full {
                running.end(running.slots.len() - 1, Ending::Finished(Finish::Length));
            }
        }
    }

    fn publish(&self, running: &Running<'_>) {
        let statistics = Statistics {
            busy: running.slots.len(),
            sequence_bytes: running.slots.iter().map(Slot::bytes).sum(),
            prefix_bytes: running.prefix.bytes(),
            ..running.statistics
        };
        *self.statistics.lock().unwrap_or_else(|e| e.into_inner()) = statistics;
    }
}

impl Running<'_> {
    /// One pass, and what follows from its outputs.
    fn step(&mut self, engine: &Engine) {
        if let Err(error) = self.pass(engine) {
            let message = error.to_string();
            for index in (0..self.slots.len()).rev() {
                if self.slots[index].planned() > 0 {
                    self.end(index, Ending::Failed(Error::Internal { what: message.clone() }));
                }
            }
            return;
        }
        for slot in &mut self.slots {
            slot.share(&mut self.prefix);
        }
        let mut endings: Vec<(usize, Ending)> = Vec::new();
        let vocabulary = engine.model.embeddings.rows();
        let Self { slots, outputs, statistics, .. } = self;
        for (index, logits) in outputs.slots.iter().zip(outputs.logits.chunks_exact_mut(vocabulary))
        {
            let ending = advance(&mut slots[*index], logits, statistics);
            endings.extend(ending.map(|ending| (*index, ending)));
        }
        for (index, rows) in outputs.hidden.drain(..) {
            let slot = &mut slots[index];
            if let Purpose::Embedding { sum, .. } = &mut slot.purpose {
                for row in rows.chunks_exact(sum.len()) {
                    sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(*x));
                }
                if slot.is_prefilled() {
                    endings.push((index, Ending::Embedded));
                }
            }
        }
        endings.sort_by_key(|(index, _)| std::cmp::Reverse(*index));
        endings.into_iter().for_each(|(index, ending)| self.end(index, ending));
    }

    /// Plans and runs a pass. A panic is an error.
    fn pass(&mut self, engine: &Engine) -> Result<()> {
        let Self { slots, prefix, outputs, statistics, prefill } = self;
        outputs.clear();
        let decodes = slots.iter().any(Slot::is_decoding);
        let mut budget = if decodes { SHARED_PREFILL.min(*prefill) } else { *prefill };
        for slot in &mut *slots {
            slot.plan(budget, prefix);
            if !slot.is_decoding() {
                budget -= slot.planned();
                statistics.prefilled_tokens += slot.planned() as u64;
            }
        }
        statistics.passes += 1;
        let mut segments: Vec<Segment<'_>> = slots
            .iter_mut()
            .enumerate()
            .filter(|(_, slot)| slot.planned() > 0)
            .map(|(index, slot)| slot.segment(index))
            .collect();
        let run = || engine.run_pass(&mut segments, &mut |output| outputs.receive(output));
        catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| Err(panicked(&*panic)))
    }

    /// Frees a slot and tells its client.
    fn end(&mut self, index: usize, ending: Ending) {
        let slot = self.slots.remove(index);
        let statistics = &mut self.statistics;
        statistics.cached_tokens += slot.cached as u64;
        match &ending {
            Ending::Finished(_) | Ending::Embedded => statistics.completed += 1,
            Ending::Gone => statistics.canceled += 1,
            Ending::Failed(_) => statistics.failed += 1,
        }
        let (cached, tokens) = (slot.cached, slot.prompt_tokens());
        if matches!(slot.purpose, Purpose::Answer(_)) {
            *(if cached > 0 {
                &mut statistics.prefix_hits
            } else {
                &mut statistics.prefix_misses
            }) += 1;
        }
        // A sink that panics has lost its client; the others go on.
        let _ = catch_unwind(AssertUnwindSafe(|| match (slot.purpose, ending) {
            (Purpose::Answer(answer), Ending::Finished(finish)) => answer.finish(finish, cached),
            (Purpose::Answer(answer), Ending::Failed(error)) => answer.fail(error),
            (Purpose::Embedding { sum, sink }, Ending::Embedded) => {
                sink(Ok(sum.iter().map(|sum| (sum / tokens as f64) as f32).collect()));
            }
            (Purpose::Embedding { sink, .. }, Ending::Failed(error)) => sink(Err(error)),
            _ => {}
        }));
    }
}

/// Chooses the next token of a slot from `logits`, `[vocab]`. A panic is an error of this slot alone.
fn advance(slot: &mut Slot<'_>, logits: &mut [f32], statistics: &mut Statistics) -> Option<Ending> {
    let has_room = slot.has_room();
    let Purpose::Answer(answer) = &mut slot.purpose else { return None };
    let before = answer.tokens();
    let step = catch_unwind(AssertUnwindSafe(|| answer.step(logits, has_room)));
    statistics.decoded_tokens += (answer.tokens() - before) as u64;
    match step.unwrap_or_else(|panic| Err(panicked(&*panic))) {
        Ok(Step::Next(token)) => {
            slot.continue_with(token);
            None
        }
        Ok(Step::Ended(finish)) => Some(Ending::Finished(finish)),
        Ok(Step::Gone) => Some(Ending::Gone),
        Err(error) => Some(Ending::Failed(error)),
    }
}

fn panicked(panic: &(dyn std::any::Any + Send)) -> Error {
    Error::Internal { what: panics::message(panic) }
}
