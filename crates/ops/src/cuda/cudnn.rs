//! Causal attention through cuDNN, where that is faster than the own kernels: bf16 rows of q|k|v in
//! documents of one length. The library is opened at run time; `cu/cudnn.cpp` describes attention
//! to it.
//!
//! `RELUFY_ATTENTION` chooses: `own` never asks cuDNN; `cudnn` fails, with the reason, where cuDNN
//! is not used; without it, cuDNN does what it can and the own kernels do the rest.
//! `RELUFY_CUDNN_LIB` names the library's file. That it is missing is an error and not a reason to
//! be slow.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::{CString, c_char, c_void};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use candle_core::cuda_backend::DeviceId;
use candle_core::cuda_backend::cudarc::driver::sys::CUdevice_attribute as Attribute;
use candle_core::{DType, Tensor};

use super::gpu::{Gpu, Scratch, failed};
use super::operand::{Elem, empty, empty_like, operand};
use crate::attention::{Heads, Qkv, Saved, Segment};
use crate::device::{Cudnn, deterministic};
use crate::error::{Error, Result};

const OP: &str = "attention";
/// Older ones know neither all shapes nor the same arithmetic.
const OLDEST: usize = 90_600;
/// A backward pass that needs more than this part of the GPU's memory is left to the own kernels.
const WORKSPACE_PART: u64 = 16;

/// The attention of `relufy_ops::attention::forward`; `None` where cuDNN does not apply.
///
/// # Errors
/// [`Error::Cuda`] where the library is missing or fails; [`Error::Unsupported`] where
/// `RELUFY_ATTENTION=cudnn` asks for what cuDNN does not do.
pub(crate) fn forward(qkv: &Qkv<'_>, segments: &[Segment], heads: &Heads) -> Result<Option<Saved>> {
    let packed = qkv.q.tensor;
    let Some(shape) = ready(packed, || Shape::of(qkv, segments, heads, false))? else {
        return Ok(None);
    };
    let rows = shape.batch * shape.len;
    let device = packed.device();
    let out = empty((rows, shape.heads * shape.head_dim), DType::BF16, device, OP)?;
    let stats = empty((shape.batch, shape.heads, shape.len), DType::F32, device, OP)?;
    let [q, k, v] = columns(packed, &shape)?;
    run(packed, &shape, &[q, k, v, operand(&out, OP)?.ptr, operand(&stats, OP)?.ptr])?;
    // Of one document, the order is the same and nothing is copied.
    let lse = stats.transpose(0, 1)?.contiguous()?.reshape((shape.heads, rows))?;
    Ok(Some(Saved { out, lse }))
}

/// The gradient of `relufy_ops::attention::backward`; `None` where cuDNN does not apply.
///
/// # Errors
/// As [`forward`].
pub(crate) fn backward(
    qkv: &Qkv<'_>,
    segments: &[Segment],
    heads: &Heads,
    saved: &Saved,
    dout: &Tensor,
) -> Result<Option<Tensor>> {
    let packed = qkv.q.tensor;
    let shape = || {
        let types = [saved.out.dtype(), dout.dtype(), saved.lse.dtype()];
        if types != [DType::BF16, DType::BF16, DType::F32] {
            return Err("it wants outputs and their gradient in bf16, and log-sum-exps in f32");
        }
        for tensor in [&saved.out, dout] {
            aligned(tensor)?;
        }
        Shape::of(qkv, segments, heads, true)
    };
    let Some(shape) = ready(packed, shape)? else {
        return Ok(None);
    };
    // Every column of every row is written: q, k and v fill the rows and documents tile them.
    let grad = empty_like(packed, OP)?;
    let stats = saved.lse.reshape((shape.heads, shape.batch, shape.len))?;
    let stats = stats.transpose(0, 1)?.contiguous()?;
    let [q, k, v] = columns(packed, &shape)?;
    let [dq, dk, dv] = columns(&grad, &shape)?;
    let (out, dout) = (operand(&saved.out, OP)?.ptr, operand(dout, OP)?.ptr);
    run(packed, &shape, &[q, k, v, out, operand(&stats, OP)?.ptr, dout, dq, dk, dv])?;
    Ok(Some(grad))
}

/// What cuDNN did so far; opens it. `None` where `RELUFY_ATTENTION=own`.
///
/// # Errors
/// [`Error::Cuda`] where the library is missing.
pub(crate) fn report() -> Result<Option<Cudnn>> {
    if Choice::get()? == Choice::Own {
        return Ok(None);
    }
    let version = library()?;
    let sessions = sessions();
    let plans = || sessions.values().flat_map(|session| &session.plans);
    let refused = plans().filter_map(|(shape, plan)| Some((shape, plan.as_ref().err()?)));
    let mut refused: Vec<String> =
        refused.map(|(shape, why)| format!("{shape:?}: {why}")).collect();
    refused.sort_unstable();
    let runs = sessions.values().map(|session| session.runs).sum();
    Ok(Some(Cudnn {
        version,
        plans: plans().filter(|(_, plan)| plan.is_ok()).count(),
        runs,
        refused,
    }))
}

/// Where q, k and v begin in packed rows.
fn columns(packed: &Tensor, shape: &Shape) -> Result<[u64; 3]> {
    let rows = operand(packed, OP)?;
    let k = shape.heads * shape.head_dim;
    Ok([rows.at(0), rows.at(k), rows.at(k + shape.kv_heads * shape.head_dim)])
}

/// cuDNN reads 16 bytes at a time.
fn aligned(tensor: &Tensor) -> std::result::Result<(), &'static str> {
    match operand(tensor, OP) {
        Ok(operand) if operand.elem == Elem::Bf16 && operand.ptr.is_multiple_of(16) => Ok(()),
        _ => Err("it wants contiguous bf16 tensors that begin at a multiple of 16 bytes"),
    }
}

/// The shape if cuDNN is to do it, with its plan built.
fn ready(
    packed: &Tensor,
    shape: impl FnOnce() -> std::result::Result<Shape, &'static str>,
) -> Result<Option<Shape>> {
    let choice = Choice::get()?;
    let refuse = |why: &str| match choice {
        Choice::Cudnn => {
            let what = format!("cuDNN here, which RELUFY_ATTENTION demands: {why}");
            Err(Error::Unsupported { op: OP, what })
        }
        Choice::Auto | Choice::Own => Ok(None),
    };
    if choice == Choice::Own {
        return Ok(None);
    }
    let shape = match shape() {
        Ok(shape) => shape,
        Err(why) => return refuse(why),
    };
    if choice == Choice::Auto && !shape.is_worth_a_plan() {
        return Ok(None);
    }
    let gpu = Gpu::of(packed)?;
    gpu.bind(OP)?;
    let mut sessions = sessions();
    let session = match sessions.entry(gpu.device.id()) {
        Entry::Occupied(known) => known.into_mut(),
        Entry::Vacant(new) => new.insert(Session::new(&gpu)?),
    };
    match session.plan(&gpu, shape)? {
        Ok(_) => Ok(Some(shape)),
        Err(why) => refuse(why),
    }
}

/// Queues the plan of a shape that is ready.
fn run(packed: &Tensor, shape: &Shape, tensors: &[u64]) -> Result<()> {
    let gpu = Gpu::of(packed)?;
    gpu.bind(OP)?;
    match sessions().get_mut(&gpu.device.id()) {
        Some(session) => session.run(&gpu, shape, tensors),
        None => Err(Refusal::Failed("there is no plan".to_string()).into()),
    }
}

/// What a plan is built for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Shape {
    backward: bool,
    batch: usize,
    len: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    scale_bits: u32,
    deterministic: bool,
}

impl Shape {
    /// The shape, or why cuDNN is not asked. It depends on the arguments alone, so that a run that
    /// is resumed takes the same way again.
    fn of(
        qkv: &Qkv<'_>,
        segments: &[Segment],
        heads: &Heads,
        backward: bool,
    ) -> std::result::Result<Shape, &'static str> {
        let Heads { heads: n, kv_heads, head_dim, scale, .. } = *heads;
        let packed = qkv.q.tensor;
        let whole = Qkv::packed(packed, heads);
        let same = |a: &crate::attention::Cols<'_>, b: &crate::attention::Cols<'_>| {
            a.tensor.id() == b.tensor.id() && a.start_col == b.start_col
        };
        let &[rows, width] = packed.dims() else {
            return Err("q, k and v are not rows");
        };
        if !(same(&qkv.q, &whole.q) && same(&qkv.k, &whole.k) && same(&qkv.v, &whole.v))
            || width != (n + 2 * kv_heads) * head_dim
        {
            return Err("q, k and v do not fill the rows of one tensor");
        }
        aligned(packed)?;
        if heads.softcap.is_some() || heads.alibi.is_some() {
            return Err("soft caps and ALiBi are left to the own kernels");
        }
        // Backward of wide heads has been wrong in versions that are in use.
        if !head_dim.is_multiple_of(8) || head_dim > if backward { 128 } else { 256 } {
            return Err("the heads are too wide, or not a multiple of 8 columns");
        }
        let mut documents = segments.iter().filter(|segment| segment.q_len > 0);
        let (batch, len) = match documents.clone().next() {
            Some(first) => (rows / first.q_len, first.q_len),
            None => return Err("there are no queries"),
        };
        let tile = documents.clone().count() == batch
            && batch * len == rows
            && documents.by_ref().enumerate().all(|(at, segment)| {
                *segment == Segment::document(at * len, len) && segment.prefix.is_empty()
            });
        if !tile {
            return Err("the documents differ in length, leave rows out or see other keys");
        }
        if heads.window.is_some_and(|window| window < len) {
            return Err("windows are left to the own kernels");
        }
        if len < 2 || batch * n > u16::MAX.into() || i32::try_from(rows * width).is_err() {
            return Err("there are too few or too many rows");
        }
        let deterministic = backward && deterministic();
        let scale_bits = scale.to_bits();
        Ok(Shape { backward, batch, len, heads: n, kv_heads, head_dim, scale_bits, deterministic })
    }

    /// A plan takes half a second. Training asks for one length all the time; prompts and texts to
    /// be scored have any length, once.
    fn is_worth_a_plan(&self) -> bool {
        self.len.is_multiple_of(64) || (self.batch > 1 && self.batch * self.len >= 4096)
    }

    /// In a profile, with the operations that a causal mask leaves.
    fn label(&self) -> (String, f64) {
        let Shape { backward, batch, len, heads, kv_heads, head_dim, .. } = *self;
        let pass = if backward { "backward" } else { "forward" };
        let products = if backward { 5.0 } else { 2.0 };
        let flops = products * (batch * heads * head_dim) as f64 * (len as f64).powi(2);
        (format!("cudnn: {pass} {batch} x {heads}({kv_heads}) x {len} x {head_dim}"), flops)
    }

    /// As the shim takes it.
    fn raw(&self, capability: i32) -> RawShape {
        RawShape {
            batch: self.batch as i64,
            len: self.len as i64,
            heads: self.heads as i64,
            kv_heads: self.kv_heads as i64,
            head_dim: self.head_dim as i64,
            scale: f32::from_bits(self.scale_bits),
            capability,
            backward: self.backward.into(),
            deterministic: self.deterministic.into(),
        }
    }
}

/// What `RELUFY_ATTENTION` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Choice {
    Auto,
    Own,
    Cudnn,
}

impl Choice {
    fn get() -> Result<Choice> {
        static CHOICE: OnceLock<std::result::Result<Choice, String>> = OnceLock::new();
        let read = || match std::env::var("RELUFY_ATTENTION").as_deref() {
            Err(_) | Ok("" | "auto") => Ok(Choice::Auto),
            Ok("own") => Ok(Choice::Own),
            Ok("cudnn") => Ok(Choice::Cudnn),
            Ok(other) => {
                Err(format!("RELUFY_ATTENTION is `{other}`: expected `auto`, `own` or `cudnn`"))
            }
        };
        let message = |message: &String| Error::Invalid { op: OP, message: message.clone() };
        CHOICE.get_or_init(read).as_ref().copied().map_err(message)
    }
}

/// cuDNN on one GPU.
struct Session {
    handle: Pointer,
    /// 90 for 9.0.
    capability: i32,
    /// By shape: a plan, or why cuDNN has none.
    plans: HashMap<Shape, std::result::Result<Plan, String>>,
    /// Shared by all plans, since they run one after the other; as large as the largest wants.
    workspace: Option<(usize, Scratch)>,
    runs: u64,
}

struct Plan {
    pointer: Pointer,
    workspace: usize,
}

/// An object of the shim.
struct Pointer(*mut c_void);

// SAFETY: cuDNN's objects belong to no thread; the lock around sessions lets one in at a time.
unsafe impl Send for Pointer {}

fn sessions() -> MutexGuard<'static, HashMap<DeviceId, Session>> {
    static SESSIONS: OnceLock<Mutex<HashMap<DeviceId, Session>>> = OnceLock::new();
    SESSIONS.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner)
}

impl Session {
    fn new(gpu: &Arc<Gpu>) -> Result<Session> {
        library()?;
        let number = |attribute| {
            gpu.stream.context().attribute(attribute).map_err(|error| failed(OP, error))
        };
        let capability = 10 * number(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?
            + number(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: the library is open and the GPU's context current; the call writes one pointer.
        // The stream lives as long as the GPU, which is never dropped, and so does the handle.
        told(|text, room| unsafe {
            relufy_cudnn_handle(gpu.stream.cu_stream().cast(), &mut handle, text, room)
        })?;
        let handle = Pointer(handle);
        let (plans, workspace) = (HashMap::new(), None);
        Ok(Session { handle, capability, plans, workspace, runs: 0 })
    }

    /// The plan for a shape, built if it is new, or why there is none.
    fn plan(&mut self, gpu: &Gpu, shape: Shape) -> Result<std::result::Result<&Plan, &str>> {
        let entry = match self.plans.entry(shape) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => {
                let raw = shape.raw(self.capability);
                let (mut pointer, mut workspace) = (std::ptr::null_mut(), 0);
                // SAFETY: the handle is alive and the GPU's context current; the call reads the
                // shape and writes a pointer and a number.
                let built = told(|text, room| unsafe {
                    relufy_cudnn_plan(self.handle.0, &raw, &mut pointer, &mut workspace, text, room)
                });
                let room = gpu.memory()?.total / WORKSPACE_PART;
                new.insert(match built {
                    Ok(()) if workspace as u64 <= room => {
                        Ok(Plan { pointer: Pointer(pointer), workspace })
                    }
                    Ok(()) => {
                        // SAFETY: the plan was just made, and nobody else has it.
                        unsafe { relufy_cudnn_free(pointer) };
                        Err(format!("it would work in {workspace} bytes, {room} are allowed"))
                    }
                    Err(Refusal::Unsupported(why)) => Err(why),
                    Err(failure) => return Err(failure.into()),
                })
            }
        };
        Ok(entry.as_ref().map_err(String::as_str))
    }

    fn run(&mut self, gpu: &Gpu, shape: &Shape, tensors: &[u64]) -> Result<()> {
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
        gpu.timed(
            || shape.label(),
            || {
                // SAFETY: the handle and the plan are alive, the tensors have the sizes of the
                // plan's shape and are as many as its direction takes, and their memory is freed on
                // the same stream.
                told(|text, room| unsafe {
                    let (handle, plan) = (self.handle.0, plan.pointer.0);
                    relufy_cudnn_run(handle, plan, tensors.as_ptr(), workspace, text, room)
                })
                .map_err(Error::from)
            },
        )
    }
}

/// Opens cuDNN, once; its version.
fn library() -> Result<usize> {
    static VERSION: OnceLock<std::result::Result<usize, String>> = OnceLock::new();
    let open = || {
        let named = std::env::var("RELUFY_CUDNN_LIB").ok().filter(|name| !name.is_empty());
        let file = named.unwrap_or_else(|| "libcudnn.so.9".to_string());
        let path = CString::new(file.as_str()).map_err(|error| error.to_string())?;
        let mut version = 0;
        // SAFETY: the call reads a path that ends with a 0, and writes one number.
        told(|text, room| unsafe { relufy_cudnn_open(path.as_ptr(), &mut version, text, room) })
            .map_err(|(Refusal::Unsupported(why) | Refusal::Failed(why))| why)?;
        match version {
            OLDEST.. => Ok(version),
            _ => Err(format!("{file} is version {version}, at least {OLDEST} is wanted")),
        }
    };
    VERSION.get_or_init(open).clone().map_err(|why| {
        let hint = "RELUFY_CUDNN_LIB names the path of libcudnn.so.9";
        Error::Cuda { op: OP, message: format!("cannot open cuDNN: {why} ({hint}; {DO_WITHOUT})") }
    })
}

const DO_WITHOUT: &str = "RELUFY_ATTENTION=own does without cuDNN";

/// What the shim answers when it did not do a thing.
enum Refusal {
    Unsupported(String),
    Failed(String),
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Error {
        let (Refusal::Unsupported(why) | Refusal::Failed(why)) = refusal;
        Error::Cuda { op: OP, message: format!("cuDNN: {why} ({DO_WITHOUT})") }
    }
}

/// Calls the shim with room for a text.
fn told(call: impl FnOnce(*mut c_char, usize) -> i32) -> std::result::Result<(), Refusal> {
    let mut text = [0u8; 2048];
    let status = call(text.as_mut_ptr().cast(), text.len());
    let end = text.iter().position(|byte| *byte == 0).unwrap_or(text.len());
    let why = || String::from_utf8_lossy(&text[..end]).trim().to_string();
    match status {
        0 => Ok(()),
        1 => Err(Refusal::Unsupported(why())),
        _ => Err(Refusal::Failed(why())),
    }
}

/// `RelufyCudnnShape` of `cu/cudnn.cpp`.
#[repr(C)]
struct RawShape {
    batch: i64,
    len: i64,
    heads: i64,
    kv_heads: i64,
    head_dim: i64,
    scale: f32,
    capability: i32,
    backward: i32,
    deterministic: i32,
}

// Each returns 0, 1 (not supported) or 2 (failed), and writes a reason that ends with a 0.
unsafe extern "C" {
    fn relufy_cudnn_open(
        file: *const c_char,
        version: *mut usize,
        text: *mut c_char,
        room: usize,
    ) -> i32;
    fn relufy_cudnn_handle(
        stream: *mut c_void,
        handle: *mut *mut c_void,
        text: *mut c_char,
        room: usize,
    ) -> i32;
    fn relufy_cudnn_plan(
        handle: *mut c_void,
        shape: *const RawShape,
        plan: *mut *mut c_void,
        workspace: *mut usize,
        text: *mut c_char,
        room: usize,
    ) -> i32;
    fn relufy_cudnn_free(plan: *mut c_void);
    /// `tensors` and `workspace` are addresses on the GPU.
    fn relufy_cudnn_run(
        handle: *mut c_void,
        plan: *mut c_void,
        tensors: *const u64,
        workspace: u64,
        text: *mut c_char,
        room: usize,
    ) -> i32;
}
