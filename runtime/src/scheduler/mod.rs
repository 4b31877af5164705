//! [`Scheduler`]: answers many jobs at once with one model.
//!
//! One thread owns the sequences. Jobs wait in one bounded queue; each has a sink for its events, which the
//! thread calls.
//!
//! The same prompt with the same options and seed gets the same answer, bit for bit, whatever else is computed in
//! the same passes, what the prefix cache holds and how the prompt is cut. Three rules make it so: the role of a
//! prompt's rows follows from its length alone, and generated tokens are decode rows; kernels and attention give a
//! row of one role the same bits in any batch (see the modules `linear` and `attention`); and the prefix cache has
//! only pages of prefill rows.

mod job;
mod options;
mod prefix;
mod queue;
mod reply;
mod slot;
mod statistics;
mod worker;

use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

pub use job::{
    Constraint, EmbeddingSink, Event, EventSink, Job, SubmitError, Ticket, TokenLogprob, TokenMask,
    Usage,
};
pub use options::SchedulerOptions;
pub use statistics::Statistics;

use crate::engine::Engine;
use crate::error::Error;
use crate::tokenizer::Tokenizer;
use queue::{Queue, Work};

/// Answers many jobs at once with one model. Dropping it cancels what is running.
#[derive(Debug)]
pub struct Scheduler {
    queue: Arc<Queue>,
    statistics: Arc<Mutex<Statistics>>,
    context: usize,
    vocabulary: usize,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Scheduler {
    /// Starts the thread of the scheduler.
    ///
    /// # Errors
    /// [`Error::Usage`] for no slots or no context, or if the thread cannot be started;
    /// [`Error::Unsupported`] if a GPU computes layers of the model.
    pub fn start(
        engine: Arc<Engine>,
        tokenizer: Arc<Tokenizer>,
        options: SchedulerOptions,
    ) -> Result<Self, Error> {
        if let Some(device) = engine.device_name() {
            return Err(Error::unsupported(format!(
                "serving several sequences on a GPU ({device}) is not supported; use --device cpu"
            )));
        }
        let context = options.context.unwrap_or(engine.model.spec.context_length as usize);
        if options.slots == 0 || context < 2 {
            return Err(Error::usage("a server needs a slot and a context of at least 2 tokens"));
        }
        if let Some(positions) = &engine.model.positions
            && context > positions.rows()
        {
            let most = positions.rows();
            return Err(Error::usage(format!("the model has {most} positions; lower the context")));
        }
        let queue = Arc::new(Queue::new(options.max_queue));
        let statistics = Arc::new(Mutex::new(Statistics::new(options.slots)));
        let vocabulary = engine.model.embeddings.rows();
        let worker = worker::Worker {
            engine,
            tokenizer,
            options,
            context,
            queue: Arc::clone(&queue),
            statistics: Arc::clone(&statistics),
        };
        let thread = std::thread::Builder::new()
            .name("scheduler".to_owned())
            .spawn(move || worker.run())
            .map_err(|e| Error::usage(format!("cannot start a thread: {e}")))?;
        Ok(Self { queue, statistics, context, vocabulary, thread: Mutex::new(Some(thread)) })
    }

    /// The largest number of tokens of a sequence, prompt and answer.
    #[must_use]
    pub fn context(&self) -> usize {
        self.context
    }

    /// Queues a job. Its events go to `sink`, see [`EventSink`].
    ///
    /// # Errors
    /// [`SubmitError::Busy`] if the queue is full, [`SubmitError::Closed`] after [`Scheduler::drain`],
    /// [`SubmitError::Invalid`] if the prompt is empty, leaves no room in the context for an answer, or has a
    /// token that the model lacks.
    pub fn submit(&self, job: Job, sink: EventSink) -> Result<Ticket, SubmitError> {
        self.check(&job.prompt, self.context - 1)?;
        self.queue.push(Work::Answer(Box::new(job), sink))
    }

    /// Queues the computation of an embedding, see [`EmbeddingSink`].
    ///
    /// # Errors
    /// The errors of [`Scheduler::submit`]; `tokens` may fill the whole context.
    pub fn embed(&self, tokens: Vec<u32>, sink: EmbeddingSink) -> Result<Ticket, SubmitError> {
        self.check(&tokens, self.context)?;
        self.queue.push(Work::Embedding(tokens, sink))
    }

    /// Cancels a job whose client has gone, waiting or running: its slot is free before the next pass. No event
    /// follows. A job that has ended is ignored.
    pub fn cancel(&self, ticket: Ticket) {
        self.queue.cancel(ticket);
    }

    fn check(&self, tokens: &[u32], most: usize) -> Result<(), Error> {
        if tokens.is_empty() {
            return Err(Error::usage("the prompt is empty"));
        }
        if tokens.len() > most {
            return Err(Error::usage(format!(
                "the prompt has {} tokens, but at most {most} fit into the context of {}",
                tokens.len(),
                self.context
            )));
        }
        match tokens.iter().find(|token| **token as usize >= self.vocabulary) {
            Some(token) => Err(Error::usage(format!(
                "token {token} is outside the vocabulary of {}",
                self.vocabulary
            ))),
            None => Ok(()),
        }
    }

    /// Counts and sizes as of the last step.
    #[must_use]
    pub fn statistics(&self) -> Statistics {
        let statistics = *self.statistics.lock().unwrap_or_else(|e| e.into_inner());
        Statistics { queued: self.queue.len(), ..statistics }
    }

    /// Finishes the jobs that have a slot, fails those that wait for one, and accepts no more. Returns when the
    /// thread has ended.
    pub fn drain(&self) {
        self.queue.close(queue::Closing::AfterRunning);
        self.join();
    }

    fn join(&self) {
        let thread = self.thread.lock().unwrap_or_else(|e| e.into_inner()).take();
        // A sink may have been the last to drop the scheduler; its thread cannot wait for itself.
        if let Some(thread) = thread.filter(|t| t.thread().id() != std::thread::current().id()) {
            // The thread catches the panics of jobs.
            let _ = thread.join();
        }
    }
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        self.queue.close(queue::Closing::AtOnce);
        self.join();
    }
}
