//! A result made up, for tests.

use relufy_spec::Stage;
use relufy_spec::flops::{FlopsReport, SiteDensities};

use super::{
    DensityError, DensityReport, ModelInfo, RunResult, Settings, TaskResult, TokenizerInfo,
};
use crate::metrics::{Estimate, Metric};
use crate::request::Compat;

/// A task of 100 documents.
pub(crate) fn task(name: &str, metrics: &[(Metric, f64, Option<f64>)]) -> TaskResult {
    TaskResult {
        name: name.into(),
        alias: None,
        version: Some(1.0),
        source: format!("{name}.jsonl"),
        filter: "none".into(),
        shots: 0,
        split_documents: 120,
        documents: 100,
        requests: 400,
        tokens: 9000,
        excluded: Vec::new(),
        metrics: metrics
            .iter()
            .map(|(metric, value, stderr)| (*metric, Estimate { value: *value, stderr: *stderr }))
            .collect(),
        densities: None,
        seconds: 1.0,
        config: serde_json::Map::new(),
    }
}

/// A run of some tasks.
pub(crate) fn run(
    name: &str,
    stage: Stage,
    tokens_trained: u64,
    tasks: Vec<TaskResult>,
) -> RunResult {
    let flops = |scale: f64| FlopsReport {
        blocks: scale * 1e6,
        with_head: scale * 1.5e6,
        paper_compat: scale * 1.4e6,
    };
    let mean = SiteDensities { qkv: 0.5, o: 1.0, up: 1.0 / 3.0, down: 0.049 };
    let error = SiteDensities { qkv: 0.01, o: 0.0, up: 0.02, down: 0.003 };
    RunResult {
        relufy: "0".into(),
        compat: Compat::Current,
        model: ModelInfo {
            name: name.into(),
            revision: None,
            family: "llama".into(),
            stage,
            parameters: 2_000_000,
            tokens_trained,
        },
        max_length: 256,
        settings: Settings::default(),
        tokenizer: TokenizerInfo { pad: None, eos: Some(("</s>".into(), 2)), bos: None },
        limit: None,
        tasks,
        groups: Vec::new(),
        densities: DensityReport {
            mean,
            layers: vec![mean; 2],
            error_95: Some(DensityError { documents: 100, mean: error, layers: vec![error; 2] }),
        },
        flops: flops(0.5),
        flops_dense: flops(1.0),
        seconds: 2.5,
    }
}
