//! A model as a Hugging Face folder: opened and checked without converting anything.

mod companions;
mod content;
mod load;
mod save;
mod source;
mod staged;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use relufy_data::{Hub, Need, Progress, Tokenizer};
use relufy_spec::family::{self, ModelConfig};
use relufy_spec::{ReluPlan, WeightRow};

pub use companions::{TOKENIZER_FILES, copy_companions, write_config};
pub use content::hash_file;
pub use save::{checkpoint_tensor, save_weights};
pub use source::StoredDtype;
pub use staged::{STAGED_PREFIX, StagedDir, write_atomic};

use crate::{Decoder, Error, Params, Result};
use source::{Source, Stored};

/// A model folder whose config and weight headers were read and found to agree. Weights
/// stay memory-mapped in their files until [`Checkpoint::load`] converts them once.
pub struct Checkpoint {
    dir: PathBuf,
    name: String,
    revision: Option<String>,
    config: ModelConfig,
    source: Source,
    /// The stored tensor of each row of the weight map.
    bound: Vec<String>,
}

impl Checkpoint {
    /// Opens a local folder.
    ///
    /// # Errors
    /// A folder without config or weights, an unknown architecture, a key or tensor that
    /// nobody understands, a missing tensor, a wrong shape or type, a damaged file.
    pub fn open(dir: &Path) -> Result<Checkpoint> {
        let name = dir
            .canonicalize()
            .ok()
            .and_then(|full| full.file_name().map(|name| name.to_string_lossy().into_owned()))
            .unwrap_or_else(|| dir.display().to_string());
        Checkpoint::open_as(dir, name, None)
    }

    /// Opens a local folder, or a hub id `org/name[@revision]` after fetching what is not
    /// in the cache yet.
    ///
    /// # Errors
    /// As [`Checkpoint::open`]; an id that cannot be fetched.
    pub fn resolve(reference: &str, progress: &dyn Progress) -> Result<Checkpoint> {
        let files = Hub::from_env()?.model(reference, Need::Everything, progress)?;
        match files.revision {
            None => Checkpoint::open(&files.folder),
            Some(revision) => {
                let name = reference.split('@').next().unwrap_or(reference).to_owned();
                Checkpoint::open_as(&files.folder, name, Some(revision))
            }
        }
    }

    fn open_as(dir: &Path, name: String, revision: Option<String>) -> Result<Checkpoint> {
        let config = read_config(dir)?;
        let source = Source::open(dir)?;
        let bound = bind(dir, &config, &source)?;
        Ok(Checkpoint { dir: dir.to_owned(), name, revision, config, source, bound })
    }

    /// What the config says.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Hub id, or the folder's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Commit of the hub's repository, for a model that came from there.
    pub fn revision(&self) -> Option<&str> {
        self.revision.as_deref()
    }

    /// The weight files.
    pub fn weight_files(&self) -> Vec<PathBuf> {
        self.source.paths().map(Path::to_owned).collect()
    }

    /// The stored tensors that carry weights, in the weight map's order.
    pub fn tensor_names(&self) -> &[String] {
        &self.bound
    }

    /// The number type in which most weights are stored.
    pub fn stored_dtype(&self) -> StoredDtype {
        let mut elements: BTreeMap<usize, (usize, StoredDtype)> = BTreeMap::new();
        for name in &self.bound {
            let stored = &self.source.tensors()[name];
            if let Ok(dtype) = &stored.dtype {
                elements.entry(*dtype as usize).or_insert((0, *dtype)).0 +=
                    stored.shape.iter().product::<usize>();
            }
        }
        elements.into_values().max_by_key(|(count, _)| *count).map_or(StoredDtype::F32, |(_, d)| d)
    }

    /// The tokenizer, checked against the embedding.
    ///
    /// # Errors
    /// No usable tokenizer in the folder; more tokens than the embedding has rows.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        let tokenizer = Tokenizer::from_folder(&self.dir)?;
        let (tokens, rows) = (tokenizer.vocab_size(), self.config.spec.vocab);
        if tokens > rows {
            return Err(Error::TokenizerTooLarge { path: self.dir.clone(), tokens, rows });
        }
        Ok(tokenizer)
    }

    /// Reads the weights into a decoder, as f32.
    ///
    /// # Errors
    /// A weight that is NaN or infinite, by name; a tied head that differs.
    pub fn load(&self, device: &Device) -> Result<Decoder> {
        self.load_with(device, &ReluPlan::default())
    }

    /// As [`Checkpoint::load`], with surgery applied in memory.
    ///
    /// # Errors
    /// As [`Checkpoint::load`]; a plan that does not fit.
    pub fn load_with(&self, device: &Device, plan: &ReluPlan) -> Result<Decoder> {
        self.load_as(device, plan, DType::F32)
    }

    /// As [`Checkpoint::load_with`], the weights rounded to `dtype` one after the other: what
    /// inference on a GPU wants.
    ///
    /// # Errors
    /// As [`Checkpoint::load_with`]; a type that the device does not compute in.
    pub fn load_as(&self, device: &Device, plan: &ReluPlan, dtype: DType) -> Result<Decoder> {
        let spec = plan.apply(&self.config.spec)?;
        let params = load::load(self, device, dtype)?;
        Decoder::new(spec, params)
    }

    /// The weights in f32, for whoever trains them.
    ///
    /// # Errors
    /// As [`Checkpoint::load`].
    pub fn load_params(&self, device: &Device) -> Result<Params> {
        load::load(self, device, DType::F32)
    }

    fn bound_rows(&self) -> impl Iterator<Item = (&WeightRow, &str, &Stored)> {
        let names = self.bound.iter();
        self.config
            .weights
            .rows
            .iter()
            .zip(names)
            .map(|(row, name)| (row, name.as_str(), &self.source.tensors()[name]))
    }
}

fn read_config(dir: &Path) -> Result<ModelConfig> {
    let path = dir.join("config.json");
    if !path.is_file() {
        let what = "no config.json: not a model folder".to_owned();
        return Err(Error::NotAModel { path: dir.to_owned(), what });
    }
    let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
    let json =
        serde_json::from_str(&text).map_err(|source| Error::Json { path: path.clone(), source })?;
    family::parse(&json).map_err(|source| Error::Config { path, source })
}

/// Finds the stored tensor of each row of the weight map, and demands that nothing is left.
fn bind(dir: &Path, config: &ModelConfig, source: &Source) -> Result<Vec<String>> {
    let map = &config.weights;
    let stored = source.tensors();
    let mut bound = Vec::with_capacity(map.rows.len());
    let mut taken = std::collections::BTreeSet::new();
    for row in &map.rows {
        let mut found = row.names.iter().flat_map(|name| {
            let bare = name.strip_prefix(map.prefix.as_str()).filter(|_| !map.prefix.is_empty());
            std::iter::once(name.as_str()).chain(bare).filter(|name| stored.contains_key(*name))
        });
        let Some(name) = found.next() else {
            return Err(Error::MissingTensor {
                path: dir.to_owned(),
                tensor: row.names.first().cloned().unwrap_or_default(),
            });
        };
        taken.insert(name);
        for twin in found {
            taken.insert(twin);
            require_equal(dir, source, name, twin)?;
        }
        check(source, &config.spec, row, name)?;
        bound.push(name.to_owned());
    }
    let extra: Vec<String> = stored
        .keys()
        .filter(|name| !taken.contains(name.as_str()))
        .filter(|name| !map.ignored_suffixes.iter().any(|suffix| name.ends_with(suffix)))
        .cloned()
        .collect();
    if extra.is_empty() {
        Ok(bound)
    } else {
        Err(Error::ExtraTensors { path: dir.to_owned(), tensors: extra })
    }
}

/// A tied head that is stored as well must be the embedding, byte for byte.
fn require_equal(dir: &Path, source: &Source, first: &str, second: &str) -> Result<()> {
    let (a, b) = (&source.tensors()[first], &source.tensors()[second]);
    if source.bytes(first, a)? == source.bytes(second, b)? {
        return Ok(());
    }
    Err(Error::TiedDiffer {
        path: dir.to_owned(),
        first: first.to_owned(),
        second: second.to_owned(),
    })
}

/// Checks type and shape of the tensor of one row.
fn check(
    source: &Source,
    spec: &relufy_spec::DecoderSpec,
    row: &WeightRow,
    name: &str,
) -> Result<()> {
    let stored = &source.tensors()[name];
    let path = || source.path_of(stored).to_owned();
    if let Err(found) = &stored.dtype {
        let (tensor, found) = (name.to_owned(), found.clone());
        return Err(Error::Dtype { path: path(), tensor, found });
    }
    let expected = save::stored_shape(spec, row);
    if stored.shape != expected {
        let (tensor, found) = (name.to_owned(), stored.shape.clone());
        return Err(Error::Shape { path: path(), tensor, expected, found });
    }
    Ok(())
}
