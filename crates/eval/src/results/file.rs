//! `results_*.json`: the harness's keys, nesting and order, and a `relufication` section with
//! what the harness does not measure.
//!
//! What we cannot know (versions of Python packages, git hashes of the harness) is null.

use std::collections::BTreeMap;

use relufy_spec::flops::{FlopsReport, SiteDensities};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{DensityReport, Excluded, GroupResult, ModelInfo, RunResult, TaskResult, pyjson};
use crate::Result;
use crate::metrics::{Estimate, Metric};
use crate::request::Compat;
use crate::tasks::Limit;

/// What stands for a number where the harness has none.
pub(super) const NOT_APPLICABLE: &str = "N/A";

/// The whole file.
#[derive(Serialize, Deserialize)]
pub(super) struct File {
    pub(super) results: Map<String, Value>,
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub(super) groups: Map<String, Value>,
    pub(super) group_subtasks: Map<String, Value>,
    pub(super) configs: BTreeMap<String, Map<String, Value>>,
    pub(super) versions: BTreeMap<String, Value>,
    #[serde(rename = "n-shot")]
    pub(super) n_shot: BTreeMap<String, usize>,
    pub(super) higher_is_better: BTreeMap<String, Map<String, Value>>,
    #[serde(rename = "n-samples")]
    pub(super) n_samples: Map<String, Value>,
    pub(super) config: Config,
    pub(super) git_hash: Option<String>,
    pub(super) date: f64,
    pub(super) pretty_env_info: Option<String>,
    pub(super) transformers_version: Option<String>,
    pub(super) lm_eval_version: Option<String>,
    pub(super) upper_git_hash: Option<String>,
    pub(super) tokenizer_pad_token: (Option<String>, String),
    pub(super) tokenizer_eos_token: (Option<String>, String),
    pub(super) tokenizer_bos_token: (Option<String>, String),
    pub(super) eot_token_id: Option<u32>,
    pub(super) max_length: usize,
    pub(super) task_hashes: Map<String, Value>,
    pub(super) model_source: String,
    pub(super) model_name: String,
    pub(super) model_name_sanitized: String,
    pub(super) system_instruction: Option<String>,
    pub(super) system_instruction_sha: Option<String>,
    pub(super) fewshot_as_multiturn: bool,
    pub(super) chat_template: Option<String>,
    pub(super) chat_template_sha: Option<String>,
    pub(super) total_evaluation_time_seconds: String,
    pub(super) relufication: Value,
}

/// How the evaluation was asked for.
#[derive(Serialize, Deserialize)]
pub(super) struct Config {
    pub(super) model: String,
    pub(super) model_args: Map<String, Value>,
    pub(super) model_num_parameters: usize,
    pub(super) model_dtype: String,
    pub(super) model_revision: Option<String>,
    pub(super) model_sha: String,
    pub(super) batch_size: Value,
    pub(super) batch_sizes: Vec<usize>,
    pub(super) device: String,
    pub(super) use_cache: Option<String>,
    pub(super) limit: Option<Limit>,
    pub(super) bootstrap_iters: u32,
    pub(super) gen_kwargs: Option<Value>,
    pub(super) random_seed: Option<u64>,
    pub(super) numpy_seed: Option<u64>,
    pub(super) torch_seed: Option<u64>,
    pub(super) fewshot_seed: Option<u64>,
}

/// What the harness does not measure.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Relufication {
    pub(super) format: u32,
    pub(super) relufy: String,
    pub(super) compat: Compat,
    pub(super) model: ModelInfo,
    pub(super) seconds: f64,
    pub(super) tokens: u64,
    pub(super) densities: DensityReport,
    pub(super) flops: FlopsReport,
    pub(super) flops_dense: FlopsReport,
    pub(super) tasks: Map<String, Value>,
}

/// The same of one task.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TaskDetails {
    pub(super) source: String,
    pub(super) requests: usize,
    pub(super) tokens: u64,
    pub(super) seconds: f64,
    pub(super) excluded: Vec<Excluded>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) densities: Option<SiteDensities>,
}

/// Where a metric stands among others: the harness's tasks list perplexities first.
pub(super) fn place(metric: Metric) -> (bool, Metric) {
    (metric.is_accuracy(), metric)
}

impl RunResult {
    /// The text of `results_*.json`. `task_hashes` are those of the documents, where these
    /// are written too.
    ///
    /// # Errors
    /// None in practice: all of it is plain data.
    pub fn to_json(&self, task_hashes: Map<String, Value>) -> Result<String> {
        let tasks = self.tasks.iter().map(|task| (task.name.clone(), task_entry(task)));
        let groups = |groups: Vec<&GroupResult>| -> Map<String, Value> {
            groups.into_iter().map(|group| (group.name.clone(), group_entry(group))).collect()
        };
        let details = |task: &TaskResult| {
            let details = TaskDetails {
                source: task.source.clone(),
                requests: task.requests,
                tokens: task.tokens,
                seconds: task.seconds,
                excluded: task.excluded.clone(),
                densities: task.densities,
            };
            Ok((task.name.clone(), serde_json::to_value(details)?))
        };
        let relufication = Relufication {
            format: RunResult::FORMAT,
            relufy: self.relufy.clone(),
            compat: self.compat,
            model: self.model.clone(),
            seconds: self.seconds,
            tokens: self.tasks.iter().map(|task| task.tokens).sum(),
            densities: self.densities.clone(),
            flops: self.flops,
            flops_dense: self.flops_dense,
            tasks: self.tasks.iter().map(details).collect::<Result<_>>()?,
        };
        let subtasks = |group: &GroupResult| (group.name.clone(), json!(group.members));
        let original = |task: &TaskResult| {
            let counts = json!({"original": task.split_documents, "effective": task.documents});
            (task.name.clone(), counts)
        };
        let (settings, tokenizer) = (&self.settings, &self.tokenizer);
        let token = |token: &Option<(String, u32)>| match token {
            Some((text, id)) => (Some(text.clone()), id.to_string()),
            None => (None, "None".to_owned()),
        };
        let [random_seed, numpy_seed, torch_seed, fewshot_seed] = settings.seeds;
        let file = File {
            results: tasks.chain(groups(self.groups_children_first())).collect(),
            groups: groups(
                self.groups_children_first()
                    .into_iter()
                    .filter(|group| !group.metrics.is_empty())
                    .collect(),
            ),
            group_subtasks: self.groups_parents_first().into_iter().map(subtasks).collect(),
            configs: self
                .tasks
                .iter()
                .map(|task| (task.name.clone(), task.config.clone()))
                .collect(),
            versions: self.versions(),
            n_shot: self.n_shot(),
            higher_is_better: self.higher_is_better(),
            n_samples: self.tasks.iter().map(original).collect(),
            config: Config {
                model: "relufy".into(),
                model_args: settings.model_args.clone(),
                model_num_parameters: self.model.parameters,
                model_dtype: "float32".into(),
                model_revision: self.model.revision.clone(),
                model_sha: self.model.revision.clone().unwrap_or_default(),
                batch_size: settings.batch_size.clone(),
                batch_sizes: Vec::new(),
                device: settings.device.clone(),
                use_cache: settings.use_cache.clone(),
                limit: self.limit,
                bootstrap_iters: settings.bootstrap_iters,
                gen_kwargs: None,
                random_seed,
                numpy_seed,
                torch_seed,
                fewshot_seed,
            },
            git_hash: None,
            date: settings.date,
            pretty_env_info: Some(format!(
                "relufy {} on {} {}, {} threads",
                self.relufy,
                std::env::consts::OS,
                std::env::consts::ARCH,
                rayon::current_num_threads()
            )),
            transformers_version: None,
            lm_eval_version: None,
            upper_git_hash: None,
            tokenizer_pad_token: token(&tokenizer.pad),
            tokenizer_eos_token: token(&tokenizer.eos),
            tokenizer_bos_token: token(&tokenizer.bos),
            eot_token_id: tokenizer.eos.as_ref().map(|(_, id)| *id),
            max_length: self.max_length,
            task_hashes,
            model_source: "relufy".into(),
            model_name: settings.pretrained.clone().unwrap_or_else(|| self.model.name.clone()),
            model_name_sanitized: self.sanitized_name(),
            system_instruction: None,
            system_instruction_sha: None,
            fewshot_as_multiturn: false,
            chat_template: None,
            chat_template_sha: None,
            total_evaluation_time_seconds: pyjson::float(self.seconds),
            relufication: serde_json::to_value(relufication)?,
        };
        pyjson::indented(&file)
    }
}

/// Metrics in the harness's order.
pub(super) fn metrics(
    metrics: &BTreeMap<Metric, Estimate>,
) -> impl Iterator<Item = (Metric, Estimate)> {
    let mut sorted: Vec<_> = metrics.iter().map(|(metric, value)| (*metric, *value)).collect();
    sorted.sort_by_key(|(metric, _)| place(*metric));
    sorted.into_iter()
}

fn task_entry(task: &TaskResult) -> Value {
    let mut entry = Map::new();
    entry.insert("name".into(), task.name.clone().into());
    entry.insert("alias".into(), task.alias.as_ref().unwrap_or(&task.name).clone().into());
    entry.insert("sample_len".into(), task.documents.into());
    put_metrics(&mut entry, &task.metrics, &task.filter);
    entry.into()
}

fn group_entry(group: &GroupResult) -> Value {
    let mut entry = Map::new();
    entry.insert("alias".into(), group.alias.as_ref().unwrap_or(&group.name).clone().into());
    entry.insert("name".into(), group.name.clone().into());
    if !group.metrics.is_empty() {
        entry.insert("sample_len".into(), group.documents.into());
        put_metrics(&mut entry, &group.metrics, "none");
        let count = |metric: Metric| (format!("{},none", metric.name()), group.documents.into());
        let counts: Map<String, Value> =
            metrics(&group.metrics).map(|(metric, _)| count(metric)).collect();
        entry.insert("sample_count".into(), counts.into());
    }
    entry.into()
}

fn put_metrics(entry: &mut Map<String, Value>, of: &BTreeMap<Metric, Estimate>, filter: &str) {
    for (metric, Estimate { value, stderr }) in metrics(of) {
        let name = metric.name();
        entry.insert(format!("{name},{filter}"), number(value));
        let stderr = stderr.map_or(NOT_APPLICABLE.into(), number);
        entry.insert(format!("{name}_stderr,{filter}"), stderr);
    }
}

/// A number, or its name where JSON has none.
fn number(value: f64) -> Value {
    if value.is_finite() { value.into() } else { value.to_string().into() }
}

#[cfg(test)]
mod tests {
    use relufy_spec::Stage;

    use super::super::example;
    use super::*;
    use crate::request::Exclusion;

    fn run() -> RunResult {
        let mut subject = example::task("mmlu_anatomy", &[(Metric::Acc, 0.1 + 0.2, Some(0.04))]);
        subject.alias = Some("anatomy".into());
        subject.shots = 5;
        subject.excluded = vec![Excluded { document: 3, reason: Exclusion::NoContinuationToken }];
        subject.densities = Some(SiteDensities { qkv: 0.1, o: 1.0, up: 0.3, down: 1.0 / 3.0 });
        subject.config.insert("dataset_path".into(), "cais/mmlu".into());
        let lambada =
            [(Metric::Acc, 0.0, None), (Metric::Perplexity, f64::INFINITY, Some(5004117871.73247))];
        let mut trivia = example::task("triviaqa", &[(Metric::ExactMatch, 0.5, Some(0.1))]);
        trivia.filter = "remove_whitespace".into();
        let mut corpus = example::task("wikitext", &[(Metric::BitsPerByte, 3.6, None)]);
        corpus.version = None;
        let tasks = vec![subject, example::task("lambada", &lambada), trivia, corpus];
        let mut run = example::run("org/model", Stage::Two, 1_000, tasks);
        run.limit = Some(Limit::Share(0.25));
        run.settings.pretrained = Some("runs/a b".into());
        run.settings.date = 1_795_309_996.997_131_3;
        run.settings.seeds[1] = None;
        let group = |name: &str, alias: Option<&str>, member: &str| GroupResult {
            name: name.into(),
            alias: alias.map(str::to_owned),
            version: 2.0,
            members: vec![member.into()],
            documents: 100,
            metrics: [(Metric::Acc, Estimate { value: 0.3, stderr: None })].into(),
        };
        run.groups = vec![
            group("mmlu", None, "mmlu_stem"),
            group("mmlu_stem", Some("stem"), "mmlu_anatomy"),
        ];
        run
    }

    #[test]
    fn what_is_written_is_read_back_to_the_last_bit() {
        let run = run();
        let read = RunResult::from_json(&run.to_json(Map::new()).unwrap()).unwrap();
        assert_eq!(read, run);
        assert_eq!(RunResult::from_json(&read.to_json(Map::new()).unwrap()).unwrap(), run);
    }

    #[test]
    fn keys_are_the_harness_own() {
        let text = run().to_json(Map::new()).unwrap();
        let file: Value = serde_json::from_str(&text).unwrap();
        let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        // The top of a file of lm_eval 0.4.13, and what we add.
        let expected = "results groups group_subtasks configs versions n-shot higher_is_better \
            n-samples config git_hash date pretty_env_info transformers_version lm_eval_version \
            upper_git_hash tokenizer_pad_token tokenizer_eos_token tokenizer_bos_token \
            eot_token_id max_length task_hashes model_source model_name model_name_sanitized \
            system_instruction system_instruction_sha fewshot_as_multiturn chat_template \
            chat_template_sha total_evaluation_time_seconds relufication";
        assert_eq!(keys(&file).join(" "), expected);
        assert_eq!(
            keys(&file["config"]).join(" "),
            "model model_args model_num_parameters model_dtype model_revision model_sha \
             batch_size batch_sizes device use_cache limit bootstrap_iters gen_kwargs random_seed \
             numpy_seed torch_seed fewshot_seed"
        );
        assert_eq!(
            keys(&file["results"]["lambada"]).join(" "),
            "name alias sample_len perplexity,none perplexity_stderr,none acc,none acc_stderr,none"
        );
        assert_eq!(file["results"]["lambada"]["acc_stderr,none"], "N/A");
        assert_eq!(file["results"]["lambada"]["perplexity,none"], "inf");
        assert_eq!(
            keys(&file["results"]["mmlu"]).join(" "),
            "alias name sample_len acc,none acc_stderr,none sample_count"
        );
        assert_eq!(file["results"]["triviaqa"]["exact_match,remove_whitespace"], 0.5);
        // Parts before the whole among results, the whole first among groups.
        assert!(keys(&file["results"]).ends_with(&["mmlu_stem".into(), "mmlu".into()]));
        assert_eq!(keys(&file["group_subtasks"]), ["mmlu", "mmlu_stem"]);
        assert_eq!(
            (&file["versions"]["mmlu"], &file["versions"]["triviaqa"]),
            (&json!("2"), &json!(1.0))
        );
        assert_eq!(file["versions"].get("wikitext"), None);
        assert_eq!((&file["n-shot"]["mmlu_stem"], file["n-shot"].get("mmlu")), (&json!(5), None));
        assert_eq!(file["higher_is_better"]["mmlu_stem"], json!({"acc": true}));
        assert_eq!(file["n-samples"]["lambada"], json!({"original": 120, "effective": 100}));
        assert_eq!(file["tokenizer_pad_token"], json!([null, "None"]));
        assert_eq!(file["tokenizer_eos_token"], json!(["</s>", "2"]));
        assert_eq!(file["model_name_sanitized"], "runs__a b");
        assert_eq!(file["relufication"]["tasks"]["mmlu_anatomy"]["excluded"][0]["document"], 3);
        assert!(text.starts_with("{\n  \"results\": {\n    \"mmlu_anatomy\": {\n"), "{text}");
    }

    #[test]
    fn what_is_no_result_of_ours_is_refused() {
        let why = |text: &str| RunResult::from_json(text).unwrap_err().to_string();
        assert!(why("{}").contains("missing field `results`"), "{}", why("{}"));
        let mut file: Value = serde_json::from_str(&run().to_json(Map::new()).unwrap()).unwrap();
        file["relufication"]["format"] = 2.into();
        let older = why(&file.to_string());
        assert!(older.contains("format of the result: expected 3, found 2"), "{older}");
        // What lm_eval itself writes.
        file.as_object_mut().unwrap().remove("relufication");
        let harness = why(&file.to_string());
        assert!(harness.contains("missing field `relufication`"), "{harness}");
        let mut file: Value = serde_json::from_str(&run().to_json(Map::new()).unwrap()).unwrap();
        file["results"].as_object_mut().unwrap().remove("triviaqa");
        let less = why(&file.to_string());
        assert!(less.contains("`triviaqa` is missing in `results`"), "{less}");
    }
}
