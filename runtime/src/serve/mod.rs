//! The HTTP server: OpenAI's API, and a page, over one [`Scheduler`](crate::scheduler::Scheduler) per model.
//!
//! A request passes `listen` (connections), `router` (key, origin, log), a handler (`chat`, `completions`,
//! `embeddings`, `tokens`, `info`), which parses, renders and tokenizes it outside of the threads that serve
//! connections, and `generation`, which queues its jobs. Their events come back through a channel, and `streaming`
//! turns them into the response. A client that goes drops the channel, which cancels the jobs.

mod app;
mod auth;
mod calls;
mod chat;
mod chat_reply;
mod completion_reply;
mod completions;
mod embeddings;
mod error;
mod generation;
mod grammar;
mod info;
mod json;
mod listen;
mod log;
mod markers;
mod messages;
mod metrics;
mod models;
mod openapi;
mod options;
mod page;
mod part;
mod prompt;
mod reply;
mod respond;
mod router;
mod sampling;
mod splitter;
mod streaming;
mod tokens;
mod tools;
mod trace;

use std::sync::Arc;

use app::App;
use auth::Access;
use log::LogLine;
use models::Models;
use tokio::sync::oneshot;

pub use options::ServeOptions;

use crate::engine::Engine;
use crate::error::{Error, Result};

/// Threads that serve connections. They only pass events on; the model has threads of its own.
const THREADS: usize = 2;
/// Threads for work that takes long. Each request occupies at most one.
const BLOCKING_THREADS: usize = 16;
/// Bytes of the stack of each. Schemas and templates are nested.
const STACK_BYTES: usize = 16 << 20;

/// Serves models until SIGTERM or SIGINT. The address is bound, and printed to standard error, before the models are
/// loaded. `opened` sees each engine.
///
/// # Errors
/// [`Error::Usage`] for wrong options, an address that other machines can reach without a key, or one that is in use;
/// the errors of [`Engine::open`], of tokenizers and of chat templates.
pub fn serve(options: ServeOptions, opened: impl Fn(&Engine) + Send + 'static) -> Result<()> {
    let models = Models::new(&options)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(THREADS)
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_stack_size(STACK_BYTES)
        .enable_all()
        .build()
        .map_err(|e| Error::usage(format!("cannot start threads: {e}")))?;
    let result = runtime.block_on(async {
        let (listener, address) = listen::bind(&options).await?;
        LogLine::info("listening").field("address", format_args!("http://{address}")).write();
        let access = Access::new(&options.keys, &options.origins, address.ip().is_loopback());
        let app = Arc::new(App::new(models, access, options.timeout, options.log_prompts));
        let router = router::router(Arc::clone(&app), &options.origins);
        let (failure, failed) = oneshot::channel();
        let loading = Arc::clone(&app);
        let load = move || match loading.models.load(&options, &opened) {
            Ok(()) => {
                for model in loading.models.iter() {
                    LogLine::info("ready").field("model", &model.name).write();
                }
            }
            Err(e) => {
                // The server may be shutting down already.
                let _ = failure.send(e);
            }
        };
        std::thread::Builder::new()
            .name("loading".to_owned())
            .spawn(load)
            .map_err(|e| Error::usage(format!("cannot start a thread: {e}")))?;
        let failed = async {
            match failed.await {
                Ok(error) => error,
                // The models are loaded.
                Err(_) => std::future::pending().await,
            }
        };
        listen::run(listener, router, app, failed).await
    });
    // A request that is still being prepared is not waited for.
    runtime.shutdown_background();
    result
}
