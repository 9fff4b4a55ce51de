//! The keys and values themselves: a row a token, in every layer.

use candle_core::Tensor;
use relufy_ops::rows;

use crate::{Decoder, Error, Result};

/// Rows of keys and values, and which of them the next pass fills. A cache gives them to
/// [`Decoder::hidden_cached`].
pub struct KvRows {
    layers: Vec<LayerRows>,
    /// The row of each token that was announced and not stored yet.
    pending: Vec<usize>,
}

/// `[rows, kv_width]` each.
struct LayerRows {
    keys: Tensor,
    values: Tensor,
    q_width: usize,
    kv_width: usize,
}

impl KvRows {
    pub(super) fn new(decoder: &Decoder, rows: usize) -> Result<KvRows> {
        let dtype = decoder.params().dtype();
        let layers = decoder
            .spec()
            .layers
            .iter()
            .map(|layer| {
                let (q_width, kv_width) = (layer.attention.q_width(), layer.attention.kv_width());
                let zeros = || Tensor::zeros((rows, kv_width), dtype, decoder.device());
                Ok(LayerRows { keys: zeros()?, values: zeros()?, q_width, kv_width })
            })
            .collect::<Result<_>>()?;
        Ok(KvRows { layers, pending: Vec::new() })
    }

    /// Says where the tokens of the next pass go.
    pub(super) fn announce(&mut self, rows: Vec<usize>) {
        self.pending = rows;
    }

    /// How many tokens were announced and did not go through a pass.
    pub(crate) fn pending(&self) -> usize {
        self.pending.len()
    }

    /// The announced tokens went through all layers.
    pub(crate) fn passed(&mut self) {
        self.pending.clear();
    }

    /// Stores the keys and values of the announced tokens, columns of packed `qkv`, and
    /// gives all rows of the layer.
    pub(crate) fn store(&self, layer: usize, qkv: &Tensor) -> Result<(&Tensor, &Tensor)> {
        let rows = self
            .layers
            .get(layer)
            .ok_or_else(|| Error::Invalid(format!("the cache has no layer {layer}")))?;
        let (q, kv) = (rows.q_width, rows.kv_width);
        rows::scatter(qkv, q..q + kv, &rows.keys, &self.pending)?;
        rows::scatter(qkv, q + kv..q + 2 * kv, &rows.values, &self.pending)?;
        Ok((&rows.keys, &rows.values))
    }

    /// All rows of a layer's keys and of its values; `None` where there is no such layer.
    pub(super) fn layer(&self, n: usize) -> Option<(&Tensor, &Tensor)> {
        self.layers.get(n).map(|layer| (&layer.keys, &layer.values))
    }

    /// Moves runs of rows (from, to, number), one after the other.
    pub(super) fn relocate(&mut self, moves: &[(usize, usize, usize)]) -> Result<()> {
        for layer in &self.layers {
            rows::relocate(&layer.keys, moves)?;
            rows::relocate(&layer.values, moves)?;
        }
        Ok(())
    }
}

impl AsMut<KvRows> for KvRows {
    fn as_mut(&mut self) -> &mut KvRows {
        self
    }
}
