//! Answers as server-sent events.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::response::sse::{Event as ServerEvent, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use super::error::ApiError;
use super::generation::Generation;
use super::trace::Trace;
use crate::scheduler::Event;

/// Time without an event after which a comment is sent, so that proxies keep the connection and a client that has
/// gone is noticed.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// Turns the events of the scheduler into the chunks of a response.
pub(crate) trait Assembler: Send + 'static {
    /// A chunk.
    type Chunk: Serialize;

    /// The chunks before the first event.
    fn begin(&mut self) -> Vec<Self::Chunk>;

    /// The chunks of an event of answer `index`.
    fn push(&mut self, index: usize, event: Event) -> Vec<Self::Chunk>;

    /// The chunks after the last event.
    fn end(&mut self) -> Vec<Self::Chunk>;

    /// Whether all answers are complete.
    fn is_complete(&self) -> bool;

    /// Prompt tokens and tokens generated, for the log.
    fn counts(&self) -> (usize, usize);
}

/// A response in progress.
struct Streamer<A> {
    generation: Generation,
    assembler: A,
    /// Events that are ready to be sent.
    ready: VecDeque<String>,
    done: bool,
    trace: Arc<Trace>,
}

/// The response with the events of a generation.
pub(crate) fn respond(
    generation: Generation,
    assembler: impl Assembler,
    trace: Arc<Trace>,
) -> Response {
    let mut streamer =
        Streamer { generation, assembler, ready: VecDeque::new(), done: false, trace };
    let first = streamer.assembler.begin();
    streamer.add(first);
    let events = futures_util::stream::unfold(streamer, |mut streamer| async move {
        let text = streamer.next().await?;
        Some((Ok::<_, Infallible>(ServerEvent::default().data(text)), streamer))
    });
    Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response()
}

impl<A: Assembler> Streamer<A> {
    /// The data of the next event.
    async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(text) = self.ready.pop_front() {
                return Some(text);
            }
            if self.done {
                return None;
            }
            match self.generation.next().await {
                Ok((index, event)) => {
                    let chunks = self.assembler.push(index, event);
                    self.add(chunks);
                    if self.assembler.is_complete() {
                        let last = self.assembler.end();
                        self.add(last);
                        self.ready.push_back("[DONE]".to_owned());
                        self.done = true;
                        self.trace.complete(self.assembler.counts());
                    }
                }
                Err(error) => self.fail(&error),
            }
        }
    }

    fn add(&mut self, chunks: Vec<A::Chunk>) {
        let text = |chunk| serde_json::to_string(&chunk).unwrap_or_default();
        self.ready.extend(chunks.into_iter().map(text));
    }

    /// The status has been sent, so the error is an event.
    fn fail(&mut self, error: &ApiError) {
        self.trace.fail(error);
        self.ready.push_back(serde_json::to_string(&error.body()).unwrap_or_default());
        self.done = true;
    }
}

/// Waits for all answers and returns all chunks.
///
/// # Errors
/// The errors of [`Generation::next`].
pub(crate) async fn collect<A: Assembler>(
    mut generation: Generation,
    assembler: &mut A,
    trace: &Trace,
) -> Result<Vec<A::Chunk>, ApiError> {
    let mut chunks = Vec::new();
    while !assembler.is_complete() {
        let (index, event) = generation.next().await?;
        chunks.extend(assembler.push(index, event));
    }
    trace.complete(assembler.counts());
    Ok(chunks)
}
