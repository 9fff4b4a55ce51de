//! Devices by name: opening one, waiting for it, and what memory it has.

use std::sync::atomic::{AtomicBool, Ordering};

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

/// Whether [`open`] would understand a name, wherever that device is.
pub fn is_name(name: &str) -> bool {
    match name.split_once(':') {
        None => matches!(name, "cpu" | "cuda"),
        Some((kind, number)) => kind == "cuda" && number.parse::<usize>().is_ok(),
    }
}

/// What the maker calls a GPU; `None` of the CPU.
///
/// # Errors
/// [`Error::Cuda`].
pub fn model_name(device: &Device) -> Result<Option<String>> {
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        return crate::cuda::Gpu::on(device)?.name().map(Some);
    }
    let _ = device;
    Ok(None)
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

static DETERMINISTIC: AtomicBool = AtomicBool::new(true);

/// Whether the same work on the same GPU must give the same bits, which is how a program starts.
///
/// The own kernels always do. cuDNN's attention has a second backward pass which is 6 to 8 %
/// faster and needs less memory, but adds in any order.
pub fn set_deterministic(yes: bool) {
    DETERMINISTIC.store(yes, Ordering::Relaxed);
}

/// What [`set_deterministic`] said last.
pub fn deterministic() -> bool {
    DETERMINISTIC.load(Ordering::Relaxed)
}

/// cuDNN in this process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cudnn {
    /// 91900 for 9.19.0.
    pub version: usize,
    /// Shapes that it has a plan for.
    pub plans: usize,
    /// How often one of them ran.
    pub runs: u64,
    /// Shapes that it refused, with the reason; the own kernels do these.
    pub refused: Vec<String>,
}

/// Opens cuDNN if it is not open yet, and says what it did so far. `None` in a build without the
/// feature `cudnn`, or where `RELUFY_ATTENTION=own` does without.
///
/// # Errors
/// [`Error::Cuda`] where the library cannot be opened: `RELUFY_CUDNN_LIB` names its file.
pub fn cudnn() -> Result<Option<Cudnn>> {
    #[cfg(feature = "cudnn")]
    return crate::cuda::cudnn::report();
    #[cfg(not(feature = "cudnn"))]
    Ok(None)
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

/// Work of one kind that a GPU did.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// The kernel, or the product's sides.
    pub label: String,
    /// How often.
    pub calls: usize,
    /// All calls together.
    pub ms: f64,
    /// Floating-point operations of all calls; 0 where they are not what limits.
    pub flops: f64,
}

/// Runs `work` and says where the GPU's time went, the longest first; nothing on the CPU. The
/// events around each piece cost a little: the sum is not quite the time of an untouched run.
///
/// # Errors
/// Those of `work`; [`Error::Cuda`].
pub fn profile<R, E: From<Error>>(
    device: &Device,
    work: impl FnOnce() -> std::result::Result<R, E>,
) -> std::result::Result<(R, Vec<Span>), E> {
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        let gpu = crate::cuda::Gpu::on(device)?;
        gpu.begin_profile()?;
        let result = work();
        let spans = gpu.end_profile()?;
        return Ok((result?, spans));
    }
    let _ = device;
    Ok((work()?, Vec::new()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_names() {
        assert!(open("cpu").unwrap().is_cpu());
        assert!(["cpu", "cuda", "cuda:1"].into_iter().all(is_name));
        for name in ["gpu", "cuda:", "cuda:x", "cpu:0", ""] {
            assert!(matches!(open(name), Err(Error::Device { .. })), "{name}");
            assert!(!is_name(name), "{name}");
        }
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn a_build_without_cuda_says_how_to_get_one() {
        let error = open("cuda").unwrap_err().to_string();
        assert!(error.contains("scripts/build-cuda.sh"), "{error}");
    }
}
