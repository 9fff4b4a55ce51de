//! Evaluating a model: tasks and corpora in, one result with densities and FLOPs out.

use std::collections::{BTreeMap, HashSet};
use std::time::Instant;

use relufy_data::{Hub, Progress, Record, TaskData};
use relufy_model::DensityTap;
use relufy_spec::flops::{Densities, FlopsReport};

use crate::corpus::Corpus;
use crate::metrics::{Estimate, Metric};
use crate::request::{Exclusion, Request};
use crate::results::{Excluded, ModelInfo, RunResult, TaskResult};
use crate::session::{Scored, Session};
use crate::tasks::{Document, Source, Task};
use crate::{Error, Result};

/// What a model is evaluated on.
#[derive(Default)]
pub struct Suite {
    /// Tasks.
    pub tasks: Vec<Box<dyn Task>>,
    /// Corpora whose perplexity is wanted.
    pub corpora: Vec<Corpus>,
    /// Only the first so many documents of each task.
    pub limit: Option<usize>,
}

/// Where a suite's text comes from.
pub struct Inputs<'a> {
    /// Datasets of the tasks.
    pub tasks: &'a TaskData,
    /// For corpora named by a hub address.
    pub hub: &'a Hub,
}

/// Runs the suite. Densities count every token that entered the model in any task or
/// corpus, each request on its own; FLOPs follow from them.
///
/// # Errors
/// A suite with nothing in it or two entries of one name; data, tokenizer or model; a
/// task of which no document can be scored.
pub fn evaluate(
    session: &Session<'_>,
    model: ModelInfo,
    suite: &Suite,
    inputs: &Inputs<'_>,
    progress: &dyn Progress,
) -> Result<RunResult> {
    check_names(suite)?;
    let spec = session.decoder().spec();
    let mut total = DensityTap::new(spec.layers.len());
    let mut tasks = Vec::new();
    for task in &suite.tasks {
        let mut tap = DensityTap::new(spec.layers.len());
        tasks.push(run_task(session, task.as_ref(), suite.limit, inputs, &mut tap, progress)?);
        total.merge(&tap);
    }
    for corpus in &suite.corpora {
        let mut tap = DensityTap::new(spec.layers.len());
        tasks.push(run_corpus(session, corpus, inputs, &mut tap, progress)?);
        total.merge(&tap);
    }
    let densities = total.densities();
    Ok(RunResult {
        format: RunResult::FORMAT,
        relufy: env!("CARGO_PKG_VERSION").into(),
        model,
        max_length: session.max_length(),
        limit: suite.limit,
        tasks,
        flops: FlopsReport::new(spec, &densities),
        flops_dense: FlopsReport::new(spec, &Densities::dense(spec.layers.len())),
        densities: densities.into(),
    })
}

/// Names are keys in results and columns in tables.
fn check_names(suite: &Suite) -> Result<()> {
    let tasks = suite.tasks.iter().map(|task| task.name());
    let corpora = suite.corpora.iter().map(|corpus| corpus.name.as_str());
    let mut seen = HashSet::new();
    for name in tasks.chain(corpora) {
        if !seen.insert(name) {
            return Err(Error::DuplicateName { name: name.into() });
        }
    }
    if seen.is_empty() {
        return Err(Error::Setting {
            what: "suite",
            expected: "a task or a corpus".into(),
            found: "neither".into(),
        });
    }
    Ok(())
}

fn run_task(
    session: &Session<'_>,
    task: &dyn Task,
    limit: Option<usize>,
    inputs: &Inputs<'_>,
    tap: &mut DensityTap,
    progress: &dyn Progress,
) -> Result<TaskResult> {
    let source = task.source();
    let records = load(&source, inputs, progress)?;
    let documents = documents(task, &records[..limit.unwrap_or(records.len()).min(records.len())])?;
    let requests: Vec<Request> =
        documents.iter().flat_map(|document| document.requests().iter().cloned()).collect();
    let started = Instant::now();
    progress.start(&format!("{} (requests)", task.name()), Some(requests.len() as u64));
    let scored = session.loglikelihood(&requests, tap, progress)?;
    progress.finish();
    let seconds = started.elapsed().as_secs_f64();

    let Judged { kept, excluded } = judge(&documents, scored);
    let metrics: BTreeMap<Metric, Estimate> = task
        .metrics()
        .iter()
        .filter_map(|&metric| {
            let values: Vec<f64> =
                kept.iter().map(|(document, scores)| document.value(metric, scores)).collect();
            Some((metric, metric.aggregate(&values)?))
        })
        .collect();
    if metrics.is_empty() {
        let why = match excluded.first() {
            Some(first) => format!("every document is excluded; the first: {}", first.reason),
            None => "no documents".into(),
        };
        return Err(Error::Empty {
            name: task.name().into(),
            source_name: source.to_string(),
            why,
        });
    }
    Ok(TaskResult {
        name: task.name().into(),
        version: Some(task.version()),
        source: source.to_string(),
        documents: kept.len(),
        requests: requests.len(),
        tokens: kept.iter().flat_map(|(_, scores)| scores).map(input_tokens).sum(),
        excluded,
        metrics,
        seconds,
    })
}

fn run_corpus(
    session: &Session<'_>,
    corpus: &Corpus,
    inputs: &Inputs<'_>,
    tap: &mut DensityTap,
    progress: &dyn Progress,
) -> Result<TaskResult> {
    let started = Instant::now();
    progress.start(&format!("{} (windows)", corpus.name), None);
    let score = corpus.score(session, inputs.hub, tap, progress)?;
    progress.finish();
    Ok(TaskResult {
        name: corpus.name.clone(),
        version: None,
        source: corpus.source.path.clone(),
        documents: score.documents,
        requests: score.windows,
        tokens: score.tokens,
        excluded: Vec::new(),
        metrics: score.metrics().into(),
        seconds: started.elapsed().as_secs_f64(),
    })
}

fn load(source: &Source, inputs: &Inputs<'_>, progress: &dyn Progress) -> Result<Vec<Record>> {
    Ok(match source {
        Source::Split { repo, config, split } => {
            inputs.tasks.load_split(repo, config, split, progress)?
        }
        Source::File(path) => relufy_data::taskdata::load_file(path)?,
    })
}

/// The documents of some records, in their order.
pub fn documents(task: &dyn Task, records: &[Record]) -> Result<Vec<Document>> {
    records
        .iter()
        .enumerate()
        .map(|(index, record)| {
            task.document(record).map_err(|why| Error::Record {
                task: task.name().into(),
                source_name: task.source().to_string(),
                record: index + 1,
                why: why.to_string(),
            })
        })
        .collect()
}

/// Documents with the scores of their requests.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Judged<'a> {
    /// Those that count.
    pub kept: Vec<(&'a Document, Vec<Scored>)>,
    /// Those that do not.
    pub excluded: Vec<Excluded>,
}

/// Deals the scores out to their documents, in order. A document with a request that
/// cannot be scored is left out as a whole and named.
pub fn judge(
    documents: &[Document],
    scored: Vec<std::result::Result<Scored, Exclusion>>,
) -> Judged<'_> {
    let mut judged = Judged::default();
    let mut scored = scored.into_iter();
    for (index, document) in documents.iter().enumerate() {
        // All of the document's scores are taken, whether one fails or not.
        let own: Vec<_> = scored.by_ref().take(document.requests().len()).collect();
        match own.into_iter().collect() {
            Ok(scores) => judged.kept.push((document, scores)),
            Err(reason) => judged.excluded.push(Excluded { document: index, reason }),
        }
    }
    judged
}

/// Tokens that entered the model for a request.
fn input_tokens(scored: &Scored) -> u64 {
    (scored.context_tokens + scored.continuation_tokens - scored.truncated - 1) as u64
}
