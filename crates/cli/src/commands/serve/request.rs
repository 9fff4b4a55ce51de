//! What a client asks: OpenAI's fields, the ones that we give their meaning.
//!
//! A field that OpenAI's API knows and this server does not is refused where it asks for
//! something; a field that nobody knows is ignored. `null` is as good as absent.

use serde_json::{Map, Value};

use super::refusal::Refusal;
use crate::sampling::Draw;

/// Below this, drawing is taking the most likely token, and the division overflows.
const GREEDY_BELOW: f64 = 1e-5;
/// OpenAI's number.
const MOST_STOPS: usize = 4;
/// Prompts of one request.
const MOST_PROMPTS: usize = 128;
/// What OpenAI's completions give who does not say; a chat goes on to the model's last position.
const COMPLETION_TOKENS: usize = 16;

/// Which of the two ways of asking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Completion,
    Chat,
}

/// What to continue.
#[derive(Clone, Debug, PartialEq)]
pub enum Input {
    Texts(Vec<String>),
    Ids(Vec<Vec<u32>>),
    /// A list of `{role, content}`, each content a string.
    Messages(Value),
}

/// A request that makes sense by itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Ask {
    pub input: Input,
    /// `None`: as far as the model has positions.
    pub max_new: Option<usize>,
    pub draw: Draw,
    pub stop: Vec<String>,
    pub stream: bool,
    pub include_usage: bool,
}

impl Ask {
    /// Reads a request to the model `name`; `fresh` is the seed where none is given.
    ///
    /// # Errors
    /// Names the field that will not do.
    pub fn read(body: &[u8], kind: Kind, name: &str, fresh: u64) -> Result<Ask, Refusal> {
        let mut fields = match serde_json::from_slice(body) {
            Ok(Value::Object(fields)) => Fields(fields),
            Ok(_) => return Err(bad_json("it is not an object")),
            Err(error) => return Err(bad_json(error)),
        };
        fields.0.retain(|_, value| !value.is_null());
        fields.check_model(name)?;
        for (field, value) in &fields.0 {
            check_supported(field, value, kind)?;
        }
        let input = match kind {
            Kind::Completion => prompt(fields.need("prompt")?)?,
            Kind::Chat => Input::Messages(messages(fields.need("messages")?)?),
        };
        let default = (kind == Kind::Completion).then_some(COMPLETION_TOKENS);
        let stream = fields.flag("stream")?;
        Ok(Ask {
            input,
            max_new: fields.max_new()?.or(default),
            draw: fields.draw(fresh)?,
            stop: fields.stop()?,
            stream,
            include_usage: fields.include_usage(stream)?,
        })
    }
}

fn bad_json(why: impl std::fmt::Display) -> Refusal {
    Refusal { param: None, ..Refusal::field("", format!("the body is no JSON request: {why}")) }
}

/// Refuses what would change the answer if it were honoured.
fn check_supported(name: &str, value: &Value, kind: Kind) -> Result<(), Refusal> {
    let is = |number: f64| value.as_f64() == Some(number);
    let empty = || {
        value.as_array().is_some_and(Vec::is_empty)
            || value.as_object().is_some_and(Map::is_empty)
            || value.as_str() == Some("")
    };
    let (neutral, instead) = match name {
        "n" | "best_of" => (is(1.0), "only 1 is possible"),
        "echo" => (*value == false, "the prompt is not repeated"),
        // A completion's `logprobs` is a number, of which 0 still asks for the token's own.
        "logprobs" => (*value == false && kind == Kind::Chat, "there are none"),
        "top_logprobs" => (is(0.0), "there are none"),
        "presence_penalty" | "frequency_penalty" | "min_p" => (is(0.0), "only 0 is possible"),
        "repetition_penalty" => (is(1.0), "only 1 is possible"),
        "suffix" | "logit_bias" | "tools" | "functions" => (empty(), "it is not supported"),
        "tool_choice" | "function_call" => {
            (*value == "none" || *value == "auto", "there are no tools")
        }
        "response_format" => (value["type"] == "text", "only {\"type\": \"text\"} is possible"),
        "modalities" => (*value == serde_json::json!(["text"]), "only text is possible"),
        "audio" | "prediction" | "web_search_options" => (false, "it is not supported"),
        _ => return Ok(()),
    };
    match neutral {
        true => Ok(()),
        false => Err(Refusal::unsupported(name, format!("`{name}`: {instead}"))),
    }
}

/// Fields that were given.
struct Fields(Map<String, Value>);

impl Fields {
    fn need(&mut self, name: &str) -> Result<Value, Refusal> {
        self.0.remove(name).ok_or_else(|| Refusal::field(name, format!("`{name}` is missing")))
    }

    /// Who names no model means the one that there is.
    fn check_model(&self, name: &str) -> Result<(), Refusal> {
        match self.0.get("model") {
            None => Ok(()),
            Some(Value::String(asked)) if asked == name => Ok(()),
            Some(Value::String(asked)) => Err(Refusal {
                status: axum::http::StatusCode::NOT_FOUND,
                code: Some("model_not_found"),
                ..Refusal::field("model", format!("no model `{asked}` here: this is `{name}`"))
            }),
            Some(_) => Err(expected("model", "a string")),
        }
    }

    fn flag(&self, name: &str) -> Result<bool, Refusal> {
        match self.0.get(name) {
            None => Ok(false),
            Some(value) => value.as_bool().ok_or_else(|| expected(name, "true or false")),
        }
    }

    fn number(
        &self,
        name: &str,
        allowed: impl Fn(f64) -> bool,
        words: &str,
    ) -> Result<Option<f64>, Refusal> {
        let Some(value) = self.0.get(name) else { return Ok(None) };
        match value.as_f64().filter(|number| allowed(*number)) {
            Some(number) => Ok(Some(number)),
            None => Err(expected(name, words)),
        }
    }

    /// The newer name counts where both are given.
    fn max_new(&self) -> Result<Option<usize>, Refusal> {
        for name in ["max_completion_tokens", "max_tokens"] {
            if let Some(value) = self.0.get(name) {
                let number = value.as_u64().filter(|number| *number > 0);
                let number =
                    number.ok_or_else(|| expected(name, "a whole number of at least 1"))?;
                return Ok(Some(usize::try_from(number).unwrap_or(usize::MAX)));
            }
        }
        Ok(None)
    }

    fn draw(&self, fresh: u64) -> Result<Draw, Refusal> {
        let temperature =
            self.number("temperature", |t| (0.0..=2.0).contains(&t), "a number from 0 to 2")?;
        let top_p = self.number("top_p", |p| p > 0.0 && p <= 1.0, "a number above 0, at most 1")?;
        let top_k = match self.0.get("top_k").map(Value::as_i64) {
            // Other servers write "all of them" so.
            None | Some(Some(-1 | 0)) => None,
            Some(Some(k @ 1..)) => Some(usize::try_from(k).unwrap_or(usize::MAX)),
            Some(_) => return Err(expected("top_k", "a whole number")),
        };
        let seed = match self.0.get("seed") {
            None => fresh,
            Some(value) => match (value.as_u64(), value.as_i64()) {
                (Some(seed), _) => seed,
                (_, Some(seed)) => seed.cast_unsigned(),
                _ => return Err(expected("seed", "a whole number")),
            },
        };
        let temperature = temperature.unwrap_or(1.0);
        Ok(Draw {
            temperature: if temperature < GREEDY_BELOW { 0.0 } else { temperature },
            top_k,
            top_p: top_p.filter(|p| *p < 1.0),
            seed,
        })
    }

    fn stop(&self) -> Result<Vec<String>, Refusal> {
        let stops = match self.0.get("stop") {
            None => Some(Vec::new()),
            Some(Value::String(stop)) => Some(vec![stop.clone()]),
            Some(Value::Array(stops)) => strings(stops),
            Some(_) => None,
        };
        stops
            .filter(|stops| stops.len() <= MOST_STOPS && stops.iter().all(|stop| !stop.is_empty()))
            .ok_or_else(|| expected("stop", "a string or up to four of them, none empty"))
    }

    fn include_usage(&self, stream: bool) -> Result<bool, Refusal> {
        let Some(options) = self.0.get("stream_options") else { return Ok(false) };
        if !stream {
            return Err(Refusal::field("stream_options", "`stream_options` needs `stream: true`"));
        }
        match options.as_object().map(|options| options.get("include_usage")) {
            Some(None | Some(Value::Null)) => Ok(false),
            Some(Some(Value::Bool(include))) => Ok(*include),
            _ => Err(expected("stream_options", "an object with `include_usage`: true or false")),
        }
    }
}

fn expected(name: &str, what: &str) -> Refusal {
    Refusal::field(name, format!("`{name}`: expected {what}"))
}

fn strings(list: &[Value]) -> Option<Vec<String>> {
    list.iter().map(|value| value.as_str().map(str::to_owned)).collect()
}

fn ids(list: &[Value]) -> Option<Vec<u32>> {
    list.iter().map(|value| value.as_u64().and_then(|id| u32::try_from(id).ok())).collect()
}

/// A text, a list of texts, a list of ids, or a list of lists of ids.
fn prompt(value: Value) -> Result<Input, Refusal> {
    let input = match &value {
        Value::String(text) => Some(Input::Texts(vec![text.clone()])),
        Value::Array(list) if list.is_empty() => None,
        Value::Array(list) if list.iter().all(Value::is_string) => strings(list).map(Input::Texts),
        Value::Array(list) if list.iter().all(Value::is_array) => list
            .iter()
            .map(|list| list.as_array().and_then(|list| ids(list)))
            .collect::<Option<_>>()
            .map(Input::Ids),
        Value::Array(list) => ids(list).map(|ids| Input::Ids(vec![ids])),
        _ => None,
    };
    let prompts = match &input {
        Some(Input::Texts(texts)) => texts.len(),
        Some(Input::Ids(lists)) => lists.len(),
        _ => 0,
    };
    if prompts > MOST_PROMPTS {
        let message = format!("`prompt`: {prompts} at once; at most {MOST_PROMPTS} are possible");
        return Err(Refusal::field("prompt", message));
    }
    input.ok_or_else(|| expected("prompt", "a string, a list of strings, or token ids"))
}

/// Messages whose contents are plain strings: parts of text are joined.
fn messages(mut value: Value) -> Result<Value, Refusal> {
    for (n, message) in value.as_array_mut().into_iter().flatten().enumerate() {
        for name in ["tool_calls", "function_call"] {
            if message.get(name).is_some_and(|calls| !calls.is_null()) {
                let message = format!("message {n}: `{name}`: there are no tools");
                return Err(Refusal::unsupported("messages", message));
            }
        }
        let Some(content) = message.get_mut("content") else { continue };
        let Value::Array(parts) = content else { continue };
        let text: Option<Vec<&str>> = parts
            .iter()
            .map(|part| part["text"].as_str().filter(|_| part["type"] == "text"))
            .collect();
        let text = text.ok_or_else(|| {
            let message = format!("message {n}: only parts of type `text` are possible");
            Refusal::unsupported("messages", message)
        })?;
        *content = Value::String(text.concat());
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(kind: Kind, body: Value) -> Result<Ask, Refusal> {
        Ask::read(body.to_string().as_bytes(), kind, "m", 9)
    }

    #[test]
    fn defaults_are_openais() {
        let ask = read(Kind::Completion, json!({"model": "m", "prompt": "a", "n": null})).unwrap();
        let draw = Draw { temperature: 1.0, top_k: None, top_p: None, seed: 9 };
        assert_eq!((ask.max_new, ask.draw, ask.stop.len()), (Some(16), draw, 0));
        assert!(!ask.stream && !ask.include_usage);
        let messages = json!([{"role": "user", "content": [
            {"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]);
        let ask = read(Kind::Chat, json!({"messages": messages, "whatever": 1})).unwrap();
        let plain = json!([{"role": "user", "content": "ab"}]);
        assert_eq!((ask.max_new, ask.input), (None, Input::Messages(plain)));
    }

    #[test]
    fn prompts_come_in_four_forms() {
        let input =
            |prompt: Value| read(Kind::Completion, json!({"prompt": prompt})).map(|ask| ask.input);
        assert_eq!(input(json!("a")), Ok(Input::Texts(vec!["a".into()])));
        assert_eq!(input(json!(["a", "b"])), Ok(Input::Texts(vec!["a".into(), "b".into()])));
        assert_eq!(input(json!([1, 2])), Ok(Input::Ids(vec![vec![1, 2]])));
        assert_eq!(input(json!([[1], [2]])), Ok(Input::Ids(vec![vec![1], vec![2]])));
        for bad in [json!([]), json!(1), json!([1, "a"]), json!([-1]), json!([[1], "a"]), json!({})]
        {
            assert_eq!(input(bad).unwrap_err().param.as_deref(), Some("prompt"));
        }
        let many = json!(vec!["a"; MOST_PROMPTS + 1]);
        assert!(input(many).unwrap_err().message.contains("at most 128"));
    }

    #[test]
    fn what_is_asked_is_read() {
        let ask = read(
            Kind::Completion,
            json!({"prompt": "a", "max_tokens": 5, "max_completion_tokens": 7, "temperature": 0.5,
                "top_p": 0.9, "top_k": 3, "seed": -1, "stop": ["x", "y"], "stream": true,
                "stream_options": {"include_usage": true}}),
        )
        .unwrap();
        let draw = Draw { temperature: 0.5, top_k: Some(3), top_p: Some(0.9), seed: u64::MAX };
        assert_eq!((ask.max_new, ask.draw), (Some(7), draw));
        assert_eq!(ask.stop, ["x", "y"]);
        assert!(ask.stream && ask.include_usage);
    }

    #[test]
    fn fields_that_will_not_do_are_named() {
        for (field, value) in [
            ("max_tokens", json!(0)),
            ("max_tokens", json!(1.5)),
            ("temperature", json!(2.1)),
            ("temperature", json!("hot")),
            ("top_p", json!(0)),
            ("top_k", json!(-2)),
            ("seed", json!(0.5)),
            ("stop", json!([""])),
            ("stop", json!(["a", "b", "c", "d", "e"])),
            ("stream", json!(1)),
            ("stream_options", json!({"include_usage": true})),
            ("model", json!(1)),
        ] {
            let mut body = json!({"prompt": "a"});
            body[field] = value.clone();
            let refusal = read(Kind::Completion, body).unwrap_err();
            assert_eq!(refusal.param.as_deref(), Some(field), "{value}");
            assert_eq!(refusal.status, 400);
        }
        let other = read(Kind::Completion, json!({"prompt": "a", "model": "x"})).unwrap_err();
        assert_eq!((other.status.as_u16(), other.code), (404, Some("model_not_found")));
        for (body, why) in [("[]", "not an object"), ("{", "EOF"), ("", "EOF")] {
            let error = Ask::read(body.as_bytes(), Kind::Chat, "m", 0).unwrap_err();
            assert!(error.message.contains(why), "{}", error.message);
        }
    }

    #[test]
    fn what_would_be_ignored_is_refused() {
        for (kind, field, neutral, asked) in [
            (Kind::Completion, "n", json!(1), json!(2)),
            (Kind::Completion, "best_of", json!(1), json!(3)),
            (Kind::Completion, "echo", json!(false), json!(true)),
            (Kind::Completion, "logprobs", json!(null), json!(0)),
            (Kind::Chat, "logprobs", json!(false), json!(true)),
            (Kind::Chat, "top_logprobs", json!(0), json!(2)),
            (Kind::Completion, "suffix", json!(""), json!("x")),
            (Kind::Chat, "logit_bias", json!({}), json!({"5": 1})),
            (Kind::Chat, "presence_penalty", json!(0.0), json!(0.5)),
            (Kind::Chat, "frequency_penalty", json!(0), json!(1)),
            (Kind::Chat, "tools", json!([]), json!([{}])),
            (Kind::Chat, "tool_choice", json!("auto"), json!("required")),
            (
                Kind::Chat,
                "response_format",
                json!({"type": "text"}),
                json!({"type": "json_object"}),
            ),
            (Kind::Chat, "modalities", json!(["text"]), json!(["text", "audio"])),
            (Kind::Chat, "audio", json!(null), json!({})),
        ] {
            let mut body = json!({"prompt": "a", "messages": []});
            body[field] = neutral;
            assert!(read(kind, body.clone()).is_ok(), "{body}");
            body[field] = asked;
            let refusal = read(kind, body).unwrap_err();
            assert_eq!(refusal.code, Some("unsupported_parameter"));
            assert_eq!(refusal.param.as_deref(), Some(field));
        }
        for part in
            [json!([{"type": "image_url", "image_url": {"url": ""}}]), json!([{"text": "a"}])]
        {
            let body = json!({"messages": [{"role": "user", "content": part}]});
            assert!(read(Kind::Chat, body).unwrap_err().message.contains("message 0: only parts"));
        }
    }
}
