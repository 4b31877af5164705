//! [`App`]: what all handlers share.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;

use super::auth::Access;
use super::error::ApiError;
use super::log::LogLine;
use super::metrics::Metrics;
use super::models::Models;

/// Requests that are parsed, rendered and tokenized at the same time. It bounds the memory of templates and schemas.
const PREPARATIONS: usize = 4;

/// The state of the server.
pub(crate) struct App {
    pub models: Models,
    pub access: Access,
    pub metrics: Arc<Metrics>,
    /// The longest time for an answer.
    pub timeout: Duration,
    log_prompts: bool,
    preparing: Semaphore,
}

impl App {
    pub fn new(models: Models, access: Access, timeout: Duration, log_prompts: bool) -> Self {
        let preparing = Semaphore::new(PREPARATIONS);
        Self { models, access, metrics: Arc::default(), timeout, log_prompts, preparing }
    }

    /// Runs `work`, which may take long, outside of the threads that serve connections.
    ///
    /// # Errors
    /// Those of `work`; 500 if it panics.
    pub async fn prepare<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let fault = |_| ApiError::internal("The server has a fault; please report it.");
        let _permit =
            self.preparing.acquire().await.map_err(|e| ApiError::internal(e.to_string()))?;
        tokio::task::spawn_blocking(work).await.map_err(fault)?
    }

    /// Logs a prompt, if that was asked for.
    pub fn log_prompt(&self, prompt: &str) {
        if self.log_prompts {
            LogLine::info("prompt").field("text", prompt).write();
        }
    }

    /// Logs an answer, if that was asked for.
    pub fn log_answer(&self, answer: impl FnOnce() -> String) {
        if self.log_prompts {
            LogLine::info("answer").field("text", answer()).write();
        }
    }
}
