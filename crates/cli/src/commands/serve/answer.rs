//! A prompt on its way to the worker, and its text on the way back: whole or in pieces.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::Request;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, StatusCode};
use axum::response::sse::{Event as Sse, KeepAlive};
use axum::response::{IntoResponse, Response};
use serde_json::Value;
use tokio::sync::mpsc::{self, UnboundedReceiver};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;

use super::app::App;
use super::ids;
use super::job::{Event, Finish, Job};
use super::queue::Refused;
use super::receipt::Receipt;
use super::refusal::{Refusal, json_body};
use super::reply::{Reply, Usage};
use super::request::{Ask, Kind};

/// Bytes of a request: ids of a long prompt as JSON fit many times.
const MOST_BYTES: usize = 8 << 20;
/// Bytes after which nobody listens any more.
const MOST_READ: usize = 64 << 20;
/// For a request's bytes to arrive.
const ARRIVAL: Duration = Duration::from_secs(30);

/// Answers a request for text.
///
/// # Errors
/// What is wrong with the request, or why there is no text.
pub async fn answer(
    app: Arc<App>,
    receipt: Arc<Receipt>,
    request: Request,
    kind: Kind,
) -> Result<Response, Refusal> {
    let deadline = Instant::now() + app.timeout;
    check_type(request.headers())?;
    let body = arrive(request.into_body()).await?;
    let ask = Ask::read(&body, kind, &app.name, ids::random())?;
    let Ask { input, max_new, draw, stop, stream, include_usage } = ask;
    // Tokenising a long text would keep the others waiting.
    let encoder = app.clone();
    let prompts = tokio::task::spawn_blocking(move || encoder.prompts(input, max_new));
    let prompts = prompts.await.map_err(|error| Refusal::fault(error.to_string()))??;

    let prompt_tokens = prompts.iter().map(|prompt| prompt.ids.len()).sum();
    let usage = Usage { prompt: prompt_tokens, new: 0 };
    receipt.tokens(usage);
    let texts = prompts.len();
    let (sender, events) = mpsc::unbounded_channel();
    let job = Job { prompts, draw, stop, deadline, events: sender };
    app.queue.push(job, Job::given_up).map_err(|refused| match refused {
        Refused::Full => Refusal::full(app.queue.limit()),
        Refused::Closed => Refusal::stopping(),
    })?;
    let prefix = if kind == Kind::Chat { "chatcmpl" } else { "cmpl" };
    let reply = Reply {
        kind,
        id: format!("{prefix}-{:016x}", ids::random()),
        created: ids::now(),
        model: app.name.clone(),
        fingerprint: app.inexact.clone(),
    };
    if stream {
        return Ok(Pieces { reply, receipt, usage, texts, include_usage }.answer(events));
    }
    whole(&reply, &receipt, usage, texts, events).await
}

/// A page in a browser can post a form anywhere, but not JSON without having asked first.
fn check_type(headers: &HeaderMap) -> Result<(), Refusal> {
    let kind = headers.get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim();
    if kind.eq_ignore_ascii_case("application/json") {
        return Ok(());
    }
    let message = format!("expected the header `Content-Type: application/json`, not `{kind}`");
    Err(Refusal::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "wrong_content_type", message))
}

/// The bytes of a request, all of them: a client that is told no in the middle of its sending
/// sees a broken connection and not the reason. So too many are read all the same, if not kept.
async fn arrive(body: Body) -> Result<Vec<u8>, Refusal> {
    let (mut pieces, mut bytes, mut seen) = (body.into_data_stream(), Vec::new(), 0);
    let all = async {
        while let Some(piece) = pieces.next().await {
            let piece = piece.map_err(|error| {
                let message = format!("the request has not arrived whole: {error}");
                Refusal::new(StatusCode::BAD_REQUEST, "incomplete", message)
            })?;
            seen += piece.len();
            if seen <= MOST_BYTES {
                bytes.extend_from_slice(&piece);
            } else if seen <= MOST_READ {
                bytes = Vec::new();
            } else {
                break;
            }
        }
        if seen > MOST_BYTES {
            let message = format!("the request has more than {MOST_BYTES} bytes");
            return Err(Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, "request_too_large", message));
        }
        Ok(bytes)
    };
    tokio::time::timeout(ARRIVAL, all).await.unwrap_or_else(|_| {
        let message = format!("the request did not arrive within {} s", ARRIVAL.as_secs());
        Err(Refusal::new(StatusCode::REQUEST_TIMEOUT, "timeout", message))
    })
}

/// Waits for all of the text.
async fn whole(
    reply: &Reply,
    receipt: &Receipt,
    mut usage: Usage,
    texts: usize,
    mut events: UnboundedReceiver<Event>,
) -> Result<Response, Refusal> {
    let mut made = vec![(String::new(), Finish::Length); texts];
    let mut left = texts;
    while let Some(event) = events.recv().await {
        match event {
            Event::Text(index, text) => made[index].0.push_str(&text),
            Event::Done(index, finish, new) => {
                made[index].1 = finish;
                left -= 1;
                usage.new += new;
                receipt.tokens(usage);
            }
            Event::Failed(refusal) => return Err(refusal),
        }
    }
    match left {
        0 => Ok(json_body(&reply.whole(made, usage))),
        _ => Err(Refusal::stopping()),
    }
}

/// An answer in pieces.
struct Pieces {
    reply: Reply,
    receipt: Arc<Receipt>,
    usage: Usage,
    texts: usize,
    include_usage: bool,
}

impl Pieces {
    fn answer(mut self, events: UnboundedReceiver<Event>) -> Response {
        self.receipt.unfinished(true);
        let (sender, pieces) = mpsc::channel(16);
        tokio::spawn(async move {
            // Who has gone wants no more; dropping the events tells the worker.
            let _gone = self.send(events, &sender).await;
        });
        let pieces = ReceiverStream::new(pieces);
        axum::response::Sse::new(pieces).keep_alive(KeepAlive::new()).into_response()
    }

    async fn send(
        &mut self,
        mut events: UnboundedReceiver<Event>,
        sender: &mpsc::Sender<Result<Sse, Infallible>>,
    ) -> Result<(), mpsc::error::SendError<Result<Sse, Infallible>>> {
        let mut left = self.texts;
        let send = async |body: Value| sender.send(Ok(Sse::default().data(body.to_string()))).await;
        if let Some(opening) = self.reply.opening() {
            send(self.with_usage(opening)).await?;
        }
        while left > 0 {
            let event = tokio::select! {
                event = events.recv() => event,
                () = sender.closed() => return Ok(()),
            };
            match event {
                Some(Event::Text(index, text)) => {
                    send(self.with_usage(self.reply.piece(index, &text))).await?;
                }
                Some(Event::Done(index, finish, new)) => {
                    left -= 1;
                    self.usage.new += new;
                    self.receipt.tokens(self.usage);
                    send(self.with_usage(self.reply.end(index, finish))).await?;
                }
                Some(Event::Failed(refusal)) => return send(refusal.body()).await,
                None => return send(Refusal::stopping().body()).await,
            }
        }
        if self.include_usage {
            send(self.reply.usage(self.usage)).await?;
        }
        sender.send(Ok(Sse::default().data("[DONE]"))).await?;
        self.receipt.unfinished(false);
        Ok(())
    }

    /// Who asked for the numbers in the last piece finds their place in each.
    fn with_usage(&self, mut piece: Value) -> Value {
        if self.include_usage {
            piece["usage"] = Value::Null;
        }
        piece
    }
}
