//! `relufy probe`: one batch through a model, every number written to a file.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use relufy_model::checkpoint::write_atomic;
use relufy_model::{Checkpoint, Error};
use relufy_spec::{ReluPlan, Stage};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use crate::compute::Compute;
use crate::out;
use crate::progress::Bars;

/// Run a batch of token ids and write logits, loss, densities and gradients: what parity
/// checks run on.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  echo '[[1, 5, 9, 4], [1, 7, 2, 2]]' > ids.json
  relufy probe MODEL --input-ids ids.json --stage 2 --grad model.embed_tokens.weight -o out.safetensors
  relufy probe MODEL --input-ids ids.json --device cuda --dtype f32 -o gpu.safetensors

The file holds, as f32: `logits` [batch, time, vocab]; `loss` [1], the mean cross-entropy of
the next token; `density.qkv`, `density.up`, `density.down` [layers], the share of non-zeros
that those matrices read; and `grad.NAME` for each tensor asked, shaped as in the checkpoint.")]
pub struct Probe {
    /// Folder or hub id.
    model: String,
    /// A JSON list of equally long lists of token ids.
    #[arg(long, value_name = "FILE")]
    input_ids: PathBuf,
    /// The safetensors file to write.
    #[arg(short, long)]
    output: PathBuf,
    /// Surgery in memory before the run: 0 (none), 1 or 2.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=2))]
    stage: u8,
    /// Also write the loss's gradient of this checkpoint tensor; may be repeated.
    #[arg(long, value_name = "TENSOR_NAME")]
    grad: Vec<String>,
    #[command(flatten)]
    compute: Compute,
}

impl Probe {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let path = self.input_ids.display();
        let text = std::fs::read_to_string(&self.input_ids).with_context(|| path.to_string())?;
        let ids: Vec<Vec<u32>> = serde_json::from_str(&text)
            .with_context(|| format!("{path}: not a list of lists of token ids"))?;
        check(&ids).with_context(|| path.to_string())?;
        let checkpoint = Checkpoint::resolve(&self.model, &Bars::default())?;
        let stage = Stage::try_from(self.stage).map_err(anyhow::Error::msg)?;
        let decoder = self.compute.load(&checkpoint, &ReluPlan::stage(stage))?;
        let mut wanted: Vec<String> = Vec::new();
        for name in self.grad {
            if !wanted.contains(&name) {
                wanted.push(name);
            }
        }
        let probe = relufy_model::probe(&decoder, &checkpoint.config().weights, &ids, &wanted)
            .map_err(|error| match error {
                Error::TokenOutOfRange { .. } | Error::SequenceTooLong { .. } => {
                    anyhow::Error::new(error).context(path.to_string())
                }
                other => other.into(),
            })?;

        let mut tensors: Vec<(String, Vec<usize>, Vec<f32>)> = vec![
            ("logits".into(), probe.logits_shape.to_vec(), probe.logits),
            ("loss".into(), vec![1], vec![probe.loss as f32]),
        ];
        for (site, density) in ["qkv", "up", "down"].into_iter().zip(probe.density) {
            let values = density.into_iter().map(|share| share as f32).collect::<Vec<_>>();
            tensors.push((format!("density.{site}"), vec![values.len()], values));
        }
        for (name, shape, values) in probe.gradients {
            tensors.push((format!("grad.{name}"), shape, values));
        }
        let bytes: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
            .into_iter()
            .map(|(name, shape, values)| {
                (name, shape, values.into_iter().flat_map(f32::to_le_bytes).collect())
            })
            .collect();
        let views = bytes
            .iter()
            .map(|(name, shape, data)| {
                Ok((name, TensorView::new(Dtype::F32, shape.clone(), data)?))
            })
            .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()?;
        write_atomic(&self.output, &safetensors::serialize(views, None)?)?;
        out::line(format_args!("{}: loss {:.6}", self.output.display(), probe.loss))?;
        Ok(ExitCode::SUCCESS)
    }
}

/// A batch has rows, all of one length.
fn check(ids: &[Vec<u32>]) -> anyhow::Result<()> {
    let length = ids.first().map_or(0, Vec::len);
    if length == 0 {
        bail!(
            "expected rows of token ids, found {}",
            if ids.is_empty() { "none" } else { "an empty one" }
        );
    }
    match ids.iter().position(|row| row.len() != length) {
        None => Ok(()),
        Some(n) => bail!(
            "row {} has {} token ids, but row 1 has {length}: rows must be equally long",
            n + 1,
            ids[n].len()
        ),
    }
}
