//! A short model card: what was done to which model, and how to load the result.

use relufy_spec::{Source, Stage};

use super::ExportConfig;

/// The text of `README.md`.
pub(super) fn model_card(export: &ExportConfig) -> String {
    let block = &export.relufication;
    let (name, from) = match &block.source {
        Some(source) => (source.model.as_str(), origin(source)),
        None => ("a model", "a model of unknown origin".to_owned()),
    };
    // Only an id of the hub: a folder's name would be a dead link there.
    let base = if name.split('/').count() == 2 && block.source.is_some() {
        format!("base_model: {name}\n")
    } else {
        String::new()
    };
    let done = match block.stage {
        Stage::Dense => "Its activations are as they were.",
        Stage::One => "ReLU stands in place of the feed-forward network's activation (stage 1).",
        Stage::Two => {
            "ReLU stands in place of the feed-forward network's activation, and ReLUs stand \
             behind norms (stage 2)."
        }
    };
    let trained = match block.tokens_trained {
        0 => "It was not fine-tuned since: expect it to be worse than its source until it is."
            .to_owned(),
        tokens => format!("It was fine-tuned on {tokens} tokens since."),
    };
    let (argument, note) = if export.remote_code {
        (
            ", trust_remote_code=True",
            "The Python files beside it put the ReLUs into transformers' own classes; without \
             `trust_remote_code` transformers refuses the model.",
        )
    } else {
        (
            "",
            "Engines that do not read the config's activation field compute something else: \
             llama.cpp does so without a warning.",
        )
    };
    let (what, tags, note) = match block.stage {
        Stage::Dense => ("fine-tuned", "", ""),
        _ => ("relufied", "tags:\n- relu\n- activation-sparsity\n", note),
    };
    format!(
        "---\n{base}library_name: transformers\npipeline_tag: text-generation\n{tags}\
         ---\n\n# {name}, {what}\n\nMade of {from} by relufy. {done} \
         {trained}\nThe `relufication` block of `config.json` says what stands where.\n\n\
         ```python\nfrom transformers import AutoModelForCausalLM\n\n\
         model = AutoModelForCausalLM.from_pretrained(\"path/to/this/folder\"{argument})\n```\n\n\
         {note}\n"
    )
}

fn origin(source: &Source) -> String {
    match (&source.revision, &source.weights_blake3) {
        (Some(revision), _) => format!("`{}` (revision `{revision}`)", source.model),
        (None, Some(hash)) => format!("`{}` (BLAKE3 of its weights `{hash}`)", source.model),
        (None, None) => format!("`{}`", source.model),
    }
}
