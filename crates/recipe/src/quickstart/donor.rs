//! The donor: a small SiLU model that knows the little world, built into the program.
//!
//! It was made by `relufy quickstart --rebuild-donor`, which trains it from random weights as
//! `configs/micro/donor.toml` says.

use std::fs;

use relufy_model::StoredDtype;
use relufy_model::checkpoint::{StagedDir, write_atomic};
use relufy_trainer::InitOptions;

use super::folder::Folder;
use crate::error::{Error, Result};

/// The donor's folder, file by file.
pub(super) const FILES: [(&str, &[u8]); 4] = [
    ("config.json", include_bytes!("../../donor/config.json")),
    ("model.safetensors", include_bytes!("../../donor/model.safetensors")),
    ("tokenizer.json", include_bytes!("../../donor/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("../../donor/tokenizer_config.json")),
];

/// What a new donor is: the keys of its config.json.
pub(super) const ARCHITECTURE: &str = include_str!("../../../../configs/micro/donor-model.json");

/// The seed of a new donor's random weights.
const INIT_SEED: u64 = 1;

/// Writes the donor into the folder: the one built in, or the one trained there.
pub(super) fn install(folder: &Folder) -> Result<()> {
    let staged = StagedDir::create(&folder.donor())?;
    let trained = folder.trained(super::training::DONOR.name);
    for (name, built_in) in FILES {
        let source = trained.join(name);
        let bytes = match folder.settings.rebuild_donor {
            true => fs::read(&source).map_err(Error::io(&source))?,
            false => built_in.to_vec(),
        };
        let target = staged.path().join(name);
        fs::write(&target, bytes).map_err(Error::io(&target))?;
    }
    Ok(staged.commit()?)
}

/// Makes the random model that a new donor's training begins with, unless it is there.
pub(super) fn init(folder: &Folder) -> Result<()> {
    let output = folder.path("donor-init");
    if output.is_dir() {
        return Ok(());
    }
    let config = folder.path("donor-model.json");
    write_atomic(&config, ARCHITECTURE.as_bytes())?;
    relufy_trainer::init(&InitOptions {
        config,
        output,
        tokenizer: Some(folder.world().join("tokenizer")),
        seed: INIT_SEED,
        std: None,
        dtype: StoredDtype::Bf16,
    })?;
    Ok(())
}
