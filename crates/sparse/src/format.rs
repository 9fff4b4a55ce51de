//! How a weight is stored.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::Error;

/// How a weight is stored. Arithmetic is f32, but for [`Format::Int8`] where the processor has AVX-512
/// VNNI: there the other factor is rounded to 16 bits and products are exact integers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// As the decoder has it: to compare with the dense path.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of an f32.
    Bf16,
    /// Integers of 8 bits, with an f32 scale for each stored row. An embedding that is not the head
    /// is kept in f16: one row of it is read.
    Int8,
}

impl Format {
    /// Every format.
    pub const ALL: [Format; 4] = [Format::F32, Format::F16, Format::Bf16, Format::Int8];

    /// Bytes of one weight.
    pub fn bytes(self) -> usize {
        match self {
            Format::F32 => 4,
            Format::F16 | Format::Bf16 => 2,
            Format::Int8 => 1,
        }
    }

    /// Its name: `f32`, `f16`, `bf16`, `int8`.
    pub fn name(self) -> &'static str {
        match self {
            Format::F32 => "f32",
            Format::F16 => "f16",
            Format::Bf16 => "bf16",
            Format::Int8 => "int8",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Format {
    type Err = Error;

    fn from_str(name: &str) -> Result<Format, Error> {
        let found = Format::ALL.into_iter().find(|format| format.name() == name);
        found.ok_or_else(|| Error::UnknownFormat(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        for format in Format::ALL {
            assert_eq!(format.to_string().parse::<Format>().unwrap(), format);
            assert_eq!(serde_json::to_value(format).unwrap(), format.name());
        }
        let why = "q4".parse::<Format>().unwrap_err().to_string();
        assert_eq!(why, "unknown format `q4`; there are f32, f16, bf16 and int8");
    }
}
