//! Choose and apply a ReLU plan to a checkpoint.
//!
//! [`surgery`] writes a relufied copy of a model folder without touching a weight;
//! [`calibrate`](calibrate()) measures a model's pre-activations on text, and
//! [`fit_shifts`] chooses from them the shifts of a shifted ReLU.

mod calibrate;
mod error;
mod link;
mod request;
mod surgery;

pub use calibrate::{
    Calibration, Histogram, LayerCalibration, Options, Quantile, Shifts, SiteCalibration,
    calibrate, fit_shifts, sequences,
};
pub use error::{Error, Result};
pub use link::Linked;
pub use request::{Shift, SurgeryRequest};
pub use surgery::{Report, surgery};
