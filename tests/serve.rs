//! `relufy serve`, asked over HTTP as OpenAI's clients ask.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod support;

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::{Lab, llama, text};

/// Nothing here takes half as long, even on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running server; ends with its owner.
struct Server {
    child: Child,
    /// `http://127.0.0.1:PORT`.
    base: String,
}

impl Server {
    fn start(lab: &Lab, model: &str, args: &[&str]) -> Server {
        Server::with(lab, &[&["serve", model, "--port", "0"], args].concat(), &[])
    }

    fn with(lab: &Lab, args: &[&str], env: &[(&str, &str)]) -> Server {
        let log = File::create(lab.path("serve.log")).unwrap();
        let mut child = lab
            .command(args)
            .envs(env.iter().copied())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let Some((_, url)) = line.trim().split_once(" at ") else {
            panic!("no address: {}", text(&lab.read("serve.log")));
        };
        Server { child, base: url.strip_suffix("/v1").unwrap().to_owned() }
    }

    fn request(&self, path: &str, body: &[u8], headers: &[(&str, &str)]) -> Reply {
        let mut request = ureq::post(format!("{}{path}", self.base))
            .config()
            .http_status_as_error(false)
            .timeout_global(Some(PATIENCE))
            .build();
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.send(body).unwrap()
    }

    fn ask(&self, path: &str, body: &Value) -> Reply {
        self.request(path, body.to_string().as_bytes(), &[JSON])
    }

    /// An answer that must come.
    #[track_caller]
    fn post(&self, path: &str, body: &Value) -> Value {
        let (status, answer) = taken(self.ask(path, body));
        assert_eq!(status, 200, "{body}: {answer}");
        answer
    }

    /// A refusal that must come: its status and `error`.
    #[track_caller]
    fn refused(&self, path: &str, body: &Value) -> (u16, Value) {
        refusal(self.ask(path, body))
    }

    fn get(&self, path: &str) -> (u16, Value) {
        let request = ureq::get(format!("{}{path}", self.base));
        taken(request.config().http_status_as_error(false).build().call().unwrap())
    }

    /// The pieces of an answer, without the last line.
    #[track_caller]
    fn pieces(&self, path: &str, body: &Value) -> Vec<Value> {
        let mut body = body.clone();
        body["stream"] = true.into();
        let mut reply = self.ask(path, &body);
        assert_eq!(reply.status(), 200);
        assert_eq!(reply.headers()["content-type"], "text/event-stream");
        let text = reply.body_mut().read_to_string().unwrap();
        let mut lines: Vec<&str> = text
            .split("\n\n")
            .filter(|event| !event.is_empty())
            .map(|event| event.strip_prefix("data: ").unwrap())
            .collect();
        assert_eq!(lines.pop(), Some("[DONE]"), "{text}");
        lines.iter().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[cfg(unix)]
    fn interrupt(&self) {
        // SAFETY: a signal to a process that is our child and was not waited for.
        unsafe { libc::kill(self.child.id() as i32, libc::SIGINT) };
    }

    fn code(&mut self) -> Option<i32> {
        self.child.wait().unwrap().code()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ended_already = self.child.kill();
        let _known = self.child.wait();
    }
}

type Reply = ureq::http::Response<ureq::Body>;

const JSON: (&str, &str) = ("Content-Type", "application/json");
const TEXT: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

fn taken(mut reply: Reply) -> (u16, Value) {
    let text = reply.body_mut().read_to_string().unwrap();
    (reply.status().as_u16(), serde_json::from_str(&text).unwrap_or_else(|_| panic!("{text}")))
}

#[track_caller]
fn refusal(reply: Reply) -> (u16, Value) {
    let (status, mut body) = taken(reply);
    let error = body["error"].take();
    let keys: Vec<&String> = error.as_object().unwrap().keys().collect();
    assert_eq!(keys, ["message", "type", "param", "code"]);
    (status, error)
}

/// A model with room for a text that nobody waits for.
fn endless(lab: &Lab) {
    let mut config = llama();
    config["max_position_embeddings"] = 200_000.into();
    lab.write("endless.json", Value::Object(config).to_string());
    lab.succeed(&["init", "endless.json", "--tokenizer", "tokenizer", "-o", "endless"]);
}

/// Asks for a text without end, in pieces of which the first have come.
fn begun(server: &Server) -> impl BufRead + use<> {
    let body = json!({"prompt": "the cat", "max_tokens": 150_000, "stream": true});
    let mut reader = BufReader::new(server.ask(TEXT, &body).into_body().into_reader());
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    assert!(line.starts_with("data: {"), "{line}");
    reader
}

#[test]
fn the_model_introduces_itself() {
    let lab = Lab::new();
    let server = Server::start(&lab, "./model/", &[]);
    assert_eq!(server.get("/health"), (200, json!({"status": "ok"})));
    let (status, list) = server.get("/v1/models");
    assert_eq!((status, &list["object"]), (200, &json!("list")));
    let card = &list["data"][0];
    assert_eq!((&card["id"], &card["object"]), (&json!("model"), &json!("model")));
    assert_eq!(server.get("/v1/models/model"), (200, card.clone()));
    assert_eq!(server.get("/v1/models/a/b").0, 404);
    assert_eq!(server.get("/v1/nothing").1["error"]["code"], "unknown_url");
    assert_eq!(server.get("/").0, 404);
    assert_eq!(server.get(TEXT).0, 405);
    let named = Server::start(&lab, "model", &["--name", "org/name"]);
    assert_eq!(named.get("/v1/models/org/name").1["id"], "org/name");
    named.post(TEXT, &json!({"model": "org/name", "prompt": "the"}));
}

#[test]
fn answers_that_are_not_exact_say_so() {
    let lab = Lab::new();
    let measure = ["--corpus", "corpus.jsonl", "--tokens", "500", "-o", "measured.json"];
    lab.succeed(&[&["calibrate", "model"], &measure[..]].concat());
    let flags = ["--calibration", "measured.json", "--density-target", "0.5"];
    let server = Server::start(&lab, "model", &flags);
    let (_, models) = server.get("/v1/models");
    let why = models["data"][0]["inexact"].as_str().unwrap();
    assert!(why.starts_with("inexact: activations below thresholds count as zero"), "{why}");
    let answer = server.post("/v1/completions", &json!({"prompt": "the cat", "max_tokens": 2}));
    assert_eq!(answer["system_fingerprint"], why);
    let exact = Server::start(&lab, "model", &[]);
    let answer = exact.post("/v1/completions", &json!({"prompt": "the cat", "max_tokens": 2}));
    assert!(answer.get("system_fingerprint").is_none(), "{answer}");
}

#[test]
fn a_greedy_text_is_what_generate_writes() {
    let lab = Lab::new();
    let server = Server::start(&lab, "model", &[]);
    let generated = |n: &str| {
        lab.succeed(&["generate", "model", "-p", "the cat", "-n", n, "--no-echo"])
            .trim_end_matches('\n')
            .to_owned()
    };
    let ask = json!({"model": "model", "prompt": "the cat", "max_tokens": 12, "temperature": 0});
    let answer = server.post(TEXT, &ask);
    let whole = generated("12");
    assert!(!whole.trim().is_empty());
    let choice = json!({"index": 0, "text": whole, "logprobs": null, "finish_reason": "length"});
    assert_eq!(answer["choices"], json!([choice]));
    let usage = json!({"prompt_tokens": 2, "completion_tokens": 12, "total_tokens": 14});
    assert_eq!(answer["usage"], usage);
    assert_eq!((&answer["object"], &answer["model"]), (&json!("text_completion"), &json!("model")));
    assert!(answer["id"].as_str().unwrap().starts_with("cmpl-"));
    assert!(answer["created"].as_u64().unwrap() > 1_700_000_000);

    // Ids, several prompts, OpenAI's number of tokens, and the end of the positions.
    let with = |field: &str, value: Value| {
        let mut ask = ask.clone();
        ask[field] = value;
        server.post(TEXT, &ask)
    };
    assert_eq!(with("prompt", json!([2, 4]))["choices"], answer["choices"]);
    let several = with("prompt", json!(["the cat", "a dog", "the cat"]));
    assert_eq!(several["choices"][2]["text"], answer["choices"][0]["text"]);
    assert_eq!(several["choices"][1]["index"], 1);
    assert_eq!(several["usage"]["total_tokens"], 3 * 14);
    assert_eq!(with("max_tokens", json!(null))["usage"]["completion_tokens"], 16);
    let longest = with("max_tokens", json!(1_000_000));
    assert_eq!(longest["usage"]["completion_tokens"], 62);
    assert_eq!(longest["choices"][0]["text"], generated("62"));

    // Seeds make drawing repeatable.
    let drawn = |seed: u64| {
        let ask = json!({"prompt": "the cat", "max_tokens": 40, "top_p": 0.9, "seed": seed});
        server.post(TEXT, &ask)["choices"].clone()
    };
    assert_eq!(drawn(1), drawn(1));
    assert_ne!(drawn(1), drawn(2));
    let log = text(&lab.read("serve.log"));
    assert!(log.contains("POST /v1/completions 200 done prompt=2 new=12 ms="), "{log}");
}

#[test]
fn pieces_make_the_whole() {
    let lab = Lab::new();
    let server = Server::start(&lab, "model", &["--chat-template", "default"]);
    let ask = json!({"prompt": ["the cat", "a"], "max_tokens": 30, "seed": 5});
    let whole = server.post(TEXT, &ask);
    let pieces = server.pieces(TEXT, &ask);
    assert!(pieces.len() > 10);
    for index in [0, 1] {
        let of: Vec<&Value> = pieces
            .iter()
            .map(|piece| &piece["choices"][0])
            .filter(|c| c["index"] == index)
            .collect();
        let made: String = of.iter().map(|choice| choice["text"].as_str().unwrap()).collect();
        assert_eq!(made, whole["choices"][index]["text"]);
        let (last, others) = of.split_last().unwrap();
        assert_eq!(last["finish_reason"], "length");
        assert!(others.iter().all(|choice| choice["finish_reason"].is_null()));
    }
    assert!(pieces.iter().all(|piece| piece["id"] == pieces[0]["id"] && piece["usage"].is_null()));

    let messages = json!([
        {"role": "system", "content": "the"}, {"role": "user", "content": [{"type": "text", "text": "a cat"}]}
    ]);
    let ask = json!({"messages": messages, "max_completion_tokens": 20, "temperature": 0});
    let whole = server.post(CHAT, &ask);
    let message = &whole["choices"][0]["message"];
    assert_eq!(
        (&whole["object"], &message["role"]),
        (&json!("chat.completion"), &json!("assistant"))
    );
    let mut ask = ask;
    ask["stream_options"] = json!({"include_usage": true});
    let pieces = server.pieces(CHAT, &ask);
    assert_eq!(pieces[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert!(pieces.iter().all(|piece| piece["object"] == "chat.completion.chunk"));
    let (usage, pieces) = pieces.split_last().unwrap();
    assert_eq!((&usage["choices"], &usage["usage"]), (&json!([]), &whole["usage"]));
    let (last, _) = pieces.split_last().unwrap();
    assert_eq!(
        last["choices"][0],
        json!({"index": 0, "delta": {}, "logprobs": null, "finish_reason": "length"})
    );
    let made: String = pieces
        .iter()
        .filter_map(|piece| piece["choices"][0]["delta"]["content"].as_str())
        .collect();
    assert_eq!(made, *message["content"].as_str().unwrap());
    // The model sees relufy's own template, without the space that its words bring along.
    let prompt = "the\n\nUser: a cat\nAssistant:";
    let ask = json!({"prompt": prompt, "max_tokens": 20, "temperature": 0});
    let plain = server.post(TEXT, &ask);
    assert_eq!(plain["usage"], whole["usage"]);
    let plain = plain["choices"][0]["text"].as_str().unwrap();
    assert_eq!(plain.strip_prefix(' ').unwrap_or(plain), made);
}

#[test]
fn characters_are_never_cut() {
    let lab = Lab::new();
    // A vocabulary of bytes, most of them parts of characters.
    let bytes = [0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80, 0x61, 0x62, 0x20, 0xBC];
    let mut words = support::tokenizer(0);
    let names =
        ["<unk>".to_owned()].into_iter().chain(bytes.iter().map(|b| format!("<0x{b:02X}>")));
    words["model"]["vocab"] = names.enumerate().map(|(id, name)| (name, json!(id))).collect();
    words["added_tokens"].as_array_mut().unwrap().truncate(1);
    words["decoder"] =
        json!({"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]});
    lab.write("model/tokenizer.json", words.to_string());
    let server = Server::start(&lab, "model", &[]);
    let mut held = 0;
    for seed in 0..5 {
        let ask = json!({"prompt": [1, 2], "max_tokens": 50, "seed": seed});
        let whole = server.post(TEXT, &ask);
        let pieces = server.pieces(TEXT, &ask);
        let made: Vec<&str> =
            pieces.iter().map(|piece| piece["choices"][0]["text"].as_str().unwrap()).collect();
        assert_eq!(made.concat(), *whole["choices"][0]["text"].as_str().unwrap());
        held += 51 - pieces.len();
    }
    assert!(held > 50, "only {held} tokens waited for the rest of a character");
}

#[test]
fn a_stop_string_ends_a_text() {
    let lab = Lab::new();
    let server = Server::start(&lab, "model", &[]);
    let ask = |stop: Value| json!({"prompt": "the", "max_tokens": 60, "seed": 3, "stop": stop});
    let free = server.post(TEXT, &ask(Value::Null));
    let whole = free["choices"][0]["text"].as_str().unwrap();
    // Over the border of two words, from the middle of the text on.
    let middle = whole.len() / 2;
    let (space, _) = whole[middle..].match_indices(' ').next().unwrap();
    let stop = &whole[middle + space - 1..middle + space + 2];
    let end = whole.find(stop).unwrap();
    let body = ask(json!(["nothing of that", stop]));
    let answer = server.post(TEXT, &body);
    assert_eq!(answer["choices"][0]["text"], whole[..end]);
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    assert!(answer["usage"]["completion_tokens"].as_u64().unwrap() < 60);
    let pieces = server.pieces(TEXT, &body);
    let made: String =
        pieces.iter().map(|piece| piece["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(made, whole[..end]);
    assert_eq!(pieces.last().unwrap()["choices"][0]["finish_reason"], "stop");
    // What only begins like a stop string is not lost.
    let tail = format!("{}!", &whole[whole.len() - 2..]);
    assert_eq!(server.post(TEXT, &ask(json!(tail)))["choices"][0]["text"], whole);
}

#[test]
fn what_will_not_do_is_named() {
    let lab = Lab::new();
    let server = Server::start(&lab, "model", &[]);
    for body in ["{", "", "[1]", "{\"prompt\": \"\u{1}\"}"] {
        let (status, error) = refusal(server.request(TEXT, body.as_bytes(), &[JSON]));
        assert_eq!((status, &error["type"]), (400, &json!("invalid_request_error")), "{body}");
    }
    let (status, _) = refusal(server.request(TEXT, b"{}", &[("Content-Type", "text/plain")]));
    assert_eq!(status, 415);
    let (status, error) = refusal(server.request(TEXT, &vec![b' '; 9 << 20], &[JSON]));
    assert_eq!((status, &error["code"]), (413, &json!("request_too_large")));

    // One that never comes whole keeps nobody from ending.
    let mut stream = TcpStream::connect(server.base.strip_prefix("http://").unwrap()).unwrap();
    let head = format!("POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n");
    write!(stream, "{head}Content-Length: 99\r\n\r\n{{").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).unwrap();
    assert!(reply.is_empty() || reply.starts_with("HTTP/1.1 400 "), "{reply}");

    let long = vec!["cat"; 64].join(" ");
    for (field, value, status, code, why) in [
        ("model", json!("gpt-9"), 404, json!("model_not_found"), "this is `model`"),
        ("prompt", json!(long), 400, json!("context_length_exceeded"), "64 tokens"),
        ("prompt", json!([14]), 400, json!(null), "token 14 is not in the vocabulary of 14"),
        ("prompt", json!(""), 400, json!(null), "nothing to continue"),
        ("n", json!(2), 400, json!("unsupported_parameter"), "only 1"),
        ("echo", json!(true), 400, json!("unsupported_parameter"), "not repeated"),
        ("logprobs", json!(1), 400, json!("unsupported_parameter"), "there are none"),
        ("max_tokens", json!(0), 400, json!(null), "at least 1"),
        ("temperature", json!(-1), 400, json!(null), "from 0 to 2"),
    ] {
        let mut body = json!({"prompt": "the"});
        body[field] = value;
        let (got, error) = server.refused(TEXT, &body);
        assert_eq!(
            (got, &error["param"], &error["code"]),
            (status, &json!(field), &code),
            "{error}"
        );
        assert!(error["message"].as_str().unwrap().contains(why), "{error}");
    }
    let body = json!({"messages": [{"role": "user", "content": "the"}]});
    let (status, error) = server.refused(CHAT, &body);
    assert_eq!((status, &error["code"]), (400, &json!("no_chat_template")));

    lab.write("chat.toml", "user = '{content} '\nassistant = '. {content}{eos}'\n");
    let server = Server::start(&lab, "model", &["--chat-template", "chat.toml"]);
    assert_eq!(server.post(CHAT, &body)["usage"]["prompt_tokens"], 2);
    for (messages, why) in [
        (json!([]), "is empty"),
        (json!([{"role": "tool", "content": "x"}]), "message 0: no pattern for role `tool`"),
        (json!([{"role": "user"}]), "message 0: `content` is missing"),
    ] {
        let (status, error) = server.refused(CHAT, &json!({"messages": messages}));
        assert_eq!((status, &error["param"]), (400, &json!("messages")));
        assert!(error["message"].as_str().unwrap().contains(why), "{error}");
    }
}

#[test]
fn the_program_refuses_what_cannot_be_served() {
    let lab = Lab::new();
    lab.write("bad.toml", "user = 'no place for words'");
    lab.write("unknown.toml", "owl = '{content}'");
    lab.refuse(&["serve", "nowhere", "--port", "0"], &["nowhere"]);
    lab.refuse(&["serve", "model", "--port", "0", "--api-key", " "], &["--api-key is empty"]);
    let several = ["serve", "model", "--port", "0", "--engine", "dense", "--parallel", "2"];
    lab.refuse(&several, &["2 texts side by side are for the sparse engine on the CPU"]);
    lab.refuse(&["serve", "model", "--parallel", "0"], &["--parallel"]);
    let template = |file| ["serve", "model", "--port", "0", "--chat-template", file];
    lab.refuse(&template("bad.toml"), &["bad.toml", "`user` needs one {content}"]);
    lab.refuse(&template("unknown.toml"), &["unknown.toml", "owl"]);
    lab.refuse(&template("none.toml"), &["none.toml"]);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let output = lab.run(&["serve", "model", "--port", &port]);
    assert_eq!(output.status.code(), Some(1));
    let message = text(&output.stderr);
    assert!(message.starts_with("error: cannot listen at 127.0.0.1:"), "{message}");
    assert!(message.contains("hint: another program listens there"), "{message}");
}

#[test]
fn who_has_no_key_gets_no_text() {
    let lab = Lab::new();
    let server =
        Server::with(&lab, &["serve", "model", "--port", "0"], &[("RELUFY_API_KEY", "sesame")]);
    assert_eq!(server.get("/health").0, 200);
    let (status, body) = server.get("/v1/models");
    assert_eq!((status, &body["error"]["code"]), (401, &json!("invalid_api_key")));
    let ask = |key: &str| {
        let body = json!({"prompt": "the"}).to_string();
        taken(server.request(TEXT, body.as_bytes(), &[JSON, ("Authorization", key)]))
    };
    assert_eq!(ask("Bearer sesame").0, 200);
    for wrong in ["Bearer sesam", "Bearer sesame2", "Bearer ", "Basic sesame", "sesame", ""] {
        assert_eq!(ask(wrong).0, 401, "{wrong}");
    }
}

/// One that computes as `generate` does, to the bit, whatever else it computes beside.
const EXACT: [&str; 5] = ["--stage", "2", "--format", "f32", "--parallel"];

#[test]
fn texts_side_by_side_are_what_each_is_alone() {
    let lab = Lab::new();
    endless(&lab);
    let server = Server::start(&lab, "endless", &[&EXACT[..], &["3"]].concat());
    let long = vec!["a cat the dog"; 60].join(" ");
    let prompts = ["the cat", "a dog", &long, "the", "a dog the cat", "a"];
    let asked = |prompt: &str, n: usize| json!({"prompt": prompt, "max_tokens": n, "seed": n});
    let text = |answer: &Value| answer["choices"][0]["text"].as_str().unwrap().to_owned();
    let alone: Vec<String> = prompts
        .iter()
        .enumerate()
        .map(|(n, prompt)| text(&server.post(TEXT, &asked(prompt, 50 + n))))
        .collect();
    // Twice as many as there are places.
    std::thread::scope(|scope| {
        let server = &server;
        let ask = |n: usize, prompt| {
            scope.spawn(move || text(&server.post(TEXT, &asked(prompt, 50 + n))))
        };
        let answers: Vec<_> = prompts.into_iter().enumerate().map(|(n, p)| ask(n, p)).collect();
        for (answer, alone) in answers.into_iter().zip(&alone) {
            assert_eq!(answer.join().unwrap(), *alone);
        }
    });
    // Several prompts of one request, more than there are places; each draws with a seed of its own.
    let all = json!({"prompt": prompts, "max_tokens": 30, "temperature": 0});
    let answer = server.post(TEXT, &all);
    assert_eq!(answer["usage"]["completion_tokens"], 6 * 30);
    for (n, prompt) in prompts.iter().enumerate() {
        let one = json!({"prompt": prompt, "max_tokens": 30, "temperature": 0});
        assert_eq!(answer["choices"][n]["text"], server.post(TEXT, &one)["choices"][0]["text"]);
    }
    // In pieces they come mixed.
    let mut made = vec![String::new(); prompts.len()];
    let mut order = Vec::new();
    for piece in server.pieces(TEXT, &all) {
        let choice = &piece["choices"][0];
        let index = choice["index"].as_u64().unwrap() as usize;
        made[index] += choice["text"].as_str().unwrap();
        order.push(index);
    }
    for (n, text) in made.iter().enumerate() {
        assert_eq!(answer["choices"][n]["text"], *text);
    }
    assert!(!order.is_sorted(), "one after the other");
}

#[test]
fn a_short_text_does_not_wait_for_an_endless_one() {
    let lab = Lab::new();
    endless(&lab);
    let server = Server::start(&lab, "endless", &[&EXACT[..], &["2", "--queue", "0"]].concat());
    let short = json!({"prompt": "a", "max_tokens": 2});
    let mut first = begun(&server);
    for _ in 0..3 {
        assert_eq!(server.post(TEXT, &short)["usage"]["completion_tokens"], 2);
    }
    // Both places are taken; nobody may wait.
    let second = begun(&server);
    assert_eq!(server.refused(TEXT, &short).1["code"], "queue_full");
    // The first goes on all the while.
    let mut line = String::new();
    assert!(first.read_line(&mut line).unwrap() > 0 && first.read_line(&mut line).unwrap() > 0);
    drop((first, second));
    let begun = Instant::now();
    while taken(server.ask(TEXT, &short)).0 == 429 {
        assert!(begun.elapsed() < PATIENCE);
    }
}

#[test]
fn others_wait_or_are_sent_away_and_who_leaves_makes_room() {
    let lab = Lab::new();
    endless(&lab);
    let server = Server::start(&lab, "endless", &["--queue", "1", "--parallel", "1"]);
    let first = begun(&server);
    let short = json!({"prompt": "a", "max_tokens": 2});
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            loop {
                let (status, answer) = taken(server.ask(TEXT, &short));
                if status != 429 {
                    break answer;
                }
            }
        });
        // Until the one above waits, this one is taken itself: then it waits and gives up.
        let started = Instant::now();
        let full = loop {
            let reply = ureq::post(format!("{}{TEXT}", server.base))
                .header(JSON.0, JSON.1)
                .config()
                .http_status_as_error(false)
                .timeout_global(Some(Duration::from_millis(300)))
                .build()
                .send(short.to_string());
            match reply {
                Ok(reply) => break reply,
                Err(_) => assert!(started.elapsed() < PATIENCE),
            }
        };
        assert_eq!(full.headers()["retry-after"], "1");
        let (status, error) = refusal(full);
        assert_eq!((status, &error["code"]), (429, &json!("queue_full")));
        assert!(!waiting.is_finished());
        // The endless text ends with its reader.
        drop(first);
        assert_eq!(waiting.join().unwrap()["usage"]["completion_tokens"], 2);
    });
    // Also a client that waits for the whole text.
    let body = json!({"prompt": "the", "max_tokens": 150_000}).to_string();
    let mut stream = TcpStream::connect(server.base.strip_prefix("http://").unwrap()).unwrap();
    let length = body.len();
    write!(
        stream,
        "POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
    )
    .unwrap();
    // Long enough for the request to be taken on a busy machine.
    stream.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    assert!(stream.read(&mut [0]).is_err(), "an endless text has ended");
    drop(stream);
    server.post(TEXT, &short);
    let log = text(&lab.read("serve.log"));
    assert!(log.contains("200 cut prompt=2") && log.contains(" 0 client gone "), "{log}");
}

#[test]
fn a_request_may_not_take_for_ever() {
    let lab = Lab::new();
    endless(&lab);
    let server = Server::start(&lab, "endless", &["--timeout", "1"]);
    let (status, error) = server.refused(TEXT, &json!({"prompt": "the", "max_tokens": 150_000}));
    assert_eq!(
        (status, &error["code"], &error["type"]),
        (504, &json!("timeout"), &json!("server_error"))
    );
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_the_server_and_what_it_was_at() {
    let lab = Lab::new();
    endless(&lab);
    let mut idle = Server::start(&lab, "model", &[]);
    idle.post(TEXT, &json!({"prompt": "the"}));
    idle.interrupt();
    assert_eq!(idle.code(), Some(130));

    let mut server = Server::start(&lab, "endless", &[]);
    let mut running = begun(&server);
    let started = Instant::now();
    server.interrupt();
    let mut rest = String::new();
    running.read_to_string(&mut rest).unwrap();
    let last = rest.trim_end().rsplit("\n\n").next().unwrap();
    let error: Value = serde_json::from_str(last.strip_prefix("data: ").unwrap()).unwrap();
    assert_eq!(error["error"]["code"], "stopping");
    assert_eq!(server.code(), Some(130));
    assert!(started.elapsed() < Duration::from_secs(20));

    // What is nearly complete is completed.
    let mut server = Server::start(&lab, "endless", &[]);
    let body = json!({"prompt": "the", "max_tokens": 1000, "stream": true});
    let mut reader = BufReader::new(server.ask(TEXT, &body).into_body().into_reader());
    reader.read_line(&mut String::new()).unwrap();
    server.interrupt();
    let mut rest = String::new();
    reader.read_to_string(&mut rest).unwrap();
    assert!(rest.ends_with("data: [DONE]\n\n"), "{rest}");
    assert_eq!(server.code(), Some(130));
}
