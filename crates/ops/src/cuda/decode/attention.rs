//! One new token's attention over the cache of those before.

use std::sync::Arc;

use candle_core::{Device, Tensor};

use super::super::{Elem, Gpu, Grid, Module, Scratch, module, operand};
use super::launch::queue;
use super::{Format, Norm, Room, Words, activations, numbers, numbers_or_null};
use crate::attention::Heads;
use crate::buffer::ensure_shape;
use crate::error::{Error, Result};
use crate::rope::{RopePairs, RopeTable};

static MODULE: Module = module!("decode_attention");
static BF16: Module = module!("decode_attention_bf16");
const OP: &str = "attention of a token";

/// The keys and values of some sequences in one layer, `[batch, kv_heads, context, head_dim]`.
pub struct KvCache {
    gpu: Arc<Gpu>,
    data: Scratch,
    format: Format,
    batch: usize,
    kv_heads: usize,
    context: usize,
    head_dim: usize,
}

impl KvCache {
    /// Room for `batch` sequences of up to `context` tokens, in f32 or bf16.
    ///
    /// # Errors
    /// Another format; heads of more than 256 columns; a device that is no GPU; no memory.
    pub fn new(
        device: &Device,
        format: Format,
        batch: usize,
        context: usize,
        (kv_heads, head_dim): (usize, usize),
    ) -> Result<KvCache> {
        if format == Format::Int8 {
            let what = "keys and values in int8; f32 and bf16 are there".to_string();
            return Err(Error::Unsupported { op: OP, what });
        }
        if head_dim == 0 || head_dim > 256 || kv_heads == 0 {
            let what = format!("{kv_heads} heads of {head_dim} columns; they may have 1 to 256");
            return Err(Error::Unsupported { op: OP, what });
        }
        let gpu = Gpu::on(device)?;
        let cache = |data| KvCache { gpu, data, format, batch, kv_heads, context, head_dim };
        let bytes = 2 * batch * kv_heads * context * padded(head_dim) * format.bytes();
        let data = Gpu::on(device)?.scratch(bytes, OP)?;
        Ok(cache(data))
    }

    /// Overwrites the keys and values of sequence `row` from token `at` on: `keys` and `values`
    /// `[n, kv_heads * head_dim]`, f32 or bf16, as attention reads them (turned and normalised).
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn store(&self, row: usize, at: usize, keys: &Tensor, values: &Tensor) -> Result<()> {
        let n = keys.dim(0)?;
        ensure_shape(keys, OP, "keys", &[n, self.kv_heads * self.head_dim])?;
        ensure_shape(values, OP, "values", keys.dims())?;
        if row >= self.batch || at + n > self.context {
            let range = at..at + n;
            return Err(Error::Range { op: OP, what: "tokens", range, len: self.context });
        }
        for (part, from) in [keys, values].into_iter().enumerate() {
            let from = operand(from, OP)?;
            let store = Store {
                from: from.ptr,
                to: self.part(part) + (row * self.row_bytes()) as u64,
                n: n as i32,
                at: at as i32,
                kv_heads: self.kv_heads as i32,
                context: self.context as i32,
                head_dim: self.head_dim as i32,
                padded: padded(self.head_dim) as i32,
                from_bf16: i32::from(from.elem == Elem::Bf16),
                pad: 0,
            };
            let name = format!("store_{}", self.format.name());
            let grid = Grid::over(n * self.kv_heads * padded(self.head_dim), 256);
            queue(&self.gpu, OP, (&MODULE, &name), grid, &store)?;
        }
        Ok(())
    }

    /// The most tokens of a sequence.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Bytes of keys and values in memory.
    pub fn bytes(&self) -> usize {
        2 * self.batch * self.row_bytes()
    }

    /// Bytes of one sequence's keys.
    fn row_bytes(&self) -> usize {
        self.kv_heads * self.context * padded(self.head_dim) * self.format.bytes()
    }

    /// The address of the keys (0) or values (1).
    fn part(&self, part: usize) -> u64 {
        self.data.ptr + (part * self.batch * self.row_bytes()) as u64
    }
}

/// Columns of a head, filled up to whole vectors.
fn padded(head_dim: usize) -> usize {
    head_dim.next_multiple_of(8)
}

/// What attention of one layer does, with its parameters on the GPU.
pub struct AttentionPlan {
    heads: Heads,
    angles: Option<(Tensor, usize, RopePairs)>,
    norms: [Option<Norm>; 2],
    slopes: Option<Tensor>,
}

impl AttentionPlan {
    /// Copies what attention needs to a GPU. `norms` are those over each head of queries and keys.
    ///
    /// # Errors
    /// Heads that are no whole number of groups; a norm with bias; more elements that turn than a
    /// head has; a device that is no GPU.
    pub fn new(
        device: &Device,
        heads: &Heads,
        rope: Option<(&RopeTable, RopePairs)>,
        norms: [Option<Norm>; 2],
    ) -> Result<AttentionPlan> {
        if heads.kv_heads == 0 || !heads.heads.is_multiple_of(heads.kv_heads) {
            let (len, part) = (heads.heads, heads.kv_heads);
            return Err(Error::Indivisible { op: OP, what: "heads", len, part });
        }
        if norms.iter().flatten().any(|norm| norm.bias.is_some()) {
            let what = "a bias of the norms of queries and keys".to_string();
            return Err(Error::Unsupported { op: OP, what });
        }
        let angles = match rope {
            Some((table, _)) if table.rotary_dim() > heads.head_dim => {
                let (turned, has) = (table.rotary_dim(), heads.head_dim);
                let what = format!("turning {turned} elements of heads of {has}");
                return Err(Error::Unsupported { op: OP, what });
            }
            Some((table, pairs)) if table.rotary_dim() > 0 => {
                Some((table.on_gpu(device)?, table.rotary_dim() / 2, pairs))
            }
            _ => None,
        };
        let slopes = heads.alibi.as_ref().map(|alibi| Tensor::new(&alibi.slopes[..], device));
        let slopes = slopes.transpose()?;
        Ok(AttentionPlan { heads: heads.clone(), angles, norms, slopes })
    }
}

/// `Attend` of `cu/decode_attention.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Attend {
    pub(super) qkv: u64,
    positions: u64,
    keys: u64,
    values: u64,
    angles: u64,
    gains: [u64; 2],
    slopes: u64,
    pub(super) out: u64,
    pub(super) partial: u64,
    counters: u64,
    pub(super) heads: i32,
    pub(super) kv_heads: i32,
    pub(super) head_dim: i32,
    padded: i32,
    context: i32,
    max_pos: i32,
    pairs: i32,
    interleaved: i32,
    centred: [i32; 2],
    eps: [f32; 2],
    scale: f32,
    window: i32,
    softcap: f32,
    factor: f32,
    alibi_bf16: i32,
    pub(super) chunks: i32,
}

/// `Store` of `cu/decode_attention.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Store {
    from: u64,
    to: u64,
    n: i32,
    at: i32,
    kv_heads: i32,
    context: i32,
    head_dim: i32,
    padded: i32,
    from_bf16: i32,
    pad: i32,
}

/// Attention of one new token of each sequence.
#[derive(Clone, Copy)]
pub struct Attention<'a> {
    /// `[batch, (heads + 2 kv_heads) head_dim]` f32.
    pub qkv: &'a Tensor,
    /// Of each sequence: how many tokens its cache holds.
    pub positions: &'a Words,
    /// What it does.
    pub plan: &'a AttentionPlan,
    /// Keys and values of the tokens before.
    pub cache: &'a KvCache,
    /// `[batch, heads * head_dim]` f32.
    pub out: &'a Tensor,
}

impl Attention<'_> {
    /// Query heads that read one key head.
    pub(super) fn group(&self) -> usize {
        self.plan.heads.heads / self.plan.heads.kv_heads
    }

    /// Sequences, and what the kernels take where a block has `wide` query heads of a group.
    pub(super) fn attend(&self, wide: usize, room: &Room) -> Result<(usize, Attend)> {
        let Attention { qkv, positions, plan, cache, out } = *self;
        let AttentionPlan { heads, angles, norms, slopes } = plan;
        let (dim, batch) = (heads.head_dim, qkv.dim(0)?);
        ensure_shape(qkv, OP, "qkv", &[batch, (heads.heads + 2 * heads.kv_heads) * dim])?;
        ensure_shape(out, OP, "out", &[batch, heads.heads * dim])?;
        if (cache.kv_heads, cache.head_dim) != (heads.kv_heads, dim) || batch > cache.batch {
            let expected = vec![batch, heads.kv_heads, dim];
            let found = vec![cache.batch, cache.kv_heads, cache.head_dim];
            return Err(Error::Shape { op: OP, tensor: "cache", expected, found });
        }
        let chunks = self.group().div_ceil(wide);
        let needs = batch * heads.heads * Room::SPLITS * (dim + 2);
        if needs > room.floats || heads.kv_heads * chunks * batch > Room::COUNTERS {
            let message = format!("the room holds {} numbers, {needs} are needed", room.floats);
            return Err(Error::Invalid { op: OP, message });
        }
        let gain =
            |n: usize| numbers_or_null(norms[n].as_ref().map(|norm| &norm.gain), dim, "gain", OP);
        let of = |n: usize| {
            norms[n].as_ref().map_or((0, 0.0), |norm| (i32::from(norm.centred), norm.eps))
        };
        let (max_pos, pairs, interleaved) = match angles {
            Some((table, pairs, layout)) => {
                (table.dim(0)?, *pairs, *layout == RopePairs::Interleaved)
            }
            None => (cache.context, 0, false),
        };
        let alibi = heads.alibi.as_ref();
        let attend = Attend {
            qkv: activations(qkv, "qkv", OP)?.0,
            positions: positions.at(0, batch, OP)?,
            keys: cache.part(0),
            values: cache.part(1),
            angles: match angles {
                Some((table, ..)) => numbers(table, table.elem_count(), "angles", OP)?,
                None => 0,
            },
            gains: [gain(0)?, gain(1)?],
            slopes: numbers_or_null(slopes.as_ref(), heads.heads, "slopes", OP)?,
            out: activations(out, "out", OP)?.0,
            partial: room.partial.ptr,
            counters: room.counters.ptr,
            heads: heads.heads as i32,
            kv_heads: heads.kv_heads as i32,
            head_dim: dim as i32,
            padded: padded(dim) as i32,
            context: cache.context as i32,
            max_pos: max_pos as i32,
            pairs: pairs as i32,
            interleaved: i32::from(interleaved),
            centred: [of(0).0, of(1).0],
            eps: [of(0).1, of(1).1],
            scale: heads.scale,
            window: heads.window.map_or(i32::MAX, |window| window.min(i32::MAX as usize) as i32),
            softcap: heads.softcap.unwrap_or(0.0),
            factor: alibi.map_or(0.0, |alibi| alibi.factor),
            alibi_bf16: i32::from(alibi.is_some_and(|alibi| alibi.bf16)),
            chunks: chunks as i32,
        };
        Ok((batch, attend))
    }
}

/// Normalises and turns the queries and keys of `qkv`, appends keys and values to the cache at
/// `positions`, and writes `out`. A token attends to itself in f32, and to the others as the cache
/// holds them. A position past the cache or the table of angles gives NaN and leaves the cache
/// alone.
///
/// # Errors
/// Shapes that do not fit; a batch other than 1, 2, 4 or 8.
pub fn attend(it: &Attention<'_>, room: &Room) -> Result<()> {
    let cache = it.cache;
    let kernel = Kernel::of(cache.format, it.group(), cache.head_dim);
    let (batch, attend) = it.attend(kernel.wide, room)?;
    let blocks = cache.kv_heads * attend.chunks as usize;
    let splits = splits(kernel.resident * cache.gpu.processors as usize, blocks * batch);
    let grid = Grid {
        blocks: (blocks as u32, splits as u32, batch as u32),
        ..Grid::new(1, kernel.threads)
    };
    queue(&cache.gpu, OP, (kernel.module, &kernel.name), grid, &attend)
}

/// What a cache is read by.
struct Kernel {
    module: &'static Module,
    name: String,
    threads: u32,
    /// Query heads of one block, which reads its keys once for all of them.
    wide: usize,
    /// Blocks that are on a multiprocessor at a time.
    resident: usize,
}

impl Kernel {
    /// The one for groups of `group` query heads of `dim` columns.
    fn of(format: Format, group: usize, dim: usize) -> Kernel {
        if format != Format::Bf16 {
            let wide = group.next_power_of_two().min(8);
            let name = format!("attend_{}_{wide}", format.name());
            return Kernel { module: &MODULE, name, threads: 128, wide, resident: 2 };
        }
        let wide = if group > 8 { 16 } else { 8 };
        let columns = dim.next_power_of_two().clamp(64, 256);
        let name = format!("attend_bf16_{columns}_{wide}");
        // Heads of more columns have more registers.
        let resident = if columns == 64 { 2 } else { 1 };
        Kernel { module: &BF16, name, threads: 256, wide, resident }
    }
}

/// The most parts of a sequence's keys where `slots` blocks run at a time: the fewest that keep
/// all of them busy, as far as a tenth of the time.
fn splits(slots: usize, blocks: usize) -> usize {
    let time = |splits: usize| (blocks * splits).div_ceil(slots) as f64 / splits as f64;
    let better = |best: usize, n: usize| if time(n) < 0.9 * time(best) { n } else { best };
    (2..=Room::SPLITS).fold(1, better)
}
