//! Activation sites: the places where a tensor enters matrices.

use serde::{Deserialize, Serialize};

/// A place where a tensor enters matrices, named after the matrices that read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Site {
    /// The input of the query, key and value projections (the first norm's output).
    QkvIn,
    /// The input of the attention output projection.
    OIn,
    /// The input of the up (and gate) projection (the second norm's output).
    UpIn,
    /// The input of the down projection (the MLP's activation, or gated product).
    DownIn,
}

impl Site {
    /// Every site, in the order in which a token passes them.
    pub const ALL: [Site; 4] = [Site::QkvIn, Site::OIn, Site::UpIn, Site::DownIn];

    /// Its place in [`Site::ALL`].
    pub fn index(self) -> usize {
        self as usize
    }

    /// The short name used on the command line and in tables: `qkv`, `o`, `up`, `down`.
    pub fn short(self) -> &'static str {
        match self {
            Site::QkvIn => "qkv",
            Site::OIn => "o",
            Site::UpIn => "up",
            Site::DownIn => "down",
        }
    }

    /// The site of a short name.
    pub fn from_short(name: &str) -> Option<Site> {
        Site::ALL.into_iter().find(|site| site.short() == name)
    }
}

/// What is applied element by element to a tensor before its matrices read it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
pub enum SiteOp {
    /// Nothing.
    #[default]
    Identity,
    /// `max(x, 0)`.
    Relu,
    /// `max(x - shift, 0)` (paper section 5.3).
    ShiftedRelu {
        /// What is subtracted before the ReLU.
        shift: f64,
    },
    /// `x` where `x >= threshold`, else 0 (ProSparse's FATReLU).
    FatRelu {
        /// The smallest value that survives.
        threshold: f64,
    },
}

/// The operation at each site of one layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SiteOps {
    /// At the input of the query, key and value projections.
    pub qkv_in: SiteOp,
    /// At the input of the attention output projection.
    pub o_in: SiteOp,
    /// At the input of the up and gate projections.
    pub up_in: SiteOp,
    /// At the input of the down projection, after the MLP's own activation.
    pub down_in: SiteOp,
}

impl SiteOps {
    /// The operation at `site`.
    pub fn get(&self, site: Site) -> SiteOp {
        match site {
            Site::QkvIn => self.qkv_in,
            Site::OIn => self.o_in,
            Site::UpIn => self.up_in,
            Site::DownIn => self.down_in,
        }
    }

    /// Puts `op` at `site`.
    pub fn set(&mut self, site: Site, op: SiteOp) {
        match site {
            Site::QkvIn => self.qkv_in = op,
            Site::OIn => self.o_in = op,
            Site::UpIn => self.up_in = op,
            Site::DownIn => self.down_in = op,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_site_stands_at_its_index() {
        assert!(Site::ALL.iter().enumerate().all(|(at, site)| site.index() == at));
    }
}
