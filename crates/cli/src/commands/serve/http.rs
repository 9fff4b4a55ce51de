//! The paths, and who may ask.

use std::sync::Arc;

use axum::extract::{Path, Request, State};
use axum::http::StatusCode;
use axum::http::header::AUTHORIZATION;
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Router};
use serde_json::json;

use super::answer::answer;
use super::app::App;
use super::receipt::{self, Receipt};
use super::refusal::{Refusal, json_body};
use super::request::Kind;

/// Every path of the server.
pub fn router(app: Arc<App>) -> Router {
    let v1 = Router::new()
        .route("/models", get(models))
        .route("/models/{*name}", get(model))
        .route("/completions", post(completions))
        .route("/chat/completions", post(chat))
        .fallback(unknown)
        .method_not_allowed_fallback(wrong_method)
        .layer(from_fn_with_state(app.clone(), authorised));
    Router::new()
        .route("/health", get(async || json_body(&json!({"status": "ok"}))))
        .nest("/v1", v1)
        .fallback(unknown)
        .method_not_allowed_fallback(wrong_method)
        .layer(from_fn(receipt::keep))
        .with_state(app)
}

async fn unknown(request: Request) -> Refusal {
    let message = format!("no such path: {}", request.uri().path());
    Refusal::new(StatusCode::NOT_FOUND, "unknown_url", message)
}

async fn wrong_method(request: Request) -> Refusal {
    let message = format!("{} is not for {}", request.uri().path(), request.method());
    Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
}

/// Lets through who has the key, or all where there is none.
async fn authorised(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let Some(key) = &app.key else { return next.run(request).await };
    let given = request.headers().get(AUTHORIZATION).map(|value| value.as_bytes());
    let given = given.and_then(|value| {
        let (scheme, token) = value.split_at_checked("Bearer ".len())?;
        scheme.eq_ignore_ascii_case(b"Bearer ").then_some(token)
    });
    // Hashes are compared in constant time, and their length says nothing of the key's.
    match given {
        Some(token) if blake3::hash(token) == *key => next.run(request).await,
        given => {
            let message = match given {
                None => "an API key is needed: `Authorization: Bearer KEY`",
                Some(_) => "the API key is wrong",
            };
            Refusal::new(StatusCode::UNAUTHORIZED, "invalid_api_key", message).into_response()
        }
    }
}

async fn models(State(app): State<Arc<App>>) -> Response {
    json_body(&json!({"object": "list", "data": [app.card()]}))
}

async fn model(State(app): State<Arc<App>>, Path(name): Path<String>) -> Response {
    if name == app.name {
        return json_body(&app.card());
    }
    let message = format!("no model `{name}` here: this is `{}`", app.name);
    Refusal::new(StatusCode::NOT_FOUND, "model_not_found", message).into_response()
}

type Kept = Extension<Arc<Receipt>>;

async fn completions(State(app): State<Arc<App>>, kept: Kept, request: Request) -> Response {
    answer(app, kept.0, request, Kind::Completion).await.unwrap_or_else(Refusal::into_response)
}

async fn chat(State(app): State<Arc<App>>, kept: Kept, request: Request) -> Response {
    answer(app, kept.0, request, Kind::Chat).await.unwrap_or_else(Refusal::into_response)
}
