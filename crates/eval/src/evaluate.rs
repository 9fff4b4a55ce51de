//! Evaluating a model: tasks and corpora in, one result with densities and FLOPs out.

use std::collections::{BTreeMap, HashSet};
use std::time::Instant;

use relufy_data::{Hub, Progress, TaskData};
use relufy_spec::flops::{Densities, FlopsReport};

use crate::bootstrap;
use crate::cache::Cache;
use crate::corpus::Corpus;
use crate::metrics::{Estimate, Metric, Point};
use crate::request::Request;
use crate::results::{
    Excluded, ModelInfo, RunResult, Sample, Settings, Spread, TaskResult, TaskSamples,
    TokenizerInfo, task_config,
};
use crate::session::{Answer, Answered, Session};
use crate::tasks::{Chosen, Document, Group, Prepared, Task};
use crate::{Error, Result};

/// What a model is evaluated on.
pub struct Suite {
    /// Tasks.
    pub tasks: Vec<Box<dyn Task>>,
    /// Groups of these tasks whose mean is wanted too.
    pub groups: Vec<Group>,
    /// Corpora whose perplexity is wanted.
    pub corpora: Vec<Corpus>,
    /// Which documents of each task, and how they are asked.
    pub chosen: Chosen,
    /// Replicates of the bootstrap behind a perplexity's standard error; with 0 nothing
    /// gets a standard error, as in the harness.
    pub bootstrap_iters: u32,
}

impl Default for Suite {
    /// Nothing, with the harness's number of replicates.
    fn default() -> Suite {
        Suite {
            tasks: Vec::new(),
            groups: Vec::new(),
            corpora: Vec::new(),
            chosen: Chosen::default(),
            bootstrap_iters: bootstrap::REPLICATES,
        }
    }
}

/// Where a suite's text comes from.
pub struct Inputs<'a> {
    /// Datasets of the tasks.
    pub tasks: &'a TaskData,
    /// For corpora named by a hub address.
    pub hub: &'a Hub,
}

/// What an evaluation found.
#[derive(Clone, Debug, PartialEq)]
pub struct Evaluation {
    /// In all.
    pub result: RunResult,
    /// Document by document, for each task.
    pub samples: Vec<TaskSamples>,
}

/// Runs the suite. Densities count every token that entered the model in any task or
/// corpus, each request as if it ran alone; FLOPs follow from them. What `cache` holds is
/// not asked again.
///
/// # Errors
/// A suite with nothing in it or two entries of one name; data, tokenizer or model; a
/// task of which no document can be scored.
pub fn evaluate(
    session: &Session<'_>,
    model: ModelInfo,
    suite: &Suite,
    inputs: &Inputs<'_>,
    cache: &mut Cache,
    progress: &dyn Progress,
) -> Result<Evaluation> {
    check_names(suite)?;
    suite.chosen.check(&suite.tasks)?;
    let started = Instant::now();
    let settings = Settings { bootstrap_iters: suite.bootstrap_iters, ..Settings::now() };
    let spec = session.decoder().spec();
    let mut total = Spread::new(spec.layers.len());
    let (mut tasks, mut samples) = (Vec::new(), Vec::new());
    for task in &suite.tasks {
        let prepared = crate::tasks::prepare(task.as_ref(), inputs.tasks, &suite.chosen, progress)?;
        let (result, asked) =
            run_task(session, task.as_ref(), prepared, suite.bootstrap_iters, cache, progress)?;
        asked.samples.iter().for_each(|sample| total.add(&sample.activity, spec));
        tasks.push(result);
        samples.push(asked);
    }
    for corpus in &suite.corpora {
        tasks.push(run_corpus(session, corpus, inputs, &mut total, progress)?);
    }
    let densities = total.total.densities(spec);
    let result = RunResult {
        relufy: env!("CARGO_PKG_VERSION").into(),
        compat: session.rules().compat,
        model,
        max_length: session.max_length(),
        settings,
        tokenizer: TokenizerInfo::of(session.tokenizer()),
        limit: suite.chosen.limit,
        groups: suite.groups.iter().filter_map(|group| group.result(&tasks)).collect(),
        tasks,
        flops: FlopsReport::new(spec, &densities),
        flops_dense: FlopsReport::new(spec, &Densities::dense(spec.layers.len())),
        densities: total.report(spec),
        seconds: started.elapsed().as_secs_f64(),
    };
    Ok(Evaluation { result, samples })
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
    prepared: Prepared,
    bootstrap_iters: u32,
    cache: &mut Cache,
    progress: &dyn Progress,
) -> Result<(TaskResult, TaskSamples)> {
    let compat = session.rules().compat;
    let config = task_config(task, &prepared);
    let requests: usize =
        prepared.documents.iter().map(|asked| asked.document.requests().len()).sum();
    let started = Instant::now();
    progress.start(&format!("{} (requests)", task.name()), Some(requests as u64));
    let documents: Vec<&Document> =
        prepared.documents.iter().map(|asked| &asked.document).collect();
    let answered = ask(session, task.name(), &documents, cache, progress)?;
    progress.finish();
    let seconds = started.elapsed().as_secs_f64();

    let (mut samples, mut excluded) = (Vec::new(), Vec::new());
    for (asked, Answered { answers, activity }) in prepared.documents.into_iter().zip(answered) {
        match answers.into_iter().collect::<std::result::Result<Vec<Answer>, _>>() {
            Err(reason) => excluded.push(Excluded { document: asked.id, reason }),
            Ok(answers) => {
                let point =
                    |metric: &Metric| (*metric, asked.document.value(*metric, &answers, compat));
                let values = task.metrics().iter().map(point).collect();
                samples.push(Sample { asked, answers, values, activity });
            }
        }
    }
    let metrics = aggregate(task.metrics(), &samples, bootstrap_iters);
    if metrics.is_empty() {
        let why = match excluded.first() {
            Some(first) => format!("every document is excluded; the first: {}", first.reason),
            None => "no documents".into(),
        };
        return Err(Error::Empty {
            name: task.name().into(),
            source_name: task.source().to_string(),
            why,
        });
    }
    let spec = session.decoder().spec();
    let mut spread = Spread::new(spec.layers.len());
    samples.iter().for_each(|sample| spread.add(&sample.activity, spec));
    let result = TaskResult {
        name: task.name().into(),
        alias: task.alias().map(str::to_owned),
        version: Some(task.version()),
        source: task.source().to_string(),
        filter: task.filter().into(),
        shots: prepared.shots,
        split_documents: prepared.split_documents,
        documents: samples.len(),
        requests,
        tokens: spread.total.tokens,
        excluded,
        metrics,
        densities: Some(spread.total.densities(spec).mean()),
        seconds,
        config,
    };
    Ok((result, TaskSamples { task: task.name().into(), filter: task.filter(), samples }))
}

/// Answers from the cache, and from the model for the rest.
fn ask(
    session: &Session<'_>,
    task: &str,
    documents: &[&Document],
    cache: &mut Cache,
    progress: &dyn Progress,
) -> Result<Vec<Answered>> {
    let keys = documents
        .iter()
        .map(|document| cache.key(document.requests()))
        .collect::<Result<Vec<_>>>()?;
    let mut answered: Vec<Option<Answered>> = keys.iter().map(|key| cache.find(key)).collect();
    let open: Vec<usize> = (0..documents.len()).filter(|&at| answered[at].is_none()).collect();
    let known = (0..documents.len()).filter(|&at| answered[at].is_some());
    progress.advance(known.map(|at| documents[at].requests().len() as u64).sum());
    let requests: Vec<&[Request]> = open.iter().map(|&at| documents[at].requests()).collect();
    let fresh = session.answer(&requests, progress, &mut |index, answered| {
        cache.keep(task, &keys[open[index]], answered)
    })?;
    for (at, fresh) in open.into_iter().zip(fresh) {
        answered[at] = Some(fresh);
    }
    Ok(answered.into_iter().flatten().collect())
}

/// Each metric over all documents.
fn aggregate(
    metrics: &[Metric],
    samples: &[Sample],
    bootstrap_iters: u32,
) -> BTreeMap<Metric, Estimate> {
    metrics
        .iter()
        .filter_map(|metric| {
            let points: Vec<Point> =
                samples.iter().filter_map(|sample| sample.value(*metric)).collect();
            Some((*metric, metric.aggregate(&points, bootstrap_iters)?))
        })
        .collect()
}

fn run_corpus(
    session: &Session<'_>,
    corpus: &Corpus,
    inputs: &Inputs<'_>,
    total: &mut Spread,
    progress: &dyn Progress,
) -> Result<TaskResult> {
    let started = Instant::now();
    progress.start(&format!("{} (windows)", corpus.name), None);
    let score = corpus.score(session, inputs.hub, progress)?;
    progress.finish();
    total.merge(&score.spread);
    Ok(TaskResult {
        name: corpus.name.clone(),
        alias: None,
        version: None,
        source: corpus.source.path.clone(),
        filter: "none".into(),
        shots: 0,
        split_documents: score.documents,
        documents: score.documents,
        requests: score.windows,
        tokens: score.tokens,
        excluded: Vec::new(),
        metrics: score.metrics().into_iter().collect(),
        densities: Some(score.spread.total.densities(session.decoder().spec()).mean()),
        seconds: started.elapsed().as_secs_f64(),
        config: corpus.config(),
    })
}
