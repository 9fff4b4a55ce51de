//! The kernels of decoding against plain f64 arithmetic on the weights as they are stored.

use candle_core::{DType, Device, Tensor};
use relufy_ops::attention::{Alibi, Heads};
use relufy_ops::decode::{
    Attention, AttentionPlan, BATCHES, COUNTS, Embedding, Format, GpuMatrix, Graph, Input, KvCache,
    Norm, Output, PairsByInput, Room, Tiles, UpRows, Words, advance, argmax, attend, embed,
    gate_and_up, pairs_by_input, project_by_input, project_by_input_in, project_by_output,
    read_bandwidth, up_rows,
};
use relufy_ops::pointwise::Pointwise;
use relufy_ops::rope::{RopePairs, RopeTable};

use crate::common::{Random, Trials, gpu, nan, on_gpu, values};

pub fn trials() -> Trials {
    vec![
        ("decode_packs_weights", packs_weights),
        ("decode_projects_by_input", projects_by_input),
        ("decode_projects_by_input_in_any_tiles", projects_by_input_in_any_tiles),
        ("decode_does_not_read_rows_of_zeros", does_not_read_rows_of_zeros),
        ("decode_projects_by_output", projects_by_output),
        ("decode_adds_to_the_residual_stream", adds_to_the_residual_stream),
        ("decode_gate_and_up", gates),
        ("decode_up_of_open_gates", up_of_open_gates),
        ("decode_pairs_by_input", pairs),
        ("decode_attention", attention),
        ("decode_attention_of_long_sequences", attention_of_long_sequences),
        ("decode_attention_out_of_range", attention_out_of_range),
        ("decode_tokens", tokens),
        ("decode_replays_graphs", replays_graphs),
        ("decode_graphs_may_fail", graphs_may_fail),
        ("decode_refuses_what_does_not_fit", refuses_what_does_not_fit),
        ("decode_reads_memory", reads_memory),
    ]
}

/// What f32 sums and a norm in f32 may differ from f64, relative by norm.
const CLOSE: f64 = 1e-5;

/// Widths and outputs: one, odd ones, several slabs of a row, several chunks of a list.
const SIZES: [(usize, usize); 7] =
    [(1, 1), (63, 65), (65, 63), (200, 300), (4096, 200), (300, 11008), (11008, 130)];

fn there(v: &[f64], shape: &[usize]) -> Tensor {
    let v: Vec<f32> = v.iter().map(|v| *v as f32).collect();
    Tensor::from_vec(v, shape, &Device::Cpu).unwrap().to_device(gpu()).unwrap()
}

/// Numbers of which a share is not zero, exact in bf16.
fn some(random: &mut Random, shape: (usize, usize), density: f64) -> Vec<f64> {
    let draws = random.ids(shape.0 * shape.1, 1000);
    let all = values(&random.tensor(shape));
    let kept = |(v, draw): (f64, u32)| if f64::from(draw) < 1000.0 * density { v } else { 0.0 };
    all.into_iter().zip(draws).map(kept).collect()
}

fn vector(random: &mut Random, len: usize) -> Vec<f64> {
    values(&random.tensor(len))
}

/// `[rows, cols]` weights on the GPU and as they are stored.
fn weights(
    random: &mut Random,
    format: Format,
    (rows, cols): (usize, usize),
) -> (GpuMatrix, Vec<f64>) {
    let matrix = GpuMatrix::pack(&on_gpu(&random.tensor((rows, cols)), DType::F32), false, format);
    let matrix = matrix.unwrap();
    let stored = matrix.to_host().unwrap().into_iter().map(f64::from).collect();
    (matrix, stored)
}

fn curve(f: Pointwise, x: f64) -> f64 {
    match f {
        Pointwise::Identity => x,
        Pointwise::Silu => x / (1.0 + (-x).exp()),
        Pointwise::Relu => x.max(0.0),
        Pointwise::ShiftedRelu { shift } => (x - f64::from(shift)).max(0.0),
        Pointwise::FatRelu { threshold } if x < f64::from(threshold) => 0.0,
        Pointwise::FatRelu { .. } => x,
        _ => unreachable!("not in these tests"),
    }
}

/// A norm's parameters.
struct Plain {
    centred: bool,
    gain: Vec<f64>,
    bias: Option<Vec<f64>>,
}

const EPS: f64 = 1e-3;

impl Plain {
    fn new(random: &mut Random, width: usize, centred: bool) -> Plain {
        let bias = centred.then(|| vector(random, width));
        Plain { centred, gain: vector(random, width), bias }
    }

    fn there(&self) -> Norm {
        let len = &[self.gain.len()];
        Norm {
            centred: self.centred,
            eps: EPS as f32,
            gain: there(&self.gain, len),
            bias: self.bias.as_ref().map(|bias| there(bias, len)),
        }
    }

    fn apply(&self, x: &[f64]) -> Vec<f64> {
        let n = x.len() as f64;
        let mean = if self.centred { x.iter().sum::<f64>() / n } else { 0.0 };
        let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
        let factor = 1.0 / (variance + EPS).sqrt();
        let bias = |i: usize| self.bias.as_ref().map_or(0.0, |bias| bias[i]);
        x.iter().enumerate().map(|(i, x)| (x - mean) * factor * self.gain[i] + bias(i)).collect()
    }
}

fn masked(x: f64, mask: Option<&Vec<f64>>, at: usize) -> f64 {
    mask.map_or(x, |mask| mask[at] * (x.abs() + f64::from(1e-3f32)))
}

/// What enters a matrix, `[batch, width]`.
fn entering(
    x: &[f64],
    width: usize,
    norm: Option<&Plain>,
    (op, then): (Pointwise, Pointwise),
    mask: Option<&Vec<f64>>,
) -> Vec<f64> {
    let rows = x.chunks(width).map(|row| norm.map_or(row.to_vec(), |norm| norm.apply(row)));
    let site = |(i, v): (usize, f64)| curve(then, masked(curve(op, v), mask, i));
    rows.flat_map(|row| row.into_iter().enumerate().map(site).collect::<Vec<_>>()).collect()
}

/// `x W^T` with `w` `[outputs, width]`.
fn product(x: &[f64], w: &[f64], width: usize) -> Vec<f64> {
    let row = |x: &[f64]| -> Vec<f64> {
        w.chunks(width).map(|w| x.iter().zip(w).map(|(x, w)| x * w).sum()).collect()
    };
    x.chunks(width).flat_map(row).collect()
}

fn transposed(w: &[f64], cols: usize) -> Vec<f64> {
    let rows = w.len() / cols;
    (0..w.len()).map(|i| w[i % rows * cols + i / rows]).collect()
}

fn plus_bias(mut y: Vec<f64>, bias: &[f64]) -> Vec<f64> {
    y.chunks_mut(bias.len()).for_each(|y| y.iter_mut().zip(bias).for_each(|(y, b)| *y += b));
    y
}

/// The counts' record for what enters.
fn counted(x: &[f64], width: usize) -> Vec<u32> {
    let mut counts = vec![0; COUNTS];
    for i in 0..width {
        counts[0] += u32::from(x.chunks(width).any(|row| row[i] != 0.0));
    }
    for (b, row) in x.chunks(width).enumerate() {
        counts[1 + b] = row.iter().filter(|x| **x != 0.0).count() as u32;
    }
    counts
}

#[track_caller]
fn assert_near(what: &str, found: &Tensor, expected: &[f64]) {
    let found = values(found);
    assert_eq!(found.len(), expected.len(), "{what}");
    let far: f64 = found.iter().zip(expected).map(|(f, e)| (f - e).powi(2)).sum();
    let size: f64 = expected.iter().map(|e| e * e).sum();
    let distance = (far / size.max(f64::MIN_POSITIVE)).sqrt();
    assert!(distance <= CLOSE || far == 0.0, "{what}: {distance:.2e} off, {CLOSE:.0e} allowed");
}

#[track_caller]
fn assert_same_bits(what: &str, one: &Tensor, other: &Tensor) {
    let bits = |t: &Tensor| values(t).into_iter().map(f64::to_bits).collect::<Vec<_>>();
    assert!(bits(one) == bits(other), "{what}: differs");
}

fn room() -> Room {
    Room::new(gpu(), 8, 11008, 71, 256).unwrap()
}

fn packs_weights() {
    let random = &mut Random::new(1);
    for (rows, cols) in SIZES {
        let t = random.tensor((rows, cols));
        let plain: Vec<f32> = t.flatten_all().unwrap().to_vec1().unwrap();
        for format in Format::ALL {
            for dtype in [DType::F32, DType::BF16] {
                let there = on_gpu(&t, dtype);
                let across = on_gpu(&t.t().unwrap().contiguous().unwrap(), dtype);
                let matrix = GpuMatrix::pack(&there, false, format).unwrap();
                let found = matrix.to_host().unwrap();
                let turned = GpuMatrix::pack(&across, true, format).unwrap();
                assert_eq!((turned.rows(), turned.cols()), (rows, cols));
                assert_eq!(found, turned.to_host().unwrap());
                for (row, found) in plain.chunks(cols).zip(found.chunks(cols)) {
                    let largest = row.iter().fold(0f32, |most, x| most.max(x.abs()));
                    let unit = if format == Format::Int8 { largest / 127.0 } else { 0.0 };
                    for (x, found) in row.iter().zip(found) {
                        assert!((x - found).abs() <= 0.5001 * unit, "{format:?}: {found} of {x}");
                    }
                }
            }
        }
    }
    let drawn =
        GpuMatrix::random(gpu(), Format::Bf16, 300, 500, 0.5, 7).unwrap().to_host().unwrap();
    let variance = drawn.iter().map(|x| x * x).sum::<f32>() / drawn.len() as f32;
    assert!((variance.sqrt() - 0.5).abs() < 0.01, "{variance}");
}

/// Ways in: nothing, a ReLU, norms with a site, a mask, two activations.
fn ways(random: &mut Random, width: usize) -> Vec<(Option<Plain>, (Pointwise, Pointwise), bool)> {
    let id = Pointwise::Identity;
    let relu = Pointwise::Relu;
    vec![
        (None, (id, id), false),
        (None, (relu, id), false),
        (Some(Plain::new(random, width, false)), (relu, id), false),
        (
            Some(Plain::new(random, width, true)),
            (Pointwise::ShiftedRelu { shift: 0.25 }, id),
            false,
        ),
        (Some(Plain::new(random, width, false)), (id, id), true),
        (None, (Pointwise::Silu, Pointwise::FatRelu { threshold: 0.5 }), false),
    ]
}

fn check_projection(
    random: &mut Random,
    format: Format,
    batch: usize,
    (width, outputs): (usize, usize),
    by_input: bool,
    density: f64,
) {
    let stored = if by_input { (width, outputs) } else { (outputs, width) };
    let (matrix, plain) = weights(random, format, stored);
    let plain = if by_input { transposed(&plain, outputs) } else { plain };
    let room = room();
    for (norm, (op, then), with_mask) in ways(random, width) {
        let x = some(random, (batch, width), density);
        let mask: Vec<f64> =
            some(random, (1, width), 0.4).iter().map(|m| f64::from(*m != 0.0)).collect();
        let mask = with_mask.then_some(mask);
        let bias = vector(random, outputs);
        let entered = entering(&x, width, norm.as_ref(), (op, then), mask.as_ref());
        let expected = plus_bias(product(&entered, &plain, width), &bias);

        let (x, bias) = (there(&x, &[batch, width]), there(&bias, &[outputs]));
        let mask = mask.map(|mask| there(&mask, &[width]));
        let norm = norm.map(|norm| norm.there());
        let h = nan((batch, width), DType::F32);
        let counts = Words::zeros(gpu(), 2 * COUNTS).unwrap();
        let input = Input {
            norm: norm.as_ref(),
            op,
            mask: mask.as_ref(),
            then,
            h: Some(&h),
            counts: Some((&counts, COUNTS)),
            ..Input::new(&x)
        };
        let run = |input: &Input<'_>| {
            let y = nan((batch, outputs), DType::F32);
            let output = Output::new(&y, Some(&bias));
            match by_input {
                true => project_by_input(input, &matrix, &output, &room).unwrap(),
                false => project_by_output(input, &matrix, &output).unwrap(),
            }
            y
        };
        let what = format!("{format:?} {batch} x {width} -> {outputs}, {op:?} at {density}");
        let y = run(&input);
        assert_near(&what, &y, &expected);
        assert_near(&format!("{what}: h"), &h, &entered);
        let counts = counts.read().unwrap();
        assert_eq!(counts[..COUNTS], [0; COUNTS], "{what}");
        assert_eq!(counts[COUNTS..], counted(&entered, width), "{what}");
        assert_same_bits(&what, &y, &run(&Input { h: None, counts: None, ..input }));
    }
}

fn check_projections(by_input: bool) {
    let random = &mut Random::new(2);
    for format in Format::ALL {
        for batch in BATCHES {
            for (n, size) in SIZES.into_iter().enumerate() {
                let density = [0.3, 1.0, 0.0, 0.5][(n + batch) % 4];
                check_projection(random, format, batch, size, by_input, density);
            }
        }
        check_projection(random, format, 1, (4096, 200), by_input, 0.0);
        check_projection(random, format, 8, (4096, 200), by_input, 1.0);
    }
}

fn projects_by_input() {
    check_projections(true);
}

fn projects_by_output() {
    check_projections(false);
}

fn projects_by_input_in_any_tiles() {
    let random = &mut Random::new(3);
    let room = room();
    for format in Format::ALL {
        for batch in BATCHES {
            let (width, outputs) = (700, 1000);
            let (matrix, plain) = weights(random, format, (width, outputs));
            let x = some(random, (batch, width), 0.3);
            let expected = product(&x, &transposed(&plain, outputs), width);
            let x = there(&x, &[batch, width]);
            for columns in [32, 64, 96, 128, 160, 256, 512] {
                for shares in [1, 2, 7, 32] {
                    let y = nan((batch, outputs), DType::F32);
                    let tiles = Tiles { columns, shares };
                    let output = Output::new(&y, None);
                    project_by_input_in(tiles, &Input::new(&x), &matrix, &output, &room).unwrap();
                    assert_near(&format!("{format:?} {batch} {tiles:?}"), &y, &expected);
                }
            }
        }
    }
}

fn does_not_read_rows_of_zeros() {
    let random = &mut Random::new(4);
    let (width, outputs) = (130, 70);
    let mut x = some(random, (2, width), 0.5);
    x[5] = f64::from(-0.0f32);
    x[width + 5] = 0.0;
    let mut w = vector(random, width * outputs);
    for i in 0..width {
        if x[i] == 0.0 && x[width + i] == 0.0 {
            w[i * outputs..(i + 1) * outputs].fill(f64::NAN);
        }
    }
    let matrix = GpuMatrix::pack(&there(&w, &[width, outputs]), false, Format::F32).unwrap();
    let y = nan((2, outputs), DType::F32);
    let x_there = there(&x, &[2, width]);
    let output = Output::new(&y, None);
    project_by_input(&Input::new(&x_there), &matrix, &output, &room()).unwrap();
    w.iter_mut().filter(|w| w.is_nan()).for_each(|w| *w = 0.0);
    assert_near("skipped", &y, &product(&x, &transposed(&w, outputs), width));
}

fn adds_to_the_residual_stream() {
    let random = &mut Random::new(5);
    let room = room();
    for (batch, width, outputs) in [(1, 300, 200), (2, 4096, 4096), (8, 63, 65)] {
        for by_input in [true, false] {
            let shape = if by_input { (width, outputs) } else { (outputs, width) };
            let (matrix, plain) = weights(random, Format::Bf16, shape);
            let plain = if by_input { transposed(&plain, outputs) } else { plain };
            let (x, y) = (some(random, (batch, width), 0.4), some(random, (batch, outputs), 1.0));
            let bias = vector(random, outputs);
            let sum = plus_bias(product(&x, &plain, width), &bias);
            let (x, bias) = (there(&x, &[batch, width]), there(&bias, &[outputs]));
            let (added, capped) = (there(&y, &[batch, outputs]), nan((batch, outputs), DType::F32));
            let output = Output::residual(&added, Some(&bias));
            let cap = Output { softcap: Some(30.0), ..Output::new(&capped, Some(&bias)) };
            for output in [output, cap] {
                match by_input {
                    true => project_by_input(&Input::new(&x), &matrix, &output, &room).unwrap(),
                    false => project_by_output(&Input::new(&x), &matrix, &output).unwrap(),
                }
            }
            let expected: Vec<f64> = sum.iter().zip(&y).map(|(sum, y)| sum + y).collect();
            assert_near("added", &added, &expected);
            let expected: Vec<f64> = sum.iter().map(|sum| 30.0 * (sum / 30.0).tanh()).collect();
            assert_near("capped", &capped, &expected);
        }
    }
}

fn gates() {
    let random = &mut Random::new(6);
    for format in Format::ALL {
        for batch in BATCHES {
            for (width, ffn) in [(1, 40), (63, 300), (200, 65), (4096, 1100)] {
                let (gate, gate_plain) = weights(random, format, (ffn, width));
                let (up, up_plain) = weights(random, format, (ffn, width));
                let (gate_bias, up_bias) = (vector(random, ffn), vector(random, ffn));
                let norm = Plain::new(random, width, false);
                let x = some(random, (batch, width), 1.0);
                let id = Pointwise::Identity;
                let h = entering(&x, width, Some(&norm), (id, id), None);
                let acts = (Pointwise::Silu, Pointwise::Relu);
                let opened = plus_bias(product(&h, &gate_plain, width), &gate_bias);
                let raised = plus_bias(product(&h, &up_plain, width), &up_bias);
                let both = opened.iter().zip(raised);
                let expected: Vec<f64> =
                    both.map(|(gate, up)| curve(acts.1, curve(acts.0, *gate) * up)).collect();
                let (x, norm) = (there(&x, &[batch, width]), norm.there());
                let biases = (there(&gate_bias, &[ffn]), there(&up_bias, &[ffn]));
                let products = nan((batch, ffn), DType::F32);
                let input = Input::normed(&x, &norm, id);
                let (gate, up) = ((&gate, Some(&biases.0)), (&up, Some(&biases.1)));
                gate_and_up(&input, gate, up, acts, &products).unwrap();
                assert_near(&format!("{format:?} {batch} {width} {ffn}"), &products, &expected);
            }
        }
    }
}

fn up_of_open_gates() {
    let random = &mut Random::new(7);
    for format in Format::ALL {
        for batch in BATCHES {
            for (width, ffn) in
                [(1, 1), (63, 300), (200, 65), (4096, 300), (65, 11008), (64, 20000)]
            {
                for (density, with_mask) in [(0.0, false), (0.3, false), (1.0, false), (1.0, true)]
                {
                    let (up, plain) = weights(random, format, (ffn, width));
                    let (h, bias) = (some(random, (batch, width), 0.6), vector(random, ffn));
                    let gate = some(random, (batch, ffn), density);
                    let mask: Vec<f64> =
                        some(random, (1, ffn), 0.2).iter().map(|m| f64::from(*m != 0.0)).collect();
                    let mask = with_mask.then_some(mask);
                    let acts = (Pointwise::Relu, Pointwise::Relu);
                    let open =
                        entering(&gate, ffn, None, (acts.0, Pointwise::Identity), mask.as_ref());
                    let raised = plus_bias(product(&h, &plain, width), &bias);
                    let expected: Vec<f64> = open
                        .iter()
                        .zip(raised)
                        .map(|(gate, up)| curve(acts.1, gate * up))
                        .collect();
                    let (gate, h) = (there(&gate, &[batch, ffn]), there(&h, &[batch, width]));
                    let bias = there(&bias, &[ffn]);
                    let mask = mask.map(|mask| there(&mask, &[ffn]));
                    let counts = Words::zeros(gpu(), COUNTS).unwrap();
                    let run = || {
                        let products = nan((batch, ffn), DType::F32);
                        up_rows(&UpRows {
                            gate: &gate,
                            activation: acts.0,
                            mask: mask.as_ref(),
                            h: &h,
                            up: &up,
                            bias: Some(&bias),
                            then: acts.1,
                            products: &products,
                            counts: Some((&counts, 0)),
                        })
                        .unwrap();
                        products
                    };
                    let what = format!("{format:?} {batch} x {width}, {ffn} at {density}");
                    let products = run();
                    assert_near(&what, &products, &expected);
                    assert_eq!(counts.read().unwrap(), counted(&open, ffn), "{what}");
                    assert_same_bits(&what, &products, &run());
                }
            }
        }
    }
}

/// `[ffn, width]` weights of gates (0) or of `up` (1) as they are stored side by side.
fn half_of_pairs(pairs: &GpuMatrix, ffn: usize, which: usize) -> Vec<f64> {
    let (stored, columns) = (pairs.to_host().unwrap(), pairs.cols());
    let half = 8 / pairs.format().bytes();
    let column = |n: usize| n / half * 2 * half + which * half + n % half;
    let row = |n: usize| {
        (0..pairs.rows()).map(|i| f64::from(stored[i * columns + column(n)])).collect::<Vec<_>>()
    };
    (0..ffn).flat_map(row).collect()
}

fn pairs() {
    let random = &mut Random::new(17);
    for format in Format::ALL {
        for batch in BATCHES {
            for (width, ffn) in [(1, 1), (63, 300), (200, 65), (4096, 300), (65, 5000)] {
                for (act, with_mask) in [
                    (Pointwise::Relu, false),
                    (Pointwise::FatRelu { threshold: 0.5 }, false),
                    (Pointwise::ShiftedRelu { shift: 0.25 }, true),
                ] {
                    let sources = [0, 1].map(|_| random.tensor((ffn, width)));
                    let [gate, up] = sources.each_ref().map(|t| on_gpu(t, DType::F32));
                    let matrix = GpuMatrix::pack_pairs(&gate, &up, format).unwrap();
                    let plain = [0, 1].map(|which| half_of_pairs(&matrix, ffn, which));
                    if format != Format::Int8 {
                        assert_eq!(plain, sources.each_ref().map(values));
                    }
                    let biases = [0, 1].map(|_| vector(random, ffn));
                    let x = some(random, (batch, width), 0.4);
                    let norm = Plain::new(random, width, false);
                    let (id, relu) = (Pointwise::Identity, Pointwise::Relu);
                    let h = entering(&x, width, Some(&norm), (relu, id), None);
                    let mask: Vec<f64> =
                        some(random, (1, ffn), 0.3).iter().map(|m| f64::from(*m != 0.0)).collect();
                    let mask = with_mask.then_some(mask);
                    let sum = |n: usize| plus_bias(product(&h, &plain[n], width), &biases[n]);
                    let open = entering(&sum(0), ffn, None, (act, id), mask.as_ref());
                    let products = open.iter().zip(sum(1)).map(|(gate, up)| curve(relu, gate * up));
                    let expected: Vec<f64> = products.collect();

                    let (x, norm) = (there(&x, &[batch, width]), norm.there());
                    let biases = biases.map(|bias| there(&bias, &[ffn]));
                    let mask = mask.map(|mask| there(&mask, &[ffn]));
                    let counts = Words::zeros(gpu(), 2 * COUNTS).unwrap();
                    let room = room();
                    let run = || {
                        let sums = nan((batch, matrix.cols()), DType::F32);
                        let products = nan((batch, ffn), DType::F32);
                        let input = Input::normed(&x, &norm, relu);
                        let it = PairsByInput {
                            input: Input { counts: Some((&counts, 0)), ..input },
                            matrix: &matrix,
                            biases: biases.each_ref().map(Some),
                            activation: act,
                            mask: mask.as_ref(),
                            then: relu,
                            sums: &sums,
                            products: &products,
                            counts: Some((&counts, COUNTS)),
                        };
                        pairs_by_input(&it, &room).unwrap();
                        products
                    };
                    let what = format!("{format:?} {batch} x {width}, {ffn}, {act:?}");
                    let products = run();
                    assert_near(&what, &products, &expected);
                    let counts = counts.read().unwrap();
                    assert_eq!(counts[..COUNTS], counted(&h, width), "{what}");
                    assert_eq!(counts[COUNTS..], counted(&open, ffn), "{what}");
                    assert_same_bits(&what, &products, &run());
                }
            }
        }
    }
}

/// One sequence's attention, token by token, in f64 with a cache that rounds as the GPU's.
struct Reference<'a> {
    heads: &'a Heads,
    rope: Option<(&'a [f64], RopePairs)>,
    norms: &'a [Option<Plain>; 2],
    bf16: bool,
    keys: Vec<Vec<f64>>,
    values: Vec<Vec<f64>>,
}

impl Reference<'_> {
    fn turned(&self, which: usize, x: &[f64], position: usize) -> Vec<f64> {
        let mut x = self.norms[which].as_ref().map_or(x.to_vec(), |norm| norm.apply(x));
        if let Some((frequencies, pairs)) = self.rope {
            for (j, f) in frequencies.iter().enumerate() {
                let (a, b) = match pairs {
                    RopePairs::Half => (j, j + frequencies.len()),
                    RopePairs::Interleaved => (2 * j, 2 * j + 1),
                };
                let angle = f64::from(position as f32 * *f as f32);
                let (p, q) = (x[a], x[b]);
                x[a] = p * angle.cos() - q * angle.sin();
                x[b] = q * angle.cos() + p * angle.sin();
            }
        }
        x
    }

    fn stored(&self, x: f64) -> f64 {
        if self.bf16 { half::bf16::from_f32(x as f32).to_f64() } else { x }
    }

    fn step(&mut self, qkv: &[f64]) -> Vec<f64> {
        let Heads { heads, kv_heads, head_dim: dim, .. } = *self.heads;
        let position = self.keys.len() / kv_heads;
        let (q, rest) = qkv.split_at(heads * dim);
        let (k, v) = rest.split_at(kv_heads * dim);
        let k: Vec<Vec<f64>> = k.chunks(dim).map(|k| self.turned(1, k, position)).collect();
        let v: Vec<Vec<f64>> = v.chunks(dim).map(<[f64]>::to_vec).collect();
        let first = self.heads.window.map_or(0, |window| (position + 1).saturating_sub(window));
        let mut out = Vec::new();
        for (head, q) in q.chunks(dim).enumerate() {
            let q = self.turned(0, q, position);
            let kv = head / (heads / kv_heads);
            let at = |all: &[Vec<f64>], own: &[Vec<f64>], key: usize| match key == position {
                true => own[kv].clone(),
                false => all[key * kv_heads + kv].clone(),
            };
            let scores: Vec<f64> = (first..=position)
                .map(|key| {
                    let k = at(&self.keys, &k, key);
                    let product: f64 = q.iter().zip(&k).map(|(q, k)| q * k).sum();
                    let mut score = product * f64::from(self.heads.scale);
                    if let Some(cap) = self.heads.softcap {
                        score = f64::from(cap) * (score / f64::from(cap)).tanh();
                    }
                    score + self.penalty(head, key, position)
                })
                .collect();
            let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|s| (s - top).exp()).collect();
            let all: f64 = weights.iter().sum();
            let mut sum = vec![0.0; dim];
            for (key, weight) in (first..=position).zip(weights) {
                let v = at(&self.values, &v, key);
                sum.iter_mut().zip(v).for_each(|(sum, v)| *sum += weight / all * v);
            }
            out.extend(sum);
        }
        let rounded = |rows: Vec<Vec<f64>>| -> Vec<Vec<f64>> {
            rows.iter().map(|row| row.iter().map(|x| self.stored(*x)).collect()).collect()
        };
        let (k, v) = (rounded(k), rounded(v));
        self.keys.extend(k);
        self.values.extend(v);
        out
    }

    fn penalty(&self, head: usize, key: usize, position: usize) -> f64 {
        let Some(alibi) = &self.heads.alibi else { return 0.0 };
        let steep = match alibi.bf16 {
            true => half::bf16::from_f32(alibi.slopes[head] * key as f32).to_f64(),
            false => f64::from(alibi.slopes[head]) * (key as f64 - position as f64),
        };
        f64::from(alibi.factor) * steep
    }
}

fn heads(heads: usize, kv_heads: usize, head_dim: usize) -> Heads {
    let scale = 0.5 / (head_dim as f32).sqrt();
    Heads { heads, kv_heads, head_dim, scale, window: None, softcap: None, alibi: None }
}

/// Decodes `len` tokens of `batch` sequences, of which the second begins later, and compares
/// every `look`-th.
fn check_attention(
    random: &mut Random,
    what: &str,
    heads: &Heads,
    rope: Option<(usize, RopePairs)>,
    qk_norm: bool,
    (batch, len, look): (usize, usize, usize),
) {
    let dim = heads.head_dim;
    let frequencies: Vec<f64> =
        rope.map_or(Vec::new(), |(pairs, _)| (0..pairs).map(|j| 0.7f64.powi(j as i32)).collect());
    let table = RopeTable::new(&frequencies, len, 1.0);
    let norms = [0, 1].map(|_| qk_norm.then(|| Plain::new(random, dim, false)));
    let there_norms = [0, 1].map(|n: usize| norms[n].as_ref().map(Plain::there));
    let layout = rope.map(|(_, pairs)| (&table, pairs));
    let plan = AttentionPlan::new(gpu(), heads, layout, there_norms).unwrap();
    let room = room();
    for format in [Format::F32, Format::Bf16] {
        let cache = KvCache::new(gpu(), format, batch, len, (heads.kv_heads, dim)).unwrap();
        let mut sequences: Vec<Reference<'_>> = (0..batch)
            .map(|_| Reference {
                heads,
                rope: rope.map(|(_, pairs)| (&frequencies[..], pairs)),
                norms: &norms,
                bf16: format == Format::Bf16,
                keys: Vec::new(),
                values: Vec::new(),
            })
            .collect();
        let positions = Words::zeros(gpu(), batch).unwrap();
        let width = (heads.heads + 2 * heads.kv_heads) * dim;
        for token in 0..len {
            let qkv = some(random, (batch, width), 1.0);
            let at: Vec<u32> =
                sequences.iter().map(|s| (s.keys.len() / heads.kv_heads) as u32).collect();
            positions.write(&at).unwrap();
            let out = nan((batch, heads.heads * dim), DType::F32);
            let qkv_there = there(&qkv, &[batch, width]);
            attend(&attending(&qkv_there, &positions, &plan, &cache, &out), &room).unwrap();
            let expected: Vec<f64> = sequences
                .iter_mut()
                .zip(qkv.chunks(width))
                .flat_map(|(s, qkv)| s.step(qkv))
                .collect();
            if token % look == 0 || token + 1 == len {
                let what = format!("{what}, {format:?}, token {token}");
                assert_near(&what, &out, &expected);
                let again = nan((batch, heads.heads * dim), DType::F32);
                attend(&attending(&qkv_there, &positions, &plan, &cache, &again), &room).unwrap();
                assert_same_bits(&what, &out, &again);
            }
            // The second sequence stays behind: it begins anew once.
            if token == len / 3 && batch > 1 {
                sequences[1].keys.clear();
                sequences[1].values.clear();
            }
        }
    }
}

fn attention() {
    let random = &mut Random::new(8);
    let half = |pairs| Some((pairs, RopePairs::Half));
    let every = |pairs| Some((pairs, RopePairs::Interleaved));
    check_attention(random, "plain", &heads(3, 3, 64), None, false, (1, 300, 17));
    check_attention(random, "grouped", &heads(6, 2, 128), half(64), false, (2, 150, 9));
    check_attention(random, "one key head", &heads(11, 1, 64), half(32), false, (1, 150, 9));
    check_attention(random, "interleaved", &heads(4, 2, 80), every(16), false, (4, 70, 5));
    check_attention(random, "norms", &heads(4, 4, 128), half(64), true, (8, 40, 5));
    check_attention(random, "odd", &heads(5, 1, 7), half(3), false, (1, 40, 3));
    check_attention(random, "one column", &heads(2, 2, 1), None, false, (1, 20, 3));
    check_attention(random, "wide", &heads(4, 2, 256), half(128), false, (1, 90, 7));
    let windowed = Heads { window: Some(50), softcap: Some(2.0), ..heads(8, 2, 16) };
    check_attention(random, "windowed", &windowed, half(8), false, (1, 150, 9));
    let slopes: Vec<f32> = (0..6).map(|h| 0.5f32.powi(h)).collect();
    let steep = Heads { alibi: Some(slopes.clone().into()), ..heads(6, 6, 32) };
    check_attention(random, "ALiBi", &steep, None, false, (2, 150, 9));
    let falcon = Alibi { slopes, factor: 0.25, bf16: true };
    let steep = Heads { alibi: Some(falcon), ..heads(6, 1, 64) };
    check_attention(random, "rounded ALiBi", &steep, None, false, (1, 150, 9));
}

/// A prompt that was stored at once, and one token after it.
fn attention_of_long_sequences() {
    let random = &mut Random::new(9);
    for (heads, n) in [(heads(2, 1, 128), 5000), (heads(32, 32, 16), 1000)] {
        let (dim, kv_heads) = (heads.head_dim, heads.kv_heads);
        let plan = AttentionPlan::new(gpu(), &heads, None, [None, None]).unwrap();
        for format in [Format::F32, Format::Bf16] {
            let width = kv_heads * dim;
            let (k, v) = (random.tensor((n, width)), random.tensor((n, width)));
            let cache = KvCache::new(gpu(), format, 2, n + 1, (kv_heads, dim)).unwrap();
            cache.store(1, 0, &on_gpu(&k, DType::F32), &on_gpu(&v, DType::BF16)).unwrap();
            let qkv = some(random, (2, heads.heads * dim + 2 * width), 1.0);
            let out = nan((2, heads.heads * dim), DType::F32);
            let positions = Words::zeros(gpu(), 2).unwrap();
            positions.write(&[0, n as u32]).unwrap();
            let there = there(&qkv, &[2, heads.heads * dim + 2 * width]);
            attend(&attending(&there, &positions, &plan, &cache, &out), &room()).unwrap();
            let rows = |t: &Tensor| values(t).chunks(dim).map(<[f64]>::to_vec).collect();
            let none = [None, None];
            let mut all = Reference {
                heads: &heads,
                rope: None,
                norms: &none,
                bf16: format == Format::Bf16,
                keys: rows(&k),
                values: rows(&v),
            };
            let second = all.step(&qkv[qkv.len() / 2..]);
            (all.keys, all.values) = (Vec::new(), Vec::new());
            let first = all.step(&qkv[..qkv.len() / 2]);
            assert_near(&format!("{n} {format:?}"), &out, &[first, second].concat());
        }
    }
}

fn attention_out_of_range() {
    let heads = heads(2, 2, 16);
    let plan = AttentionPlan::new(gpu(), &heads, None, [None, None]).unwrap();
    let cache = KvCache::new(gpu(), Format::F32, 1, 3, (2, 16)).unwrap();
    let positions = Words::zeros(gpu(), 1).unwrap();
    positions.write(&[3]).unwrap();
    let qkv = Tensor::ones((1, 96), DType::F32, gpu()).unwrap();
    let out = Tensor::zeros((1, 32), DType::F32, gpu()).unwrap();
    attend(&attending(&qkv, &positions, &plan, &cache, &out), &room()).unwrap();
    assert!(values(&out).iter().all(|x| x.is_nan()));
}

fn tokens() {
    let random = &mut Random::new(10);
    for format in Format::ALL {
        for (batch, width) in [(1, 1), (2, 65), (8, 4096)] {
            let (table, plain) = weights(random, format, (50, width));
            let (learned, places) = weights(random, format, (9, width));
            let (tokens, positions) = (random.ids(batch, 50), random.ids(batch, 7));
            let (ids, at) =
                (Words::zeros(gpu(), batch).unwrap(), Words::zeros(gpu(), batch).unwrap());
            ids.write(&tokens).unwrap();
            at.write(&positions).unwrap();
            let x = nan((batch, width), DType::F32);
            embed(&embedding(&ids, &at, &table, 1.5, Some((&learned, 2)), &x)).unwrap();
            let row = |(token, position): (&u32, &u32)| -> Vec<f64> {
                let (t, p) = (*token as usize * width, (*position as usize + 2) * width);
                (0..width).map(|i| 1.5 * plain[t + i] + places[p + i]).collect()
            };
            let expected: Vec<f64> = tokens.iter().zip(&positions).flat_map(row).collect();
            assert_near("embedding", &x, &expected);
            advance(&at).unwrap();
            let next: Vec<u32> = positions.iter().map(|p| p + 1).collect();
            assert_eq!(at.read().unwrap(), next);
            ids.write(&vec![50; batch]).unwrap();
            embed(&embedding(&ids, &at, &table, 1.0, None, &x)).unwrap();
            assert!(values(&x).iter().all(|x| x.is_nan()));
        }
    }
    for vocab in [1, 50, 1023, 32001] {
        let ids = Words::zeros(gpu(), 2).unwrap();
        let mut logits = some(random, (2, vocab), 1.0);
        // The first of equals, and no NaN.
        for best in [vocab / 3, vocab / 2, vocab - 1] {
            (logits[best], logits[vocab + best]) = (5.0, 5.0);
        }
        if vocab > 1 {
            logits[0] = f64::NAN;
        }
        argmax(&there(&logits, &[2, vocab]), &ids).unwrap();
        assert_eq!(ids.read().unwrap(), [vocab as u32 / 3; 2]);
    }
}

/// A layer's kernels, queued and replayed: the same bits, token after token.
fn replays_graphs() {
    let random = &mut Random::new(11);
    let (hidden, ffn, batch) = (200, 300, 2);
    let heads = heads(4, 2, 50);
    let (qkv_w, _) = weights(random, Format::Bf16, (hidden, 400));
    let (o_w, _) = weights(random, Format::Bf16, (hidden, 200));
    let (gate_w, _) = weights(random, Format::Bf16, (hidden, ffn));
    let (up_w, _) = weights(random, Format::Bf16, (ffn, hidden));
    let (down_w, _) = weights(random, Format::Bf16, (ffn, hidden));
    let (table, _) = weights(random, Format::Bf16, (50, hidden));
    let norm = Plain::new(random, hidden, false).there();
    let plan = AttentionPlan::new(gpu(), &heads, None, [None, None]).unwrap();
    let room = room();
    let chain = |captured: bool| -> Vec<f64> {
        let empty = |width: usize| nan((batch, width), DType::F32);
        let (x, h, qkv, out) = (empty(hidden), empty(hidden), empty(400), empty(200));
        let (gate, products, logits) = (empty(ffn), empty(ffn), empty(50));
        let cache = KvCache::new(gpu(), Format::Bf16, batch, 12, (2, 50)).unwrap();
        let ids = Words::zeros(gpu(), batch).unwrap();
        let at = Words::zeros(gpu(), batch).unwrap();
        ids.write(&[3, 4]).unwrap();
        let relu = Pointwise::Relu;
        let token = || -> relufy_ops::Result<()> {
            embed(&embedding(&ids, &at, &table, 1.0, None, &x))?;
            let input = Input::normed(&x, &norm, relu);
            project_by_input(&input, &qkv_w, &Output::new(&qkv, None), &room)?;
            attend(&attending(&qkv, &at, &plan, &cache, &out), &room)?;
            project_by_output(&Input::new(&out), &o_w, &Output::residual(&x, None))?;
            let input = Input { h: Some(&h), ..Input::normed(&x, &norm, relu) };
            project_by_input(&input, &gate_w, &Output::new(&gate, None), &room)?;
            up_rows(&UpRows {
                gate: &gate,
                activation: relu,
                mask: None,
                h: &h,
                up: &up_w,
                bias: None,
                then: Pointwise::Identity,
                products: &products,
                counts: None,
            })?;
            project_by_input(&Input::new(&products), &down_w, &Output::residual(&x, None), &room)?;
            project_by_output(
                &Input::normed(&x, &norm, relu),
                &table,
                &Output::new(&logits, None),
            )?;
            argmax(&logits, &ids)?;
            advance(&at)
        };
        let mut seen = Vec::new();
        let graph = captured.then(|| Graph::capture(gpu(), token).unwrap());
        for _ in 0..10 {
            match &graph {
                Some(graph) => graph.replay().unwrap(),
                None => token().unwrap(),
            }
            seen.extend(values(&logits));
            seen.extend(ids.read().unwrap().into_iter().map(f64::from));
        }
        assert_eq!(at.read().unwrap(), [10; 2]);
        assert!(seen.iter().all(|x| x.is_finite()));
        seen
    };
    let direct = chain(false);
    assert!(direct == chain(true), "a graph gives other numbers");
    assert!(direct == chain(false), "two runs differ");
}

fn refuses_what_does_not_fit() {
    let t = |shape: (usize, usize)| Tensor::zeros(shape, DType::F32, gpu()).unwrap();
    let matrix = GpuMatrix::pack(&t((4, 6)), false, Format::F32).unwrap();
    let (x, y, room) = (t((1, 4)), t((1, 6)), room());
    let fits = project_by_input(&Input::new(&x), &matrix, &Output::new(&y, None), &room);
    fits.unwrap();
    for (x, y) in [((1, 6), (1, 6)), ((1, 4), (1, 4)), ((3, 4), (3, 6)), ((2, 4), (1, 6))] {
        let (x, y) = (t(x), t(y));
        let refused = project_by_input(&Input::new(&x), &matrix, &Output::new(&y, None), &room);
        assert!(refused.is_err(), "{x:?}");
        let refused = project_by_output(&Input::new(&y), &matrix, &Output::new(&x, None));
        assert!(refused.is_err(), "{y:?}");
    }
    let half = x.to_dtype(DType::BF16).unwrap();
    assert!(project_by_input(&Input::new(&half), &matrix, &Output::new(&y, None), &room).is_err());
    assert!(KvCache::new(gpu(), Format::Int8, 1, 8, (1, 64)).is_err());
    assert!(KvCache::new(gpu(), Format::F32, 1, 8, (1, 257)).is_err());
    assert!(GpuMatrix::random(gpu(), Format::F32, 0, 8, 1.0, 1).is_err());
    assert!(Words::zeros(gpu(), 2).unwrap().write(&[1]).is_err());
}

/// A failed capture leaves the device as it was.
fn graphs_may_fail() {
    let t = |shape: (usize, usize)| Tensor::ones(shape, DType::F32, gpu()).unwrap();
    let matrix = GpuMatrix::pack(&t((4, 6)), false, Format::F32).unwrap();
    let (x, y, room) = (t((1, 4)), t((1, 6)), room());
    let run = |x: &Tensor| project_by_input(&Input::new(x), &matrix, &Output::new(&y, None), &room);
    let wide = t((1, 5));
    assert!(Graph::capture(gpu(), || run(&wide)).is_err());
    run(&x).unwrap();
    assert_eq!(values(&y), [4.0; 6]);
}

fn reads_memory() {
    let bytes = read_bandwidth(gpu(), 64 << 20, 2).unwrap();
    assert!(bytes > 1e9, "{bytes}");
}

fn attending<'a>(
    qkv: &'a Tensor,
    positions: &'a Words,
    plan: &'a AttentionPlan,
    cache: &'a KvCache,
    out: &'a Tensor,
) -> Attention<'a> {
    Attention { qkv, positions, plan, cache, out }
}

fn embedding<'a>(
    tokens: &'a Words,
    positions: &'a Words,
    table: &'a GpuMatrix,
    factor: f32,
    learned: Option<(&'a GpuMatrix, usize)>,
    x: &'a Tensor,
) -> Embedding<'a> {
    Embedding { tokens, positions, table, factor, learned, x }
}
