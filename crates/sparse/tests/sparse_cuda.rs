//! The engine on a GPU against the dense decoder and against the engine on the CPU: every family and
//! stage. Ignored, with the reason, where there is no GPU.
//!
//! `cargo test --release --workspace --features cuda --test sparse_cuda` on a machine with one.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a failure is the test's failure")]

#[cfg(feature = "cuda")]
mod common;

use libtest_mimic::Arguments;

fn main() {
    let args = Arguments::from_args();
    #[cfg(feature = "cuda")]
    let trials = gpu::trials();
    #[cfg(not(feature = "cuda"))]
    let trials = {
        eprintln!("ignored: this build has no CUDA");
        vec![libtest_mimic::Trial::test("gpu", || Ok(())).with_ignored_flag(true)]
    };
    // Tests share the GPU's one stream, on which nothing else may be queued during a capture.
    libtest_mimic::run(&Arguments { test_threads: Some(1), ..args }, trials).exit();
}

#[cfg(feature = "cuda")]
mod gpu {
    use std::panic::AssertUnwindSafe;
    use std::path::PathBuf;

    use candle_core::{DType, Device};
    use libtest_mimic::{Failed, Trial};
    use relufy_model::{Checkpoint, Decoder, Init, Params, generate};
    use relufy_ops::buffer::{to_host, write_from_host};
    use relufy_sparse::{
        Calibrated, Engine, Error, Format, GpuEngine, GpuSession, Options, Reads, Session,
    };
    use relufy_spec::flops::{Densities, SiteDensities};
    use relufy_spec::{Activation, DecoderSpec, MlpKind, Position, ReluPlan, SiteOp, Stage};
    use serde_json::json;

    use super::common::{
        VOCAB, all, argmax, configs, decoder, dense_logits, distance, largest_of, prompt, spec,
    };

    /// A test of one decoder.
    type Test = fn(&DecoderSpec, &Device);

    /// A test with decoders of its own.
    type Single = fn(&Device);

    pub fn trials() -> Vec<Trial> {
        let gpu = relufy_ops::device::open("cuda");
        if let Err(why) = &gpu {
            eprintln!("ignored: {why}");
        }
        let gpu = gpu.ok();
        let tests: [(&str, Test); 9] = [
            ("f32_logits", f32_logits),
            ("greedy_text", greedy_text),
            ("prompts", prompts),
            ("counts", counts),
            ("taken_back", taken_back),
            ("batches", batches),
            ("ragged_prompts", ragged_prompts),
            ("smaller_formats", smaller_formats),
            ("everything_read", everything_read),
        ];
        let mut trials = Vec::new();
        for (name, spec) in all() {
            let by_input = takes_up_by_input(&spec).then_some(("up_by_input", up_by_input as Test));
            for (test, run) in tests.into_iter().chain(by_input) {
                let (name, spec) = (format!("{test}: {name}"), spec.clone());
                trials.push(trial(name, &gpu, move |gpu| run(&spec, gpu)));
            }
        }
        let more: [(&str, Single); 8] = [
            ("long_prompts", long_prompts),
            ("wide_rows", wide_rows),
            ("wide_inputs", wide_inputs),
            ("wide_parallel_blocks", wide_parallel_blocks),
            ("long_contexts", long_contexts),
            ("refused", refused),
            ("fastest", fastest),
            ("random_weights", random_weights),
        ];
        for (name, run) in more {
            trials.push(trial(name.to_owned(), &gpu, run));
        }
        let stories = gpu.filter(|_| stories().is_some());
        trials.push(trial("stories3m_greedy_text".to_owned(), &stories, real_text));
        trials
    }

    fn trial(name: String, gpu: &Option<Device>, run: impl Fn(&Device) + Send + 'static) -> Trial {
        let Some(gpu) = gpu.clone() else {
            return Trial::test(name, || Ok(())).with_ignored_flag(true);
        };
        Trial::test(name, move || {
            std::panic::catch_unwind(AssertUnwindSafe(|| run(&gpu))).map_err(|panic| {
                let text = panic.downcast_ref::<String>().map(String::as_str);
                Failed::from(text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("panicked"))
            })
        })
    }

    /// The same weights on a GPU.
    fn on(gpu: &Device, decoder: &Decoder, dtype: DType) -> Decoder {
        let params = Params::random(decoder.spec(), &Init::default(), gpu).unwrap();
        for (there, here) in params.iter().zip(decoder.params().iter()) {
            assert_eq!(there.id, here.id);
            write_from_host(&there.tensor, &to_host(&here.tensor).unwrap()).unwrap();
        }
        let (params, _) = params.into_use(dtype, |_| false).unwrap();
        Decoder::new(decoder.spec().clone(), params).unwrap()
    }

    fn options(format: Format) -> Options {
        Options { format, threads: 1, context: 0 }
    }

    fn engine(gpu: &Device, decoder: &Decoder, format: Format) -> GpuEngine {
        GpuEngine::new(on(gpu, decoder, DType::F32), &options(format)).unwrap()
    }

    fn session(gpu: &Device, decoder: &Decoder, format: Format) -> GpuSession {
        GpuSession::new(&engine(gpu, decoder, format), 1).unwrap()
    }

    /// The largest distance of a token's logits, token by token.
    fn worst(session: &mut GpuSession, ids: &[u32], expected: &[Vec<f32>]) -> f32 {
        let pairs = ids.iter().zip(expected);
        largest_of(pairs.map(|(id, expected)| distance(session.step(&[*id]).unwrap(), expected)))
    }

    fn f32_logits(spec: &DecoderSpec, gpu: &Device) {
        let (ids, decoder) = (prompt(), decoder(spec.clone()));
        let expected = dense_logits(&decoder, &ids);
        let engine = engine(gpu, &decoder, Format::F32);
        let as_one = GpuSession::new(&engine, 1).unwrap();
        let by_kernels = GpuSession::by_kernels(&engine, 1).unwrap();
        for mut session in [as_one, by_kernels] {
            let apart = worst(&mut session, &ids, &expected);
            assert!(apart < 1e-5, "{apart:e}");
        }
    }

    /// The same model without skipping.
    fn everything_read(spec: &DecoderSpec, gpu: &Device) {
        let (ids, decoder) = (prompt(), decoder(spec.clone()));
        let expected = dense_logits(&decoder, &ids);
        let there = on(gpu, &decoder, DType::F32);
        let engine = GpuEngine::reading(there, &options(Format::F32), Reads::All).unwrap();
        assert_eq!(engine.reads(), Reads::All);
        let mut session = GpuSession::new(&engine, 1).unwrap();
        let apart = worst(&mut session, &ids, &expected);
        assert!(apart < 1e-5, "{apart:e}");
    }

    /// Whether the engine can read `up` of a gated MLP by input.
    fn takes_up_by_input(spec: &DecoderSpec) -> bool {
        let takes = |layer: &relufy_spec::Layer| {
            layer.mlp.kind == MlpKind::Gated && layer.sites.up_in != SiteOp::Identity
        };
        spec.layers.iter().any(takes)
    }

    /// The same model where densities say that inputs are sparser than gates: its logits, what it does,
    /// and sequences side by side.
    fn up_by_input(spec: &DecoderSpec, gpu: &Device) {
        let (ids, decoder) = (prompt(), decoder(spec.clone()));
        let each = SiteDensities { up: 0.1, ..SiteDensities::DENSE };
        let densities = Densities::uniform(spec.layers.len(), each);
        let packed = |format| {
            let there = on(gpu, &decoder, DType::F32);
            let engine = GpuEngine::calibrated(there, &options(format), &densities).unwrap();
            assert!(engine.up_by_input().any(|by_input| by_input) && engine.suits(&densities));
            engine
        };
        let expected = dense_logits(&decoder, &ids);
        let engine = packed(Format::F32);
        let calibrated = Calibrated { densities: Some(densities.clone()), thresholds: None };
        let here = Engine::calibrated(&decoder, &options(Format::F32), &calibrated).unwrap();
        let as_one = GpuSession::new(&engine, 1).unwrap();
        let by_kernels = GpuSession::by_kernels(&engine, 1).unwrap();
        for mut session in [as_one, by_kernels] {
            let mut here = Session::new(&here).unwrap();
            for (n, (id, expected)) in ids.iter().zip(&expected).enumerate() {
                let apart = distance(session.step(&[*id]).unwrap(), expected);
                assert!(apart < 1e-5, "token {n}: {apart:e}");
                here.step(*id).unwrap();
                let (found, expected) = (session.counts().unwrap(), here.counts());
                assert_eq!(found.up.needed, expected.up.needed, "token {n}");
                if engine.up_by_input().all(|by_input| by_input) {
                    assert_eq!(found.up, expected.up, "token {n}");
                }
                assert_eq!(found.down.needed, expected.down.needed, "token {n}");
                assert_eq!(found.qkv, expected.qkv, "token {n}");
            }
        }
        for batch in [2, 8] {
            let rows = rows(batch);
            let mut alone: Vec<_> =
                rows.iter().map(|_| GpuSession::new(&engine, 1).unwrap()).collect();
            let mut together = GpuSession::new(&engine, batch).unwrap();
            for i in 0..4 {
                let tokens: Vec<u32> = rows.iter().map(|row| row[i]).collect();
                let logits = together.step(&tokens).unwrap().to_vec();
                let mut needed = 0;
                for (row, alone) in alone.iter_mut().enumerate() {
                    let apart = distance(
                        &logits[row * VOCAB..][..VOCAB],
                        alone.step(&tokens[row..=row]).unwrap(),
                    );
                    assert!(apart < 1e-5, "{batch} rows, row {row}, token {i}: {apart:e}");
                    needed += alone.counts().unwrap().total().needed;
                }
                assert_eq!(together.counts().unwrap().total().needed, needed, "{batch}, {i}");
            }
        }
        for (format, bound) in [(Format::Bf16, 8e-2), (Format::Int8, 1.2e-1)] {
            let mut session = GpuSession::new(&packed(format), 1).unwrap();
            let apart = worst(&mut session, &ids, &expected);
            eprintln!("{format}: {apart:.1e}");
            assert!(apart < bound, "{format}: {apart:e}");
        }
    }

    /// Which way it is depends on the GPU; what is computed does not.
    fn fastest(gpu: &Device) {
        let decoder = decoder(spec(&configs()[0].1, Stage::Two));
        let ids = prompt();
        let expected = dense_logits(&decoder, &ids);
        for batch in [1, 4] {
            let there = on(gpu, &decoder, DType::F32);
            let engine = GpuEngine::fastest(there, &options(Format::F32), batch).unwrap();
            let mut session = GpuSession::new(&engine, batch).unwrap();
            let logits = session.prefill(&vec![&ids[..]; batch]).unwrap();
            for row in logits.chunks(decoder.spec().vocab) {
                let apart = distance(row, &expected[ids.len() - 1]);
                assert!(apart < 1e-5, "{batch}: {apart:e}");
            }
        }
    }

    fn greedy_text(spec: &DecoderSpec, gpu: &Device) {
        let (ids, decoder) = (prompt(), decoder(spec.clone()));
        let pick = |logits: &[f32]| Ok::<_, relufy_model::Error>(argmax(logits));
        let expected = generate(&decoder, &ids, 40, &[], pick, |_| true).unwrap();
        let mut session = session(gpu, &decoder, Format::F32);
        let first = argmax(session.prefill(&[&ids]).unwrap());
        let mut found = vec![first];
        while found.len() < expected.len() {
            found.push(argmax(session.step(&[found[found.len() - 1]]).unwrap()));
        }
        assert_eq!(found, expected);
        // The same without the host.
        session.truncate(ids.len());
        let last = session.greedy(&[first], expected.len() - 1).unwrap();
        assert_eq!(last, expected[expected.len() - 1..]);
        assert_eq!(session.lens(), [ids.len() + expected.len() - 1]);
    }

    /// Prompts go through the dense decoder where they are long and first, else one by one.
    fn prompts(spec: &DecoderSpec, gpu: &Device) {
        let (ids, decoder) = (prompt(), decoder(spec.clone()));
        let expected = dense_logits(&decoder, &ids);
        let mut session = session(gpu, &decoder, Format::F32);
        for parts in [&[0, 17][..], &[0, 12, 17], &[0, 2, 13, 17]] {
            session.truncate(0);
            for part in parts.windows(2) {
                let logits = session.prefill(&[&ids[part[0]..part[1]]]).unwrap();
                let apart = distance(logits, &expected[part[1] - 1]);
                assert!(apart < 1e-5, "{part:?} of {parts:?}: {apart:e}");
            }
        }
    }

    /// Non-zeros are those of the engine on the CPU, and so is what both do with them.
    fn counts(spec: &DecoderSpec, gpu: &Device) {
        let (ids, decoder) = (prompt(), decoder(spec.clone()));
        let mut on_gpu = session(gpu, &decoder, Format::F32);
        let here = Engine::new(&decoder, &options(Format::F32)).unwrap();
        let mut here = Session::new(&here).unwrap();
        let skips = |layer: &relufy_spec::Layer| Activation::is_sparse(layer.mlp.activation);
        for (n, id) in ids.iter().enumerate() {
            on_gpu.step(&[*id]).unwrap();
            here.step(*id).unwrap();
            let (found, expected) = (on_gpu.counts().unwrap(), here.counts());
            let sites = [(found.qkv, expected.qkv), (found.o, expected.o)];
            for (found, expected) in sites.into_iter().chain([(found.head, expected.head)]) {
                assert_eq!(found, expected, "token {n}");
            }
            assert_eq!(found.up.needed, expected.up.needed, "token {n}");
            assert_eq!(found.down.needed, expected.down.needed, "token {n}");
            if spec.layers.iter().all(skips) {
                assert_eq!(found.up, expected.up, "token {n}");
                // Of neurons whose gate is open, one whose product is zero is left out here.
                assert_eq!(found.down.done, found.down.needed, "token {n}");
                assert!(found.down.done <= expected.down.done, "token {n}");
            }
        }
    }

    fn taken_back(spec: &DecoderSpec, gpu: &Device) {
        let (ids, decoder) = (prompt(), decoder(spec.clone()));
        let engine = engine(gpu, &decoder, Format::F32);
        let mut session = GpuSession::new(&engine, 1).unwrap();
        let all = session.prefill(&[&ids]).unwrap().to_vec();
        session.truncate(9);
        assert_eq!((session.lens(), session.left()), (&[9][..], engine.context() - 9));
        // Another sequence of the same engine in between.
        let mut other = GpuSession::new(&engine.clone(), 1).unwrap();
        other.prefill(&[&ids[3..8]]).unwrap();
        assert!(distance(session.prefill(&[&ids[9..]]).unwrap(), &all) < 1e-5);
        // The same work gives the same bits.
        let runs: Vec<Vec<f32>> = (0..2)
            .map(|_| {
                session.truncate(0);
                session.prefill(&[&ids]).unwrap().to_vec()
            })
            .collect();
        assert_eq!(runs[0], runs[1]);
        assert_eq!(runs[0], all);
    }

    /// Each sequence's tokens.
    fn rows(batch: usize) -> Vec<Vec<u32>> {
        let id = |row: usize, i: usize| ((i * i * 11 + i * 3 + 5 + row * 17) % VOCAB) as u32;
        (0..batch).map(|row| (0..10).map(|i| id(row, i)).collect()).collect()
    }

    /// Sequences side by side are what each is alone.
    fn batches(spec: &DecoderSpec, gpu: &Device) {
        let decoder = decoder(spec.clone());
        let engine = engine(gpu, &decoder, Format::F32);
        for batch in [2, 4, 8] {
            let rows = rows(batch);
            let mut alone: Vec<_> =
                rows.iter().map(|_| GpuSession::new(&engine, 1).unwrap()).collect();
            let mut together = GpuSession::new(&engine, batch).unwrap();
            for i in 0..rows[0].len() {
                let tokens: Vec<u32> = rows.iter().map(|row| row[i]).collect();
                let logits = together.step(&tokens).unwrap().to_vec();
                let mut needed = 0;
                for (row, alone) in alone.iter_mut().enumerate() {
                    let expected = alone.step(&tokens[row..=row]).unwrap();
                    let apart = distance(&logits[row * VOCAB..][..VOCAB], expected);
                    assert!(apart < 1e-5, "{batch} rows, row {row}, token {i}: {apart:e}");
                    needed += alone.counts().unwrap().total().needed;
                }
                assert_eq!(together.counts().unwrap().total().needed, needed, "{batch}, {i}");
            }
        }
    }

    /// Prompts of several lengths side by side.
    fn ragged_prompts(spec: &DecoderSpec, gpu: &Device) {
        let (ids, decoder) = (prompt(), decoder(spec.clone()));
        let expected = dense_logits(&decoder, &ids);
        let mut together = GpuSession::new(&engine(gpu, &decoder, Format::F32), 4).unwrap();
        let mut lens = [1, 13, 5, 17];
        let prompts = lens.map(|len| &ids[..len]);
        let logits = together.prefill(&prompts).unwrap().to_vec();
        assert_eq!(together.lens(), lens);
        let check = |logits: &[f32], lens: &[usize]| {
            for (logits, len) in logits.chunks(VOCAB).zip(lens) {
                let apart = distance(logits, &expected[len - 1]);
                assert!(apart < 1e-5, "{len} of {lens:?}: {apart:e}");
            }
        };
        check(&logits, &lens);
        together.truncate(13);
        lens[3] = 13;
        let tokens = lens.map(|len| ids[len]);
        let logits = together.step(&tokens).unwrap();
        check(logits, &lens.map(|len| len + 1));
    }

    fn smaller_formats(spec: &DecoderSpec, gpu: &Device) {
        let (ids, decoder) = (prompt(), decoder(spec.clone()));
        let expected = dense_logits(&decoder, &ids);
        // Shifted ReLUs are the farthest off: bf16 sends inputs next to a kink to its other side.
        for (format, bound) in [(Format::Bf16, 8e-2), (Format::Int8, 1.2e-1)] {
            let apart = worst(&mut session(gpu, &decoder, format), &ids, &expected);
            eprintln!("{format}: {apart:.1e}");
            assert!(apart < bound, "{format}: {apart:e}");
        }
        // Prompts through a decoder in bf16.
        let half = on(gpu, &decoder, DType::BF16);
        let half = GpuEngine::new(half, &options(Format::Bf16)).unwrap();
        let mut session = GpuSession::new(&half, 1).unwrap();
        let apart = distance(session.prefill(&[&ids]).unwrap(), &expected[ids.len() - 1]);
        eprintln!("bf16 prompt: {apart:.1e}");
        assert!(apart < 8e-2, "bf16 prompt: {apart:e}");
    }

    /// A Llama of another size.
    fn llama(stage: Stage, more: serde_json::Value) -> DecoderSpec {
        let mut config = configs()[0].1.clone();
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        spec(&config, stage)
    }

    fn long_prompts(gpu: &Device) {
        let spec = llama(Stage::Two, json!({"max_position_embeddings": 200}));
        let ids: Vec<u32> = (0..170).map(|i| ((i * i * 7 + i) % VOCAB) as u32).collect();
        let decoder = decoder(spec);
        let expected = dense_logits(&decoder, &ids);
        let mut session = session(gpu, &decoder, Format::F32);
        let apart = distance(session.prefill(&[&ids]).unwrap(), &expected[169]);
        assert!(apart < 1e-5, "{apart:e}");
        assert_eq!((session.lens(), session.left()), (&[170][..], 30));
    }

    /// Rows that take several blocks and shares.
    fn wide_rows(gpu: &Device) {
        let sizes = json!({"hidden_size": 1024, "intermediate_size": 3000, "vocab_size": 1000,
            "num_attention_heads": 8, "num_key_value_heads": 4});
        for stage in [Stage::Dense, Stage::One, Stage::Two] {
            let spec = llama(stage, sizes.clone());
            let init = Init { std: 0.05, scale_residual: false, seed: 3 };
            let params = Params::random(&spec, &init, &Device::Cpu).unwrap();
            let decoder = Decoder::new(spec, params).unwrap();
            let ids = prompt();
            let expected = dense_logits(&decoder, &ids);
            for (format, bound) in
                [(Format::F32, 1e-5), (Format::Bf16, 4e-2), (Format::Int8, 1.2e-1)]
            {
                let apart = worst(&mut session(gpu, &decoder, format), &ids, &expected);
                eprintln!("{stage:?} {format}: {apart:.1e}");
                assert!(apart < bound, "{stage:?} {format}: {apart:e}");
            }
        }
    }

    /// Inputs that take several registers of a thread, or more than it has; `up` either way.
    fn wide_inputs(gpu: &Device) {
        for (hidden, ffn) in [(4608, 500), (6400, 300), (256, 11000), (256, 13000)] {
            let sizes = json!({"hidden_size": hidden, "intermediate_size": ffn, "head_dim": 32,
                "num_attention_heads": 4, "num_key_value_heads": 2});
            let spec = llama(Stage::Two, sizes);
            let init = Init { std: 0.03, scale_residual: false, seed: 3 };
            let params = Params::random(&spec, &init, &Device::Cpu).unwrap();
            let decoder = Decoder::new(spec, params).unwrap();
            let ids = &prompt()[..6];
            let expected = dense_logits(&decoder, ids);
            for (format, bound) in
                [(Format::F32, 1e-5), (Format::Bf16, 4e-2), (Format::Int8, 1.2e-1)]
            {
                let there = || on(gpu, &decoder, DType::F32);
                let densities = Densities::dense(decoder.spec().layers.len());
                let by_neuron = GpuEngine::new(there(), &options(format)).unwrap();
                let by_input =
                    GpuEngine::calibrated(there(), &options(format), &densities).unwrap();
                assert!(by_input.up_by_input().all(|by_input| by_input));
                assert!(!by_neuron.up_by_input().any(|by_input| by_input));
                for (way, engine) in [("by neuron", by_neuron), ("by input", by_input)] {
                    let mut session = GpuSession::new(&engine, 1).unwrap();
                    let apart = worst(&mut session, ids, &expected);
                    eprintln!("{hidden} x {ffn} {format}, up {way}: {apart:.1e}");
                    assert!(apart < bound, "{hidden} x {ffn} {format}, up {way}: {apart:e}");
                }
            }
        }
    }

    /// Pythia 6.9B's shape: in the one kernel a plain MLP with long rows follows attention. By kernels it
    /// is the same.
    fn wide_parallel_blocks(gpu: &Device) {
        let mut config = configs()[8].1.clone();
        let sizes = json!({"hidden_size": 4096, "intermediate_size": 16384,
            "num_attention_heads": 32});
        config.as_object_mut().unwrap().extend(sizes.as_object().unwrap().clone());
        for stage in [Stage::Dense, Stage::Two] {
            let spec = spec(&config, stage);
            let engine = GpuEngine::random(&spec, &options(Format::Bf16), gpu, 5).unwrap();
            let mut as_one = GpuSession::new(&engine, 1).unwrap();
            let mut by_kernels = GpuSession::by_kernels(&engine, 1).unwrap();
            for id in &prompt()[..4] {
                let expected = by_kernels.step(&[*id]).unwrap().to_vec();
                let apart = distance(as_one.step(&[*id]).unwrap(), &expected);
                eprintln!("{stage:?}: {apart:.1e}");
                assert!(apart < 5e-4, "{stage:?}: {apart:e}");
            }
        }
    }

    /// Attention over more tokens than one block reads.
    fn long_contexts(gpu: &Device) {
        let rope = llama(Stage::Two, json!({"max_position_embeddings": 1200}));
        let mut alibi = rope.clone();
        alibi.position = Position::Alibi { bf16_slopes: false, scaled: false };
        let window = spec(&configs()[1].1, Stage::Two);
        let window = DecoderSpec { max_positions: 1200, ..window };
        let ids: Vec<u32> = (0..1100).map(|i| ((i * i * 7 + i * 3) % VOCAB) as u32).collect();
        for (name, spec) in [("rope", rope), ("alibi", alibi), ("window", window)] {
            let decoder = decoder(spec);
            let expected = dense_logits(&decoder, &ids);
            let mut session = session(gpu, &decoder, Format::F32);
            session.prefill(&[&ids[..1000]]).unwrap();
            let apart = worst(&mut session, &ids[1000..], &expected[1000..]);
            assert!(apart < 2e-5, "{name}: {apart:e}");
        }
    }

    fn refused(gpu: &Device) {
        let decoder = decoder(spec(&configs()[9].1, Stage::Two));
        let here = Decoder::new(decoder.spec().clone(), decoder.params().clone()).unwrap();
        assert!(matches!(GpuEngine::new(here, &options(Format::F32)), Err(Error::Decoder(_))));
        let there = || on(gpu, &decoder, DType::F32);
        let half = GpuEngine::new(there(), &options(Format::F16));
        assert!(matches!(half, Err(Error::NotOnGpus(Format::F16))));
        let short = Options { context: 4, ..options(Format::F32) };
        let engine = GpuEngine::new(there(), &short).unwrap();
        assert_eq!((engine.context(), engine.format()), (4, Format::F32));
        assert!(matches!(GpuSession::new(&engine, 3), Err(Error::Batch(3))));
        let mut session = GpuSession::new(&engine, 1).unwrap();
        assert!(matches!(session.prefill(&[&[]]), Err(Error::EmptyPrompt)));
        assert!(matches!(session.step(&[70]), Err(Error::TokenOutOfRange { id: 70, .. })));
        assert!(matches!(session.step(&[1, 1]), Err(Error::Sequences { found: 2, expected: 1 })));
        let full = Error::ContextFull { len: 5, context: 4 }.to_string();
        assert_eq!(session.prefill(&[&[1; 5]]).unwrap_err().to_string(), full);
        assert_eq!(session.greedy(&[1], 5).unwrap_err().to_string(), full);
        session.prefill(&[&[1; 4]]).unwrap();
        assert_eq!(session.step(&[1]).unwrap_err().to_string(), full);
        assert_eq!(session.lens(), [4]);
    }

    fn random_weights(gpu: &Device) {
        let spec = llama(Stage::Two, json!({}));
        for format in [Format::F32, Format::Bf16, Format::Int8] {
            let engine = GpuEngine::random(&spec, &options(format), gpu, 5).unwrap();
            let mut session = GpuSession::new(&engine, 2).unwrap();
            let logits = session.prefill(&[&[1, 2, 3], &[1, 2, 3]]).unwrap();
            assert!(logits.iter().all(|logit| logit.is_finite()));
            assert_eq!(logits[..VOCAB], logits[VOCAB..]);
        }
    }

    /// Where the shared data lie when the test runs.
    fn stories() -> Option<PathBuf> {
        let shared = std::env::var_os("RELUFY_SHARED").map(PathBuf::from);
        let shared = shared.or(option_env!("RELUFY_SHARED_DIR").map(PathBuf::from))?;
        let folder = shared.join("data/checkpoints/stories3M");
        folder.is_dir().then_some(folder)
    }

    /// A real model's text is the dense decoder's on the CPU.
    fn real_text(gpu: &Device) {
        let loaded = Checkpoint::open(&stories().unwrap()).unwrap().load(&Device::Cpu).unwrap();
        for stage in [Stage::Dense, Stage::One, Stage::Two] {
            let spec = ReluPlan::stage(stage).apply(loaded.spec()).unwrap();
            let decoder = Decoder::new(spec, loaded.params().clone()).unwrap();
            let mut session = session(gpu, &decoder, Format::F32);
            for first in [1, 403, 1000] {
                let pick = |logits: &[f32]| Ok::<_, relufy_model::Error>(argmax(logits));
                let expected = generate(&decoder, &[1, first], 120, &[], pick, |_| true).unwrap();
                session.truncate(0);
                let mut found = vec![argmax(session.prefill(&[&[1, first]]).unwrap())];
                while found.len() < expected.len() {
                    found.push(argmax(session.step(&[found[found.len() - 1]]).unwrap()));
                }
                assert_eq!(found, expected, "{stage:?}, {first}");
            }
        }
    }
}
