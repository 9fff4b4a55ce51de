//! A decoder's weights, packed on a GPU.

use std::sync::Arc;

use candle_core::Device;
use relufy_model::layer::{inverse_frequencies, norm_plan, rope_pairs};
use relufy_model::{Decoder, ParamId};
use relufy_ops::decode::{Format as Stored, GpuMatrix, Norm};
use relufy_ops::rope::RopeTable;
use relufy_spec::flops::Densities;
use relufy_spec::{DecoderSpec, Position};

use super::choice::Reads;
use super::layer::{Layer, Linear, Mlp};
use super::layout::Layout;
use super::weights::{Part, Weights};
use crate::engine::check_densities;
use crate::{Error, Format, Options, Result};

/// A decoder packed for decoding on a GPU. Copies share the weights.
///
/// Which rows of a matrix are contiguous follows the sites, as on the CPU: inputs behind a ReLU,
/// where zero ones are skipped, else outputs; neurons in `up` and `down` of an MLP that can skip
/// them. Where densities are known and inputs are sparse enough, `up` is read by input as well,
/// together with the gate. Weights are stored once more than the decoder has them.
#[derive(Clone)]
pub struct GpuEngine {
    pub(crate) packed: Arc<Packed>,
}

/// What a [`GpuEngine`] shares.
pub(crate) struct Packed {
    pub spec: DecoderSpec,
    pub format: Format,
    pub reads: Reads,
    pub context: usize,
    pub device: Device,
    /// The embedding, where the head's rows do not serve.
    embed: Option<GpuMatrix>,
    /// Learned positions, `[positions, hidden]`.
    pub(super) positions: Option<(GpuMatrix, usize)>,
    pub(super) layers: Vec<Layer>,
    pub(super) final_norm: Norm,
    pub(super) head: Linear,
    /// Takes prompts, many tokens at a time.
    pub(super) decoder: Option<Decoder>,
}

impl GpuEngine {
    /// Packs the weights of a decoder on a GPU, and keeps the decoder for prompts: it takes many
    /// tokens at a time, densely and in its own number type. `options.threads` says nothing here.
    ///
    /// # Errors
    /// A decoder that is not on a GPU; [`Format::F16`], which has no kernels there; no memory.
    pub fn new(decoder: Decoder, options: &Options) -> Result<GpuEngine> {
        GpuEngine::reading(decoder, options, Reads::Needed)
    }

    /// The same, with a choice of what is read.
    ///
    /// # Errors
    /// As [`GpuEngine::new`].
    pub fn reading(decoder: Decoder, options: &Options, reads: Reads) -> Result<GpuEngine> {
        GpuEngine::pack(decoder, options, reads, None)
    }

    /// The same with measured densities, by which a layout is chosen: `up` of a gated MLP is read by
    /// input, together with the gate, where its inputs are sparse enough, else by open gates. The result
    /// is the same to rounding.
    ///
    /// # Errors
    /// As [`GpuEngine::new`]; densities of another number of layers.
    pub fn calibrated(
        decoder: Decoder,
        options: &Options,
        densities: &Densities,
    ) -> Result<GpuEngine> {
        GpuEngine::pack(decoder, options, Reads::Needed, Some(densities))
    }

    fn pack(
        decoder: Decoder,
        options: &Options,
        reads: Reads,
        densities: Option<&Densities>,
    ) -> Result<GpuEngine> {
        let device = decoder.device().clone();
        if !device.is_cuda() {
            return Err(Error::Decoder("it is not on a GPU".to_owned()));
        }
        let weights = Weights::Params(decoder.params(), &device);
        let packed = Packed::new(decoder.spec(), &weights, options, (reads, densities))?;
        Ok(GpuEngine { packed: Arc::new(Packed { decoder: Some(decoder), ..packed }) })
    }

    /// An engine with random weights (norms one, biases zero): for measurements, where only the
    /// shape matters. Prompts go in token by token.
    ///
    /// # Errors
    /// As [`GpuEngine::new`].
    pub fn random(
        spec: &DecoderSpec,
        options: &Options,
        device: &Device,
        seed: u64,
    ) -> Result<GpuEngine> {
        GpuEngine::random_calibrated(spec, options, None, device, seed)
    }

    /// The same with a layout that follows densities.
    ///
    /// # Errors
    /// As [`GpuEngine::calibrated`].
    pub fn random_calibrated(
        spec: &DecoderSpec,
        options: &Options,
        densities: Option<&Densities>,
        device: &Device,
        seed: u64,
    ) -> Result<GpuEngine> {
        let weights = Weights::Random(seed, device);
        let packed = Packed::new(spec, &weights, options, (Reads::Needed, densities))?;
        Ok(GpuEngine { packed: Arc::new(packed) })
    }

    /// What the decoder is.
    pub fn spec(&self) -> &DecoderSpec {
        &self.packed.spec
    }

    /// How its weights are stored.
    pub fn format(&self) -> Format {
        self.packed.format
    }

    /// Which rows it reads.
    pub fn reads(&self) -> Reads {
        self.packed.reads
    }

    /// For each layer whether `up` of a gated MLP is read by input, together with the gate.
    pub fn up_by_input(&self) -> impl ExactSizeIterator<Item = bool> {
        self.packed.layers.iter().map(|layer| matches!(layer.mlp, Mlp::Pairs { .. }))
    }

    /// Whether packing with these densities would give the same layout.
    pub fn suits(&self, densities: &Densities) -> bool {
        let packed = &*self.packed;
        let layout =
            Layout { format: packed.stored(), reads: packed.reads, densities: Some(densities) };
        let hidden = packed.spec.hidden;
        let wanted = packed.layers.iter().enumerate();
        wanted.map(|(n, layer)| layout.up_by_input(n, &layer.plan, hidden)).eq(self.up_by_input())
    }

    /// Where they are.
    pub fn device(&self) -> &Device {
        &self.packed.device
    }

    /// The most tokens of a sequence.
    pub fn context(&self) -> usize {
        self.packed.context
    }

    /// Bytes of the packed weights.
    pub fn bytes(&self) -> usize {
        let packed = &*self.packed;
        let positions = packed.positions.as_ref().map(|(table, _)| table);
        let tables = [packed.embed.as_ref(), positions].into_iter().flatten();
        let layers = packed.layers.iter().map(Layer::bytes);
        packed.head.matrix.bytes() + tables.map(GpuMatrix::bytes).chain(layers).sum::<usize>()
    }
}

impl Packed {
    fn new(
        spec: &DecoderSpec,
        weights: &Weights<'_>,
        options: &Options,
        (reads, densities): (Reads, Option<&Densities>),
    ) -> Result<Packed> {
        check_densities(densities, spec)?;
        let format = stored(options.format)?;
        let context = match options.context {
            0 => spec.max_positions,
            wanted => wanted.min(spec.max_positions),
        };
        let (vocab, hidden) = (spec.vocab, spec.hidden);
        // Only one row is read of these: nothing is saved by less than half precision.
        let half = if format == Stored::Int8 { Stored::Bf16 } else { format };
        let table = |id, rows| {
            let part = Part { id, rows: 0..rows, inputs: hidden };
            weights.matrix(part, false, half)
        };
        let embed = match spec.head.tied && half == format {
            true => None,
            false => Some(table(ParamId::Embed, vocab)?),
        };
        let positions = match spec.position {
            Position::Learned { offset } => {
                Some((table(ParamId::Positions, spec.max_positions + offset)?, offset))
            }
            _ => None,
        };
        let rope = match spec.position {
            Position::Rope { theta, rotary_dim, layout, scaling } => {
                let frequencies = inverse_frequencies(theta, rotary_dim, scaling);
                Some((RopeTable::new(&frequencies, context, 1.0), rope_pairs(layout)))
            }
            _ => None,
        };
        let layout = Layout { format, reads, densities };
        let layers = (0..spec.layers.len())
            .map(|n| Layer::pack(spec, n, weights, rope.as_ref(), layout))
            .collect::<Result<_>>()?;
        let norm_ids = (ParamId::FinalNorm, Some(ParamId::FinalNormBias));
        let final_norm = weights.norm(norm_plan(&spec.final_norm), norm_ids, hidden)?;
        let head_id = if spec.head.tied { ParamId::Embed } else { ParamId::Head };
        let part = Part { id: head_id, rows: 0..vocab, inputs: hidden };
        let bias = weights.vector(ParamId::HeadBias, 0..vocab)?;
        Ok(Packed {
            spec: spec.clone(),
            format: options.format,
            reads,
            context,
            device: weights.device().clone(),
            embed,
            positions,
            layers,
            final_norm,
            head: Linear::pack(weights, part, bias, false, format)?,
            decoder: None,
        })
    }

    /// Where a token's row is.
    pub(super) fn table(&self) -> &GpuMatrix {
        self.embed.as_ref().unwrap_or(&self.head.matrix)
    }

    /// How weights are stored, as the kernels know it.
    pub(super) fn stored(&self) -> Stored {
        self.head.matrix.format()
    }

    /// How keys and values are stored.
    pub(super) fn kv_format(&self) -> Stored {
        if self.format == Format::F32 { Stored::F32 } else { Stored::Bf16 }
    }
}

/// A format as the kernels know it.
fn stored(format: Format) -> Result<Stored> {
    match format {
        Format::F32 => Ok(Stored::F32),
        Format::Bf16 => Ok(Stored::Bf16),
        Format::Int8 => Ok(Stored::Int8),
        Format::F16 => Err(Error::NotOnGpus(format)),
    }
}
