//! The optimizer's step.

use std::ops::Range;

use candle_core::{DType, Tensor};
use relufy_ops::adamw::{self, AdamW, Item};
use relufy_ops::buffer;

use crate::common::{
    Random, TYPES, Trials, assert_close, assert_same, gpu, on_gpu, on_gpu_at_an_odd_place, values,
};

pub fn trials() -> Trials {
    vec![
        ("adamw_ten_steps_match_the_cpu", ten_steps_match_the_cpu),
        ("adamw_moves_the_masters_of_bf16", moves_the_masters_of_bf16),
        ("adamw_moves_only_the_rows_asked_for", moves_only_the_rows_asked_for),
        ("adamw_takes_bf16_moments", takes_bf16_moments),
        ("adamw_clips_to_the_norm", clips_to_the_norm),
        ("adamw_leaves_all_as_it_is_without_a_norm", leaves_all_as_it_is_without_a_norm),
        ("adamw_steps_more_tensors_than_a_block_has_threads", steps_many_tensors),
        ("adamw_refuses_what_does_not_fit", refuses_what_does_not_fit),
        ("small_adamw", small),
    ]
}

/// Every combination of types.
fn small() {
    let tensors = |seed| {
        let mut random = Random::new(seed);
        [(3, 5), (16, 8)].map(|shape| random.tensor(shape)).to_vec()
    };
    let state = |t| State::new(t, None, DType::F32);
    let expected: Vec<State> = tensors(0).into_iter().map(state).collect();
    step(&expected, &tensors(1), 1, None);
    for ((params, master), moments) in
        [(DType::F32, false), (DType::BF16, false), (DType::BF16, true)]
            .into_iter()
            .flat_map(|params| TYPES.map(|(moments, _)| (params, moments)))
    {
        for (gradients, _) in TYPES {
            let states: Vec<State> = tensors(0)
                .iter()
                .map(|t| {
                    let master = master.then(|| on_gpu(t, DType::F32));
                    State::new(on_gpu(t, params), master, moments)
                })
                .collect();
            step(&states, &at(on_gpu, &tensors(1), gradients), 1, None);
            assert_states(&states, &expected, 1e-2);
        }
    }
}

const HP: AdamW = AdamW { lr: 0.02, beta1: 0.9, beta2: 0.95, eps: 1e-6, weight_decay: 0.1 };
const SHAPES: [(usize, usize); 6] = [(1, 1), (3, 5), (64, 64), (4097, 3), (300, 1024), (77, 1031)];
const DECAYS: [f64; 2] = [0.1, 0.0];

type Rows<'a> = Option<&'a [Range<usize>]>;

/// Parameters with their moments.
struct State {
    param: Tensor,
    master: Option<Tensor>,
    m: Tensor,
    v: Tensor,
}

impl State {
    fn new(param: Tensor, master: Option<Tensor>, moments: DType) -> State {
        let zeros = || Tensor::zeros(param.dims(), moments, param.device()).unwrap();
        let (m, v) = (zeros(), zeros());
        State { param, master, m, v }
    }
}

fn step(states: &[State], gradients: &[Tensor], t: u64, rows: Rows<'_>) {
    let items: Vec<Item<'_>> = states
        .iter()
        .zip(gradients)
        .enumerate()
        .map(|(i, (state, grad))| Item {
            param: &state.param,
            master: state.master.as_ref(),
            grad,
            m: &state.m,
            v: &state.v,
            weight_decay: DECAYS[i % 2],
            rows,
        })
        .collect();
    adamw::step_all(&items, &HP, t, 0.5).unwrap();
}

fn tensors(seed: u64) -> Vec<Tensor> {
    let mut random = Random::new(seed);
    SHAPES.into_iter().map(|shape| random.tensor(shape)).collect()
}

type Place = fn(&Tensor, DType) -> Tensor;
const PLACES: [Place; 2] = [on_gpu, on_gpu_at_an_odd_place];

fn at(place: Place, tensors: &[Tensor], dtype: DType) -> Vec<Tensor> {
    tensors.iter().map(|t| place(t, dtype)).collect()
}

/// Steps on the CPU, in f32.
fn on_the_cpu(steps: u64, rows: Rows<'_>) -> Vec<State> {
    let copies = tensors(0).into_iter();
    let states: Vec<State> = copies.map(|t| State::new(t, None, DType::F32)).collect();
    for t in 1..=steps {
        step(&states, &tensors(t), t, rows);
    }
    states
}

/// All shapes together: a single number may be the small rest of large ones.
fn assert_states(found: &[State], expected: &[State], tolerance: f64) {
    let parts = |state: &State| {
        let moved = state.master.as_ref().unwrap_or(&state.param);
        [moved, &state.m, &state.v].map(|t| t.flatten_all().unwrap())
    };
    for (which, what) in ["parameters", "m", "v"].into_iter().enumerate() {
        let all = |states: &[State]| {
            let flat: Vec<Tensor> =
                states.iter().map(|state| parts(state)[which].clone()).collect();
            Tensor::cat(&flat, 0).unwrap()
        };
        assert_close(what, &all(found), &all(expected), tolerance);
    }
}

fn ten_steps_match_the_cpu() {
    let expected = on_the_cpu(10, None);
    for place in PLACES {
        // Gradients of either type are the same numbers, and so is each run.
        let runs = [DType::F32, DType::BF16, DType::F32].map(|gradients| {
            let params = at(place, &tensors(0), DType::F32).into_iter();
            let states: Vec<State> = params.map(|t| State::new(t, None, DType::F32)).collect();
            for t in 1..=10 {
                step(&states, &at(place, &tensors(t), gradients), t, None);
            }
            states
        });
        assert_states(&runs[0], &expected, 1e-6);
        for run in &runs[1..] {
            for (one, other) in runs[0].iter().zip(run) {
                assert_same("parameter", &one.param, &other.param);
                assert_same("v", &one.v, &other.v);
            }
        }
    }
}

fn moves_the_masters_of_bf16() {
    let expected = on_the_cpu(10, None);
    for place in PLACES {
        for (gradients, _) in TYPES {
            let states: Vec<State> = at(place, &tensors(0), DType::F32)
                .into_iter()
                .map(|master| {
                    let param = buffer::cast(&master, DType::BF16).unwrap();
                    State::new(param, Some(master), DType::F32)
                })
                .collect();
            for t in 1..=10 {
                step(&states, &at(place, &tensors(t), gradients), t, None);
            }
            assert_states(&states, &expected, 1e-6);
            for state in &states {
                let rounded = buffer::cast(state.master.as_ref().unwrap(), DType::BF16).unwrap();
                assert_same("rounded master", &state.param, &rounded);
            }
        }
    }
}

fn moves_only_the_rows_asked_for() {
    // The smallest shape has one row only.
    let rows: Rows<'_> = Some(&[0..1, 1..1]);
    let expected = on_the_cpu(3, rows);
    for place in PLACES {
        let params = at(place, &tensors(0), DType::F32).into_iter();
        let states: Vec<State> = params.map(|t| State::new(t, None, DType::F32)).collect();
        for t in 1..=3 {
            step(&states, &at(place, &tensors(t), DType::BF16), t, rows);
        }
        assert_states(&states, &expected, 1e-6);
    }
    let mut random = Random::new(9);
    let (param, grad) = (random.tensor((60, 7)), random.tensor((60, 7)));
    let rows: Rows<'_> = Some(&[1..2, 5..31, 59..60]);
    let zeros = |t: &Tensor| (t.zeros_like().unwrap(), t.zeros_like().unwrap());
    let (m, v) = zeros(&param);
    let (there, there_grad) = (on_gpu(&param, DType::F32), on_gpu(&grad, DType::F32));
    let (there_m, there_v) = zeros(&there);
    adamw::step(&param, &grad, &m, &v, &HP, 1, 1.0, rows).unwrap();
    adamw::step(&there, &there_grad, &there_m, &there_v, &HP, 1, 1.0, rows).unwrap();
    assert_close("parameter", &there, &param, 1e-6);
    for (found, expected) in values(&there_v).into_iter().zip(values(&v)) {
        assert_eq!(found == 0.0, expected == 0.0);
    }
}

fn takes_bf16_moments() {
    let expected = on_the_cpu(5, None);
    for (params, _) in TYPES {
        for (gradients, _) in TYPES {
            let copies = at(on_gpu, &tensors(0), params).into_iter();
            let states: Vec<State> = copies.map(|t| State::new(t, None, DType::BF16)).collect();
            for t in 1..=5 {
                step(&states, &at(on_gpu, &tensors(t), gradients), t, None);
            }
            assert_states(&states, &expected, 2e-2);
        }
    }
}

fn items<'a>(states: &'a [State], gradients: &'a [Tensor], rows: Rows<'a>) -> Vec<Item<'a>> {
    let item = |(state, grad): (&'a State, &'a Tensor)| Item {
        param: &state.param,
        master: state.master.as_ref(),
        grad,
        m: &state.m,
        v: &state.v,
        weight_decay: 0.1,
        rows,
    };
    states.iter().zip(gradients).map(item).collect()
}

/// What f32 copies of the tensors become.
fn states_of(place: Place, tensors: &[Tensor]) -> Vec<State> {
    let params = at(place, tensors, DType::F32).into_iter();
    params.map(|t| State::new(t, None, DType::F32)).collect()
}

fn clips_to_the_norm() {
    let first = 0..1;
    let rows: Rows<'_> = Some(std::slice::from_ref(&first));
    for (limit, rows) in [(0.0, None), (1.0, None), (1e9, None), (0.5, rows)] {
        let on_host: Place = |t, _| t.copy().unwrap();
        let (host, gradients) = (states_of(on_host, &tensors(0)), tensors(1));
        let expected = adamw::step_clipped(&items(&host, &gradients, rows), &HP, 1, limit).unwrap();
        for place in PLACES {
            for (dtype, _) in TYPES {
                let gradients = at(place, &gradients, dtype);
                let once = || {
                    let there = states_of(place, &tensors(0));
                    let all = items(&there, &gradients, rows);
                    let norm = adamw::step_clipped(&all, &HP, 1, limit).unwrap();
                    (there, norm)
                };
                let ((found, norm), (again, norm_again)) = (once(), once());
                assert!((norm - expected).abs() <= 1e-12 * expected, "{norm} {expected}");
                assert_eq!(norm.to_bits(), norm_again.to_bits());
                assert_states(&found, &host, 1e-6);
                for (one, other) in found.iter().zip(&again) {
                    assert_same("parameter", &one.param, &other.param);
                }
                // The factor is that of the host.
                let apart = states_of(place, &tensors(0));
                let factor = adamw::clip_factor(norm, limit) as f32;
                adamw::step_all(&items(&apart, &gradients, rows), &HP, 1, factor).unwrap();
                for (one, other) in found.iter().zip(&apart) {
                    assert_same("parameter", &one.param, &other.param);
                    assert_same("m", &one.m, &other.m);
                }
            }
        }
    }
}

fn leaves_all_as_it_is_without_a_norm() {
    for bad in [f32::NAN, f32::INFINITY] {
        let states = states_of(on_gpu, &tensors(0));
        let mut gradients = tensors(1);
        gradients[3] = gradients[3].affine(0.0, f64::from(bad)).unwrap();
        let gradients = at(on_gpu, &gradients, DType::BF16);
        let norm = adamw::step_clipped(&items(&states, &gradients, None), &HP, 1, 1.0).unwrap();
        assert!(!norm.is_finite());
        for (state, before) in states.iter().zip(tensors(0)) {
            assert_same("parameter", &state.param, &on_gpu(&before, DType::F32));
            assert!(values(&state.m).into_iter().chain(values(&state.v)).all(|x| x == 0.0));
        }
    }
}

fn steps_many_tensors() {
    let mut random = Random::new(11);
    let sizes = (0..1100).map(|i| 1 + (i * 97) % 2500);
    let hosts: Vec<Tensor> = sizes.map(|n| random.tensor(n)).collect();
    let gradients: Vec<Tensor> = hosts.iter().map(|t| random.tensor(t.dims())).collect();
    let (host, there) = (states_of(|t, _| t.copy().unwrap(), &hosts), states_of(on_gpu, &hosts));
    let expected = adamw::step_clipped(&items(&host, &gradients, None), &HP, 1, 3.0).unwrap();
    let gradients = at(on_gpu, &gradients, DType::F32);
    let found = adamw::step_clipped(&items(&there, &gradients, None), &HP, 1, 3.0).unwrap();
    assert!((found - expected).abs() <= 1e-12 * expected, "{found} {expected}");
    assert_states(&there, &host, 1e-6);
}

fn refuses_what_does_not_fit() {
    let zeros = |dtype| Tensor::zeros((2, 4), dtype, gpu()).unwrap();
    let (param, grad, m, v) =
        (zeros(DType::F32), zeros(DType::F32), zeros(DType::F32), zeros(DType::F32));
    let (half, master) = (zeros(DType::BF16), zeros(DType::F32));
    let item = Item {
        param: &param,
        master: None,
        grad: &grad,
        m: &m,
        v: &v,
        weight_decay: 0.0,
        rows: None,
    };
    assert!(adamw::step_all(&[], &HP, 1, 1.0).is_ok());
    assert!(adamw::step_all(&[item], &HP, 1, 1.0).is_ok());
    assert!(adamw::step_all(&[item], &HP, 0, 1.0).is_err());
    let bad = [
        Item { master: Some(&master), ..item },
        Item { param: &half, master: Some(&half), ..item },
        Item { v: &half, ..item },
        Item { m: &param, ..item },
        Item { rows: Some(&[1..2, 0..1]), ..item },
    ];
    for item in bad {
        assert!(adamw::step_all(&[item], &HP, 1, 1.0).is_err());
    }
}
