//! Products with something fused behind them, through cuBLASLt: a bias, a bias and ReLU, or the
//! residual stream that the product is added to.
//!
//! Plain products stay with [`super::gemm`]: in a whole step cuBLASLt's choices are no faster.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Mutex, OnceLock, PoisonError};

use candle_core::cuda_backend::cudarc::cublaslt::{result, sys};

use super::gemm::{Mat, label};
use super::gpu::Gpu;
use super::operand::{Elem, Operand};
use crate::error::{Error, Result};

/// What is done to a product before it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Epilogue {
    /// Nothing.
    Plain,
    /// `+ b`.
    Bias,
    /// `max(. + b, 0)`.
    BiasRelu,
}

/// What a plan depends on. The stream's order keeps two uses of one plan apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    gpu: usize,
    f32: bool,
    sizes: [usize; 3],
    strides: [usize; 3],
    epilogue: Epilogue,
    adds: bool,
}

/// A chosen algorithm with its descriptions, which live as long as the program.
struct Plan {
    handle: sys::cublasLtHandle_t,
    operation: sys::cublasLtMatmulDesc_t,
    w: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    y: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
    workspace: usize,
}

// SAFETY: the handles may be used by any thread; the lock around the plans lets one at a time.
unsafe impl Send for Plan {}

/// `y = epilogue(x W^T + b) (+ residual)`: `x` `[n, in]`, `w` `[out, in]`, `y` and `residual`
/// `[n, out]`, none transposed. A residual does not go with ReLU.
///
/// # Errors
/// What cuBLASLt does not do.
pub(crate) fn linear(
    gpu: &Gpu,
    op: &'static str,
    (x, w, y): (Mat, Mat, Mat),
    bias: Option<&Operand>,
    epilogue: Epilogue,
    residual: Option<&Operand>,
) -> Result<()> {
    if y.rows == 0 || y.cols == 0 {
        return Ok(());
    }
    static PLANS: OnceLock<Mutex<HashMap<Key, Plan>>> = OnceLock::new();
    let key = Key {
        gpu: std::ptr::from_ref(gpu).addr(),
        f32: x.elem == Elem::F32,
        sizes: [y.rows, y.cols, x.cols],
        strides: [x.stride, w.stride, y.stride],
        epilogue,
        adds: residual.is_some(),
    };
    let failed = |error| Error::Cuda { op, message: format!("cuBLASLt: {error:?}") };
    gpu.bind(op)?;
    let mut plans =
        PLANS.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
    let plan = match plans.entry(key) {
        std::collections::hash_map::Entry::Occupied(known) => known.into_mut(),
        std::collections::hash_map::Entry::Vacant(free) => {
            free.insert(Plan::new(x, w, y, epilogue).map_err(failed)?)
        }
    };
    let workspace = gpu.scratch(plan.workspace, op)?;
    // ReLU wants to leave a bit for each element; only this form of it is fast.
    let aux = match epilogue {
        Epilogue::Plain | Epilogue::Bias => None,
        Epilogue::BiasRelu => Some(gpu.scratch(y.rows * aux_stride(y.cols) / 8, op)?),
    };
    use sys::cublasLtMatmulDescAttributes_t as A;
    if let Some(bias) = bias {
        plan.set(A::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias.ptr).map_err(failed)?;
    }
    if let Some(aux) = &aux {
        plan.set(A::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, &aux.ptr).map_err(failed)?;
    }
    let (alpha, beta) = (1f32, if residual.is_some() { 1f32 } else { 0f32 });
    let added = residual.map_or(y.ptr, |residual| residual.ptr);
    // SAFETY: the matrices lie within their tensors, whose shapes the caller has checked.
    let multiply = || unsafe {
        result::matmul(
            plan.handle,
            plan.operation,
            (&raw const alpha).cast(),
            (&raw const beta).cast(),
            w.ptr as *const c_void,
            plan.w,
            x.ptr as *const c_void,
            plan.x,
            added as *const c_void,
            plan.y,
            y.ptr as *mut c_void,
            plan.y,
            &plan.algorithm,
            workspace.ptr as *mut c_void,
            plan.workspace,
            gpu.stream.cu_stream().cast(),
        )
    };
    let sides = [y.rows, x.cols, y.cols].map(|side| side as i32);
    gpu.timed(|| label(op, sides[0], sides[1], sides[2]), || multiply().map_err(failed))
}

impl Plan {
    fn new(
        x: Mat,
        w: Mat,
        y: Mat,
        epilogue: Epilogue,
    ) -> std::result::Result<Plan, result::CublasError> {
        use sys::cublasLtMatmulDescAttributes_t as A;
        use sys::cublasLtMatmulPreferenceAttributes_t as P;
        /// What NVIDIA recommends for Hopper.
        const WORKSPACE: usize = 32 << 20;
        let f32 = sys::cudaDataType_t::CUDA_R_32F;
        // By column: y^T = W x^T, with W stored as its transpose.
        let layout = |mat: Mat| {
            let (rows, cols) = (mat.cols as u64, mat.rows as u64);
            result::create_matrix_layout(data_type(mat.elem), rows, cols, mat.stride as i64)
        };
        let operation =
            result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, f32)?;
        let plan = Plan {
            handle: result::create_handle()?,
            operation,
            w: layout(w)?,
            x: layout(x)?,
            y: layout(y)?,
            algorithm: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
            workspace: 0,
        };
        /// `CUBLAS_OP_T` of cuBLAS's enumeration.
        const TRANSPOSED: i32 = 1;
        plan.set(A::CUBLASLT_MATMUL_DESC_TRANSA, &TRANSPOSED)?;
        use sys::cublasLtEpilogue_t as E;
        let fused = match epilogue {
            // Named, because 0 halves the speed.
            Epilogue::Plain => E::CUBLASLT_EPILOGUE_DEFAULT,
            Epilogue::Bias => E::CUBLASLT_EPILOGUE_BIAS,
            Epilogue::BiasRelu => E::CUBLASLT_EPILOGUE_RELU_AUX_BIAS,
        };
        plan.set(A::CUBLASLT_MATMUL_DESC_EPILOGUE, &fused)?;
        if epilogue != Epilogue::Plain {
            plan.set(A::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &data_type(x.elem))?;
        }
        if epilogue == Epilogue::BiasRelu {
            let stride = aux_stride(y.cols) as i64;
            plan.set(A::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, &stride)?;
        }
        let preference = result::create_matmul_pref()?;
        let workspace = WORKSPACE;
        // SAFETY: the attribute is a usize, which the call reads.
        let chosen = unsafe {
            result::set_matmul_pref_attribute(
                preference,
                P::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                std::ptr::from_ref(&workspace).cast(),
                size_of::<usize>(),
            )
            .and_then(|()| {
                let (op, w, x, y) = (plan.operation, plan.w, plan.x, plan.y);
                result::get_matmul_algo_heuristic(plan.handle, op, w, x, y, y, preference)
            })
        };
        // SAFETY: made above and used no more.
        unsafe { result::destroy_matmul_pref(preference)? };
        let chosen = chosen?;
        Ok(Plan { algorithm: chosen.algo, workspace: chosen.workspaceSize, ..plan })
    }

    fn set<T>(
        &self,
        attribute: sys::cublasLtMatmulDescAttributes_t,
        value: &T,
    ) -> std::result::Result<(), result::CublasError> {
        // SAFETY: the value has the attribute's type, and the call copies it.
        unsafe {
            result::set_matmul_desc_attribute(
                self.operation,
                attribute,
                std::ptr::from_ref(value).cast(),
                size_of::<T>(),
            )
        }
    }
}

/// Elements between the columns of ReLU's bits, in the multiples that cuBLASLt wants.
fn aux_stride(width: usize) -> usize {
    width.next_multiple_of(128)
}

fn data_type(elem: Elem) -> sys::cudaDataType_t {
    match elem {
        Elem::F32 => sys::cudaDataType_t::CUDA_R_32F,
        Elem::Bf16 => sys::cudaDataType_t::CUDA_R_16BF,
    }
}
