//! Connections: so many at a time, none that says nothing for ever, and a quiet end.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};

/// Connections at a time; more wait until the system takes no more either.
const MOST_CONNECTIONS: usize = 256;
/// For the head of a request to arrive, and between two requests of a connection.
const HEAD: Duration = Duration::from_secs(60);
/// After an error such as too many open files.
const PAUSE: Duration = Duration::from_millis(100);

/// Serves until `stop` says so, and then `grace` longer for answers that are under way.
///
/// # Errors
/// The system gives no event loop, or does not take the socket.
pub fn serve(
    socket: std::net::TcpListener,
    router: Router,
    mut stop: watch::Receiver<bool>,
    grace: Duration,
) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        socket.set_nonblocking(true)?;
        let listener = TcpListener::from_std(socket)?;
        let places = Arc::new(Semaphore::new(MOST_CONNECTIONS));
        let graceful = GracefulShutdown::new();
        loop {
            let next = async {
                let place = places.clone().acquire_owned().await;
                (listener.accept().await, place)
            };
            let (accepted, place) = tokio::select! {
                next = next => next,
                // Also if whoever could say so is gone.
                _ = stop.wait_for(|stop| *stop) => break,
            };
            let Ok((stream, _)) = accepted else {
                tokio::time::sleep(PAUSE).await;
                continue;
            };
            // Pieces of text are small and should not wait for each other.
            let _as_it_is = stream.set_nodelay(true);
            let service = TowerToHyperService::new(router.clone());
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD)
                .serve_connection(TokioIo::new(stream), service);
            let connection = graceful.watch(connection);
            tokio::spawn(async move {
                let _place = place;
                if let Err(error) = connection.await {
                    tracing::debug!(target: "relufy::serve", "connection: {error}");
                }
            });
        }
        drop(listener);
        // Who does not end in time is cut with the runtime.
        let _cut = tokio::time::timeout(grace, graceful.shutdown()).await;
        Ok(())
    })
}
