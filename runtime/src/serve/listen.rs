//! Accepts connections, and ends when it is told to.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_io_timeout::TimeoutStream;

use super::app::App;
use super::log::LogLine;
use super::options::ServeOptions;
use crate::error::{Error, Result};

/// Connections at the same time; more wait.
const CONNECTIONS: usize = 1024;
/// The longest time in which a client may send the head of a request, and for which a connection may be idle.
const HEAD_TIME: Duration = Duration::from_secs(30);
/// The longest time for which a client may take nothing of a response.
const WRITE_TIME: Duration = Duration::from_secs(60);
/// The most bytes of the head of a request, and the most headers. hyper checks its buffer before it reads, so that a
/// head may have up to twice as many bytes.
const HEAD_BYTES: usize = 32 << 10;
const HEADERS: usize = 100;

/// Binds the address.
///
/// # Errors
/// [`Error::Usage`] if it is in use or not allowed.
pub(crate) async fn bind(options: &ServeOptions) -> Result<(TcpListener, SocketAddr)> {
    let address = options.address()?;
    let fail = |e: std::io::Error| {
        Error::usage(format!("cannot listen on {address}: {e}; choose another --port"))
    };
    let listener = TcpListener::bind(address).await.map_err(fail)?;
    let address = listener.local_addr().map_err(fail)?;
    Ok((listener, address))
}

/// Serves until SIGTERM or SIGINT, then finishes the answers that are running. A second signal ends at once.
/// `failed` completes if the models cannot be loaded.
///
/// # Errors
/// What `failed` returns; [`Error::Usage`] if signals cannot be caught.
pub(crate) async fn run(
    listener: TcpListener,
    router: Router,
    app: Arc<App>,
    failed: impl Future<Output = Error>,
) -> Result<()> {
    let watch = |kind| signal(kind).map_err(|e| Error::usage(format!("cannot catch signals: {e}")));
    let (mut terminate, mut interrupt) =
        (watch(SignalKind::terminate())?, watch(SignalKind::interrupt())?);
    let connections = Arc::new(Semaphore::new(CONNECTIONS));
    let graceful = GracefulShutdown::new();
    let mut failed = std::pin::pin!(failed);
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            error = &mut failed => return Err(error),
            accepted = accept(&listener, &connections) => match accepted {
                Some((stream, permit)) => {
                    tokio::spawn(connection(stream, router.clone(), graceful.watcher(), permit));
                }
                // No file descriptors are left, for example. Existing connections free some.
                None => tokio::time::sleep(Duration::from_millis(100)).await,
            },
        }
    }
    drop(listener);
    LogLine::info("stopping").field("reason", "signal").write();
    let finished = async {
        let drained = Arc::clone(&app);
        let drain = tokio::task::spawn_blocking(move || {
            drained.models.ready().for_each(|model| model.scheduler.drain());
        });
        let _ = drain.await;
        graceful.shutdown().await;
    };
    tokio::select! {
        () = finished => {}
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        // Clients that read slowly or not at all.
        () = tokio::time::sleep(app.timeout + WRITE_TIME) => {}
    }
    LogLine::info("stopped").write();
    Ok(())
}

/// The next connection; `None` if the system has none to give.
async fn accept(
    listener: &TcpListener,
    connections: &Arc<Semaphore>,
) -> Option<(TcpStream, OwnedSemaphorePermit)> {
    let permit = Arc::clone(connections).acquire_owned().await.ok()?;
    let (stream, _) = listener.accept().await.ok()?;
    Some((stream, permit))
}

/// Serves one connection.
async fn connection(
    stream: TcpStream,
    router: Router,
    watcher: Watcher,
    permit: OwnedSemaphorePermit,
) {
    // Events are small and must not wait for each other.
    let _ = stream.set_nodelay(true);
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(WRITE_TIME));
    let service = TowerToHyperService::new(router);
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME)
        .max_buf_size(HEAD_BYTES)
        .max_headers(HEADERS)
        .serve_connection(TokioIo::new(Box::pin(stream)), service);
    // Errors are those of clients that have gone or do not speak HTTP.
    let _ = watcher.watch(connection).await;
    drop(permit);
}
