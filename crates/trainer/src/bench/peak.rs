//! How fast a GPU multiplies at most, by its maker's word.

use serde::Serialize;

/// A rate to hold a step's own against.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PeakRate {
    /// In TFLOP/s.
    pub tflops: f64,
    /// Who says so.
    pub source: String,
}

/// Dense bf16 products with f32 sums, from the data sheets.
const KNOWN: [(&str, f64, &str); 5] = [
    ("H100 PCIe", 756.0, "NVIDIA H100 PCIe data sheet, dense bf16"),
    ("H200", 989.0, "NVIDIA H200 data sheet, dense bf16"),
    ("GH200", 989.0, "NVIDIA GH200 data sheet, dense bf16"),
    ("H100", 989.0, "NVIDIA H100 SXM data sheet, dense bf16"),
    ("A100", 312.0, "NVIDIA A100 data sheet, dense bf16"),
];

impl PeakRate {
    /// What was said on the command line.
    pub fn given(tflops: f64) -> PeakRate {
        PeakRate { tflops, source: "as given".to_owned() }
    }

    /// That of a GPU by its name.
    pub fn of(device: &str) -> Option<PeakRate> {
        let found = KNOWN.iter().find(|(name, ..)| device.contains(name));
        found.map(|(_, tflops, source)| PeakRate { tflops: *tflops, source: (*source).to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_known_by_name() {
        let rate = |name: &str| PeakRate::of(name).map(|peak| peak.tflops);
        assert_eq!(rate("NVIDIA H200"), Some(989.0));
        assert_eq!(rate("NVIDIA H100 PCIe"), Some(756.0));
        assert_eq!(rate("NVIDIA H100 80GB HBM3"), Some(989.0));
        assert_eq!(rate("NVIDIA A100-SXM4-80GB"), Some(312.0));
        assert_eq!(rate("Another"), None);
    }
}
