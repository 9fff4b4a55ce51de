//! Weight files as they lie on disk: named tensors with a type, a shape and raw bytes.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use candle_core::pickle::PthTensors;
use candle_core::{DType, Device};
use memmap2::Mmap;
use safetensors::tensor::Metadata;
use safetensors::{SafeTensorError, SafeTensors};

use crate::{Error, Result};

/// The number types that weights are stored in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StoredDtype {
    /// 32 bit.
    #[serde(alias = "float32")]
    F32,
    /// 16 bit, 10 of mantissa.
    #[serde(alias = "float16")]
    F16,
    /// 16 bit, 7 of mantissa.
    #[serde(alias = "bfloat16")]
    Bf16,
}

impl StoredDtype {
    /// Bytes of one number.
    pub fn size(self) -> usize {
        match self {
            StoredDtype::F32 => 4,
            StoredDtype::F16 | StoredDtype::Bf16 => 2,
        }
    }
}

/// Name, type and shape of a stored tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stored {
    /// Which of the files holds it.
    pub file: usize,
    pub dtype: std::result::Result<StoredDtype, String>,
    pub shape: Vec<usize>,
}

/// The weight files of one checkpoint, opened: headers are read, data is mapped.
pub(crate) struct Source {
    files: Vec<WeightFile>,
    tensors: BTreeMap<String, Stored>,
}

enum WeightFile {
    Safetensors { path: PathBuf, map: Mmap, header: usize, metadata: Metadata },
    Pickle { path: PathBuf, tensors: PthTensors },
}

impl WeightFile {
    fn path(&self) -> &Path {
        match self {
            WeightFile::Safetensors { path, .. } | WeightFile::Pickle { path, .. } => path,
        }
    }
}

impl Source {
    /// Opens the weight files of a folder: `model.safetensors`, its shards, or
    /// `pytorch_model.bin` and its shards, in this order of preference.
    pub fn open(dir: &Path) -> Result<Source> {
        let paths = weight_files(dir)?;
        let mut source = Source { files: Vec::new(), tensors: BTreeMap::new() };
        for path in paths {
            let pickle = path.extension().is_some_and(|extension| extension == "bin");
            if pickle { source.add_pickle(path)? } else { source.add_safetensors(path)? }
        }
        Ok(source)
    }

    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(WeightFile::path)
    }

    pub fn tensors(&self) -> &BTreeMap<String, Stored> {
        &self.tensors
    }

    pub fn path_of(&self, stored: &Stored) -> &Path {
        self.files[stored.file].path()
    }

    /// The raw little-endian bytes of a tensor.
    pub fn bytes(&self, name: &str, stored: &Stored) -> Result<Cow<'_, [u8]>> {
        match &self.files[stored.file] {
            WeightFile::Safetensors { path, map, header, metadata } => metadata
                .info(name)
                .and_then(|info| {
                    let (start, end) = info.data_offsets;
                    map.get(8 + header + start..8 + header + end)
                })
                .map(Cow::Borrowed)
                .ok_or_else(|| Error::Damaged {
                    path: path.clone(),
                    why: format!("tensor `{name}` lies outside the file"),
                }),
            WeightFile::Pickle { path, tensors } => {
                let damaged = |why: String| Error::Damaged { path: path.clone(), why };
                let tensor = tensors
                    .get(name)
                    .map_err(|error| damaged(format!("tensor `{name}`: {error}")))?
                    .ok_or_else(|| damaged(format!("tensor `{name}` is gone")))?
                    .to_device(&Device::Cpu)?
                    .flatten_all()?;
                Ok(Cow::Owned(match tensor.dtype() {
                    DType::F16 => bytemuck::cast_slice(&tensor.to_vec1::<half::f16>()?).to_vec(),
                    DType::BF16 => bytemuck::cast_slice(&tensor.to_vec1::<half::bf16>()?).to_vec(),
                    _ => bytemuck::cast_slice(&tensor.to_vec1::<f32>()?).to_vec(),
                }))
            }
        }
    }

    fn add_safetensors(&mut self, path: PathBuf) -> Result<()> {
        let file = File::open(&path).map_err(Error::io(&path))?;
        // SAFETY: the map is read-only; a file that another process shortens meanwhile
        // would end the process with SIGBUS, as with every memory-mapped reader.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(&path))?;
        let (header, metadata) = SafeTensors::read_metadata(&map)
            .map_err(|error| Error::Damaged { path: path.clone(), why: explain(&error, &map) })?;
        for (name, info) in metadata.tensors() {
            let dtype = match info.dtype {
                safetensors::Dtype::F32 => Ok(StoredDtype::F32),
                safetensors::Dtype::F16 => Ok(StoredDtype::F16),
                safetensors::Dtype::BF16 => Ok(StoredDtype::Bf16),
                other => Err(format!("{other:?}")),
            };
            self.add(&path, name, dtype, info.shape.clone())?;
        }
        self.files.push(WeightFile::Safetensors { path, map, header, metadata });
        Ok(())
    }

    fn add_pickle(&mut self, path: PathBuf) -> Result<()> {
        let tensors = PthTensors::new(&path, None)
            .map_err(|error| Error::Damaged { path: path.clone(), why: error.to_string() })?;
        let infos: Vec<_> = tensors
            .tensor_infos()
            .iter()
            .map(|(name, info)| (name.clone(), info.dtype, info.layout.dims().to_vec()))
            .collect();
        for (name, dtype, shape) in infos {
            let dtype = match dtype {
                DType::F32 => Ok(StoredDtype::F32),
                DType::F16 => Ok(StoredDtype::F16),
                DType::BF16 => Ok(StoredDtype::Bf16),
                other => Err(format!("{other:?}")),
            };
            self.add(&path, name, dtype, shape)?;
        }
        self.files.push(WeightFile::Pickle { path, tensors });
        Ok(())
    }

    fn add(
        &mut self,
        path: &Path,
        name: String,
        dtype: std::result::Result<StoredDtype, String>,
        shape: Vec<usize>,
    ) -> Result<()> {
        let stored = Stored { file: self.files.len(), dtype, shape };
        if self.tensors.contains_key(&name) {
            let why = format!("tensor `{name}` stands in another file too");
            return Err(Error::Damaged { path: path.to_owned(), why });
        }
        self.tensors.insert(name, stored);
        Ok(())
    }
}

/// What is wrong with a header, with the numbers that do not fit.
fn explain(error: &SafeTensorError, file: &[u8]) -> String {
    let length = file.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    match error {
        SafeTensorError::HeaderTooSmall => {
            format!("expected a header of at least 8 bytes, found {}", file.len())
        }
        SafeTensorError::HeaderTooLarge | SafeTensorError::InvalidHeaderLength => {
            format!("a header of {length} bytes in a file of {}", file.len())
        }
        SafeTensorError::MetadataIncompleteBuffer => {
            format!("the tensors in the header do not add up to the file's {} bytes", file.len())
        }
        other => other.to_string(),
    }
}

/// The weight files of a folder, in the order in which they are preferred.
fn weight_files(dir: &Path) -> Result<Vec<PathBuf>> {
    for stem in ["model.safetensors", "pytorch_model.bin"] {
        let single = dir.join(stem);
        if single.is_file() {
            return Ok(vec![single]);
        }
        let index = dir.join(format!("{stem}.index.json"));
        if index.is_file() {
            return shards(dir, &index);
        }
    }
    Err(Error::NotAModel {
        path: dir.to_owned(),
        what: "no model.safetensors or pytorch_model.bin, and no index of shards".to_owned(),
    })
}

/// The distinct files that an index names, each of which must lie in the folder itself.
fn shards(dir: &Path, index: &Path) -> Result<Vec<PathBuf>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let text = std::fs::read_to_string(index).map_err(Error::io(index))?;
    let parsed: Index = serde_json::from_str(&text)
        .map_err(|source| Error::Json { path: index.to_owned(), source })?;
    let names: std::collections::BTreeSet<String> = parsed.weight_map.into_values().collect();
    names
        .into_iter()
        .map(|name| {
            let path = dir.join(&name);
            let plain = Path::new(&name).components().count() == 1 && !name.starts_with('.');
            if plain && path.is_file() {
                Ok(path)
            } else {
                Err(Error::NotAModel {
                    path: index.to_owned(),
                    what: format!("names a shard that is not there: {name}"),
                })
            }
        })
        .collect()
}
