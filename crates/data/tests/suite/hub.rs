//! The hub client against a small server of our own.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use relufy_data::corpus::{SourceConfig, documents};
use relufy_data::{Error, Hub, HubSettings, Need, Progress, Silent, TaskData, Weights};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A hub with some repositories: `(repository, revision)` to files.
struct Server {
    address: String,
    /// Cuts every body after so many bytes, while the headers promise all.
    cut: Arc<AtomicUsize>,
    down: Arc<AtomicBool>,
    requests: Arc<Mutex<Vec<String>>>,
}

type Files = Vec<(&'static str, Vec<u8>)>;

fn serve(repositories: Vec<(&'static str, Files)>) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let server = Server {
        address: format!("http://{}", listener.local_addr().unwrap()),
        cut: Arc::new(AtomicUsize::new(usize::MAX)),
        down: Arc::default(),
        requests: Arc::default(),
    };
    let repositories: HashMap<&str, Files> = repositories.into_iter().collect();
    let (cut, down, requests) = (server.cut.clone(), server.down.clone(), server.requests.clone());
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            if !down.load(Ordering::SeqCst) {
                // A client that goes away is its own affair.
                let _ = answer(stream, &repositories, cut.load(Ordering::SeqCst), &requests);
            }
        }
    });
    server
}

fn answer(
    mut stream: TcpStream,
    repositories: &HashMap<&str, Files>,
    cut: usize,
    requests: &Mutex<Vec<String>>,
) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let request = lines.next().transpose()?.unwrap_or_default();
    let (mut range, mut token) = (None, String::new());
    for line in lines {
        let line = line?.to_ascii_lowercase();
        if line.is_empty() {
            break;
        }
        if let Some(bytes) = line.strip_prefix("range: bytes=") {
            range = bytes.split_once('-').map(|(a, b)| (a.to_owned(), b.to_owned()));
        }
        if let Some(bearer) = line.strip_prefix("authorization: ") {
            token = format!(" {bearer}");
        }
    }
    let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
    requests.lock().unwrap().push(format!("{path}{token}"));
    let reply = |stream: &mut TcpStream, status: &str, headers: &str, body: &[u8]| {
        write!(
            stream,
            "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n{headers}\r\n",
            body.len()
        )?;
        stream.write_all(&body[..body.len().min(cut)])
    };
    for (repository, files) in repositories {
        let (name, revision) = repository.split_once('@').unwrap_or((repository, "main"));
        let (api, plain) = match name.strip_prefix("datasets/") {
            Some(_) => (format!("/api/{name}"), format!("/{name}")),
            None => (format!("/api/models/{name}"), format!("/{name}")),
        };
        let commit = if revision == "main" { COMMIT } else { "feedfeedfeed" };
        if path == format!("{api}/revision/{}", revision.replace('/', "%2F")) {
            let siblings: Vec<_> =
                files.iter().map(|(f, _)| serde_json::json!({"rfilename": f})).collect();
            let body = serde_json::json!({"sha": commit, "siblings": siblings}).to_string();
            return reply(&mut stream, "200 OK", "", body.as_bytes());
        }
        let file = path.strip_prefix(&format!("{plain}/resolve/{commit}/"));
        if let Some((name, body)) = files.iter().find(|(name, _)| Some(*name) == file) {
            let (start, end) = range.unwrap_or_default();
            let start: usize = start.parse().unwrap_or(0);
            let end = end.parse().map_or(body.len(), |end: usize| (end + 1).min(body.len()));
            if start >= body.len() && !body.is_empty() {
                return reply(&mut stream, "416 Range Not Satisfiable", "", b"");
            }
            let etag = name.replace('/', "-");
            let headers = format!(
                "ETag: \"{etag}\"\r\nX-Repo-Commit: {commit}\r\nContent-Range: bytes {start}-{end}/{}\r\n",
                body.len()
            );
            return reply(&mut stream, "206 Partial Content", &headers, &body[start..end]);
        }
    }
    reply(&mut stream, "404 Not Found", "", b"Repository not found")
}

fn hub(server: &Server, cache: &Path, offline: bool) -> Hub {
    Hub::new(HubSettings {
        endpoint: server.address.clone(),
        cache: cache.to_path_buf(),
        token: Some("t0ken".to_owned()),
        offline,
    })
}

fn model_files() -> Files {
    let index = serde_json::json!({"metadata": {}, "weight_map": {
        "a": "model-00002-of-00002.safetensors", "b": "model-00001-of-00002.safetensors",
    }});
    vec![
        ("config.json", b"{}".to_vec()),
        ("tokenizer.json", b"{ }".to_vec()),
        ("README.md", b"card".to_vec()),
        ("model-00001-of-00002.safetensors", vec![1; 5000]),
        ("model-00002-of-00002.safetensors", vec![2; 5000]),
        ("model.safetensors.index.json", index.to_string().into_bytes()),
        ("pytorch_model.bin", vec![3; 5000]),
        ("big/extra.bin", vec![4; 9]),
    ]
}

#[derive(Default)]
struct Count(AtomicUsize, AtomicUsize);

impl Progress for Count {
    fn start(&self, _what: &str, total: Option<u64>) {
        self.0.fetch_add(total.unwrap() as usize, Ordering::SeqCst);
    }
    fn advance(&self, delta: u64) {
        self.1.fetch_add(delta as usize, Ordering::SeqCst);
    }
    fn message(&self, _text: &str) {}
    fn finish(&self) {}
}

#[test]
fn fetches_what_is_needed_once_and_then_works_offline() {
    let folder = tempfile::tempdir().unwrap();
    let server = serve(vec![("org/model", model_files())]);
    let online = hub(&server, folder.path(), false);

    let config = online.model("org/model", Need::Config, &Silent).unwrap();
    assert_eq!(config.revision.as_deref(), Some(COMMIT));
    assert!(config.config().is_ok() && config.existing("tokenizer.json").is_none());
    assert_eq!(config.weights, Weights::None);

    let count = Count::default();
    let all = online.model("org/model@main", Need::Everything, &count).unwrap();
    let Weights::Safetensors(shards) = &all.weights else { panic!("{all:?}") };
    assert_eq!(shards.iter().map(|s| std::fs::read(s).unwrap()[0]).collect::<Vec<_>>(), [1, 2]);
    assert!(all.existing("README.md").is_some() && all.existing("tokenizer.json").is_some());
    assert!(all.existing("pytorch_model.bin").is_none() && all.existing("big/extra.bin").is_none());
    let (announced, arrived) = (count.0.into_inner(), count.1.into_inner());
    assert!(announced > 10_000 && announced == arrived, "{announced} {arrived}");

    let requests = server.requests.lock().unwrap().clone();
    assert!(requests.iter().all(|request| request.ends_with(" bearer t0ken")), "{requests:?}");
    online.model("org/model", Need::Everything, &Silent).unwrap();
    // Nothing but the question which commit it is.
    assert_eq!(server.requests.lock().unwrap().len(), requests.len() + 1);

    for reference in ["org/model".to_owned(), format!("org/model@{COMMIT}")] {
        let files =
            hub(&server, folder.path(), true).model(&reference, Need::Everything, &Silent).unwrap();
        assert_eq!((files.folder, files.weights), (all.folder.clone(), all.weights.clone()));
    }
    // No network at all is like offline.
    server.down.store(true, Ordering::SeqCst);
    let files = online.model("org/model", Need::Everything, &Silent).unwrap();
    assert_eq!(files.revision.as_deref(), Some(COMMIT));
    let error = online.model("org/other", Need::Config, &Silent).unwrap_err();
    assert!(matches!(error, Error::NotCached { .. }) && error.hint().is_some(), "{error}");
}

#[test]
fn unknown_names_and_partial_caches_are_told_apart() {
    let folder = tempfile::tempdir().unwrap();
    let server = serve(vec![("org/model", model_files())]);
    let online = hub(&server, folder.path(), false);
    let error = online.model("org/nothing", Need::Config, &Silent).unwrap_err();
    assert!(matches!(error, Error::UnknownRepository { .. }), "{error}");
    assert!(error.to_string().contains("org/nothing"), "{error}");
    let error = online.model("org/model@v9", Need::Config, &Silent).unwrap_err();
    assert!(matches!(error, Error::UnknownRepository { .. }), "{error}");
    let error = online.model("./no/folder", Need::Config, &Silent).unwrap_err();
    assert!(matches!(error, Error::BadReference { .. }), "{error}");

    let offline = hub(&server, folder.path(), true);
    let error = offline.model("org/model", Need::Config, &Silent).unwrap_err();
    assert!(matches!(error, Error::NotCached { .. }), "{error}");
    online.model("org/model", Need::Config, &Silent).unwrap();
    offline.model("org/model", Need::Config, &Silent).unwrap();
    let error = offline.model("org/model", Need::Everything, &Silent).unwrap_err();
    assert!(error.to_string().contains("weights"), "{error}");
}

#[test]
fn a_broken_transfer_is_an_error_and_is_taken_up_again() {
    let folder = tempfile::tempdir().unwrap();
    let server = serve(vec![("org/model", model_files())]);
    let online = hub(&server, folder.path(), false);
    online.model("org/model", Need::Tokenizer, &Silent).unwrap();
    server.cut.store(1000, Ordering::SeqCst);
    let error = online.model("org/model", Need::Everything, &Silent).unwrap_err();
    assert!(matches!(error, Error::Download { .. }), "{error}");
    server.cut.store(usize::MAX, Ordering::SeqCst);
    let files = online.model("org/model", Need::Everything, &Silent).unwrap();
    for (shard, byte) in files.weights.files().iter().zip([1, 2]) {
        assert_eq!(std::fs::read(shard).unwrap(), vec![byte; 5000]);
    }

    // Killed between the last byte and the rename.
    let other = tempfile::tempdir().unwrap();
    let blobs = other.path().join("models--org--model").join("blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::write(blobs.join("README.part"), b"card").unwrap();
    std::fs::write(blobs.join("config.part"), b"{}").unwrap();
    hub(&server, other.path(), false).model("org/model", Need::Config, &Silent).unwrap();
}

#[test]
fn a_folder_is_local_and_its_index_must_hold() {
    let folder = tempfile::tempdir().unwrap();
    let server = serve(vec![]);
    let hub = hub(&server, &folder.path().join("cache"), false);
    let model = folder.path().join("model");
    std::fs::create_dir(&model).unwrap();
    let reference = model.to_str().unwrap();
    let files = hub.model(reference, Need::Everything, &Silent).unwrap();
    assert!(files.revision.is_none() && files.weights == Weights::None);
    assert!(matches!(files.config().unwrap_err(), Error::MissingFile { .. }));

    for (name, body) in model_files().into_iter().filter(|(name, _)| !name.contains('/')) {
        std::fs::write(model.join(name), body).unwrap();
    }
    let files = hub.model(reference, Need::Everything, &Silent).unwrap();
    assert_eq!(files.weights.files().len(), 2);
    std::fs::remove_file(model.join("model-00001-of-00002.safetensors")).unwrap();
    let error = hub.model(reference, Need::Everything, &Silent).unwrap_err();
    assert!(error.to_string().contains("model-00001-of-00002.safetensors"), "{error}");
    let escape = r#"{"weight_map": {"a": "../secret.safetensors"}}"#;
    std::fs::write(model.join("model.safetensors.index.json"), escape).unwrap();
    let error = hub.model(reference, Need::Everything, &Silent).unwrap_err();
    assert!(error.to_string().contains("no file name"), "{error}");
    assert!(server.requests.lock().unwrap().is_empty());
}

#[test]
fn dataset_files_feed_corpora_and_tasks() {
    let folder = tempfile::tempdir().unwrap();
    let line = |text: &str| format!("{{\"text\": \"{text}\"}}\n").into_bytes();
    let server = serve(vec![
        (
            "datasets/org/data",
            vec![
                ("a/1.jsonl", line("one")),
                ("a/2.jsonl", line("two")),
                ("b.jsonl", line("three")),
                ("a/notes.md5", vec![]),
                ("easy/test-00000-of-00002.jsonl", line("x")),
                ("easy/test-00001-of-00002.jsonl", line("y")),
            ],
        ),
        ("datasets/org/data@refs/convert/parquet", vec![("hard/test/0000.jsonl", line("z"))]),
    ]);
    let online = hub(&server, folder.path(), false);
    let texts = |hub: &Hub, path: &str| -> Vec<String> {
        let source = SourceConfig::new(path);
        documents(&source, hub).unwrap().map(|d| d.unwrap().text).collect()
    };
    assert_eq!(texts(&online, "hub://org/data/a"), ["one", "two"]);
    assert_eq!(texts(&online, "hub://org/data@main/b.jsonl"), ["three"]);
    assert_eq!(texts(&online, "hub://org/data/a/*.jsonl"), ["one", "two"]);
    assert!(documents(&SourceConfig::new("hub://org/data"), &online).is_err());
    assert!(documents(&SourceConfig::new("hub://org/data/c.jsonl"), &online).is_err());

    let load = |hub: &Hub, config: &str| {
        let split = TaskData::hub(hub.clone()).load_split("org/data", config, "test", &Silent)?;
        Ok::<_, Error>(split.records.iter().map(|r| r["text"].to_string()).collect::<String>())
    };
    assert_eq!(load(&online, "easy").unwrap(), "\"x\"\"y\"");
    assert_eq!(load(&online, "hard").unwrap(), "\"z\"");
    assert!(matches!(load(&online, "soft").unwrap_err(), Error::NoSplit { .. }));

    let offline = hub(&server, folder.path(), true);
    assert_eq!(texts(&offline, "hub://org/data/a"), ["one", "two"]);
    assert_eq!(load(&offline, "easy").unwrap(), "\"x\"\"y\"");
    assert_eq!(load(&offline, "hard").unwrap(), "\"z\"");
}
