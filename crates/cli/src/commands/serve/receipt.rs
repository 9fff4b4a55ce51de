//! One line in the log for each request, written once it is over, however it ends.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicUsize, Ordering};
use std::time::Instant;

use axum::extract::Request;
use axum::http::Method;
use axum::middleware::Next;
use axum::response::Response;

use super::reply::Usage;

/// What is known of a request; dropping the last owner writes the line.
pub struct Receipt {
    method: Method,
    path: String,
    started: Instant,
    /// 0 until there is an answer.
    status: AtomicU16,
    prompt_tokens: AtomicUsize,
    new_tokens: AtomicUsize,
    /// The answer comes in pieces of which the last was not sent.
    unfinished: AtomicBool,
}

impl Receipt {
    /// Notes how many tokens went in and came out.
    pub fn tokens(&self, usage: Usage) {
        self.prompt_tokens.store(usage.prompt, Ordering::Relaxed);
        self.new_tokens.store(usage.new, Ordering::Relaxed);
    }

    /// Notes whether pieces are missing.
    pub fn unfinished(&self, yes: bool) {
        self.unfinished.store(yes, Ordering::Relaxed);
    }
}

impl Drop for Receipt {
    fn drop(&mut self) {
        let (method, path, status) = (&self.method, &self.path, *self.status.get_mut());
        let (prompt, new) = (*self.prompt_tokens.get_mut(), *self.new_tokens.get_mut());
        let ms = self.started.elapsed().as_millis();
        let end = match (status, *self.unfinished.get_mut()) {
            (0, _) => "client gone",
            (_, true) => "cut",
            _ => "done",
        };
        tracing::info!(
            target: "relufy::serve",
            "{method} {path} {status} {end} prompt={prompt} new={new} ms={ms}"
        );
    }
}

/// Gives each request its receipt.
pub async fn keep(mut request: Request, next: Next) -> Response {
    let receipt = Arc::new(Receipt {
        method: request.method().clone(),
        path: request.uri().path().to_owned(),
        started: Instant::now(),
        status: AtomicU16::new(0),
        prompt_tokens: AtomicUsize::new(0),
        new_tokens: AtomicUsize::new(0),
        unfinished: AtomicBool::new(false),
    });
    request.extensions_mut().insert(receipt.clone());
    let response = next.run(request).await;
    receipt.status.store(response.status().as_u16(), Ordering::Relaxed);
    response
}
