//! Modules of compiled kernels, and how a kernel is started.

use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::driver::{
    CudaContext, CudaFunction, CudaModule, result, sys,
};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;

use super::gpu::{Gpu, failed};
use super::operand::{Elem, Operand};
use crate::error::Result;

/// The compiled kernels of one file of `cu/`.
pub(crate) struct Module {
    pub(crate) name: &'static str,
    pub(crate) image: &'static [u8],
    /// On each GPU that asked for one of them, by its number.
    pub(crate) loaded: Mutex<Vec<(usize, Arc<CudaModule>)>>,
}

/// The module of `cu/NAME.cu`.
macro_rules! module {
    ($name:literal) => {
        $crate::cuda::Module {
            name: $name,
            image: include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".fatbin")),
            loaded: std::sync::Mutex::new(Vec::new()),
        }
    };
}
pub(crate) use module;

impl Module {
    /// A kernel; their image goes to a GPU once.
    pub(super) fn load(&self, context: &Arc<CudaContext>, name: &str) -> Result<CudaFunction> {
        const OP: &str = "loading a kernel";
        let gpu = context.ordinal();
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        let module = match loaded.iter().find(|(on, _)| *on == gpu) {
            Some((_, module)) => module.clone(),
            None => {
                let image = Ptx::from_binary(self.image.to_vec());
                let module = context.load_module(image).map_err(|e| failed(OP, e))?;
                loaded.push((gpu, module.clone()));
                module
            }
        };
        module.load_function(name).map_err(|e| failed(OP, e))
    }
}

/// How many blocks of how many threads, with how much dynamic shared memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grid {
    pub(crate) blocks: (u32, u32, u32),
    pub(crate) threads: u32,
    pub(crate) shared_bytes: u32,
}

impl Grid {
    /// A row of blocks.
    pub(crate) fn new(blocks: usize, threads: u32) -> Grid {
        Grid { blocks: (blocks as u32, 1, 1), threads, shared_bytes: 0 }
    }

    /// Blocks of `threads` threads with one thread for each of `items`.
    pub(crate) fn over(items: usize, threads: u32) -> Grid {
        Grid::new(items.div_ceil(threads as usize), threads)
    }

    pub(crate) fn shared(self, bytes: usize) -> Grid {
        Grid { shared_bytes: bytes as u32, ..self }
    }
}

/// One argument of a kernel: a pointer, an integer or a float. The kernel reads as many of the
/// bytes as its parameter has, the low ones first.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arg(u64);

impl From<u64> for Arg {
    /// A pointer, or a 64-bit integer.
    fn from(value: u64) -> Arg {
        Arg(value)
    }
}

impl From<usize> for Arg {
    /// A 64-bit integer (`long long`).
    fn from(value: usize) -> Arg {
        Arg(value as u64)
    }
}

impl From<i32> for Arg {
    fn from(value: i32) -> Arg {
        Arg(u64::from(value as u32))
    }
}

impl From<u32> for Arg {
    fn from(value: u32) -> Arg {
        Arg(u64::from(value))
    }
}

impl From<f32> for Arg {
    fn from(value: f32) -> Arg {
        Arg(u64::from(value.to_bits()))
    }
}

impl From<&Operand> for Arg {
    /// The address of the first element.
    fn from(operand: &Operand) -> Arg {
        Arg(operand.ptr)
    }
}

impl Gpu {
    /// Queues the kernel `name`, or `name_bf16` or `name_f32` where an element type is given. A
    /// grid without blocks is nothing to do.
    pub(crate) fn launch(
        &self,
        op: &'static str,
        module: &Module,
        name: &str,
        elem: Option<Elem>,
        grid: Grid,
        args: &[Arg],
    ) -> Result<()> {
        if grid.blocks.0 == 0 || grid.blocks.1 == 0 || grid.blocks.2 == 0 {
            return Ok(());
        }
        let name = match elem {
            Some(elem) => format!("{name}_{}", elem.suffix()),
            None => name.to_string(),
        };
        let kernel = self.kernel(module, &name)?;
        /// What a block has without asking.
        const FREE_SHARED: u32 = 48 << 10;
        if grid.shared_bytes > FREE_SHARED {
            let attribute =
                sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            kernel.set_attribute(attribute, grid.shared_bytes as i32).map_err(|e| failed(op, e))?;
        }
        self.bind(op)?;
        let mut params: Vec<*mut c_void> =
            args.iter().map(|arg| (&raw const arg.0).cast_mut().cast()).collect();
        // SAFETY: the caller gives the arguments that the kernel takes, in their order, and
        // pointers to memory of the sizes that it expects.
        let mut work = || unsafe {
            result::launch_kernel(
                kernel.cu_function(),
                grid.blocks,
                (grid.threads, 1, 1),
                grid.shared_bytes,
                self.stream.cu_stream(),
                &mut params,
            )
        };
        self.timed(
            || (format!("{}: {name}", module.name), 0.0),
            || work().map_err(|e| failed(op, e)),
        )
    }
}
