//! Flags in the forms of lm-evaluation-harness: limits, seeds, batch sizes, model arguments,
//! and those that it has and we do not.

use anyhow::{Context, bail};
use candle_core::DType;
use relufy_eval::Compat;
use relufy_eval::tasks::Limit;
use relufy_model::Precision;
use serde_json::{Map, Value};

/// `--limit`: 1 or more documents, or a share below 1.
pub fn limit(text: &str) -> Result<Limit, String> {
    let expected = || "expected a whole number from 1, or a share between 0 and 1".to_owned();
    match (text.parse::<usize>(), text.parse::<f64>()) {
        (Ok(count @ 1..), _) => Ok(Limit::Count(count)),
        (Err(_), Ok(share)) if share > 0.0 && share < 1.0 => Ok(Limit::Share(share)),
        // The harness reads `--limit 100.0` too.
        (Err(_), Ok(count)) if count >= 1.0 && count.fract() == 0.0 && count < 1e15 => {
            Ok(Limit::Count(count as usize))
        }
        _ => Err(expected()),
    }
}

/// `--compat`.
pub fn compat(text: &str) -> Result<Compat, String> {
    [Compat::Current, Compat::NoBos]
        .into_iter()
        .find(|known| known.version() == text)
        .ok_or_else(|| "expected 0.4.13 or 0.4.9.1".to_owned())
}

/// `--batch_size`: `auto` or the number of requests of the longest length in one pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BatchSize {
    Auto,
    Requests(usize),
}

pub fn batch_size(text: &str) -> Result<BatchSize, String> {
    let is_auto = |rest: &str| {
        rest.is_empty() || rest.strip_prefix(':').is_some_and(|n| n.parse::<u16>().is_ok())
    };
    match text.strip_prefix("auto") {
        Some(rest) if is_auto(rest) => Ok(BatchSize::Auto),
        _ => match text.parse() {
            Ok(requests @ 1..=65_536) => Ok(BatchSize::Requests(requests)),
            _ => Err("expected `auto`, `auto:N` or a number from 1 to 65536".to_owned()),
        },
    }
}

/// `--seed`: Python, NumPy, PyTorch, few-shot; one for all, or the first three or four.
pub fn seeds(text: &str) -> Result<[Option<u64>; 4], String> {
    let one = |text: &str| match text.trim() {
        "None" => Ok(None),
        number => number.parse().map(Some).map_err(|_| {
            "expected one number, or four with commas between them (a seed, or `None`)".to_owned()
        }),
    };
    let given: Vec<Option<u64>> = text.split(',').map(one).collect::<Result<_, _>>()?;
    let seeds = match given[..] {
        [all] => [all; 4],
        [python, numpy, torch] => [python, numpy, torch, Some(1234)],
        [python, numpy, torch, fewshot] => [python, numpy, torch, fewshot],
        _ => return Err(format!("expected 1, 3 or 4 seeds, found {}", given.len())),
    };
    match seeds[3] {
        // Python's generator, which draws examples, is seeded with 32 bits here.
        Some(0..=0xffff_ffff) => Ok(seeds),
        _ => Err("the last seed draws examples: expected a number below 2^32".to_owned()),
    }
}

/// `--model_args` of the harness's `hf` model, as far as they mean something here.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct ModelArgs {
    pub pretrained: Option<String>,
    pub revision: Option<String>,
    pub max_length: Option<usize>,
    pub dtype: Option<Precision>,
}

impl ModelArgs {
    /// # Errors
    /// What is no `key=value`, a key that means nothing here, or a value that would.
    pub fn parse(texts: &[String]) -> anyhow::Result<ModelArgs> {
        let mut args = ModelArgs::default();
        for (key, value) in pairs(texts)? {
            match key {
                "pretrained" => args.pretrained = Some(value.to_owned()),
                "revision" => args.revision = Some(value.to_owned()),
                "max_length" => {
                    let length = value.parse().ok();
                    args.max_length = Some(length.with_context(|| {
                        format!("--model_args max_length={value}: expected a number")
                    })?);
                }
                "dtype" => {
                    let dtype = value.parse().map_err(|_| {
                        anyhow::anyhow!(
                            "--model_args dtype={value}: expected auto, float32 or bfloat16"
                        )
                    })?;
                    args.dtype = Some(dtype);
                }
                "trust_remote_code" => {}
                other => bail!(
                    "--model_args {other}={value}: not supported; known: pretrained, revision, dtype, max_length"
                ),
            }
        }
        Ok(args)
    }
}

/// The same as the harness records them.
pub fn recorded(
    texts: &[String],
    pretrained: &str,
    dtype: DType,
) -> anyhow::Result<Map<String, Value>> {
    let mut args = Map::new();
    args.insert("pretrained".into(), pretrained.into());
    for (key, value) in pairs(texts)? {
        let value = value.parse::<u64>().map_or_else(|_| value.into(), Value::from);
        args.insert(key.to_owned(), value);
    }
    let dtype = if dtype == DType::BF16 { "bfloat16" } else { "float32" };
    args.insert("dtype".into(), dtype.into());
    Ok(args)
}

fn pairs(texts: &[String]) -> anyhow::Result<Vec<(&str, &str)>> {
    let parts = texts.iter().flat_map(|text| text.split(',')).filter(|part| !part.is_empty());
    parts
        .map(|part| {
            part.split_once('=').with_context(|| format!("--model_args {part}: expected key=value"))
        })
        .collect()
}

/// What the harness has and we do not: an error that says so, never passed over.
#[derive(Debug, clap::Args)]
pub struct Missing {
    #[arg(long = "apply_chat_template", alias = "apply-chat-template", hide = true, num_args = 0..=1)]
    apply_chat_template: Option<Option<String>>,
    #[arg(long = "system_instruction", alias = "system-instruction", hide = true)]
    system_instruction: Option<String>,
    #[arg(long = "fewshot_as_multiturn", alias = "fewshot-as-multiturn", hide = true, num_args = 0..=1)]
    fewshot_as_multiturn: Option<Option<String>>,
    #[arg(long = "gen_kwargs", alias = "gen-kwargs", hide = true, num_args = 1..)]
    gen_kwargs: Option<Vec<String>>,
    #[arg(long = "include_path", alias = "include-path", hide = true)]
    include_path: Option<String>,
    #[arg(short = 'x', long = "predict_only", alias = "predict-only", hide = true)]
    predict_only: bool,
    #[arg(long = "max_batch_size", alias = "max-batch-size", hide = true)]
    max_batch_size: Option<String>,
    #[arg(long = "cache_requests", alias = "cache-requests", hide = true, num_args = 0..=1)]
    cache_requests: Option<Option<String>>,
    #[arg(long = "check_integrity", alias = "check-integrity", hide = true)]
    check_integrity: bool,
    #[arg(short = 'C', long = "config", hide = true)]
    config: Option<String>,
    #[arg(long = "metadata", hide = true, num_args = 1..)]
    metadata: Option<Vec<String>>,
    #[arg(long = "wandb_args", alias = "wandb-args", hide = true, num_args = 1..)]
    wandb_args: Option<Vec<String>>,
    #[arg(long = "trackio_args", alias = "trackio-args", hide = true, num_args = 1..)]
    trackio_args: Option<Vec<String>>,
    #[arg(long = "hf_hub_log_args", alias = "hf-hub-log-args", hide = true, num_args = 1..)]
    hf_hub_log_args: Option<Vec<String>>,
}

impl Missing {
    /// # Errors
    /// Any of them was given.
    pub fn refuse(&self) -> anyhow::Result<()> {
        let chat = "prompts are plain text, without chat templates";
        let upload = "results are files; nothing is sent anywhere";
        let flags = [
            ("apply_chat_template", self.apply_chat_template.is_some(), chat),
            ("system_instruction", self.system_instruction.is_some(), chat),
            ("fewshot_as_multiturn", self.fewshot_as_multiturn.is_some(), chat),
            (
                "gen_kwargs",
                self.gen_kwargs.is_some(),
                "answers are generated greedily, as the tasks say",
            ),
            (
                "include_path",
                self.include_path.is_some(),
                "for questions of your own use --tasks NAME=FILE",
            ),
            ("predict_only", self.predict_only, "metrics cost nothing: use --log_samples"),
            ("max_batch_size", self.max_batch_size.is_some(), "use --tokens_per_batch"),
            (
                "cache_requests",
                self.cache_requests.is_some(),
                "requests are built in no time; answers are kept with --use_cache",
            ),
            (
                "check_integrity",
                self.check_integrity,
                "the tasks are part of the program and of its tests",
            ),
            ("config", self.config.is_some(), "give flags"),
            ("metadata", self.metadata.is_some(), "no task needs any"),
            ("wandb_args", self.wandb_args.is_some(), upload),
            ("trackio_args", self.trackio_args.is_some(), upload),
            ("hf_hub_log_args", self.hf_hub_log_args.is_some(), upload),
        ];
        match flags.into_iter().find(|(_, given, _)| *given) {
            Some((flag, _, why)) => bail!("--{flag} is not supported: {why}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_counts_or_shares() {
        assert_eq!(limit("20"), Ok(Limit::Count(20)));
        assert_eq!(limit("100.0"), Ok(Limit::Count(100)));
        assert_eq!(limit("0.25"), Ok(Limit::Share(0.25)));
        for bad in ["0", "-1", "1.5", "nan", "inf", "many", "", "0.0"] {
            assert!(limit(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn batches_are_counted_in_requests() {
        assert_eq!(batch_size("auto"), Ok(BatchSize::Auto));
        assert_eq!(batch_size("auto:4"), Ok(BatchSize::Auto));
        assert_eq!(batch_size("8"), Ok(BatchSize::Requests(8)));
        for bad in ["0", "auto4", "auto:", "-1", "99999999999999999999"] {
            assert!(batch_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn seeds_fill_up_as_in_the_harness() {
        assert_eq!(seeds("42"), Ok([Some(42); 4]));
        assert_eq!(seeds("0,None,8"), Ok([Some(0), None, Some(8), Some(1234)]));
        assert_eq!(seeds("0,1,2,3"), Ok([Some(0), Some(1), Some(2), Some(3)]));
        for bad in ["None", "1,2", "a", "1,2,3,None", "1,2,3,4294967296", "1,2,3,4,5"] {
            assert!(seeds(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn model_arguments_are_known_or_refused() {
        let parse = |text: &str| ModelArgs::parse(&[text.to_owned()]);
        let args = parse("pretrained=org/m,dtype=float32,revision=main,max_length=512").unwrap();
        assert_eq!((args.pretrained.as_deref(), args.max_length), (Some("org/m"), Some(512)));
        assert_eq!(args.dtype, Some(Precision::F32));
        assert_eq!(parse("dtype=bfloat16").unwrap().dtype, Some(Precision::Bf16));
        for (bad, why) in [
            ("dtype=float16", "float32 or bfloat16"),
            ("peft=x", "peft=x: not supported"),
            ("pretrained", "expected key=value"),
            ("max_length=long", "expected a number"),
        ] {
            let error = parse(bad).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }
}
