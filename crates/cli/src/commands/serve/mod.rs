//! `relufy serve`: a model behind OpenAI's HTTP interface.
//!
//! The event loop has a thread of its own and answers what needs no model. Prompts go through
//! a bounded queue to one worker, which owns the model and continues several texts at a time;
//! text comes back through a channel that ends when either side is gone.

mod answer;
mod app;
mod http;
mod ids;
mod job;
mod lane;
mod listen;
mod queue;
mod receipt;
mod refusal;
mod reply;
mod request;
mod stops;
mod worker;

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use relufy_data::corpus::ChatTemplate;
use relufy_model::Checkpoint;
use relufy_spec::{ReluPlan, Stage};
use tokio::sync::watch;

use crate::engine::EngineArgs;
use crate::progress::Bars;
use crate::{out, stop};
use app::App;
use job::{Event, Job};
use queue::Queue;
use refusal::Refusal;
use worker::{GRACE, Worker};

/// Answer over HTTP as OpenAI's API does: /v1/completions and /v1/chat/completions.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  relufy serve MODEL
  relufy serve MODEL --port 9000 --queue 4 --chat-template default
  relufy serve MODEL-S2 --format int8 --parallel 8
  curl http://127.0.0.1:8080/v1/completions -H 'Content-Type: application/json' \\
    -d '{\"prompt\": \"Once upon a time\", \"max_tokens\": 50, \"temperature\": 0}'
The sparse engine on the CPU continues several texts side by side and reads a weight once for all
of them; other engines take one after the other. Who finds no place waits in the queue. Ctrl-C ends
the server once running answers are complete, but within seconds.")]
pub struct Serve {
    /// Folder or hub id.
    model: String,
    /// Address to listen at; any other than this machine's own opens the server to the network.
    #[arg(long, default_value = "127.0.0.1")]
    host: String,
    /// Port to listen at; 0 takes a free one.
    #[arg(short, long, default_value_t = 8080)]
    port: u16,
    /// What the model is called; its hub id or its folder's name by default.
    #[arg(long)]
    name: Option<String>,
    /// Key that clients must send as `Authorization: Bearer KEY`.
    #[arg(long, value_name = "KEY", env = "RELUFY_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// How messages become text: `default`, or a TOML file with the patterns `system`, `user` and
    /// `assistant` of a run's `chat_template`. Without it /v1/chat/completions is refused.
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
    /// Texts that are continued side by side, each with memory for keys and values of its own: 4 by
    /// default with the sparse engine on the CPU, 1 with others.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=64))]
    parallel: Option<u8>,
    /// So many requests may wait; more are refused (429).
    #[arg(long, value_name = "N", default_value_t = 16)]
    queue: usize,
    /// Seconds that a request may take, its wait included.
    #[arg(long, value_name = "SECONDS", default_value_t = 600,
        value_parser = clap::value_parser!(u32).range(1..))]
    timeout: u32,
    /// Surgery in memory before the start: 0 (none), 1 or 2.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=2))]
    stage: u8,
    #[command(flatten)]
    engine: EngineArgs,
}

/// After [`GRACE`], for the last bytes of what was cut.
const LAST_BYTES: Duration = Duration::from_secs(1);

impl Serve {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        if self.api_key.as_deref().is_some_and(|key| key.trim().is_empty()) {
            bail!("--api-key is empty");
        }
        let template = self.chat_template.as_deref().map(read_template).transpose()?;
        // Before the model is read: an address in use should not cost minutes.
        let place = format!("{}:{}", self.host, self.port);
        let socket = TcpListener::bind((self.host.as_str(), self.port))
            .with_context(|| format!("cannot listen at {place}"))?;
        let address = socket.local_addr().context("the address that was bound")?;

        let checkpoint = Checkpoint::resolve(&self.model, &Bars::default())?;
        let tokenizer = Arc::new(checkpoint.tokenizer()?);
        let stage = Stage::try_from(self.stage).map_err(anyhow::Error::msg)?;
        let parallel = self.parallel.map(usize::from);
        let mut engine = self.engine.load(&checkpoint, &ReluPlan::stage(stage), parallel)?;

        let queue = Arc::new(Queue::new(self.queue, engine.places()));
        let app = App {
            name: self.name.unwrap_or_else(|| name_of(&self.model)),
            created: ids::now(),
            tokenizer: tokenizer.clone(),
            vocab: checkpoint.config().spec.vocab,
            max_positions: checkpoint.config().spec.max_positions,
            inexact: self.engine.inexact(),
            template,
            key: self.api_key.map(|key| blake3::hash(key.as_bytes())),
            timeout: Duration::from_secs(self.timeout.into()),
            queue: queue.clone(),
        };
        if !address.ip().is_loopback() {
            let key = if app.key.is_some() { "" } else { " and use it: there is no --api-key" };
            out::warn(format_args!("warning: other machines may reach {address}{key}"));
        }
        let stopping = Arc::new(OnceLock::new());
        let (end, ended) = watch::channel(false);
        stop_at_signal(stopping.clone(), queue.clone(), end)?;
        let line = format!("{} at http://{address}/v1", app.name);
        let router = http::router(Arc::new(app));
        let waiters = queue.clone();
        let server = thread::Builder::new().name("http".to_owned()).spawn(move || {
            let served = listen::serve(socket, router, ended, GRACE + LAST_BYTES);
            // Without clients there is nothing to work for.
            waiters.close();
            served
        })?;
        out::line(line)?;
        Worker { tokenizer, queue, stopping }.run(engine.as_mut());
        match server.join() {
            Ok(served) => served.context("the HTTP server")?,
            Err(_) => bail!("the HTTP server ended unexpectedly"),
        }
        Ok(ExitCode::from(stop::INTERRUPTED))
    }
}

/// At Ctrl-C: who waits is sent away, running answers have [`GRACE`].
fn stop_at_signal(
    stopping: Arc<OnceLock<Instant>>,
    queue: Arc<Queue<Job>>,
    end: watch::Sender<bool>,
) -> anyhow::Result<()> {
    stop::then(move || {
        out::warn("\nstopping; once more to stop at once");
        stopping.get_or_init(Instant::now);
        for job in queue.close() {
            let _gone = job.events.send(Event::Failed(Refusal::stopping()));
        }
        end.send_replace(true);
        // A model in the middle of a long prompt does not look up.
        thread::spawn(|| {
            thread::sleep(GRACE + 2 * LAST_BYTES);
            std::process::exit(i32::from(stop::INTERRUPTED));
        });
    })
}

/// A folder's own name, wherever it lies; a hub id as it is.
fn name_of(model: &str) -> String {
    let folder = Path::new(model).canonicalize().ok();
    let name = folder.as_deref().and_then(Path::file_name).and_then(|name| name.to_str());
    name.unwrap_or(model).to_owned()
}

/// The template of a file, or relufy's own.
fn read_template(path: &Path) -> anyhow::Result<ChatTemplate> {
    let template = if path == Path::new("default") {
        ChatTemplate::default()
    } else {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        toml::from_str(&text).with_context(|| path.display().to_string())?
    };
    let patterns = [
        ("system", &template.system),
        ("user", &template.user),
        ("assistant", &template.assistant),
    ];
    for (role, pattern) in patterns {
        if pattern.matches("{content}").count() != 1 {
            bail!("{}: `{role}` needs one {{content}}", path.display());
        }
    }
    Ok(template)
}
