//! Errors as a person sees them: what went wrong, what to do, and an exit code.

use std::io::ErrorKind;
use std::process::ExitCode;

use relufy_data::Error as Data;
use relufy_eval::Error as Eval;
use relufy_model::Error as Model;
use relufy_ops::Error as Ops;
use relufy_recipe::Error as Recipe;
use relufy_spec::Error as Spec;
use relufy_surgery::Error as Surgery;
use relufy_trainer::Error as Trainer;

use crate::out;

/// Exit code for input that will not do.
const BAD_INPUT: u8 = 2;
/// Exit code for everything else that fails.
const FAILURE: u8 = 1;

/// Prints an error with its hint; the exit code that belongs to it.
pub fn report(error: &anyhow::Error) -> ExitCode {
    // `head` closing its end of a pipe is no failure worth a message.
    if io_kind(error) == Some(ErrorKind::BrokenPipe) {
        return ExitCode::SUCCESS;
    }
    out::warn(format_args!("error: {}", chain(error)));
    if let Some(hint) = hint(error) {
        out::warn(format_args!("hint: {hint}"));
    }
    ExitCode::from(if is_failure(error) { FAILURE } else { BAD_INPUT })
}

/// The message with its causes; transparent wrappers repeat theirs, which is left out.
fn chain(error: &anyhow::Error) -> String {
    let mut parts: Vec<String> = Vec::new();
    for cause in error.chain() {
        let text = cause.to_string();
        if !parts.iter().any(|earlier| earlier.contains(&text)) {
            parts.push(text);
        }
    }
    parts.join(": ")
}

/// What the system refused although the input was good.
fn is_failure(error: &anyhow::Error) -> bool {
    let refused = io_kind(error).is_some_and(|kind| {
        !matches!(
            kind,
            ErrorKind::NotFound
                | ErrorKind::InvalidData
                | ErrorKind::InvalidInput
                | ErrorKind::IsADirectory
                | ErrorKind::NotADirectory
                | ErrorKind::AlreadyExists
                | ErrorKind::UnexpectedEof
        )
    });
    refused
        || error.chain().any(|cause| {
            matches!(
                cause.downcast_ref::<Trainer>(),
                Some(Trainer::NonFinite { .. } | Trainer::Gradients { .. })
            ) || ops_error(cause).is_some_and(is_of_device)
        })
}

/// Whether the device failed, rather than what it was given.
fn is_of_device(error: &Ops) -> bool {
    matches!(error, Ops::Device { .. } | Ops::OutOfMemory { .. } | Ops::Cuda { .. })
}

/// The arithmetic's error inside of another; transparent wrappers hide it from the chain.
fn ops_error<'a>(cause: &'a (dyn std::error::Error + 'static)) -> Option<&'a Ops> {
    let of_model = |error: &'a Model| match error {
        Model::Ops(error) => Some(error),
        _ => None,
    };
    if let Some(error) = cause.downcast_ref() {
        return Some(error);
    }
    if let Some(error) = cause.downcast_ref() {
        return of_model(error);
    }
    if let Some(error) = cause.downcast_ref() {
        return match error {
            Trainer::Ops(error) => Some(error),
            Trainer::Model(error) => of_model(error),
            _ => None,
        };
    }
    if let Some(error) = cause.downcast_ref() {
        return match error {
            Eval::Model(error) => of_model(error),
            _ => None,
        };
    }
    match cause.downcast_ref() {
        Some(Surgery::Model(error)) => of_model(error),
        _ => None,
    }
}

fn io_kind(error: &anyhow::Error) -> Option<ErrorKind> {
    error.chain().find_map(|cause| cause.downcast_ref::<std::io::Error>()).map(std::io::Error::kind)
}

/// What to do about it, where something can be said.
fn hint(error: &anyhow::Error) -> Option<&'static str> {
    match io_kind(error) {
        Some(ErrorKind::StorageFull | ErrorKind::QuotaExceeded) => {
            Some("free some space and run the command again: nothing was left half-written")
        }
        Some(ErrorKind::FileTooLarge) => {
            Some("a limit on the size of files stands in the way: see `ulimit -f`")
        }
        Some(ErrorKind::AddrInUse) => Some("another program listens there: choose another --port"),
        _ => error.chain().find_map(|cause| match ops_error(cause) {
            Some(error) => ops_hint(error),
            None => hint_of(cause),
        }),
    }
}

/// The hint of one error. A transparent wrapper stands in the chain in place of the error
/// that it wraps, so it is opened here.
fn hint_of(cause: &(dyn std::error::Error + 'static)) -> Option<&'static str> {
    if let Some(error) = cause.downcast_ref() {
        return data_hint(error);
    }
    if let Some(error) = cause.downcast_ref() {
        return model_hint(error);
    }
    if let Some(error) = cause.downcast_ref() {
        return spec_hint(error);
    }
    if let Some(error) = cause.downcast_ref() {
        return match error {
            Surgery::Model(inner) => model_hint(inner),
            Surgery::Data(inner) => data_hint(inner),
            Surgery::Spec(inner) => spec_hint(inner),
            _ => None,
        };
    }
    if let Some(error) = cause.downcast_ref() {
        return match error {
            Trainer::Model(inner) => model_hint(inner),
            Trainer::Data(inner) => data_hint(inner),
            Trainer::Spec(inner) => spec_hint(inner),
            other => other.hint(),
        };
    }
    if let Some(error) = cause.downcast_ref() {
        return match error {
            Eval::Model(inner) => model_hint(inner),
            Eval::Data(inner) => data_hint(inner),
            Eval::TaskData { source, .. } => data_hint(source),
            Eval::Spec(inner) => spec_hint(inner),
            other => eval_hint(other),
        };
    }
    if let Some(error) = cause.downcast_ref() {
        return match error {
            Recipe::Model(inner) => model_hint(inner),
            Recipe::Eval(inner) => hint_of(&**inner),
            other => other.hint(),
        };
    }
    None
}

fn ops_hint(error: &Ops) -> Option<&'static str> {
    Some(match error {
        Ops::OutOfMemory { .. } => {
            "take smaller batches; training also has `train.recompute = \"block\"` and `train.moment_dtype = \"bf16\"`"
        }
        Ops::Device { .. } => "`--device cpu` computes without a GPU",
        _ => return None,
    })
}

fn eval_hint(error: &Eval) -> Option<&'static str> {
    Some(match error {
        Eval::UnknownTask { .. } => "`relufy eval ls` lists tasks and groups",
        Eval::Unpaired { .. } => {
            "evaluate both with --log_samples and the same --tasks, --limit, --num_fewshot and --seed"
        }
        Eval::NoResults { .. } => "give the folder that `relufy eval --output_path` wrote to",
        Eval::Results { .. } => {
            "only results of `relufy eval` have densities and FLOPs; evaluate the model again"
        }
        Eval::Cache { .. } => "give another file, or wait until the other evaluation has ended",
        _ => return None,
    })
}

fn data_hint(error: &Data) -> Option<&'static str> {
    error.hint()
}

fn model_hint(error: &Model) -> Option<&'static str> {
    Some(match error {
        Model::NotAModel { .. } => {
            "give a Hugging Face folder: config.json, model.safetensors (or shards, or pytorch_model.bin), tokenizer.json"
        }
        Model::Config { source, .. } | Model::Spec(source) => return spec_hint(source),
        Model::Data(inner) => return data_hint(inner),
        Model::Damaged { .. } => "download or copy the file again: it is truncated or was changed",
        Model::MissingTensor { .. } => {
            "the config and the weights belong to different models, or a shard is missing"
        }
        Model::ExtraTensors { .. } => {
            "an adapter or a head that is no language model? only whole decoders are read"
        }
        Model::Dtype { .. } => "quantised weights cannot be trained: use the original checkpoint",
        Model::NonFinite { .. } => "the checkpoint diverged or is damaged: use an earlier one",
        Model::TokenizerTooLarge { .. } => "the tokenizer belongs to another model",
        Model::TiedDiffer { .. } => {
            "if the head is a matrix of its own, set `tie_word_embeddings` to false in config.json"
        }
        Model::OutputExists { .. } => "choose another folder, or remove this one first",
        Model::SequenceTooLong { .. } => "use shorter sequences",
        Model::NoSuchTensor(_) => "names are those of the checkpoint's weight files",
        _ => return None,
    })
}

fn spec_hint(error: &Spec) -> Option<&'static str> {
    Some(match error {
        Spec::UnknownArchitecture { .. } => {
            "relufy reads llama, mistral, qwen2, qwen3, opt, falcon, gpt_neox and gpt2"
        }
        Spec::UnknownKeys { .. } => {
            "an unknown key may change what the model computes; remove it only if you know that it does not"
        }
        Spec::MissingKey { .. } => "is this the config.json of a whole model?",
        _ => return None,
    })
}
