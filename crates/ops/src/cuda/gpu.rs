//! One GPU: its stream, loaded kernels, uploaded index lists and memory pool.

use std::collections::HashMap;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, CudaSlice, CudaStream, DriverError, result, sys,
};
use candle_core::cuda_backend::{CudaDevice, DeviceId};
use candle_core::{Device, Tensor};

use super::launch::Module;
use super::profile::Timed;
use crate::error::{Error, Result};

/// What the operations keep for a device, besides what candle does.
pub(crate) struct Gpu {
    pub(crate) device: CudaDevice,
    pub(crate) stream: Arc<CudaStream>,
    /// Multiprocessors.
    pub(crate) processors: u32,
    /// Whether a kernel may start before the one in front of it has ended: since Hopper.
    pub(crate) overlaps: bool,
    kernels: Mutex<HashMap<(&'static str, String), CudaFunction>>,
    uploads: Mutex<Uploads>,
    pub(super) profiling: AtomicBool,
    pub(super) timed: Mutex<Vec<Timed>>,
}

/// Bytes on the device, freed on the stream when dropped.
pub(crate) struct Scratch {
    slice: CudaSlice<u8>,
    pub(crate) ptr: u64,
}

/// Lists that were copied to the device lately. Every layer of a pass asks for the same positions
/// and segments, so they travel once.
#[derive(Default)]
struct Uploads {
    /// The newest last.
    recent: Vec<(Arc<[u8]>, Arc<Scratch>)>,
}

impl Uploads {
    const KEPT: usize = 32;
}

impl Gpu {
    /// The GPU that holds `t`.
    pub(crate) fn of(t: &Tensor) -> Result<Arc<Gpu>> {
        Gpu::on(t.device())
    }

    /// What is kept for `device`, which must be a GPU.
    pub(crate) fn on(device: &Device) -> Result<Arc<Gpu>> {
        static KNOWN: OnceLock<Mutex<HashMap<DeviceId, Arc<Gpu>>>> = OnceLock::new();
        let device = device.as_cuda_device()?;
        let mut known =
            KNOWN.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(gpu) = known.get(&device.id()) {
            return Ok(gpu.clone());
        }
        let gpu = Arc::new(Gpu::new(device)?);
        known.insert(device.id(), gpu.clone());
        Ok(gpu)
    }

    fn new(device: &CudaDevice) -> Result<Gpu> {
        const OP: &str = "opening the GPU";
        let stream = device.cuda_stream();
        let context = stream.context();
        let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let processors = context.attribute(attribute).map_err(|e| failed(OP, e))?;
        let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR;
        let major = context.attribute(attribute).map_err(|e| failed(OP, e))?;
        let gpu = Gpu {
            device: device.clone(),
            stream,
            processors: processors.max(1) as u32,
            overlaps: major >= 9,
            kernels: Mutex::default(),
            uploads: Mutex::default(),
            profiling: AtomicBool::new(false),
            timed: Mutex::default(),
        };
        // Freed memory stays in the pool: giving it back at each wait would cost a new mapping.
        let keep = u64::MAX;
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        // SAFETY: the attribute's value is a u64, which the call reads.
        unsafe {
            sys::cuMemPoolSetAttribute(
                gpu.pool(OP)?,
                attribute,
                (&raw const keep).cast_mut().cast(),
            )
        }
        .result()
        .map_err(|e| failed(OP, e))?;
        Ok(gpu)
    }

    /// The kernel `name` of a module, loaded once.
    pub(crate) fn kernel(&self, module: &Module, name: &str) -> Result<CudaFunction> {
        let mut kernels = self.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernel) = kernels.get(&(module.name, name.to_string())) {
            return Ok(kernel.clone());
        }
        let kernel = module.load(self.stream.context(), name)?;
        kernels.insert((module.name, name.to_string()), kernel.clone());
        Ok(kernel)
    }

    /// Uninitialised bytes from the pool.
    pub(crate) fn scratch(&self, bytes: usize, op: &'static str) -> Result<Scratch> {
        use candle_core::cuda_backend::cudarc::driver::DevicePtr;
        // SAFETY: the bytes are written by a kernel before another reads them.
        let slice = unsafe { self.stream.alloc::<u8>(bytes.max(1)) }.map_err(|e| failed(op, e))?;
        let ptr = slice.device_ptr(&self.stream).0;
        Ok(Scratch { slice, ptr })
    }

    /// A list on the device. One that was there lately, with the same content, is not copied again.
    pub(crate) fn upload<T: Copy + 'static>(
        &self,
        items: &[T],
        op: &'static str,
    ) -> Result<Arc<Scratch>> {
        // SAFETY: callers pass lists of numbers, or of plain structs without padding.
        let bytes: &[u8] = unsafe {
            std::slice::from_raw_parts(items.as_ptr().cast(), std::mem::size_of_val(items))
        };
        let mut uploads = self.uploads.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = uploads.recent.iter().rposition(|(known, _)| **known == *bytes) {
            let found = uploads.recent.remove(at);
            let there = found.1.clone();
            uploads.recent.push(found);
            return Ok(there);
        }
        let mut there = self.scratch(bytes.len(), op)?;
        if !bytes.is_empty() {
            self.stream.memcpy_htod(bytes, &mut there.slice).map_err(|e| failed(op, e))?;
        }
        let there = Arc::new(there);
        if uploads.recent.len() == Uploads::KEPT {
            uploads.recent.remove(0);
        }
        uploads.recent.push((bytes.into(), there.clone()));
        Ok(there)
    }

    /// Copies `len` numbers at `ptr` to the host, after waiting for what is queued.
    pub(crate) fn download<T: Copy + Default>(
        &self,
        ptr: u64,
        len: usize,
        op: &'static str,
    ) -> Result<Vec<T>> {
        let mut items = vec![T::default(); len];
        if len == 0 {
            return Ok(items);
        }
        self.bind(op)?;
        // SAFETY: the caller has `len` numbers at `ptr`; the stream is waited for before the
        // vector is looked at or dropped.
        unsafe { result::memcpy_dtoh_async(&mut items, ptr, self.stream.cu_stream()) }
            .map_err(|e| failed(op, e))?;
        self.stream.synchronize().map_err(|e| failed(op, e))?;
        Ok(items)
    }

    /// Copies numbers from the host to `ptr`.
    pub(crate) fn write<T: Copy>(&self, items: &[T], ptr: u64, op: &'static str) -> Result<()> {
        if items.is_empty() {
            return Ok(());
        }
        self.bind(op)?;
        // SAFETY: the caller has room for the items at `ptr`; the stream is waited for before the
        // host's memory may change.
        unsafe { result::memcpy_htod_async(ptr, items, self.stream.cu_stream()) }
            .map_err(|e| failed(op, e))?;
        self.stream.synchronize().map_err(|e| failed(op, e))
    }

    /// Copies bytes on the device; the ranges must not overlap.
    pub(crate) fn copy(&self, from: u64, to: u64, bytes: usize, op: &'static str) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.bind(op)?;
        // SAFETY: the caller has `bytes` bytes at both places.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream.cu_stream()) }
            .map_err(|e| failed(op, e))
    }

    /// Sets bytes to 0.
    pub(crate) fn zero(&self, ptr: u64, bytes: usize, op: &'static str) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.bind(op)?;
        // SAFETY: the caller has `bytes` bytes at `ptr`.
        unsafe { result::memset_d8_async(ptr, 0, bytes, self.stream.cu_stream()) }
            .map_err(|e| failed(op, e))
    }

    /// What the maker calls it.
    pub(crate) fn name(&self) -> Result<String> {
        self.stream.context().name().map_err(|e| failed("naming the GPU", e))
    }

    /// Bytes of shared memory that a block may ask for.
    pub(crate) fn shared_memory(&self, op: &'static str) -> Result<usize> {
        let attribute =
            sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        let bytes = self.stream.context().attribute(attribute).map_err(|e| failed(op, e))?;
        Ok(bytes.max(0) as usize)
    }

    /// Waits for everything that is queued.
    pub(crate) fn synchronize(&self, op: &'static str) -> Result<()> {
        self.stream.synchronize().map_err(|e| failed(op, e))
    }

    /// Makes the GPU's context that of this thread: any thread may call an operation.
    pub(crate) fn bind(&self, op: &'static str) -> Result<()> {
        self.stream.context().bind_to_thread().map_err(|e| failed(op, e))
    }

    /// The pool that allocations come from.
    pub(crate) fn pool(&self, op: &'static str) -> Result<sys::CUmemoryPool> {
        let mut pool = std::ptr::null_mut();
        // SAFETY: the call writes one handle.
        unsafe { sys::cuDeviceGetDefaultMemPool(&mut pool, self.stream.context().cu_device()) }
            .result()
            .map_err(|e| failed(op, e))?;
        Ok(pool)
    }
}

/// The error for a call of the driver that failed.
pub(crate) fn failed(op: &'static str, error: DriverError) -> Error {
    match error.0 {
        sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => Error::OutOfMemory { op },
        _ => Error::Cuda { op, message: error.to_string() },
    }
}
