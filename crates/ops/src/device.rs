//! Devices by name: opening one, waiting for it, and what memory it has.

use candle_core::Device;

use crate::error::{Error, Result};

/// Memory of a GPU, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Held by tensors now.
    pub used: u64,
    /// The most that tensors ever held at a time, since [`reset_peak`].
    pub peak: u64,
    /// What nobody has taken, this program's pool counted as taken.
    pub free: u64,
    /// All that the GPU has.
    pub total: u64,
}

/// Opens `cpu`, `cuda` (the first GPU) or `cuda:N`.
///
/// # Errors
/// [`Error::Device`] for another name, a build without the feature `cuda`, or a GPU that cannot be
/// opened. There is no fallback to another device.
pub fn open(name: &str) -> Result<Device> {
    let wrong = || Error::Device {
        name: name.to_string(),
        message: "expected `cpu`, `cuda` or `cuda:N`".to_string(),
    };
    match name.split_once(':') {
        None if name == "cpu" => Ok(Device::Cpu),
        None if name == "cuda" => open_gpu(name, 0),
        Some(("cuda", number)) => open_gpu(name, number.parse().map_err(|_| wrong())?),
        _ => Err(wrong()),
    }
}

/// Whether this build can use GPUs.
pub const fn has_cuda() -> bool {
    cfg!(feature = "cuda")
}

#[cfg(not(feature = "cuda"))]
fn open_gpu(name: &str, _: usize) -> Result<Device> {
    let message = "this program was built without CUDA; `scripts/build-cuda.sh` (or `cargo build \
                   --release --features cuda` where the CUDA toolkit is installed) builds one with it";
    Err(Error::Device { name: name.to_string(), message: message.to_string() })
}

#[cfg(feature = "cuda")]
fn open_gpu(name: &str, ordinal: usize) -> Result<Device> {
    let failed = |message: String| Error::Device { name: name.to_string(), message };
    let device = Device::new_cuda_with_stream(ordinal).map_err(|e| failed(e.to_string()))?;
    // SAFETY: all work is queued on the device's one stream, so no event need order it.
    unsafe { device.as_cuda_device()?.disable_event_tracking() };
    crate::cuda::Gpu::on(&device).map_err(|e| failed(e.to_string()))?;
    Ok(device)
}

/// Waits for the work that is queued on a device; on the CPU there is none.
///
/// # Errors
/// What the work failed with.
pub fn synchronize(device: &Device) -> Result<()> {
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        return crate::cuda::Gpu::on(device)?.synchronize("synchronize");
    }
    let _ = device;
    Ok(())
}

/// A GPU's memory; `None` on the CPU.
///
/// # Errors
/// [`Error::Cuda`].
pub fn memory(device: &Device) -> Result<Option<Memory>> {
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        return crate::cuda::Gpu::on(device)?.memory().map(Some);
    }
    let _ = device;
    Ok(None)
}

/// Lets [`Memory::peak`] begin at what is used now.
///
/// # Errors
/// [`Error::Cuda`].
pub fn reset_peak(device: &Device) -> Result<()> {
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        return crate::cuda::Gpu::on(device)?.reset_peak();
    }
    let _ = device;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_names() {
        assert!(open("cpu").unwrap().is_cpu());
        for name in ["gpu", "cuda:", "cuda:x", "cpu:0", ""] {
            assert!(matches!(open(name), Err(Error::Device { .. })), "{name}");
        }
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn a_build_without_cuda_says_how_to_get_one() {
        let error = open("cuda").unwrap_err().to_string();
        assert!(error.contains("scripts/build-cuda.sh"), "{error}");
    }
}
