//! [`App`]: what all handlers share.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;

use super::auth::Access;
use super::error::ApiError;
use super::grammar::{GrammarConstraint, Rule};
use super::log::LogLine;
use super::metrics::Metrics;
use super::models::{Loaded, Models};

/// The message about a panic.
const FAULT: &str = "The server has a fault; please report it.";
/// Requests that are parsed, rendered and tokenized at the same time. It bounds the memory of templates and schemas.
const PREPARATIONS: usize = 4;

/// Grammars that are compiled at the same time, and the longest wait for one. A compilation cannot be stopped: one that
/// takes longer occupies its place until it ends, and only other grammars wait.
const COMPILATIONS: usize = 2;
const COMPILE_TIME: Duration = Duration::from_secs(10);

/// The state of the server.
pub(crate) struct App {
    pub models: Models,
    pub access: Access,
    pub metrics: Arc<Metrics>,
    /// The longest time for an answer.
    pub timeout: Duration,
    log_prompts: bool,
    preparing: Semaphore,
    compiling: Arc<Semaphore>,
}

impl App {
    pub fn new(models: Models, access: Access, timeout: Duration, log_prompts: bool) -> Self {
        let preparing = Semaphore::new(PREPARATIONS);
        let compiling = Arc::new(Semaphore::new(COMPILATIONS));
        Self { models, access, metrics: Arc::default(), timeout, log_prompts, preparing, compiling }
    }

    /// Runs `work`, which may take long, outside of the threads that serve connections.
    ///
    /// # Errors
    /// Those of `work`; 500 if it panics.
    pub async fn prepare<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let fault = |_| ApiError::internal(FAULT);
        let _permit =
            self.preparing.acquire().await.map_err(|e| ApiError::internal(e.to_string()))?;
        tokio::task::spawn_blocking(work).await.map_err(fault)?
    }

    /// Compiles the rule of a request, if it has one.
    ///
    /// # Errors
    /// 400 for a rule that cannot be used or takes too long.
    pub async fn compile(
        &self,
        model: &Arc<Loaded>,
        rule: Option<Rule>,
    ) -> Result<Option<GrammarConstraint>, ApiError> {
        let Some(rule) = rule else { return Ok(None) };
        let field = rule.field();
        let (model, places) = (Arc::clone(model), Arc::clone(&self.compiling));
        let work = async move {
            let place = places.acquire_owned().await;
            let compile = move || {
                let _place = place;
                model.grammars()?.compile(rule)
            };
            tokio::task::spawn_blocking(compile).await
        };
        match tokio::time::timeout(COMPILE_TIME, work).await {
            Ok(Ok(constraint)) => constraint.map(Some),
            Ok(Err(_)) => Err(ApiError::internal(FAULT)),
            Err(_) => Err(ApiError::field(
                field,
                format!("`{field}` takes too long to compile; simplify it"),
            )),
        }
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
