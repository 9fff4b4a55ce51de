//! What must hold for every family whatever its shape: saving and loading gives the same
//! bytes.

#![allow(clippy::unwrap_used)] // a failed unwrap is the failed test

mod common;

use std::path::Path;

use candle_core::Device;
use proptest::prelude::*;
use relufy_model::checkpoint::{save_weights, write_config};
use relufy_model::{Checkpoint, Decoder, NoTap, Params, StoredDtype, Tokens};
use relufy_spec::family::ModelConfig;

use common::{KINDS, config, random};

fn write(dir: &Path, config: &ModelConfig, params: &Params, dtype: StoredDtype) {
    write_config(dir, &config.json).unwrap();
    save_weights(dir, &config.spec, params, &config.weights, dtype).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// The weight map read one way and then the other is the identity, byte for byte.
    #[test]
    fn saving_what_was_loaded_gives_the_same_bytes(
        kind in 0..KINDS, groups in 1usize..4, queries in 1usize..4, half in 1usize..5,
        layers in 1usize..3, seed in any::<u64>(), half_precision in any::<bool>(),
    ) {
        // Rotary pairs of half a head: dimensions in fours.
        let config = config(kind, groups, queries, 4 * half, layers);
        let dtype = if half_precision { StoredDtype::Bf16 } else { StoredDtype::F32 };
        let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        write(first.path(), &config, &random(&config, seed), dtype);

        let checkpoint = Checkpoint::open(first.path()).unwrap();
        prop_assert_eq!(checkpoint.stored_dtype(), dtype);
        let decoder = checkpoint.load(&Device::Cpu).unwrap();
        write(second.path(), checkpoint.config(), decoder.params(), dtype);

        let bytes = |dir: &Path| std::fs::read(dir.join("model.safetensors")).unwrap();
        prop_assert_eq!(bytes(first.path()), bytes(second.path()));
    }
}

#[test]
fn tokens_outside_the_model_are_refused() {
    let config = config(2, 1, 2, 4, 1);
    let decoder = Decoder::new(config.spec.clone(), random(&config, 1)).unwrap();
    let refused = |ids: Vec<u32>, len| decoder.hidden(&Tokens::rows(ids, len), &mut NoTap).is_err();
    assert!(refused(vec![40], 1));
    assert!(refused(vec![1; 65], 65));
    assert!(!refused(vec![1; 65], 64));
}
