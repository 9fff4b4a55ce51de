//! The speed of a forward pass without gradients, which is what evaluation and prompts cost: next
//! to that of its matrix products alone.

use std::time::Instant;

use candle_core::{DType, Tensor};
use relufy_model::{Decoder, Init, NoTap, Params};
use relufy_ops::{device, linear};
use relufy_spec::{ReluPlan, Stage};
use serde::Serialize;

use super::Shape;
use super::run::{median, random_batch};
use crate::Result;
use crate::machine::{Machine, Wish, type_name};

/// What was measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Prefill {
    /// The shape's name.
    pub shape: &'static str,
    /// Sequences of a pass.
    pub batch: usize,
    /// Tokens of a sequence.
    pub seq_len: usize,
    /// What the device is called.
    pub device: String,
    /// Type of weights and activations.
    pub dtype: &'static str,
    /// From the median pass: the walk over the layers, without the head.
    pub tokens_per_second: f64,
    /// Each pass, in milliseconds.
    pub pass_ms: Vec<f64>,
    /// The matrix products of the layers one after the other on random numbers, in milliseconds.
    pub products_ms: Vec<f64>,
    /// The rate of the products alone.
    pub products_tflops: f64,
    /// The products' time over the pass's, of the medians.
    pub share: f64,
}

/// Times `passes` passes over a shape's batch, in turn with the same products alone.
///
/// # Errors
/// From the model; a device that is not there or has no room.
pub fn prefill(
    shape: &Shape,
    device_name: &str,
    dtype: relufy_model::Precision,
    stage: Stage,
    passes: usize,
) -> Result<Prefill> {
    let machine = Machine::open(&Wish {
        device: device_name,
        dtype,
        gradients: relufy_model::Precision::Auto,
        moments: relufy_model::Precision::F32,
        deterministic: true,
        accumulation: 1,
        clips: true,
    })?;
    let spec = ReluPlan::stage(stage).apply(&shape.spec(shape.activation())?)?;
    let params = Params::random_as(&spec, &Init::default(), &machine.device, machine.dtype)?;
    let decoder = Decoder::new(spec, params)?;
    let (tokens, _) = random_batch(shape);
    let products = Products::new(&decoder, shape.tokens(), machine.dtype)?;

    let (mut pass_ms, mut products_ms) = (Vec::new(), Vec::new());
    for pass in 0..=passes.max(1) {
        let began = Instant::now();
        let hidden = decoder.hidden(&tokens, &mut NoTap)?;
        device::synchronize(&machine.device)?;
        let walked = Instant::now();
        drop(hidden);
        products.run()?;
        device::synchronize(&machine.device)?;
        let multiplied = Instant::now();
        // The first warms up.
        if pass > 0 {
            pass_ms.push((walked - began).as_secs_f64() * 1e3);
            products_ms.push((multiplied - walked).as_secs_f64() * 1e3);
        }
    }
    let (pass, alone) = (median(&pass_ms), median(&products_ms));
    Ok(Prefill {
        shape: shape.name,
        batch: shape.batch,
        seq_len: shape.seq_len,
        device: device::model_name(&machine.device)?.unwrap_or_else(|| device_name.to_owned()),
        dtype: type_name(machine.dtype),
        tokens_per_second: shape.tokens() as f64 / pass * 1e3,
        products_tflops: products.flops / alone * 1e-9,
        share: alone / pass,
        pass_ms,
        products_ms,
    })
}

/// The matrix products of a forward pass, each layer's on its own weights.
struct Products<'a> {
    list: Vec<(Tensor, &'a Tensor)>,
    flops: f64,
}

impl<'a> Products<'a> {
    fn new(decoder: &'a Decoder, tokens: usize, dtype: DType) -> Result<Products<'a>> {
        let mut inputs: Vec<Tensor> = Vec::new();
        let mut list = Vec::new();
        let mut flops = 0.0;
        let in_layers = decoder.params().iter().filter(|param| {
            matches!(param.id, relufy_model::ParamId::Layer(..)) && param.is_matrix()
        });
        for param in in_layers {
            let (outputs, width) = param.tensor.dims2()?;
            let input = match inputs.iter().find(|input| input.dims() == [tokens, width]) {
                Some(input) => input.clone(),
                None => {
                    let random = Tensor::randn(0f32, 1.0, (tokens, width), decoder.device())?;
                    let input = relufy_ops::buffer::cast(&random, dtype)?;
                    inputs.push(input.clone());
                    input
                }
            };
            flops += 2.0 * tokens as f64 * outputs as f64 * width as f64;
            list.push((input, &param.tensor));
        }
        Ok(Products { list, flops })
    }

    fn run(&self) -> Result<()> {
        for (input, weight) in &self.list {
            linear::forward(input, weight, None)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pass_takes_longer_than_its_products() {
        let tiny = Shape { hidden: 64, layers: 2, heads: 2, ffn: 96, vocab: 64, ..Shape::SMALL };
        let found = prefill(&tiny, "cpu", relufy_model::Precision::Auto, Stage::Dense, 3).unwrap();
        assert_eq!((found.pass_ms.len(), found.products_ms.len()), (3, 3));
        // q, k, v, o and gate, up, down.
        let matrices = (4 * 64 * 64 + 3 * 64 * 96) * 2 * 2 * tiny.tokens();
        let products = found.products_tflops * median(&found.products_ms) * 1e9;
        assert!((products - matrices as f64).abs() < 1.0, "{products} {matrices}");
        assert!(found.share > 0.0 && found.tokens_per_second > 0.0);
    }
}
