//! The number types that a decoder computes in, by name.

use std::fmt;
use std::str::FromStr;

use candle_core::{DType, Device};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// A number type, or the one that suits the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// f32 on the CPU, bf16 on a GPU.
    #[default]
    Auto,
    /// 32 bit.
    F32,
    /// 16 bit, 7 of mantissa; sums are of 32 bit.
    Bf16,
}

impl Precision {
    /// All of them.
    pub const ALL: [Precision; 3] = [Precision::Auto, Precision::F32, Precision::Bf16];

    /// The name that [`FromStr`] takes.
    pub fn name(self) -> &'static str {
        match self {
            Precision::Auto => "auto",
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
        }
    }

    /// The type on a device.
    ///
    /// # Errors
    /// bf16 on the CPU.
    pub fn on(self, device: &Device) -> Result<DType> {
        match (self, device.is_cpu()) {
            (Precision::Auto | Precision::F32, true) | (Precision::F32, false) => Ok(DType::F32),
            (Precision::Auto | Precision::Bf16, false) => Ok(DType::BF16),
            (Precision::Bf16, true) => Err(Error::Invalid(
                "bf16 needs a GPU: the CPU computes in f32 (leave the dtype at `auto`)".to_owned(),
            )),
        }
    }
}

impl FromStr for Precision {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Precision, String> {
        // The long names are those of PyTorch and of the evaluation harness.
        let known = match text {
            "float32" | "float" | "torch.float32" => "f32",
            "bfloat16" | "torch.bfloat16" => "bf16",
            name => name,
        };
        let found = Precision::ALL.into_iter().find(|precision| precision.name() == known);
        found.ok_or_else(|| "expected auto, f32 or bf16".to_owned())
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_read_back() {
        for precision in Precision::ALL {
            assert_eq!(precision.to_string().parse(), Ok(precision));
        }
        assert_eq!("torch.bfloat16".parse(), Ok(Precision::Bf16));
        assert!("half".parse::<Precision>().is_err());
    }

    #[test]
    fn the_cpu_computes_in_f32() {
        assert_eq!(Precision::Auto.on(&Device::Cpu).unwrap(), DType::F32);
        assert_eq!(Precision::F32.on(&Device::Cpu).unwrap(), DType::F32);
        assert!(Precision::Bf16.on(&Device::Cpu).unwrap_err().to_string().contains("GPU"));
    }
}
