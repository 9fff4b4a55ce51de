//! What decoding really did.

use std::ops::{Add, AddAssign};

use relufy_spec::flops::SiteDensities;
use relufy_spec::{DecoderSpec, Layer};
use serde::{Deserialize, Serialize};

/// Work at the matrices that read one site.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Work {
    /// Multiply-adds whose result could matter: both the input and, in a gated MLP's `up`, the
    /// gate are not zero. What [`relufy_spec::flops::active_macs`] counts.
    pub needed: u64,
    /// Multiply-adds really done. More than `needed` where a whole row is the least that is
    /// read: a row of `up` is multiplied with all inputs, once its gate is not zero.
    pub done: u64,
    /// Bytes of weights and scales read.
    pub bytes: u64,
}

/// Work per site and in the head.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Queries, keys and values.
    pub qkv: Work,
    /// Attention's output projection.
    pub o: Work,
    /// Gate and up.
    pub up: Work,
    /// Down.
    pub down: Work,
    /// The head.
    pub head: Work,
}

/// What was not zero of one token at each site, over all layers.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Nonzeros {
    pub qkv: usize,
    pub o: usize,
    pub up: usize,
    pub down: usize,
}

impl Nonzeros {
    /// Shares of what could have been not zero.
    pub fn densities(&self, spec: &DecoderSpec) -> SiteDensities {
        let widths = |width: &dyn Fn(&Layer) -> usize| spec.layers.iter().map(width).sum::<usize>();
        let share = |nonzeros: usize, width: usize| nonzeros as f64 / width as f64;
        let inputs = widths(&|_| spec.hidden);
        SiteDensities {
            qkv: share(self.qkv, inputs),
            o: share(self.o, widths(&|layer| layer.attention.q_width())),
            up: share(self.up, inputs),
            down: share(self.down, widths(&|layer| layer.mlp.ffn)),
        }
    }
}

impl AddAssign for Nonzeros {
    fn add_assign(&mut self, other: Nonzeros) {
        self.qkv += other.qkv;
        self.o += other.o;
        self.up += other.up;
        self.down += other.down;
    }
}

impl Counts {
    /// All sites of the layers.
    pub fn blocks(&self) -> Work {
        self.qkv + self.o + self.up + self.down
    }

    /// All sites and the head.
    pub fn total(&self) -> Work {
        self.blocks() + self.head
    }
}

impl Add for Work {
    type Output = Work;

    fn add(self, other: Work) -> Work {
        Work {
            needed: self.needed + other.needed,
            done: self.done + other.done,
            bytes: self.bytes + other.bytes,
        }
    }
}

impl AddAssign for Work {
    fn add_assign(&mut self, other: Work) {
        *self = *self + other;
    }
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Counts) {
        self.qkv += other.qkv;
        self.o += other.o;
        self.up += other.up;
        self.down += other.down;
        self.head += other.head;
    }
}
