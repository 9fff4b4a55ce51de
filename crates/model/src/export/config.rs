//! The `config.json` of a relufied model.
//!
//! Every key of the source stays, in its order. A stage 1 that transformers can express
//! changes the family's activation field; anything more changes the `model_type` too. A
//! `relufication` block records what was done, relative to what the other keys describe.

use relufy_spec::family::ModelConfig;
use relufy_spec::{
    Activation, DecoderSpec, PerLayer, ReluPlan, Relufication, Site, SiteOp, Source, Stage,
};
use serde_json::{Map, Value, json};

use super::python::classes;
use crate::{Error, Result};

/// A config that is ready to be written.
#[derive(Clone, Debug, PartialEq)]
pub struct ExportConfig {
    /// The file, key order kept.
    pub json: Map<String, Value>,
    /// The block inside it.
    pub relufication: Relufication,
    /// Whether loading it takes the Python module and `trust_remote_code`.
    pub remote_code: bool,
}

impl ExportConfig {
    /// Counts tokens of fine-tuning, in the block and in the file.
    pub(super) fn add_tokens(&mut self, tokens: u64) {
        self.relufication.tokens_trained += tokens;
        let counted = self.relufication.tokens_trained.into();
        if let Some(Value::Object(block)) = self.json.get_mut("relufication") {
            block.insert("tokens_trained".to_owned(), counted);
        }
    }
}

/// The config of the model that `plan` makes of `config`. Plans add up: a model that was
/// relufied before keeps what the new plan does not name, and its first source.
///
/// # Errors
/// A plan that does not fit; a config whose Python code would ignore what was changed.
pub fn export_config(
    config: &ModelConfig,
    plan: &ReluPlan,
    source: Source,
) -> Result<ExportConfig> {
    let spec = plan.apply(&config.spec)?;
    let before = config.relufication.as_ref();
    let mut plan = before.map_or_else(|| plan.clone(), |block| join(&block.plan, plan));

    let model_type = text(&config.json, "model_type");
    let remote_code = model_type.starts_with("relu_") || !stock_can(&spec);
    if model_type.starts_with("RefinedWeb") && spec != config.spec {
        return Err(Error::Export {
            why: format!(
                "the Python code of `{model_type}` has GELU fixed and would ignore the ReLUs; take \
                 the revision of the model whose `model_type` is `falcon`"
            ),
        });
    }
    let current = config.json.get(config.activation_key).and_then(Value::as_str);
    let field = activation_field(&spec, &config.spec, current, remote_code);
    if remote_code && (plan.activation.is_some() || field.is_some()) {
        // The Python module follows the plan alone, so the plan must say it all.
        plan.activation = Some(activations(&spec));
    }
    let relufication = Relufication {
        format: Relufication::FORMAT,
        stage: stage_of(&spec),
        base_model_type: before
            .map_or_else(|| model_type.to_owned(), |block| block.base_model_type.clone()),
        plan,
        source: before.and_then(|block| block.source.clone()).or(Some(source)),
        tokens_trained: before.map_or(0, |block| block.tokens_trained),
    };

    let mut json = config.json.clone();
    if let Some(name) = field {
        json.insert(config.activation_key.to_owned(), name.into());
    }
    if remote_code {
        name_our_classes(&mut json, config.family)?;
    }
    json.insert("relufication".to_owned(), to_value(&relufication)?);
    Ok(ExportConfig { json, relufication, remote_code })
}

/// How far a decoder is relufied, by what it does rather than how it came about.
pub fn stage_of(spec: &DecoderSpec) -> Stage {
    let sparse_site = |layer: &relufy_spec::Layer| {
        [Site::QkvIn, Site::OIn, Site::UpIn]
            .iter()
            .any(|site| layer.sites.get(*site) != SiteOp::Identity)
    };
    let sparse_mlp = |layer: &relufy_spec::Layer| {
        layer.mlp.activation.is_sparse() || layer.sites.down_in != SiteOp::Identity
    };
    if spec.layers.iter().any(sparse_site) {
        Stage::Two
    } else if spec.layers.iter().any(sparse_mlp) {
        Stage::One
    } else {
        Stage::Dense
    }
}

/// `second` after `first`. Each entry covers all layers, so the later one replaces the
/// earlier.
fn join(first: &ReluPlan, second: &ReluPlan) -> ReluPlan {
    let mut joined = ReluPlan {
        activation: second.activation.clone().or_else(|| first.activation.clone()),
        ..ReluPlan::default()
    };
    for site in Site::ALL {
        joined.set_site(site, second.site(site).or_else(|| first.site(site)).cloned());
    }
    joined
}

/// Whether the family's own code can run `spec`: one activation that it knows, nothing at
/// the sites.
fn stock_can(spec: &DecoderSpec) -> bool {
    let plain = spec
        .layers
        .iter()
        .all(|layer| Site::ALL.iter().all(|site| layer.sites.get(*site) == SiteOp::Identity));
    plain
        && matches!(activations(spec), PerLayer::All(activation) if activation.hf_name().is_some())
}

/// The activations of all layers; one for all where they agree.
fn activations(spec: &DecoderSpec) -> PerLayer<Activation> {
    let each: Vec<Activation> = spec.layers.iter().map(|layer| layer.mlp.activation).collect();
    match each.split_first() {
        Some((first, rest)) if rest.iter().all(|other| other == first) => PerLayer::All(*first),
        _ => PerLayer::Each(each),
    }
}

/// The new value of the family's activation field; `None` where it stays.
fn activation_field(
    spec: &DecoderSpec,
    before: &DecoderSpec,
    current: Option<&str>,
    remote_code: bool,
) -> Option<&'static str> {
    // ProSparse's names: stock classes, which our module builds on, do not know them.
    let foreign = current.is_some_and(|name| Activation::from_hf_name(name).is_none());
    let changed = activations(spec) != activations(before);
    let unbuildable = foreign && remote_code;
    if !changed && !unbuildable {
        return None;
    }
    match activations(spec) {
        PerLayer::All(one) if one.hf_name().is_some() => one.hf_name(),
        // The nearest that the field can say; the plan says which.
        _ if spec.layers.iter().all(|layer| layer.mlp.activation.is_sparse()) => Some("relu"),
        _ if foreign => Some("relu"),
        _ => None,
    }
}

/// Gives the config a `model_type` that no stock engine knows, and says where its classes are.
fn name_our_classes(json: &mut Map<String, Value>, family: &str) -> Result<()> {
    let names = classes(family)?;
    json.insert("model_type".to_owned(), format!("relu_{family}").into());
    json.insert("architectures".to_owned(), json!([names.causal]));
    let mut auto_map = match json.get("auto_map") {
        Some(Value::Object(map)) => map.clone(),
        _ => Map::new(),
    };
    // Another module's model classes would run without the ReLUs; its tokenizer may stay.
    auto_map.retain(|key, _| !key.starts_with("AutoModel") && key != "AutoConfig");
    for (key, file, class) in [
        ("AutoConfig", "configuration_relu", names.config),
        ("AutoModel", "modeling_relu", names.base),
        ("AutoModelForCausalLM", "modeling_relu", names.causal),
    ] {
        auto_map.insert(key.to_owned(), format!("{file}.{class}").into());
    }
    json.insert("auto_map".to_owned(), auto_map.into());
    Ok(())
}

fn text<'a>(json: &'a Map<String, Value>, key: &str) -> &'a str {
    json.get(key).and_then(Value::as_str).unwrap_or_default()
}

fn to_value(relufication: &Relufication) -> Result<Value> {
    serde_json::to_value(relufication)
        .map_err(|error| Error::Export { why: format!("the `relufication` block: {error}") })
}

#[cfg(test)]
mod tests {
    use super::*;
    use relufy_spec::family::parse;

    fn source() -> Source {
        Source { model: "org/name".to_owned(), revision: None, weights_blake3: None }
    }

    fn export(config: Value, plan: &ReluPlan) -> ExportConfig {
        export_config(&parse(&config).unwrap(), plan, source()).unwrap()
    }

    fn keys(json: &Map<String, Value>) -> Vec<&str> {
        json.keys().map(String::as_str).collect()
    }

    #[test]
    fn stage_1_changes_one_field_and_adds_the_record() {
        for (model_type, field, act) in [
            ("llama", "hidden_act", "silu"),
            ("falcon", "activation", "gelu"),
            ("gpt2", "activation_function", "gelu_new"),
        ] {
            let config = json!({field: act, "model_type": model_type, "bos_token_id": 1});
            let export = export(config, &ReluPlan::stage(Stage::One));
            assert!(!export.remote_code);
            assert_eq!(keys(&export.json), [field, "model_type", "bos_token_id", "relufication"]);
            assert_eq!(export.json[field], "relu");
            assert_eq!(export.json["model_type"], model_type);
            let read = parse(&Value::Object(export.json)).unwrap();
            assert_eq!(read.relufication, Some(export.relufication));
        }
    }

    #[test]
    fn a_field_that_was_left_out_is_written() {
        let export = export(json!({"model_type": "llama"}), &ReluPlan::stage(Stage::One));
        assert_eq!(export.json["hidden_act"], "relu");
    }

    #[test]
    fn stage_2_and_shifts_never_pass_for_the_stock_model() {
        let shifted = ReluPlan {
            activation: Some(PerLayer::All(Activation::ShiftedRelu { shift: 0.5 })),
            ..ReluPlan::default()
        };
        for plan in [ReluPlan::stage(Stage::Two), shifted] {
            let config = json!({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"],
                "auto_map": {"AutoTokenizer": "x.Y", "AutoModelForTokenClassification": "x.Z"}});
            let export = export(config.clone(), &plan);
            assert!(export.remote_code);
            assert_eq!(export.json["model_type"], "relu_gpt2");
            assert_eq!(export.json["architectures"], json!(["ReluGPT2LMHeadModel"]));
            assert_eq!(
                export.json["auto_map"],
                json!({"AutoTokenizer": "x.Y", "AutoConfig": "configuration_relu.ReluGPT2Config",
                    "AutoModel": "modeling_relu.ReluGPT2Model",
                    "AutoModelForCausalLM": "modeling_relu.ReluGPT2LMHeadModel"})
            );
            let expected = plan.apply(&parse(&config).unwrap().spec).unwrap();
            assert_eq!(parse(&Value::Object(export.json)).unwrap().spec, expected);
        }
    }

    #[test]
    fn plans_add_up() {
        let dense = json!({"model_type": "llama", "num_hidden_layers": 2});
        let shift = Activation::ShiftedRelu { shift: 0.1 };
        let first = ReluPlan {
            activation: Some(PerLayer::Each(vec![shift, Activation::Relu])),
            ..ReluPlan::default()
        };
        let first = export(dense.clone(), &first);
        let mut second = ReluPlan::default();
        second.set_site(Site::QkvIn, Some(PerLayer::All(SiteOp::Relu)));
        let other = Source { model: "other".to_owned(), ..source() };
        let config = parse(&Value::Object(first.json)).unwrap();
        let both = export_config(&config, &second, other).unwrap();
        assert_eq!(both.relufication.source, Some(source()));
        assert_eq!(both.relufication.stage, Stage::Two);
        assert_eq!(both.relufication.base_model_type, "llama");
        let spec = parse(&Value::Object(both.json)).unwrap().spec;
        assert_eq!(spec.layers[0].mlp.activation, shift);
        assert_eq!(spec.layers[1].mlp.activation, Activation::Relu);
        assert!(spec.layers.iter().all(|layer| layer.sites.qkv_in == SiteOp::Relu));
    }

    #[test]
    fn prosparse_becomes_something_that_stock_classes_can_build() {
        let config = json!({"model_type": "sparsellama", "hidden_act": "fatrelu",
            "hidden_act_param": 0.01, "num_hidden_layers": 2});
        let mut plan = ReluPlan::default();
        plan.set_site(Site::UpIn, Some(PerLayer::All(SiteOp::Relu)));
        let expected = plan.apply(&parse(&config).unwrap().spec).unwrap();
        let export = export(config, &plan);
        assert_eq!(export.json["hidden_act"], "relu");
        assert_eq!(export.json["model_type"], "relu_llama");
        let fat = PerLayer::All(Activation::FatRelu { threshold: 0.01 });
        assert_eq!(export.relufication.plan.activation, Some(fat));
        assert_eq!(parse(&Value::Object(export.json)).unwrap().spec, expected);
    }

    #[test]
    fn code_that_would_ignore_the_field_is_refused() {
        let config = json!({"model_type": "RefinedWebModel", "n_layer": 2, "multi_query": true,
            "parallel_attn": true});
        let config = parse(&config).unwrap();
        let refused = export_config(&config, &ReluPlan::stage(Stage::One), source());
        assert!(matches!(refused, Err(Error::Export { .. })));
        assert!(export_config(&config, &ReluPlan::default(), source()).is_ok());
    }
}
