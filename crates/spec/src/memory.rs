//! How many bytes a model takes, to hold, to run and to train, worked out from its shapes.
//!
//! Training is counted as the code holds it: which tensor lives from when to when is written down
//! here a second time, and the measured peak of a run is held against it.

use serde::{Deserialize, Serialize};

use crate::{Activation, DecoderSpec, Layer, MlpKind, NormKind, ParallelNorms, Residual, SiteOp};

/// Bytes of an f32.
const F32: u64 = 4;

/// Bytes of the weights at `element_bytes` each (4: f32, 2: bf16, f16).
pub fn weight_bytes(spec: &DecoderSpec, element_bytes: usize) -> u64 {
    (spec.parameter_count() as u64).saturating_mul(element_bytes as u64)
}

/// Bytes of the keys and values of `context` tokens in each of `batch` sequences; a
/// layer's window limits what must be kept.
pub fn kv_cache_bytes(
    spec: &DecoderSpec,
    batch: usize,
    context: usize,
    element_bytes: usize,
) -> u64 {
    let elements = spec
        .layers
        .iter()
        .map(|layer| {
            let kept = layer.attention.window.map_or(context, |window| window.min(context));
            product(&[2, layer.attention.kv_width(), kept])
        })
        .fold(0, u64::saturating_add);
    elements.saturating_mul(product(&[batch, element_bytes]))
}

/// How much of the forward pass is computed again in the backward pass instead of being kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Recompute {
    /// Every activation is kept: fastest.
    #[default]
    None,
    /// What is cheap to make again is not kept: the norms' outputs and what `down` reads.
    Inputs,
    /// Only what enters each block is kept: one more forward pass, far less memory.
    Block,
}

impl Recompute {
    /// From the fastest to the leanest.
    pub const ALL: [Recompute; 3] = [Recompute::None, Recompute::Inputs, Recompute::Block];
}

/// What computes attention, as far as the memory of its backward pass goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AttentionScratch {
    /// Nothing worth counting.
    None,
    /// The kernels of this program: one f32 for each query and head.
    Own,
    /// cuDNN's: an f32 gradient of the queries, kept for the next layer and step.
    Cudnn,
    /// cuDNN's deterministic ones: two bytes for each pair of a query and a key of a sequence, kept
    /// as well.
    CudnnDeterministic,
}

/// What a training step is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrainShape {
    /// Sequences of one micro-batch.
    pub batch: usize,
    /// Tokens of one sequence.
    pub seq_len: usize,
    /// Bytes of one element of the weights and activations in use (4: f32, 2: bf16).
    pub element_bytes: usize,
    /// Bytes of one element of the gradients.
    pub gradient_bytes: usize,
    /// Bytes of one element of Adam's moments.
    pub moment_bytes: usize,
    /// What is computed again on the way back.
    pub recompute: Recompute,
    /// Rows of logits that exist at once.
    pub logits_rows: usize,
    /// Whether a teacher's logits stand beside them.
    pub teacher: bool,
    /// What computes attention.
    pub attention: AttentionScratch,
    /// Elements of the tensors that are trained; the others have neither masters nor moments.
    pub trained: usize,
    /// Elements of the gradients' buffers: as many as are trained, or fewer where layers share.
    pub gradients: usize,
}

impl TrainShape {
    /// A step in f32 on the CPU that trains everything.
    pub fn cpu(spec: &DecoderSpec, batch: usize, seq_len: usize, logits_rows: usize) -> TrainShape {
        let f32 = F32 as usize;
        TrainShape {
            batch,
            seq_len,
            element_bytes: f32,
            gradient_bytes: f32,
            moment_bytes: f32,
            recompute: Recompute::None,
            logits_rows,
            teacher: false,
            attention: AttentionScratch::None,
            trained: spec.parameter_count(),
            gradients: spec.parameter_count(),
        }
    }
}

/// Bytes that training holds at its peak, by what for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrainMemory {
    /// The weights in use.
    pub weights: u64,
    /// f32 weights beside them, where those in use are not f32 themselves.
    pub masters: u64,
    /// Adam's two moments.
    pub moments: u64,
    /// The gradients.
    pub gradients: u64,
    /// What forward has saved for backward, at the peak.
    pub activations: u64,
    /// What else exists at the peak: logits, or the gradients inside of a block.
    pub transient: u64,
    /// When the peak is.
    pub peak: Moment,
}

/// A moment of a training step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Moment {
    /// The last layer's forward pass, where not all of its activations are kept.
    Forward,
    /// The loss.
    Loss,
    /// The backward pass of this layer.
    Backward(usize),
}

impl TrainMemory {
    /// Everything together.
    pub fn total(&self) -> u64 {
        let TrainMemory { weights, masters, moments, gradients, activations, transient, .. } =
            *self;
        [weights, masters, moments, gradients, activations, transient]
            .into_iter()
            .fold(0, u64::saturating_add)
    }
}

/// What training `spec` takes at its peak: weights, optimizer and gradients, and the larger of what
/// exists at the loss and in the backward pass of any layer.
pub fn train_memory(spec: &DecoderSpec, shape: &TrainShape) -> TrainMemory {
    let bytes = |elements: usize, size: usize| product(&[elements, size]);
    let (activations, transient, peak) = Step { spec, shape }.peak();
    let lives_twice = shape.element_bytes != F32 as usize;
    TrainMemory {
        weights: weight_bytes(spec, shape.element_bytes),
        masters: if lives_twice { bytes(shape.trained, F32 as usize) } else { 0 },
        moments: bytes(shape.trained, 2 * shape.moment_bytes),
        gradients: bytes(shape.gradients, shape.gradient_bytes),
        activations,
        transient,
        peak,
    }
}

/// The least that must be computed again for training to fit into `room` bytes; [`Recompute::Block`]
/// where nothing does.
pub fn least_recompute(spec: &DecoderSpec, shape: &TrainShape, room: u64) -> Recompute {
    let fits = |recompute: &Recompute| {
        train_memory(spec, &TrainShape { recompute: *recompute, ..*shape }).total() <= room
    };
    Recompute::ALL.into_iter().find(fits).unwrap_or(Recompute::Block)
}

/// What one token leaves in memory: elements of the activations' type, and f32 numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct PerToken {
    elements: u64,
    floats: u64,
}

impl PerToken {
    fn elements(elements: usize) -> PerToken {
        PerToken { elements: elements as u64, floats: 0 }
    }

    fn floats(floats: usize) -> PerToken {
        PerToken { elements: 0, floats: floats as u64 }
    }
}

impl std::ops::Add for PerToken {
    type Output = PerToken;

    fn add(self, other: PerToken) -> PerToken {
        PerToken {
            elements: self.elements.saturating_add(other.elements),
            floats: self.floats.saturating_add(other.floats),
        }
    }
}

/// The moments of a step, one beside the other.
struct Step<'a> {
    spec: &'a DecoderSpec,
    shape: &'a TrainShape,
}

impl Step<'_> {
    /// Saved bytes, other bytes, and the moment at which their sum is largest.
    fn peak(&self) -> (u64, u64, Moment) {
        let TrainShape { recompute, logits_rows, teacher, element_bytes, .. } = *self.shape;
        let hidden = self.spec.hidden;
        let saved: Vec<u64> = self
            .spec
            .layers
            .iter()
            .scan(0u64, |sum, layer| {
                *sum = sum.saturating_add(self.bytes(self.kept(layer, recompute)));
                Some(*sum)
            })
            .collect();
        let all = saved.last().copied().unwrap_or(0);
        let stream = self.bytes(PerToken::elements(hidden));
        let stats = self.bytes(self.stats(1));

        // The stream in front of the last norm, its output, and the gradient of that.
        let logits = product(&[logits_rows.min(self.tokens()), self.spec.vocab, element_bytes]);
        let logits = logits.saturating_mul(if teacher { 2 } else { 1 });
        let mut moments = vec![(all, sum([stream, stream, stream, stats, logits]), Moment::Loss)];
        for (n, (layer, saved)) in self.spec.layers.iter().zip(saved).enumerate() {
            // One gradient of the stream goes from block to block.
            let transient = sum([stream, stats, self.backward(layer)]);
            moments.push((saved, transient, Moment::Backward(n)));
        }
        if let (true, Some(last)) = (recompute != Recompute::None, self.spec.layers.last()) {
            let whole = self.kept(last, Recompute::None) + PerToken::elements(hidden);
            let forgotten =
                self.bytes(whole).saturating_sub(self.bytes(self.kept(last, recompute)));
            moments.push((all, forgotten, Moment::Forward));
        }
        let workspace = self.workspace();
        let moments = moments
            .into_iter()
            .map(|(saved, other, moment)| (saved, other.saturating_add(workspace), moment));
        let size = |moment: &(u64, u64, Moment)| moment.0.saturating_add(moment.1);
        moments.max_by_key(size).unwrap_or((0, 0, Moment::Loss))
    }

    /// What a layer's forward pass leaves for the way back, its input included.
    fn kept(&self, layer: &Layer, recompute: Recompute) -> PerToken {
        let hidden = self.spec.hidden;
        let input = PerToken::elements(hidden);
        if recompute == Recompute::Block {
            return input;
        }
        let attention = &layer.attention;
        let sequential = matches!(layer.residual, Residual::Sequential {});
        let mut kept = input
            + PerToken::elements(attention.qkv_width() + attention.q_width())
            + PerToken::floats(attention.heads)
            + PerToken::elements(if sequential { hidden } else { 0 })
            + PerToken::elements(up_width(layer))
            + self.stats(norms(layer));
        if attention.qk_norm.is_some() {
            // Queries and keys as they were, and a number for each head.
            kept = kept
                + PerToken::elements(attention.q_width() + attention.kv_width())
                + PerToken::floats(attention.heads + attention.kv_heads);
        }
        if recompute == Recompute::None {
            let o_input = separate(layer.sites.o_in, attention.q_width());
            kept = kept + PerToken::elements(norms(layer) * hidden + o_input);
        }
        if recompute == Recompute::None || up_width(layer) == 0 {
            kept = kept + PerToken::elements(down_width(layer));
        }
        kept
    }

    /// The most that the backward pass of a layer holds besides what was saved and the gradient of
    /// the stream.
    fn backward(&self, layer: &Layer) -> u64 {
        let (hidden, ffn, attention) = (self.spec.hidden, layer.mlp.ffn, &layer.attention);
        let elements = |n: usize| self.bytes(PerToken::elements(n));
        let inputs = self.shape.recompute == Recompute::Inputs;
        let again = match self.shape.recompute {
            Recompute::Block => {
                let all = self.bytes(self.kept(layer, Recompute::None));
                all.saturating_sub(elements(hidden))
            }
            _ => 0,
        };
        let norm_again = if inputs { elements(hidden) } else { 0 };
        let down_again = if inputs && up_width(layer) > 0 { down_width(layer) } else { 0 };
        let d_up = match layer.mlp.kind {
            MlpKind::Gated => 2 * ffn,
            MlpKind::Plain => 0, // in the place of what `down` gives back
        };
        let through_down = elements(ffn + d_up + down_again);
        let through_up = sum([elements(d_up.max(ffn)), elements(hidden), norm_again]);
        let mlp = through_down.max(through_up);

        // In a parallel block the MLP's gradient waits for attention's.
        let sequential = matches!(layer.residual, Residual::Sequential {});
        let waiting = if sequential { 0 } else { elements(hidden) };
        let scratch = match self.shape.attention {
            AttentionScratch::Own => self.bytes(PerToken::floats(attention.heads)),
            _ => 0,
        };
        let behind = scratch.max(elements(hidden).saturating_add(norm_again));
        let d_qkv = elements(attention.q_width() + attention.qkv_width());
        let attention = sum([d_qkv, behind, waiting]);
        again.saturating_add(mlp.max(attention))
    }

    /// What cuDNN holds from the first backward pass on.
    fn workspace(&self) -> u64 {
        let of_layer = |layer: &Layer| {
            let (heads, width) = (layer.attention.heads, layer.attention.q_width());
            match self.shape.attention {
                AttentionScratch::None | AttentionScratch::Own => 0,
                AttentionScratch::Cudnn => self.bytes(PerToken::floats(width)),
                AttentionScratch::CudnnDeterministic => {
                    product(&[self.tokens(), heads, self.shape.seq_len, 2])
                }
            }
        };
        self.spec.layers.iter().map(of_layer).max().unwrap_or(0)
    }

    /// What `norms` norms keep of each token beside their input.
    fn stats(&self, norms: usize) -> PerToken {
        let each = match self.spec.final_norm.kind {
            NormKind::LayerNorm {} => 2,
            NormKind::Rms { .. } => 1,
        };
        PerToken::floats(norms * each)
    }

    fn tokens(&self) -> usize {
        self.shape.batch.saturating_mul(self.shape.seq_len)
    }

    /// Bytes of all tokens.
    fn bytes(&self, each: PerToken) -> u64 {
        let size = each.elements.saturating_mul(self.shape.element_bytes as u64);
        let size = size.saturating_add(each.floats.saturating_mul(F32));
        size.saturating_mul(self.tokens() as u64)
    }
}

/// Norms in front of a layer's branches.
fn norms(layer: &Layer) -> usize {
    match layer.residual {
        Residual::Parallel { norms: ParallelNorms::Shared } => 1,
        _ => 2,
    }
}

/// Columns that are kept of the up projection: `gate` and `up`, or `up` alone; none where ReLU
/// comes with the product, and says all about the way back itself.
fn up_width(layer: &Layer) -> usize {
    match layer.mlp.kind {
        MlpKind::Gated => 2 * layer.mlp.ffn,
        MlpKind::Plain if layer.mlp.activation == Activation::Relu => 0,
        MlpKind::Plain => layer.mlp.ffn,
    }
}

/// Columns of the activation's output, and of its site's operation where there is one.
fn down_width(layer: &Layer) -> usize {
    layer.mlp.ffn + separate(layer.sites.down_in, layer.mlp.ffn)
}

/// Columns that an operation writes: none where it does nothing.
fn separate(op: SiteOp, width: usize) -> usize {
    if op == SiteOp::Identity { 0 } else { width }
}

fn sum<const N: usize>(parts: [u64; N]) -> u64 {
    parts.into_iter().fold(0, u64::saturating_add)
}

fn product(factors: &[usize]) -> u64 {
    factors.iter().fold(1, |product, factor| product.saturating_mul(*factor as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn llama_7b() -> DecoderSpec {
        crate::family::parse(&serde_json::json!({"model_type": "llama"})).unwrap().spec
    }

    const PARAMETERS: u64 = 6_738_415_616;

    fn shape() -> TrainShape {
        TrainShape {
            batch: 4,
            seq_len: 2048,
            element_bytes: 2,
            gradient_bytes: 2,
            moment_bytes: 4,
            recompute: Recompute::None,
            logits_rows: 8192,
            teacher: false,
            attention: AttentionScratch::Own,
            trained: PARAMETERS as usize,
            gradients: PARAMETERS as usize,
        }
    }

    #[test]
    fn states_of_llama_7b_by_hand() {
        let spec = llama_7b();
        assert_eq!(weight_bytes(&spec, 2), 2 * PARAMETERS);
        assert_eq!(kv_cache_bytes(&spec, 3, 100, 2), 3 * 100 * 32 * 2 * 4096 * 2);
        let found = train_memory(&spec, &shape());
        let states = (found.weights, found.masters, found.moments, found.gradients);
        assert_eq!(states, (2 * PARAMETERS, 4 * PARAMETERS, 8 * PARAMETERS, 2 * PARAMETERS));
        let f32 = TrainShape { element_bytes: 4, gradient_bytes: 4, ..shape() };
        let found = train_memory(&spec, &f32);
        let states = (found.weights, found.masters, found.moments, found.gradients);
        assert_eq!(states, (4 * PARAMETERS, 0, 8 * PARAMETERS, 4 * PARAMETERS));
    }

    /// Bytes of a token at each moment of a step, in the order of the code.
    #[test]
    fn activations_of_llama_7b_by_hand() {
        let (mut spec, tokens, h, f) = (llama_7b(), 8192, 4096, 11_008);
        spec.vocab = 32; // the loss is another test's
        // x, qkv, out, mid, gate and up; 32 log-sum-exps and two norms' numbers in f32.
        let inputs = 2 * (h + 3 * h + h + h + 2 * f) + 4 * (32 + 2);
        let all = inputs + 2 * (2 * h + f);
        // The stream's gradient; the last norm's numbers.
        let stream = 2 * h + 4;
        let backward = 2 * (f + 2 * f);
        let cases = [
            (Recompute::None, 32 * all, backward),
            (Recompute::Inputs, 32 * inputs, backward + 2 * f),
            (Recompute::Block, 32 * 2 * h, backward + all - 2 * h),
        ];
        for (recompute, saved, transient) in cases {
            let found = train_memory(&spec, &TrainShape { recompute, ..shape() });
            assert_eq!(found.peak, Moment::Backward(31));
            assert_eq!(found.activations, tokens * saved, "{recompute:?}");
            assert_eq!(found.transient, tokens * (stream + transient), "{recompute:?}");
        }
    }

    #[test]
    fn a_large_vocabulary_peaks_at_the_loss() {
        let mut spec = llama_7b();
        spec.vocab = 256_000;
        let found = train_memory(&spec, &shape());
        assert_eq!(found.peak, Moment::Loss);
        assert_eq!(found.transient, 8192 * (3 * 2 * 4096 + 4 + 2 * 256_000));
        let taught = train_memory(&spec, &TrainShape { teacher: true, ..shape() });
        assert_eq!(taught.transient - found.transient, 8192 * 2 * 256_000);
    }

    #[test]
    fn cudnn_keeps_what_it_works_in() {
        let of = |attention| train_memory(&llama_7b(), &TrainShape { attention, ..shape() });
        let own = of(AttentionScratch::Own).total();
        let square = of(AttentionScratch::CudnnDeterministic).total();
        assert_eq!(square - own, 8192 * 32 * 2048 * 2);
        assert_eq!(of(AttentionScratch::Cudnn).total() - own, 8192 * 4096 * 4);
    }

    #[test]
    fn one_norm_and_one_head_of_keys_keep_less() {
        let config = serde_json::json!({
            "model_type": "falcon", "hidden_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 4, "vocab_size": 32, "multi_query": true,
            "parallel_attn": true, "new_decoder_architecture": false, "bias": false,
        });
        let mut spec = crate::family::parse(&config).unwrap().spec;
        let tokens = TrainShape { batch: 1, seq_len: 10, logits_rows: 1, ..shape() };
        let (h, kv, f) = (64, 16, 256);
        // x, the norm's output, qkv, out, up, its activation; log-sum-exps, mean and deviation.
        let all = 2 * (h + h + (h + 2 * kv) + h + f + f) + 4 * (4 + 2);
        let stream = 2 * h + 8;
        let found = train_memory(&spec, &tokens);
        assert_eq!(found.activations, 10 * all);
        assert_eq!(found.transient, 10 * (stream + 2 * (f + h)));
        // ReLU comes with the product, which is then not kept in front of it.
        spec.layers[0].mlp.activation = Activation::Relu;
        assert_eq!(train_memory(&spec, &tokens).activations, 10 * (all - 2 * f));
        // Attention's site has an output of its own.
        spec.layers[0].sites.o_in = SiteOp::Relu;
        assert_eq!(train_memory(&spec, &tokens).activations, 10 * (all - 2 * f + 2 * h));
    }

    #[test]
    fn the_least_is_chosen_that_fits() {
        let spec = llama_7b();
        let total = |recompute| train_memory(&spec, &TrainShape { recompute, ..shape() }).total();
        let sizes = Recompute::ALL.map(total);
        assert!(sizes.is_sorted_by(|a, b| a > b));
        for (recompute, size) in Recompute::ALL.into_iter().zip(sizes) {
            assert_eq!(least_recompute(&spec, &shape(), size), recompute);
        }
        assert_eq!(least_recompute(&spec, &shape(), 0), Recompute::Block);
    }

    #[test]
    fn windows_limit_the_cache() {
        let mut spec = llama_7b();
        for layer in &mut spec.layers {
            layer.attention.window = Some(7);
        }
        assert_eq!(kv_cache_bytes(&spec, 1, 100, 4), kv_cache_bytes(&llama_7b(), 1, 7, 4));
    }

    #[test]
    fn frozen_parameters_have_no_gradient() {
        let frozen = TrainShape { trained: 10, gradients: 10, ..shape() };
        let memory = train_memory(&llama_7b(), &frozen);
        assert_eq!((memory.masters, memory.gradients, memory.moments), (40, 20, 80));
    }
}
