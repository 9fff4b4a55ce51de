//! A step that is taken while its gradients are still being computed: each parameter moves as soon
//! as its own is final, and the buffer serves the next layer.
//!
//! The norm of all gradients is known only when everything has moved, so it cannot clip. It is
//! summed up on the way; a gradient that is no number stops the step there.

use relufy_model::{Decoder, Gradients, ParamId, Params};
use relufy_spec::{LayerSlot, Position, Slot, WeightMap};

use crate::optimizer::Piecewise;

/// Looks at the gradients of a run's first step, which were poisoned before.
#[derive(Clone, Copy)]
pub(crate) struct Watch<'a> {
    params: &'a Params,
    map: &'a WeightMap,
    rotary: bool,
}

impl<'a> Watch<'a> {
    pub fn new(decoder: &'a Decoder, map: &'a WeightMap) -> Watch<'a> {
        let rotary = matches!(decoder.spec().position, Position::Rope { .. });
        Watch { params: decoder.params(), map, rotary }
    }

    /// What is wrong with the gradients of some parameters: each must have been written, be finite
    /// and not all zero. Without rotary positions a bias on the keys shifts all scores of a query
    /// alike, which softmax does not see: its gradient is zero up to rounding, and may be exactly
    /// so.
    pub fn problems(
        &self,
        gradients: &Gradients,
        among: impl Fn(ParamId) -> bool,
    ) -> relufy_model::Result<Vec<String>> {
        let only_key_bias = |name: &str| {
            let rows = self.map.rows.iter();
            rows.filter(|row| row.names.first().is_some_and(|first| first == name)).all(|row| {
                row.slots.iter().all(|slot| matches!(slot, Slot::Layer(_, LayerSlot::KBias)))
            })
        };
        let found = gradients.problems_among(self.params, self.map, among)?;
        Ok(found
            .into_iter()
            .filter(|(name, why)| self.rotary || *why != "is all zero" || !only_key_bias(name))
            .map(|(name, why)| format!("{name} {why}"))
            .collect())
    }
}

/// A step on its way.
pub(crate) struct InPieces<'a> {
    params: &'a Params,
    learning_rate: f64,
    /// Who looks at the gradients, in a run's first step.
    watch: Option<Watch<'a>>,
    pub step: Piecewise<'a>,
    /// The sum of squares of all gradients so far.
    pub squares: f64,
    /// What is wrong with them; then nothing moves any more.
    pub problems: Vec<String>,
}

impl<'a> InPieces<'a> {
    pub fn new(
        params: &'a Params,
        step: Piecewise<'a>,
        learning_rate: f64,
        watch: Option<Watch<'a>>,
    ) -> InPieces<'a> {
        InPieces { params, learning_rate, watch, step, squares: 0.0, problems: Vec::new() }
    }

    /// Moves parameters whose gradients are final.
    ///
    /// # Errors
    /// From the arithmetic.
    pub fn advance(&mut self, gradients: &Gradients, ids: &[ParamId]) -> relufy_model::Result<()> {
        if let Some(watch) = &self.watch {
            self.problems.extend(watch.problems(gradients, |id| ids.contains(&id))?);
        }
        if self.is_good() {
            self.squares += gradients.sum_of_squares(ids)?;
        }
        if self.is_good() {
            self.step.step(ids, self.params, gradients, self.learning_rate)?;
        }
        match self.watch {
            // The next layer writes to the same buffers: it must not be taken for this one.
            Some(_) => gradients.poison_these(ids),
            None => Ok(()),
        }
    }

    fn is_good(&self) -> bool {
        self.problems.is_empty() && self.squares.is_finite()
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};
    use relufy_model::{Buffers, Init, Masters, NoTap, Objective, StepLoss, Tokens, Trainable};
    use relufy_spec::family;
    use serde_json::json;

    use super::*;
    use crate::config::Optim;
    use crate::optimizer::{Decay, Optimizer};

    fn decoder(tied: bool) -> Decoder {
        let config = json!({
            "model_type": "llama", "hidden_act": "relu", "hidden_size": 32,
            "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
            "vocab_size": 20, "max_position_embeddings": 16, "tie_word_embeddings": tied,
        });
        let spec = family::parse(&config).unwrap().spec;
        let init = Init { std: 0.2, ..Init::default() };
        let params = Params::random(&spec, &init, &Device::Cpu).unwrap();
        Decoder::new(spec, params).unwrap()
    }

    fn batch() -> (Tokens, Vec<i64>) {
        let ids: Vec<u32> = (0..16).map(|at| at * 7 % 20).collect();
        let targets = ids.iter().map(|id| i64::from(id * 3 % 20)).collect();
        (Tokens::rows(ids, 8), targets)
    }

    fn values(decoder: &Decoder) -> Vec<Vec<f32>> {
        let host = |param: &relufy_model::Param| relufy_ops::buffer::to_host(&param.tensor);
        decoder.params().iter().map(|param| host(param).unwrap()).collect()
    }

    /// Some steps; the losses and norms, and the weights at the end.
    fn train(tied: bool, in_pieces: bool) -> (Vec<(StepLoss, f64)>, Vec<Vec<f32>>, usize) {
        let decoder = decoder(tied);
        let params = decoder.params();
        let trainable = Trainable::all(params);
        let buffers = if in_pieces { Buffers::Shared } else { Buffers::Own };
        let mut gradients = Gradients::held(params, &trainable, DType::F32, buffers).unwrap();
        let settings = Optim { max_grad_norm: 0.0, weight_decay: 0.1, ..Optim::default() };
        let (none, decay) = (Masters::default(), Decay::Matrices);
        let mut optimizer =
            Optimizer::new(params, &trainable, &none, &settings, decay, DType::F32).unwrap();
        let (tokens, targets) = batch();
        let objective = Objective { scale: 1.0 / 16.0, ..Objective::default() };
        let mut seen = Vec::new();
        for _ in 0..3 {
            gradients.begin_step();
            let (loss, norm) = if in_pieces {
                let mut pieces = InPieces::new(params, optimizer.begin(), 1e-2, None);
                let loss = decoder
                    .forward_backward_with(
                        &tokens,
                        &targets,
                        &objective,
                        &mut gradients,
                        &mut NoTap,
                        &mut |gradients, ids| pieces.advance(gradients, ids),
                    )
                    .unwrap();
                let norm = pieces.squares.sqrt();
                pieces.step.finish().unwrap();
                (loss, norm)
            } else {
                let loss = decoder
                    .forward_backward(&tokens, &targets, &objective, &mut gradients, &mut NoTap)
                    .unwrap();
                let norm = gradients.global_norm().unwrap();
                optimizer.step(params, &gradients, 1e-2, 1.0).unwrap();
                (loss, norm)
            };
            seen.push((loss, norm));
        }
        assert_eq!(optimizer.steps(), 3);
        let elements = Gradients::buffer_elements(params, &trainable, buffers);
        (seen, values(&decoder), elements)
    }

    #[test]
    fn pieces_make_the_same_step_in_less_room() {
        for tied in [false, true] {
            let (whole, weights, room) = train(tied, false);
            let (pieces, same, less) = train(tied, true);
            assert!(weights == same);
            for ((loss, norm), (again, summed)) in whole.into_iter().zip(pieces) {
                assert_eq!(loss, again);
                assert!((norm - summed).abs() < 1e-12 * norm, "{norm} {summed}");
            }
            let layer = 4 * 32 * 32 + 3 * 32 * 48 + 2 * 32;
            let vocabulary = if tied { 0 } else { 20 * 32 };
            assert_eq!(room - less, 2 * layer + vocabulary);
        }
    }

    #[test]
    fn a_gradient_that_is_no_number_moves_nothing() {
        let decoder = decoder(false);
        let params = decoder.params();
        let head = params.get(ParamId::Head).unwrap();
        let mut broken = relufy_ops::buffer::to_host(head).unwrap();
        broken[3] = f32::NAN;
        relufy_ops::buffer::write_from_host(head, &broken).unwrap();
        let before = values(&decoder);
        let trainable = Trainable::all(params);
        let mut gradients =
            Gradients::held(params, &trainable, DType::F32, Buffers::Shared).unwrap();
        let (none, settings) = (Masters::default(), Optim::default());
        let mut optimizer =
            Optimizer::new(params, &trainable, &none, &settings, Decay::All, DType::F32).unwrap();
        let mut pieces = InPieces::new(params, optimizer.begin(), 1e-2, None);
        let (tokens, targets) = batch();
        decoder
            .forward_backward_with(
                &tokens,
                &targets,
                &Objective { scale: 1.0, ..Objective::default() },
                &mut gradients,
                &mut NoTap,
                &mut |gradients, ids| pieces.advance(gradients, ids),
            )
            .unwrap();
        assert!(pieces.squares.is_nan() && pieces.step.is_untouched());
        assert!(pieces.step.finish().is_err());
        assert_eq!(optimizer.steps(), 0);
        let bits =
            |all: Vec<Vec<f32>>| all.into_iter().flatten().map(f32::to_bits).collect::<Vec<_>>();
        assert!(bits(values(&decoder)) == bits(before));
    }

    #[test]
    fn what_stays_unwritten_is_found_in_shared_buffers_too() {
        let decoder = decoder(false);
        let params = decoder.params();
        let map = relufy_spec::family::parse(&json!({
            "model_type": "llama", "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 20,
        }));
        let map = map.unwrap().weights;
        let trainable = Trainable::all(params);
        let mut gradients =
            Gradients::held(params, &trainable, DType::F32, Buffers::Shared).unwrap();
        let (none, settings) = (Masters::default(), Optim::default());
        let mut optimizer =
            Optimizer::new(params, &trainable, &none, &settings, Decay::All, DType::F32).unwrap();
        let watch = Some(Watch::new(&decoder, &map));
        let mut pieces = InPieces::new(params, optimizer.begin(), 1e-2, watch);
        gradients.poison().unwrap();
        let before = values(&decoder);
        let untouched = [ParamId::Layer(1, relufy_model::LayerParam::O)];
        pieces.advance(&gradients, &untouched).unwrap();
        assert_eq!(pieces.problems, ["model.layers.1.self_attn.o_proj.weight was not written"]);
        let (tokens, targets) = batch();
        decoder
            .forward_backward_with(
                &tokens,
                &targets,
                &Objective { scale: 1.0, ..Objective::default() },
                &mut gradients,
                &mut NoTap,
                &mut |gradients, ids| pieces.advance(gradients, ids),
            )
            .unwrap();
        // All others are good, and still nothing moves.
        assert_eq!(pieces.problems.len(), 1);
        assert!(values(&decoder) == before);
    }
}
