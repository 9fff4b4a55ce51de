//! The Python module that an export ships: transformers' own classes of the family, with
//! the plan's operations put in.
//!
//! The templates are Llama's, and valid Python; the other families' differ in names.

use crate::{Error, Result};

/// One file of the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PythonFile {
    /// Its name in the model's folder.
    pub name: &'static str,
    /// Its text.
    pub text: String,
}

const CONFIGURATION: &str = include_str!("python/configuration_relu.py");
const MODELING: &str = include_str!("python/modeling_relu.py");
const SITES: &str = include_str!("python/relu_sites.py");

/// A family's names in transformers.
struct Names {
    family: &'static str,
    /// What its classes begin with.
    class: &'static str,
    /// What its causal language model's class ends with.
    head: &'static str,
    /// The tokenizer that `AutoTokenizer` takes for the family where no file names one.
    tokenizer: &'static str,
}

const NAMES: [Names; 8] = [
    Names {
        family: "llama",
        class: "Llama",
        head: "ForCausalLM",
        tokenizer: "PreTrainedTokenizerFast",
    },
    Names {
        family: "mistral",
        class: "Mistral",
        head: "ForCausalLM",
        tokenizer: "PreTrainedTokenizerFast",
    },
    Names { family: "qwen2", class: "Qwen2", head: "ForCausalLM", tokenizer: "Qwen2Tokenizer" },
    Names { family: "qwen3", class: "Qwen3", head: "ForCausalLM", tokenizer: "Qwen2Tokenizer" },
    Names { family: "opt", class: "OPT", head: "ForCausalLM", tokenizer: "GPT2Tokenizer" },
    Names {
        family: "falcon",
        class: "Falcon",
        head: "ForCausalLM",
        tokenizer: "PreTrainedTokenizerFast",
    },
    Names {
        family: "gpt_neox",
        class: "GPTNeoX",
        head: "ForCausalLM",
        tokenizer: "GPTNeoXTokenizer",
    },
    Names { family: "gpt2", class: "GPT2", head: "LMHeadModel", tokenizer: "GPT2Tokenizer" },
];

fn names(family: &str) -> Result<&'static Names> {
    NAMES.iter().find(|names| names.family == family).ok_or_else(|| Error::Export {
        why: format!("there is no Python module for the family `{family}`"),
    })
}

/// The files of a family's module.
///
/// # Errors
/// A family without one.
pub fn python_files(family: &str) -> Result<Vec<PythonFile>> {
    let names = names(family)?;
    let fill = |template: &str| {
        template
            .replace("LlamaForCausalLM", &format!("{}{}", names.class, names.head))
            .replace("Llama", names.class)
            .replace("llama", family)
    };
    Ok(vec![
        PythonFile { name: "configuration_relu.py", text: fill(CONFIGURATION) },
        PythonFile { name: "modeling_relu.py", text: fill(MODELING) },
        PythonFile { name: "relu_sites.py", text: SITES.to_owned() },
    ])
}

/// The classes of a family's module, as `auto_map` and `architectures` name them.
pub(super) struct Classes {
    pub config: String,
    pub base: String,
    pub causal: String,
}

/// The tokenizer that `AutoTokenizer` takes for a family where no file names one.
pub(super) fn default_tokenizer(family: &str) -> Result<&'static str> {
    names(family).map(|names| names.tokenizer)
}

/// The class names of a family's module.
pub(super) fn classes(family: &str) -> Result<Classes> {
    let Names { class, head, .. } = names(family)?;
    Ok(Classes {
        config: format!("Relu{class}Config"),
        base: format!("Relu{class}Model"),
        causal: format!("Relu{class}{head}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_classes_that_a_config_names_are_those_that_the_module_defines() {
        for names in &NAMES {
            let classes = classes(names.family).unwrap();
            let files = python_files(names.family).unwrap();
            assert!(files[0].text.contains(&format!("class {}(", classes.config)));
            assert!(files[0].text.contains(&format!("\"relu_{}\"", names.family)));
            assert!(files[1].text.contains(&format!("class {}(", classes.base)));
            assert!(files[1].text.contains(&format!("class {}(", classes.causal)));
            assert!(files[2].text.contains(&format!("\"{}\":", names.family)));
            let foreign =
                |text: &str| names.family != "llama" && text.to_lowercase().contains("llama");
            assert!(!foreign(&files[0].text) && !foreign(&files[1].text));
        }
        assert!(python_files("mamba").is_err());
    }
}
