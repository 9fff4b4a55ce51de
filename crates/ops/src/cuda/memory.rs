//! What the pool of a GPU holds, and held at most.

use candle_core::cuda_backend::cudarc::driver::{result, sys};

use super::gpu::{Gpu, failed};
use crate::device::Memory;
use crate::error::Result;

const OP: &str = "reading the GPU's memory";

impl Gpu {
    pub(crate) fn memory(&self) -> Result<Memory> {
        use sys::CUmemPool_attribute as A;
        self.bind(OP)?;
        let (free, total) = result::mem_get_info().map_err(|e| failed(OP, e))?;
        Ok(Memory {
            used: self.pool_number(A::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?,
            peak: self.pool_number(A::CU_MEMPOOL_ATTR_USED_MEM_HIGH)?,
            free: free as u64,
            total: total as u64,
        })
    }

    pub(crate) fn reset_peak(&self) -> Result<()> {
        let mut zero = 0u64;
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
        // SAFETY: the attribute's value is a u64.
        unsafe { sys::cuMemPoolSetAttribute(self.pool(OP)?, attribute, (&raw mut zero).cast()) }
            .result()
            .map_err(|e| failed(OP, e))
    }

    fn pool_number(&self, attribute: sys::CUmemPool_attribute) -> Result<u64> {
        let mut number = 0u64;
        // SAFETY: the attribute's value is a u64, which the call writes.
        unsafe { sys::cuMemPoolGetAttribute(self.pool(OP)?, attribute, (&raw mut number).cast()) }
            .result()
            .map_err(|e| failed(OP, e))?;
        Ok(number)
    }
}
