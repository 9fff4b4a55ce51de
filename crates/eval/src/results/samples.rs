//! `samples_*.jsonl`: one document a line, with the harness's keys in its order.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::config::{generation, output_type};
use super::{Sample, TaskSamples, pyjson};
use crate::metrics::{Metric, Point};
use crate::normalize;
use crate::request::{Compat, Request};
use crate::session::Answer;
use crate::{Error, Result};

/// A line of the file.
#[derive(Serialize)]
struct Line<'a> {
    doc_id: usize,
    doc: &'a Map<String, Value>,
    target: String,
    arguments: Map<String, Value>,
    resps: Vec<[Value; 1]>,
    filtered_resps: Vec<Value>,
    filter: &'a str,
    metrics: Vec<&'static str>,
    doc_hash: String,
    prompt_hash: String,
    target_hash: String,
    #[serde(flatten)]
    values: Map<String, Value>,
}

/// A task's documents as they are written, and the hash of all their hashes.
pub(super) struct Written {
    pub(super) lines: String,
    pub(super) task_hash: String,
}

/// Writes a task's documents, one line each.
pub(super) fn write_samples(samples: &TaskSamples, compat: Compat) -> Result<Written> {
    let (mut lines, mut hashes) = (String::new(), String::new());
    for sample in &samples.samples {
        let line = line(sample, samples.filter, compat)?;
        hashes.extend([&*line.doc_hash, &*line.prompt_hash, &*line.target_hash]);
        lines += &pyjson::line(&line)?;
        lines.push('\n');
    }
    Ok(Written { lines, task_hash: pyjson::sha256(&hashes) })
}

fn line<'a>(sample: &'a Sample, filter: &'a str, compat: Compat) -> Result<Line<'a>> {
    let requests = sample.asked.document.requests();
    let target = pyjson::text(sample.asked.document.right());
    let prompt = match requests.first() {
        Some(Request::Likelihood { context, .. } | Request::Generate { context, .. }) => context,
        Some(Request::Rolling { text }) => text,
        None => "",
    };
    let single = output_type(requests) == "loglikelihood";
    let mut values: Vec<(Metric, Value)> = sample
        .values
        .iter()
        .map(|(metric, point)| (*metric, value(*metric, *point, single)))
        .collect();
    values.sort_by_key(|(metric, _)| super::file::place(*metric));
    Ok(Line {
        doc_id: sample.asked.id,
        doc: &sample.asked.record,
        arguments: arguments(requests),
        resps: sample.answers.iter().map(|answer| [response(answer)]).collect(),
        filtered_resps: sample.answers.iter().map(|answer| filtered(answer, compat)).collect(),
        filter,
        metrics: values.iter().map(|(metric, _)| metric.name()).collect(),
        doc_hash: pyjson::sha256(&pyjson::indented(&sample.asked.record)?),
        prompt_hash: pyjson::sha256(prompt),
        target_hash: pyjson::sha256(&target),
        target,
        values: values.into_iter().map(|(metric, value)| (metric.name().into(), value)).collect(),
    })
}

fn arguments(requests: &[Request]) -> Map<String, Value> {
    let one = |(n, request): (usize, &Request)| {
        let arguments = match request {
            Request::Likelihood { context, continuation } => {
                json!({ "arg_0": context, "arg_1": continuation })
            }
            Request::Rolling { text } => json!({ "arg_0": text }),
            Request::Generate { context, .. } => {
                json!({ "arg_0": context, "arg_1": generation(request) })
            }
        };
        (format!("gen_args_{n}"), arguments)
    };
    requests.iter().enumerate().map(one).collect()
}

/// The answer in texts, as the harness writes it.
fn response(answer: &Answer) -> Value {
    match answer {
        Answer::Likelihood(scored) => {
            let greedy = if scored.is_greedy { "True" } else { "False" };
            json!([pyjson::float(scored.logprob), greedy])
        }
        Answer::Rolling { logprob, .. } => pyjson::float(*logprob).into(),
        Answer::Text(text) => text.as_str().into(),
    }
}

fn filtered(answer: &Answer, compat: Compat) -> Value {
    match answer {
        Answer::Text(text) => normalize::stripped(text, compat).into(),
        scored => response(scored),
    }
}

/// A document's part in a metric: with its weight where that is not 1 by nature; a whole
/// number where the harness has one.
fn value(metric: Metric, point: Point, single: bool) -> Value {
    match metric {
        _ if metric.is_weighted() => json!([point.value, point.weight as u64]),
        Metric::Acc if single => json!(point.value as u64),
        _ => json!(point.value),
    }
}

/// What is read back of a document.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Judged {
    pub(crate) doc_hash: String,
    pub(crate) prompt_hash: String,
    pub(crate) values: BTreeMap<Metric, Point>,
}

/// Reads a file of samples, ours or the harness's own: documents by their index.
///
/// # Errors
/// A file that cannot be read, or a line in it that is no sample.
pub(crate) fn read_samples(path: &Path) -> Result<BTreeMap<usize, Judged>> {
    #[derive(Deserialize)]
    struct Read {
        doc_id: usize,
        doc_hash: String,
        prompt_hash: String,
        metrics: Vec<Metric>,
        #[serde(flatten)]
        rest: Map<String, Value>,
    }
    let text = std::fs::read_to_string(path)
        .map_err(|source| Error::Read { path: path.to_path_buf(), source })?;
    let bad = |line: usize, why: String| Error::Sample { path: path.to_path_buf(), line, why };
    let mut documents = BTreeMap::new();
    for (number, line) in text.lines().enumerate() {
        let read: Read =
            serde_json::from_str(line).map_err(|why| bad(number + 1, why.to_string()))?;
        let mut values = BTreeMap::new();
        for metric in read.metrics {
            let point = read.rest.get(metric.name()).and_then(point);
            let missing = || bad(number + 1, format!("no value of `{}`", metric.name()));
            values.insert(metric, point.ok_or_else(missing)?);
        }
        let Read { doc_id, doc_hash, prompt_hash, .. } = read;
        if documents.insert(doc_id, Judged { doc_hash, prompt_hash, values }).is_some() {
            return Err(bad(number + 1, format!("document {doc_id} is there twice")));
        }
    }
    Ok(documents)
}

fn point(value: &Value) -> Option<Point> {
    match value {
        Value::Array(pair) => match pair.as_slice() {
            [value, weight] => Some(Point { value: value.as_f64()?, weight: weight.as_f64()? }),
            _ => None,
        },
        value => value.as_f64().map(Point::of),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::activity::Activity;
    use crate::session::Scored;
    use crate::tasks::{Asked, Document};

    fn sample(
        document: Document,
        record: Value,
        answers: Vec<Answer>,
        metrics: &[Metric],
    ) -> Sample {
        let values = metrics
            .iter()
            .map(|metric| (*metric, document.value(*metric, &answers, Compat::Current)))
            .collect();
        let record = record.as_object().unwrap().clone();
        let asked = Asked { id: 7, record, document };
        Sample { asked, answers, values, activity: Activity::new(1) }
    }

    fn scored(logprob: f64) -> Answer {
        Answer::Likelihood(Scored {
            logprob,
            is_greedy: false,
            context_tokens: 3,
            continuation_tokens: 1,
            truncated: 0,
        })
    }

    #[test]
    fn a_line_is_the_harness_own() {
        // The first document of boolq, shortened, in the form in which lm_eval 0.4.13 writes it;
        // hashes are hashlib's over json.dumps.
        let document = Document::choice("P\nQuestion: q?\nAnswer:".into(), &["no", "yes"], 0);
        let sample = sample(
            document,
            json!({"question": "q", "passage": "P", "idx": 0, "label": 0}),
            vec![scored(-12.5), scored(-1e-5)],
            &[Metric::Acc],
        );
        let samples = TaskSamples { task: "boolq".into(), filter: "none", samples: vec![sample] };
        let written = write_samples(&samples, Compat::Current).unwrap();
        assert_eq!(
            written.lines,
            concat!(
                r#"{"doc_id": 7, "doc": {"question": "q", "passage": "P", "idx": 0, "label": 0}, "#,
                r#""target": "0", "arguments": {"gen_args_0": {"arg_0": "P\nQuestion: q?\nAnswer:", "#,
                r#""arg_1": " no"}, "gen_args_1": {"arg_0": "P\nQuestion: q?\nAnswer:", "arg_1": " yes"}}, "#,
                r#""resps": [[["-12.5", "False"]], [["-1e-05", "False"]]], "#,
                r#""filtered_resps": [["-12.5", "False"], ["-1e-05", "False"]], "filter": "none", "#,
                r#""metrics": ["acc"], "#,
                r#""doc_hash": "cb4b18099c697d8b875ac66ffee38d07d6f718975999c3e6e6b3b493a094d057", "#,
                r#""prompt_hash": "ebb74aec601f2e184ef34130cc6ba6b47089f30a5f788c774e88cf2447048e84", "#,
                r#""target_hash": "5feceb66ffc86f38d952786c6d696c79c2dbc239dd4e91b46729d73a27fb57e9", "#,
                r#""acc": 0.0}"#,
                "\n"
            )
        );
        assert_eq!(
            written.task_hash,
            "d92f56bec517c73e4fd3025de40d1903dcbf994af1c2037a08e4fe83d5fe6890"
        );
    }

    #[test]
    fn what_is_written_is_read_back() {
        let text = Document::text("it's".into(), "it 's");
        let rolling = vec![Answer::Rolling { logprob: -3.25, tokens: 4 }];
        let metrics = [Metric::WordPerplexity, Metric::BitsPerByte];
        let sample = sample(text, json!({"page": "it 's"}), rolling, &metrics);
        let values = sample.values.clone();
        let samples = TaskSamples { task: "w".into(), filter: "none", samples: vec![sample] };
        let written = write_samples(&samples, Compat::Current).unwrap();
        assert!(written.lines.contains(r#""resps": [["-3.25"]], "filtered_resps": ["-3.25"]"#));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("samples.jsonl");
        std::fs::write(&path, &written.lines).unwrap();
        let read = read_samples(&path).unwrap();
        assert_eq!(read[&7].values, values.into_iter().collect());
        std::fs::write(&path, written.lines.repeat(2)).unwrap();
        let why = read_samples(&path).unwrap_err().to_string();
        assert!(why.contains("samples.jsonl: line 2: document 7 is there twice"), "{why}");
        std::fs::write(&path, "{}\n").unwrap();
        let why = read_samples(&path).unwrap_err().to_string();
        assert!(why.contains("line 1: missing field `doc_id`"), "{why}");
    }

    #[test]
    fn generated_text_is_shown_as_it_is_and_stripped() {
        let document = Document::spoken("Q".into(), &["\n"], 256, vec!["it's".into(), "b".into()]);
        let sample =
            sample(document, json!({}), vec![Answer::Text(" b ".into())], &[Metric::ExactMatch]);
        let line = line(&sample, "remove_whitespace", Compat::Current).unwrap();
        assert_eq!(
            (line.resps[0][0].clone(), line.filtered_resps[0].clone()),
            (" b ".into(), "b".into())
        );
        assert_eq!(line.target, r#"["it's", 'b']"#);
        let asked = json!({"arg_0": "Q", "arg_1": {"until": ["\n"], "do_sample": false, "temperature": 0.0}});
        assert_eq!(line.arguments["gen_args_0"], asked);
    }
}
