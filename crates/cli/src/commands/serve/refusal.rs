//! What a client is told when it gets no text, in OpenAI's form.

use axum::http::header::{CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub status: StatusCode,
    pub message: String,
    /// The field that is wrong.
    pub param: Option<String>,
    /// A name for programs.
    pub code: Option<&'static str>,
}

impl Refusal {
    /// Of `status`, without a field.
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Refusal {
        Refusal { status, message: message.into(), param: None, code: Some(code) }
    }

    /// A field of the request that will not do.
    pub fn field(name: &str, message: impl Into<String>) -> Refusal {
        Refusal {
            status: StatusCode::BAD_REQUEST,
            message: message.into(),
            param: Some(name.to_owned()),
            code: None,
        }
    }

    /// A field with a meaning that this server does not give it.
    pub fn unsupported(name: &str, message: impl Into<String>) -> Refusal {
        Refusal { code: Some("unsupported_parameter"), ..Refusal::field(name, message) }
    }

    /// The server ends.
    pub fn stopping() -> Refusal {
        Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "stopping", "the server is stopping")
    }

    /// Too many wait already.
    pub fn full(limit: usize) -> Refusal {
        let message = match limit {
            0 => "the model is busy, and this server lets nobody wait".to_owned(),
            _ => format!("the model is busy and {limit} requests are waiting already"),
        };
        Refusal::new(StatusCode::TOO_MANY_REQUESTS, "queue_full", message)
    }

    /// It took longer than the server allows.
    pub fn late() -> Refusal {
        let message = "the request took longer than this server allows (--timeout)";
        Refusal::new(StatusCode::GATEWAY_TIMEOUT, "timeout", message)
    }

    /// The server's own fault.
    pub fn fault(message: impl Into<String>) -> Refusal {
        Refusal {
            status: StatusCode::INTERNAL_SERVER_ERROR,
            message: message.into(),
            param: None,
            code: None,
        }
    }

    /// As JSON.
    pub fn body(&self) -> Value {
        let kind = match self.status.as_u16() {
            429 => "rate_limit_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        };
        let Refusal { message, param, code, .. } = self;
        json!({"error": {"message": message, "type": kind, "param": param, "code": code}})
    }
}

/// A response with a JSON body.
pub fn json_body(body: &Value) -> Response {
    ([(CONTENT_TYPE, "application/json")], body.to_string()).into_response()
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let mut response = (self.status, json_body(&self.body())).into_response();
        match self.status {
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
            }
            StatusCode::UNAUTHORIZED => {
                let scheme = HeaderValue::from_static("Bearer");
                response.headers_mut().insert(WWW_AUTHENTICATE, scheme);
            }
            _ => {}
        }
        response
    }
}
