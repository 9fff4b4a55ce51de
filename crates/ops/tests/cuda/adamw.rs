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
        ("adamw_refuses_what_does_not_fit", refuses_what_does_not_fit),
    ]
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
