//! Causal attention over packed segments: `out = softmax(mask(scale * Q K^T)) V`, head by head.
//!
//! One [`Segment`] is one run of queries and the keys it may look at: a document in a packed batch,
//! the new tokens of a sequence and its KV cache, or a branch of a tree, whose first keys lie in its
//! ancestors' [`Run`]s. Nothing is gathered: the scores of a block are one product a run, each into
//! columns of its own. Work is cut into (segment, head, block of
//! queries). A task holds the scores of its own block only, so no `T x T` matrix ever exists, and
//! blocks above the diagonal or out of the window are never computed. Forward keeps the log-sum-exp
//! of each row, from which backward makes the probabilities again (Dao et al., FlashAttention,
//! 2022, section 3.1 and appendix B).

mod backward;
mod few;
mod forward;
mod matrix;
mod rows;
mod segment;
#[cfg(test)]
mod tests;

pub use self::segment::{Run, Segment};

use candle_core::Tensor;

use crate::buffer::{from_vec, read_f32};
use crate::error::{Error, Result};

const OP: &str = "attention";

/// The heads of one attention layer and what is done to their scores.
#[derive(Clone, Debug, PartialEq)]
pub struct Heads {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`. Query head `h` reads key head `h / (heads /
    /// kv_heads)`.
    pub kv_heads: usize,
    /// Columns of one head.
    pub head_dim: usize,
    /// Factor of `q . k`, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// A query sees this many keys, itself included (Mistral's `sliding_window`).
    pub window: Option<usize>,
    /// `score = cap * tanh(score / cap)` before masking (Gemma 2's `attn_logit_softcapping`).
    pub softcap: Option<f32>,
    /// A linear penalty on the scores instead of positions in queries and keys.
    pub alibi: Option<Alibi>,
}

/// ALiBi (Press et al. 2022): `score += factor * slope * (j - i)` with `i`, `j` the places of
/// query and key in their segment.
#[derive(Clone, Debug, PartialEq)]
pub struct Alibi {
    /// One for each query head.
    pub slopes: Vec<f32>,
    /// On every penalty: 1, or the scores' own scale where a family scales both together.
    pub factor: f32,
    /// Each `slope * j` is rounded to bfloat16, and stands without `i`, which softmax does not
    /// see (Hugging Face `modeling_falcon.py`, `build_alibi_tensor`).
    pub bf16: bool,
}

impl From<Vec<f32>> for Alibi {
    /// The penalty as published, with these slopes.
    fn from(slopes: Vec<f32>) -> Alibi {
        Alibi { slopes, factor: 1.0, bf16: false }
    }
}

/// Columns of a `[n, width]` tensor, from `start_col` on.
#[derive(Clone, Copy, Debug)]
pub struct Cols<'a> {
    /// The tensor that holds the columns.
    pub tensor: &'a Tensor,
    /// The first of them.
    pub start_col: usize,
}

/// Where queries, keys and values lie. They may be columns of one packed tensor.
#[derive(Clone, Copy, Debug)]
pub struct Qkv<'a> {
    /// `heads * head_dim` columns, one row a query.
    pub q: Cols<'a>,
    /// `kv_heads * head_dim` columns, one row a key.
    pub k: Cols<'a>,
    /// `kv_heads * head_dim` columns, one row a value.
    pub v: Cols<'a>,
}

impl<'a> Qkv<'a> {
    /// The columns of `[q heads | k heads | v heads]`, `[n, (heads + 2*kv_heads) * head_dim]`.
    pub fn packed(tensor: &'a Tensor, heads: &Heads) -> Self {
        let k = heads.heads * heads.head_dim;
        let v = k + heads.kv_heads * heads.head_dim;
        let at = |start_col| Cols { tensor, start_col };
        Self { q: at(0), k: at(k), v: at(v) }
    }
}

/// What forward gives: the output and what backward needs.
#[derive(Clone, Debug)]
pub struct Saved {
    /// `[n_q, heads * head_dim]`; rows of no segment are 0.
    pub out: Tensor,
    /// Log-sum-exp of each row's scores, `[heads, n_q]`; 0 for rows of no segment.
    pub lse: Tensor,
}

/// Attention of each segment's queries over its keys.
///
/// Serves training (`Qkv::packed`, one segment a document) and decoding (queries of the new tokens,
/// keys and values of the cache, in one run or several). Segments may share keys but no queries.
///
/// # Errors
/// [`Error`] where shapes, columns, heads or segments do not fit one another, or there is no kernel
/// for the device or dtype.
pub fn forward(qkv: &Qkv<'_>, segments: &[Segment], heads: &Heads) -> Result<Saved> {
    let sizes = check(qkv, segments, heads)?;
    let device = qkv.q.tensor.device();
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        return crate::cuda::attention::forward(qkv, segments, heads);
    }
    let (out, lse) = read_qkv(qkv, |q, k, v| {
        let problem = Problem::new(qkv, &sizes, heads, q, k, v);
        forward::run(&problem, segments, sizes.n_q)
    })?;
    Ok(Saved {
        out: from_vec(out, (sizes.n_q, heads.heads * heads.head_dim), device)?,
        lse: from_vec(lse, (heads.heads, sizes.n_q), device)?,
    })
}

/// What [`forward`] does between its two products, for one query and one query head in plain
/// slices: products `q . k` become weights that sum to 1. The keys are those that the query sees,
/// the first of them at place `first_key`, the last the query's own.
pub fn weights_of_one(products: &mut [f32], heads: &Heads, head: usize, first_key: usize) {
    let band = rows::Band::one(first_key, products.len());
    let (mut lse, mut inverse) = ([0.0], [0.0]);
    let keys = products.len();
    rows::softmax((products, keys), &band, &scoring(heads, head), &mut lse, &mut inverse);
    products.iter_mut().for_each(|weight| *weight *= inverse[0]);
}

/// The gradient of [`forward`] with respect to the packed tensor, `[n, width]`, from `dout`, the
/// gradient of `saved.out`. Rows and columns that took no part get 0.
///
/// With `P = exp(S - lse)`, `D = rowsum(dO * O)`: `dV = P^T dO`, `dS = P * (dO V^T - D)`, `dQ =
/// scale dS K`, `dK = scale dS^T Q`, and `dS` times the derivative of the soft cap where there is
/// one.
///
/// # Errors
/// As [`forward`]; also where `qkv` is not one packed tensor, `saved` or `dout` has another shape,
/// two segments share keys, or a segment has a prefix ([`Error::Unsupported`]).
pub fn backward(
    qkv: &Qkv<'_>,
    segments: &[Segment],
    heads: &Heads,
    saved: &Saved,
    dout: &Tensor,
) -> Result<Tensor> {
    let sizes = check(qkv, segments, heads)?;
    if let Some(segment) = segments.iter().find(|segment| !segment.prefix.is_empty()) {
        let what = format!("backward of a segment with a prefix: {segment:?}");
        return Err(Error::Unsupported { op: OP, what });
    }
    let packed = qkv.q.tensor;
    if packed.id() != qkv.k.tensor.id() || packed.id() != qkv.v.tensor.id() {
        return Err(invalid("backward wants q, k and v in one packed tensor".into()));
    }
    let group_cols = heads.kv_heads * heads.head_dim;
    let mut cols = [
        (qkv.q.start_col, heads.heads * heads.head_dim),
        (qkv.k.start_col, group_cols),
        (qkv.v.start_col, group_cols),
    ];
    disjoint("columns of q, k and v", &mut cols)?;
    let mut keys: Vec<_> = segments.iter().map(|s| (s.kv_start, s.kv_len)).collect();
    disjoint("keys of two segments", &mut keys)?;
    let out_shape = [sizes.n_q, heads.heads * heads.head_dim];
    for (name, tensor, shape) in [
        ("saved.out", &saved.out, out_shape),
        ("saved.lse", &saved.lse, [heads.heads, sizes.n_q]),
        ("dout", dout, out_shape),
    ] {
        if tensor.dims() != shape {
            let found = tensor.dims();
            return Err(invalid(format!("{name} is {found:?}, expected {shape:?}")));
        }
    }
    #[cfg(feature = "cuda")]
    if packed.device().is_cuda() {
        return crate::cuda::attention::backward(qkv, segments, heads, saved, dout);
    }
    let grad = read_f32(packed, OP, |x| {
        read_f32(&saved.out, OP, |out| {
            read_f32(&saved.lse, OP, |lse| {
                read_f32(dout, OP, |dout| {
                    let problem = Problem::new(qkv, &sizes, heads, x, x, x);
                    let given = backward::Given { out, lse, dout, n_q: sizes.n_q };
                    backward::run(&problem, segments, &given)
                })
            })
        })
    })????;
    from_vec(grad, (sizes.n_q, sizes.q_width), packed.device())
}

/// A head's rows in one of the inputs: where column 0 of row 0 starts and how far apart rows are.
#[derive(Clone, Copy)]
struct Input<'a> {
    data: &'a [f32],
    stride: usize,
    start: usize,
    head_dim: usize,
}

impl<'a> Input<'a> {
    /// Rows `row..` of head `head`, with row stride `self.stride`.
    fn head(&self, head: usize, row: usize) -> &'a [f32] {
        let at = row * self.stride + self.start + head * self.head_dim;
        // Past the last row there is nothing: an empty segment may start there.
        self.data.get(at..).unwrap_or_default()
    }
}

/// The inputs as slices, checked.
struct Problem<'a> {
    q: Input<'a>,
    k: Input<'a>,
    v: Input<'a>,
    heads: &'a Heads,
}

impl<'a> Problem<'a> {
    fn new(
        qkv: &Qkv<'_>,
        sizes: &Sizes,
        heads: &'a Heads,
        q: &'a [f32],
        k: &'a [f32],
        v: &'a [f32],
    ) -> Self {
        let input = |data, stride, start| Input { data, stride, start, head_dim: heads.head_dim };
        Self {
            q: input(q, sizes.q_width, qkv.q.start_col),
            k: input(k, sizes.k_width, qkv.k.start_col),
            v: input(v, sizes.v_width, qkv.v.start_col),
            heads,
        }
    }

    /// The key head that query head `head` reads.
    fn kv_head(&self, head: usize) -> usize {
        head / (self.heads.heads / self.heads.kv_heads)
    }

    fn scoring(&self, head: usize) -> rows::Scoring {
        scoring(self.heads, head)
    }
}

fn scoring(heads: &Heads, head: usize) -> rows::Scoring {
    rows::Scoring {
        scale: heads.scale,
        softcap: heads.softcap,
        alibi: heads.alibi.as_ref().map(|alibi| rows::Penalty {
            slope: alibi.slopes[head],
            factor: alibi.factor,
            bf16: alibi.bf16,
        }),
    }
}

struct Sizes {
    n_q: usize,
    q_width: usize,
    k_width: usize,
    v_width: usize,
}

fn invalid(message: String) -> Error {
    Error::Invalid { op: OP, message }
}

fn check(qkv: &Qkv<'_>, segments: &[Segment], heads: &Heads) -> Result<Sizes> {
    let Heads { heads: n, kv_heads, head_dim, .. } = *heads;
    if n == 0 || kv_heads == 0 || head_dim == 0 || n % kv_heads != 0 {
        return Err(invalid(format!("{n} heads of {head_dim} columns over {kv_heads} key heads")));
    }
    if heads.alibi.as_ref().is_some_and(|alibi| alibi.slopes.len() != n) {
        return Err(invalid(format!("ALiBi wants one slope for each of {n} heads")));
    }
    if heads.softcap.is_some_and(|cap| cap.is_nan() || cap <= 0.0) {
        return Err(invalid("the soft cap must be positive".into()));
    }
    if heads.window == Some(0) {
        return Err(invalid("a window of 0 keys".into()));
    }
    let dims = |name, cols: &Cols<'_>, wanted: usize| match *cols.tensor.dims() {
        [rows, width] if cols.start_col.checked_add(wanted).is_some_and(|end| end <= width) => {
            Ok((rows, width))
        }
        ref found => Err(invalid(format!(
            "{name}: {wanted} columns from {} on do not fit {found:?}",
            cols.start_col
        ))),
    };
    let (n_q, q_width) = dims("q", &qkv.q, n * head_dim)?;
    let (n_k, k_width) = dims("k", &qkv.k, kv_heads * head_dim)?;
    let (n_v, v_width) = dims("v", &qkv.v, kv_heads * head_dim)?;
    for segment in segments {
        let q_end = segment.q_start.checked_add(segment.q_len);
        let mut runs = segment.runs();
        let fits = q_end.is_some_and(|end| end <= n_q)
            && runs.all(|run| run.end().is_some_and(|end| end <= n_k.min(n_v)))
            && segment.q_len <= segment.kv_len
            && segment.keys().is_some();
        if !fits {
            return Err(invalid(format!(
                "{segment:?} does not fit {n_q} queries, {n_k} keys and {n_v} values"
            )));
        }
    }
    let mut queries: Vec<_> = segments.iter().map(|s| (s.q_start, s.q_len)).collect();
    disjoint("queries of two segments", &mut queries)?;
    Ok(Sizes { n_q, q_width, k_width, v_width })
}

/// Fails where two of the (start, length) ranges overlap; tasks write to them at the same time.
fn disjoint(what: &str, ranges: &mut [(usize, usize)]) -> Result<()> {
    ranges.sort_unstable();
    let mut end = 0;
    for &(start, len) in ranges.iter().filter(|(_, len)| *len > 0) {
        if start < end {
            return Err(invalid(format!("{what} overlap at {start}")));
        }
        end = start + len;
    }
    Ok(())
}

fn read_qkv<R>(qkv: &Qkv<'_>, f: impl FnOnce(&[f32], &[f32], &[f32]) -> R) -> Result<R> {
    let (q, k, v) = (qkv.q.tensor, qkv.k.tensor, qkv.v.tensor);
    if q.id() == k.id() && q.id() == v.id() {
        return read_f32(q, OP, |x| f(x, x, x));
    }
    read_f32(q, OP, |q| read_f32(k, OP, |k| read_f32(v, OP, |v| f(q, k, v))))??
}
