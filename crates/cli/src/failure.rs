//! Errors as a person sees them: what went wrong, what to do, and an exit code.

use std::io::ErrorKind;
use std::process::ExitCode;

use relufy_model::Error as Model;
use relufy_spec::Error as Spec;

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
    eprintln!("error: {}", chain(error));
    if let Some(hint) = hint(error) {
        eprintln!("hint: {hint}");
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
                cause.downcast_ref::<relufy_trainer::Error>(),
                Some(
                    relufy_trainer::Error::NonFinite { .. }
                        | relufy_trainer::Error::Gradients { .. }
                )
            )
        })
}

fn io_kind(error: &anyhow::Error) -> Option<ErrorKind> {
    error.chain().find_map(|cause| cause.downcast_ref::<std::io::Error>()).map(std::io::Error::kind)
}

/// What to do about it, where something can be said.
fn hint(error: &anyhow::Error) -> Option<String> {
    if io_kind(error) == Some(ErrorKind::StorageFull) {
        return Some(
            "free some space and run the command again: nothing was left half-written".into(),
        );
    }
    error.chain().find_map(|cause| {
        if let Some(error) = cause.downcast_ref::<relufy_data::Error>() {
            return error.hint().map(str::to_owned);
        }
        if let Some(error) = cause.downcast_ref::<Model>() {
            return model_hint(error).map(str::to_owned);
        }
        if let Some(error) = cause.downcast_ref::<Spec>() {
            return spec_hint(error).map(str::to_owned);
        }
        cause.downcast_ref::<relufy_trainer::Error>().and_then(trainer_hint).map(str::to_owned)
    })
}

fn model_hint(error: &Model) -> Option<&'static str> {
    Some(match error {
        Model::NotAModel { .. } => {
            "give a Hugging Face folder: config.json, model.safetensors (or shards, or pytorch_model.bin), tokenizer.json"
        }
        Model::Config { source, .. } => return spec_hint(source),
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
        Model::OutputExists { .. } => "choose another folder, or remove this one first",
        Model::SequenceTooLong { .. } => "use shorter sequences",
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

fn trainer_hint(error: &relufy_trainer::Error) -> Option<&'static str> {
    use relufy_trainer::Error;
    match error {
        // Wrapped errors are transparent: the chain shows their causes, but not themselves.
        Error::Model(inner) => model_hint(inner),
        Error::Data(inner) => inner.hint(),
        Error::Spec(inner) => spec_hint(inner),
        other => other.hint(),
    }
}
