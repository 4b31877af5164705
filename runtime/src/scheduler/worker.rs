//! The thread of a scheduler.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};

use super::answer::{Answer, Step};
use super::job::EventSink;
use super::queue::{Queue, Work};
use super::{Job, SchedulerOptions, Statistics};
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::generate::Finish;
use crate::state::State;
use crate::tokenizer::Tokenizer;

/// What the thread owns.
pub(super) struct Worker {
    pub engine: Arc<Engine>,
    pub tokenizer: Arc<Tokenizer>,
    pub options: SchedulerOptions,
    pub context: usize,
    pub queue: Arc<Queue>,
    pub statistics: Arc<Mutex<Statistics>>,
}

impl Worker {
    pub(super) fn run(self) {
        loop {
            self.queue.wait();
            match self.queue.take() {
                Some(Work::Answer(job, sink)) => self.answer(*job, sink),
                Some(Work::Embedding(_, sink)) => {
                    sink(Err(Error::unsupported("embeddings are not supported")));
                }
                None => return,
            }
        }
    }

    fn answer(&self, job: Job, sink: EventSink) {
        let vocabulary = self.engine.model.embeddings.rows();
        let mut answer = Answer::new(job, sink, &self.tokenizer, vocabulary);
        answer.set_cached(0);
        let done = catch_unwind(AssertUnwindSafe(|| self.generate(&mut answer)));
        match done {
            Ok(Ok(Some(finish))) => {
                answer.finish(finish);
            }
            Ok(Ok(None)) => {}
            Ok(Err(e)) => answer.fail(e),
            Err(_) => answer.fail(Error::Internal { what: "a job panicked".to_owned() }),
        }
    }

    fn generate(&self, answer: &mut Answer<'_>) -> Result<Option<Finish>> {
        let mut state = State::new(&self.engine, self.context);
        let prompt = answer.prompt().to_vec();
        let mut logits = self.engine.forward(&mut state, &prompt)?.to_vec();
        loop {
            if answer.is_full() {
                return Ok(Some(Finish::Length));
            }
            match answer.step(&mut logits, state.len() < self.context)? {
                Step::Next(token) => {
                    logits.clear();
                    logits.extend_from_slice(self.engine.forward(&mut state, &[token])?);
                }
                Step::Ended(finish) => return Ok(Some(finish)),
                Step::Gone => return Ok(None),
            }
        }
    }
}
