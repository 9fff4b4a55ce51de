//! cuDNN on each GPU: its plans, by shape, and the memory that they share.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use candle_core::cuda_backend::DeviceId;
use candle_core::cuda_backend::cudarc::driver::sys::CUdevice_attribute as Attribute;

use super::shape::Shape;
use super::shim::{Handle, Plan, Refusal};
use super::{OP, library};
use crate::cuda::gpu::{Gpu, Scratch, failed};
use crate::device::Cudnn;
use crate::error::{Error, Result};

/// A pass that needs more than this part of the GPU's memory is left to the own kernels.
const WORKSPACE_PART: u64 = 16;

/// cuDNN on one GPU.
pub(super) struct Session {
    handle: Handle,
    /// 90 for 9.0.
    capability: i32,
    /// By shape: a plan, or why cuDNN has none.
    plans: HashMap<Shape, std::result::Result<Plan, String>>,
    /// Shared by all plans, since they run one after the other; as large as the largest wants.
    workspace: Option<(usize, Scratch)>,
    runs: u64,
}

fn sessions() -> MutexGuard<'static, HashMap<DeviceId, Session>> {
    static SESSIONS: OnceLock<Mutex<HashMap<DeviceId, Session>>> = OnceLock::new();
    SESSIONS.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner)
}

/// Calls `work` with the session of a GPU, whose context becomes that of this thread.
///
/// # Errors
/// [`Error::Cuda`] where the library is missing or fails; those of `work`.
pub(super) fn with<T>(gpu: &Gpu, work: impl FnOnce(&mut Session) -> Result<T>) -> Result<T> {
    gpu.bind(OP)?;
    let mut sessions = sessions();
    work(match sessions.entry(gpu.device.id()) {
        Entry::Occupied(known) => known.into_mut(),
        Entry::Vacant(new) => new.insert(Session::new(gpu)?),
    })
}

/// What all sessions did so far.
///
/// # Errors
/// [`Error::Cuda`] where the library is missing.
pub(super) fn report() -> Result<Cudnn> {
    let version = library::open()?;
    let sessions = sessions();
    let plans = || sessions.values().flat_map(|session| &session.plans);
    let refused = plans().filter_map(|(shape, plan)| Some((shape, plan.as_ref().err()?)));
    let mut refused: Vec<String> =
        refused.map(|(shape, why)| format!("{shape:?}: {why}")).collect();
    refused.sort_unstable();
    let runs = sessions.values().map(|session| session.runs).sum();
    Ok(Cudnn { version, plans: plans().filter(|(_, plan)| plan.is_ok()).count(), runs, refused })
}

impl Session {
    fn new(gpu: &Gpu) -> Result<Session> {
        library::open()?;
        let number = |attribute| {
            gpu.stream.context().attribute(attribute).map_err(|error| failed(OP, error))
        };
        let capability = 10 * number(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?
            + number(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let handle = Handle::new(gpu)?;
        let (plans, workspace) = (HashMap::new(), None);
        Ok(Session { handle, capability, plans, workspace, runs: 0 })
    }

    /// Builds the plan for a shape if it is new; or why there is none.
    pub(super) fn prepare(
        &mut self,
        gpu: &Gpu,
        shape: Shape,
    ) -> Result<std::result::Result<(), String>> {
        let plan = match self.plans.entry(shape) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => {
                let room = gpu.memory()?.total / WORKSPACE_PART;
                new.insert(match self.handle.plan(&shape.raw(self.capability)) {
                    Ok(plan) if plan.workspace as u64 <= room => Ok(plan),
                    Ok(Plan { workspace, .. }) => {
                        Err(format!("it would work in {workspace} bytes, {room} are allowed"))
                    }
                    Err(Refusal::Unsupported(why)) => Err(why),
                    Err(failure) => return Err(failure.into()),
                })
            }
        };
        Ok(plan.as_ref().map(|_| ()).map_err(Clone::clone))
    }

    /// Queues the plan of a shape that is prepared, for tensors of its sizes.
    pub(super) fn run(&mut self, gpu: &Gpu, shape: &Shape, tensors: &[u64]) -> Result<()> {
        let Some(Ok(plan)) = self.plans.get(shape) else {
            return Err(Refusal::Failed("there is no plan".to_string()).into());
        };
        let workspace = match &self.workspace {
            Some((bytes, scratch)) if *bytes >= plan.workspace => scratch.ptr,
            _ if plan.workspace == 0 => 0,
            _ => {
                // The old one goes first; work that is queued keeps it until it is done.
                self.workspace = None;
                let scratch = gpu.scratch(plan.workspace, OP)?;
                self.workspace.insert((plan.workspace, scratch)).1.ptr
            }
        };
        self.runs += 1;
        // SAFETY: the context was bound with the session; callers give the tensors of the shape,
        // which are freed on the same stream.
        let work = || unsafe { self.handle.run(plan, tensors, workspace) }.map_err(Error::from);
        gpu.timed(|| shape.label(), work)
    }
}
