//! Against the same formula in f64 with candle's autograd over its differentiable operations, and
//! against central differences of that formula.

use std::slice;

use candle_core::{D, DType, Device, Tensor, Var};
use proptest::prelude::*;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;

fn random(rng: &mut ChaCha8Rng, rows: usize, cols: usize) -> Tensor {
    let values: Vec<f32> = (0..rows * cols).map(|_| rng.random_range(-1.5..1.5)).collect();
    Tensor::from_vec(values, (rows, cols), &Device::Cpu).unwrap()
}

fn f64s(t: &Tensor) -> Tensor {
    t.to_dtype(DType::F64).unwrap()
}

/// Attention as the book has it, in the dtype of its inputs, `[n_q, heads * head_dim]`.
fn plain(q: &Tensor, k: &Tensor, v: &Tensor, segments: &[Segment], heads: &Heads) -> Tensor {
    let head_dim = heads.head_dim;
    let zeros = |n| Tensor::zeros((n, heads.heads * head_dim), q.dtype(), q.device()).unwrap();
    let mut sorted = segments.to_vec();
    sorted.sort_by_key(|s| (s.q_start, s.q_len));
    let (mut rows, mut next) = (vec![], 0);
    for s in sorted.iter().filter(|s| s.q_len > 0) {
        rows.push(zeros(s.q_start - next));
        next = s.q_start + s.q_len;
        let outs: Vec<_> =
            (0..heads.heads).map(|head| plain_head(q, k, v, s, heads, head)).collect();
        rows.push(Tensor::cat(&outs, 1).unwrap());
    }
    rows.push(zeros(q.dim(0).unwrap() - next));
    Tensor::cat(&rows, 0).unwrap()
}

fn plain_head(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    s: &Segment,
    heads: &Heads,
    head: usize,
) -> Tensor {
    let head_dim = heads.head_dim;
    let part = |t: &Tensor, head: usize, start, len| {
        t.narrow(1, head * head_dim, head_dim).unwrap().narrow(0, start, len).unwrap()
    };
    let kv_head = head * heads.kv_heads / heads.heads;
    let q = part(q, head, s.q_start, s.q_len);
    let k = part(k, kv_head, s.kv_start, s.kv_len);
    let v = part(v, kv_head, s.kv_start, s.kv_len);
    let mut scores = (q.matmul(&k.t().unwrap()).unwrap() * f64::from(heads.scale)).unwrap();
    if let Some(cap) = heads.softcap.map(f64::from) {
        scores = ((scores / cap).unwrap().tanh().unwrap() * cap).unwrap();
    }
    let mut mask = vec![];
    for i in 0..s.q_len {
        let position = (s.kv_len - s.q_len + i) as i64;
        for j in 0..s.kv_len as i64 {
            let seen = j <= position && heads.window.is_none_or(|w| j > position - w as i64);
            let slope = heads
                .alibi
                .as_ref()
                .map_or(0.0, |alibi| f64::from(alibi.factor * alibi.slopes[head]));
            let penalty = match &heads.alibi {
                Some(alibi) if alibi.bf16 => {
                    let rounded = half::bf16::from_f32(alibi.slopes[head] * j as f32);
                    f64::from(alibi.factor) * f64::from(rounded)
                }
                _ => slope * (j - position) as f64,
            };
            mask.push(if seen { penalty } else { -1e30 });
        }
    }
    let mask = Tensor::from_vec(mask, (s.q_len, s.kv_len), q.device()).unwrap();
    let scores = (scores + mask.to_dtype(q.dtype()).unwrap()).unwrap();
    let max = scores.max_keepdim(D::Minus1).unwrap().detach();
    let exp = scores.broadcast_sub(&max).unwrap().exp().unwrap();
    let p = exp.broadcast_div(&exp.sum_keepdim(D::Minus1).unwrap()).unwrap();
    p.matmul(&v).unwrap()
}

/// The formula over one packed tensor.
fn plain_packed(x: &Tensor, segments: &[Segment], heads: &Heads) -> Tensor {
    let (n, m) = (heads.heads * heads.head_dim, heads.kv_heads * heads.head_dim);
    let at = |start, len| x.narrow(1, start, len).unwrap();
    plain(&at(0, n), &at(n, m), &at(n + m, m), segments, heads)
}

fn inner(a: &Tensor, b: &Tensor) -> f64 {
    (f64s(a) * f64s(b)).unwrap().sum_all().unwrap().to_scalar().unwrap()
}

/// Largest difference, as a part of the largest expected magnitude (or of 1).
fn difference(found: &Tensor, expected: &Tensor) -> f64 {
    let max = |t: &Tensor| -> f64 {
        let t = t.abs().unwrap().flatten_all().unwrap();
        if t.elem_count() == 0 { 0.0 } else { t.max(0).unwrap().to_scalar().unwrap() }
    };
    max(&(f64s(found) - expected).unwrap()) / max(expected).max(1.0)
}

/// Forward and backward of random data against the formula; the packed tensor has `n` rows.
fn check(seed: u64, n: usize, segments: &[Segment], heads: &Heads) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let width = (heads.heads + 2 * heads.kv_heads) * heads.head_dim;
    let x = random(&mut rng, n, width);
    let dout = random(&mut rng, n, heads.heads * heads.head_dim);
    let qkv = Qkv::packed(&x, heads);
    let saved = forward(&qkv, segments, heads).unwrap();
    let dqkv = backward(&qkv, segments, heads, &saved, &dout).unwrap();

    let var = Var::from_tensor(&f64s(&x)).unwrap();
    let out = plain_packed(&var, segments, heads);
    assert!(difference(&saved.out, &out) < 3e-6, "out: {:e}", difference(&saved.out, &out));
    let loss = (&out * f64s(&dout)).unwrap().sum_all().unwrap();
    let grads = loss.backward().unwrap();
    let expected = grads.get(&var).cloned().unwrap_or_else(|| var.zeros_like().unwrap());
    assert!(difference(&dqkv, &expected) < 6e-6, "dqkv: {:e}", difference(&dqkv, &expected));

    let (direction, step) = (random(&mut rng, n, width), 1e-4);
    let moved = |by: f64| {
        let x = (f64s(&x) + (f64s(&direction) * by).unwrap()).unwrap();
        inner(&plain_packed(&x, segments, heads), &dout)
    };
    let slope = (moved(step) - moved(-step)) / (2.0 * step);
    let found = inner(&dqkv, &direction);
    let size = inner(&dqkv, &dqkv).sqrt() * inner(&direction, &direction).sqrt();
    assert!((slope - found).abs() <= 2e-6 * size + 1e-6, "slope {slope}, found {found}");
}

fn heads(heads: usize, kv_heads: usize, head_dim: usize) -> Heads {
    let scale = 1.0 / (head_dim as f32).sqrt();
    Heads { heads, kv_heads, head_dim, scale, window: None, softcap: None, alibi: None }
}

#[test]
fn documents_longer_than_a_block() {
    let segments =
        [Segment::document(0, 130), Segment::document(130, 64), Segment::document(194, 65)];
    check(1, 260, &segments, &heads(4, 4, 64));
    check(2, 260, &segments, &heads(6, 2, 80));
    check(3, 260, &segments, &heads(3, 1, 96));
}

#[test]
fn window_softcap_and_alibi_together() {
    let segments = [Segment::document(0, 150), Segment::document(151, 7)];
    let slopes = vec![0.5, 0.25, 0.125, 0.0625];
    let all = Heads {
        window: Some(67),
        softcap: Some(0.7),
        alibi: Some(slopes.into()),
        ..heads(4, 2, 24)
    };
    check(4, 160, &segments, &all);
    check(5, 160, &segments, &Heads { window: Some(1), ..heads(2, 1, 5) });
    check(6, 160, &segments, &Heads { softcap: Some(2.0), ..heads(2, 2, 16) });
    check(7, 160, &segments, &Heads { alibi: Some(vec![1.0, -0.5].into()), ..heads(2, 2, 16) });
    let rounded = Alibi { slopes: vec![0.7, 0.3], factor: 0.25, bf16: true };
    check(8, 160, &segments, &Heads { alibi: Some(rounded), ..heads(2, 2, 16) });
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(48) })]

    #[test]
    fn odd_shapes(
        seed: u64,
        documents in prop::collection::vec((0usize..4, 0usize..80, 0usize..90), 0..4),
        (kv_heads, group) in (1usize..4, 1usize..4),
        head_dim in prop::sample::select(vec![1usize, 2, 7, 16, 17, 33, 64, 80]),
        window in prop::option::of(1usize..100),
        softcap in prop::option::of(0.5f32..5.0),
        alibi: bool,
    ) {
        let (mut segments, mut row) = (vec![], 0);
        for (gap, q_len, more_keys) in documents {
            row += gap;
            let kv_len = q_len + more_keys * usize::from(q_len % 2 == 0);
            segments.push(Segment::continued((row + kv_len - q_len, q_len), (row, kv_len)));
            row += kv_len;
        }
        segments.reverse();
        let n = kv_heads * group;
        let alibi = alibi.then(|| (1..=n).map(|h| 0.8 / h as f32).collect::<Vec<_>>().into());
        check(seed, row + 1, &segments, &Heads { window, softcap, alibi, ..heads(n, kv_heads, head_dim) });
    }
}

#[test]
fn decoding_from_a_cache_gives_the_rows_of_the_whole() {
    let mut rng = ChaCha8Rng::seed_from_u64(8);
    let heads = Heads { window: Some(90), alibi: Some(vec![0.1; 4].into()), ..heads(4, 2, 20) };
    let (q, k, v) =
        (random(&mut rng, 200, 80), random(&mut rng, 210, 40), random(&mut rng, 210, 40));
    fn cols(tensor: &Tensor) -> Cols<'_> {
        Cols { tensor, start_col: 0 }
    }
    let whole = Segment::continued((0, 200), (3, 200));
    let (k, v) = (cols(&k), cols(&v));
    let all = forward(&Qkv { q: cols(&q), k, v }, slice::from_ref(&whole), &heads).unwrap();
    let plain = plain(&f64s(&q), &f64s(k.tensor), &f64s(v.tensor), &[whole], &heads);
    assert!(difference(&all.out, &plain) < 3e-6);
    for q_len in [1, 2, 4, 5, 30] {
        let new = q.narrow(0, 200 - q_len, q_len).unwrap();
        let segment = Segment::continued((0, q_len), (3, 200));
        let some = forward(&Qkv { q: cols(&new), k, v }, &[segment], &heads).unwrap();
        let rows = plain.narrow(0, 200 - q_len, q_len).unwrap();
        assert!(difference(&some.out, &rows) < 3e-6, "{q_len} queries");
        let lse = f64s(&all.lse.narrow(1, 200 - q_len, q_len).unwrap().contiguous().unwrap());
        assert!(difference(&some.lse, &lse) < 2e-6, "{q_len} queries");
    }
}

/// A run of a tree of sequences.
struct Node {
    parent: Option<usize>,
    /// Its rows among the keys and values.
    run: Run,
    /// The last so many of its tokens ask; those before them were there already.
    q_len: usize,
}

/// Each node's queries over its ancestors' runs against the same over its path copied together.
fn check_tree(seed: u64, nodes: &[Node], heads: &Heads) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let rows = nodes.iter().map(|node| node.run.start + node.run.len).max().unwrap_or(0) + 1;
    let queries: usize = nodes.iter().map(|node| node.q_len).sum();
    let q = random(&mut rng, queries, heads.heads * heads.head_dim);
    let [k, v] = [(); 2].map(|()| random(&mut rng, rows, heads.kv_heads * heads.head_dim));
    fn cols(tensor: &Tensor) -> Cols<'_> {
        Cols { tensor, start_col: 0 }
    }
    let path = |mut node: usize| {
        let mut runs = vec![];
        while let Some(parent) = nodes[node].parent {
            runs.insert(0, nodes[parent].run);
            node = parent;
        }
        runs
    };
    let mut q_start = 0;
    let segments: Vec<_> = (0..nodes.len())
        .map(|i| {
            let Node { run, q_len, .. } = nodes[i];
            let own = Segment::continued((q_start, q_len), (run.start, run.len));
            q_start += q_len;
            own.after(path(i))
        })
        .collect();
    let tree = forward(&Qkv { q: cols(&q), k: cols(&k), v: cols(&v) }, &segments, heads).unwrap();
    for (i, node) in nodes.iter().enumerate() {
        let runs: Vec<Run> = path(i).into_iter().chain([node.run]).collect();
        let together = |t: &Tensor| {
            let parts: Vec<_> =
                runs.iter().map(|run| t.narrow(0, run.start, run.len).unwrap()).collect();
            Tensor::cat(&parts, 0).unwrap()
        };
        let (start, len) = (segments[i].q_start, node.q_len);
        let (q, k, v) = (q.narrow(0, start, len).unwrap(), together(&k), together(&v));
        let whole = Segment::continued((0, len), (0, k.dim(0).unwrap()));
        let qkv = Qkv { q: cols(&q), k: cols(&k), v: cols(&v) };
        let whole = forward(&qkv, &[whole], heads).unwrap();
        let out = difference(&tree.out.narrow(0, start, len).unwrap(), &f64s(&whole.out));
        let lse = tree.lse.narrow(1, start, len).unwrap();
        let lse = difference(&lse, &f64s(&whole.lse));
        // ALiBi's penalties reach scores of 40, whose last bit moves a probability by 4e-6.
        let tolerance = if heads.alibi.is_some() { 4e-6 } else { 1e-6 };
        assert!(out < tolerance && lse < 1e-6, "node {i}: out {out:e}, lse {lse:e}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) })]

    #[test]
    fn a_tree_gives_what_its_sequences_give(
        seed: u64,
        shapes in prop::collection::vec((any::<prop::sample::Index>(), 1usize..90, 0usize..90, 0usize..3), 1..7),
        backwards: bool,
        (kv_heads, group) in (1usize..4, 1usize..4),
        head_dim in prop::sample::select(vec![1usize, 7, 16, 33, 64]),
        window in prop::option::of(1usize..150),
        softcap in prop::option::of(0.5f32..5.0),
        alibi in prop::sample::select(vec![None, Some(false), Some(true)]),
    ) {
        // Nodes lie in the order of their birth, or the other way round, with gaps or without.
        let mut start = 0;
        let mut nodes: Vec<Node> = shapes
            .iter()
            .enumerate()
            .map(|(i, (parent, len, q_len, gap))| {
                let parent = parent.index(i + 1).checked_sub(1);
                let node = Node { parent, run: Run { start, len: *len }, q_len: *q_len.min(len) };
                start += len + gap;
                node
            })
            .collect();
        if backwards {
            nodes.iter_mut().for_each(|node| node.run.start = start - node.run.start - node.run.len);
        }
        let n = kv_heads * group;
        let slopes = (1..=n).map(|h| 0.8 / h as f32).collect();
        let alibi = alibi.map(|bf16| Alibi { slopes, factor: 0.5, bf16 });
        check_tree(seed, &nodes, &Heads { window, softcap, alibi, ..heads(n, kv_heads, head_dim) });
    }
}

#[test]
fn siblings_of_any_length_share_blocks() {
    // Branches of a branch, so that the prefix is two runs; some have keys from before.
    let mut start = 0;
    let mut node = |parent, len, q_len| {
        let run = Run { start, len };
        start += len + 1;
        Node { parent, run, q_len }
    };
    let mut nodes = vec![node(None, 70, 70), node(Some(0), 30, 3)];
    nodes.extend([1, 2, 3, 20, 64, 65, 1, 90, 5].map(|len| node(Some(1), len, len)));
    nodes.extend([(4, 2), (40, 0), (9, 9)].map(|(len, q_len)| node(Some(1), len, q_len)));
    nodes.extend([1, 1].map(|len| node(Some(0), len, len)));
    let alibi = Some(vec![0.5, 0.25, 0.125, 0.0625].into());
    check_tree(11, &nodes, &heads(4, 2, 24));
    check_tree(12, &nodes, &Heads { alibi: alibi.clone(), softcap: Some(2.0), ..heads(4, 4, 17) });
    check_tree(13, &nodes, &Heads { alibi, window: Some(80), ..heads(4, 1, 16) });
}

#[test]
fn rows_of_no_segment_are_zero() {
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    let heads = heads(2, 1, 8);
    let x = random(&mut rng, 12, 32);
    let qkv = Qkv::packed(&x, &heads);
    let dout = random(&mut rng, 12, 16);
    for segments in [&[] as &[_], &[Segment::document(3, 5), Segment::document(0, 0)]] {
        let saved = forward(&qkv, segments, &heads).unwrap();
        let dqkv = backward(&qkv, segments, &heads, &saved, &dout).unwrap();
        for (row, (out, grad)) in
            std::iter::zip(saved.out.to_vec2::<f32>().unwrap(), dqkv.to_vec2::<f32>().unwrap())
                .enumerate()
        {
            let covered = !segments.is_empty() && (3..8).contains(&row);
            assert_eq!(out.iter().any(|&x| x != 0.0), covered, "row {row}");
            assert_eq!(grad.iter().any(|&x| x != 0.0), covered, "row {row}");
        }
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    let mut rng = ChaCha8Rng::seed_from_u64(10);
    let heads = heads(6, 2, 40);
    let x = random(&mut rng, 300, 400);
    let dout = random(&mut rng, 300, 240);
    let segments = [Segment::document(0, 170), Segment::document(170, 130)];
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let qkv = Qkv::packed(&x, &heads);
            let saved = forward(&qkv, &segments, &heads).unwrap();
            let dqkv = backward(&qkv, &segments, &heads, &saved, &dout).unwrap();
            [saved.out, saved.lse, dqkv].map(|t| {
                let values = t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                values.into_iter().map(f32::to_bits).collect::<Vec<_>>()
            })
        })
    };
    let one = run(1);
    assert!(one == run(2) && one == run(3));
}

#[test]
fn a_nan_reaches_the_output() {
    let heads = heads(1, 1, 4);
    let mut values = vec![0.5f32; 70 * 12];
    values[69 * 12 + 5] = f32::NAN;
    let x = Tensor::from_vec(values, (70, 12), &Device::Cpu).unwrap();
    let saved = forward(&Qkv::packed(&x, &heads), &[Segment::document(0, 70)], &heads).unwrap();
    assert!(saved.out.to_vec2::<f32>().unwrap()[69].iter().all(|x| x.is_nan()));
}

#[test]
fn contradictions_are_errors() {
    let x = Tensor::zeros((6, 32), DType::F32, &Device::Cpu).unwrap();
    let good = heads(2, 1, 8);
    let all = Segment::document(0, 6);
    let run =
        |segments: &[Segment], heads: &Heads| forward(&Qkv::packed(&x, heads), segments, heads);
    assert!(run(slice::from_ref(&all), &good).is_ok());
    for bad in [
        heads(3, 2, 8),
        heads(0, 0, 8),
        heads(2, 1, 9),
        Heads { alibi: Some(vec![1.0].into()), ..good.clone() },
        Heads { softcap: Some(0.0), ..good.clone() },
        Heads { window: Some(0), ..good.clone() },
    ] {
        assert!(run(slice::from_ref(&all), &bad).is_err(), "{bad:?}");
    }
    for bad in [
        Segment { kv_len: 5, ..all.clone() },
        Segment { q_start: 1, ..all.clone() },
        Segment { kv_start: usize::MAX, ..all.clone() },
        all.clone().after([Run { start: 5, len: 2 }]),
        all.clone().after([Run { start: 1, len: usize::MAX }]),
    ] {
        assert!(run(slice::from_ref(&bad), &good).is_err(), "{bad:?}");
    }
    assert!(run(&[all.clone(), Segment::document(5, 1)], &good).is_err());
    // Shared keys are fine for forward only.
    let prefix = [Segment::continued((2, 2), (0, 4)), Segment::continued((4, 2), (0, 6))];
    let saved = run(&prefix, &good).unwrap();
    let qkv = Qkv::packed(&x, &good);
    assert!(backward(&qkv, &prefix, &good, &saved, &saved.out).is_err());
    assert!(backward(&qkv, slice::from_ref(&all), &good, &saved, &x).is_err());
    let branch = Segment::document(4, 2).after([Run { start: 0, len: 2 }]);
    let found = backward(&qkv, &[branch], &good, &saved, &saved.out);
    assert!(matches!(found, Err(Error::Unsupported { .. })), "{found:?}");
    let double = x.to_dtype(DType::F64).unwrap();
    let found = forward(&Qkv::packed(&double, &good), slice::from_ref(&all), &good);
    assert!(matches!(found, Err(Error::NoKernel { .. })));
    let slanted = Tensor::zeros((32, 6), DType::F32, &Device::Cpu).unwrap().t().unwrap();
    let found = forward(&Qkv::packed(&slanted, &good), slice::from_ref(&all), &good);
    assert!(matches!(found, Err(Error::NotContiguous { .. })));
}
