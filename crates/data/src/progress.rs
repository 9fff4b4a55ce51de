//! How a library says how far it has come. The program decides how that looks.

/// Watches a long task. Methods take `&self`, because several threads may report.
pub trait Progress: Send + Sync {
    /// A task begins; `total` is how much there is to do, in bytes unless `what` says
    /// otherwise, or `None` when nobody knows.
    fn start(&self, what: &str, total: Option<u64>);
    /// So much more is done.
    fn advance(&self, delta: u64);
    /// Something worth a line.
    fn message(&self, text: &str);
    /// The task that began last is over.
    fn finish(&self);
}

/// Nobody watches.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Progress for Silent {
    fn start(&self, _what: &str, _total: Option<u64>) {}
    fn advance(&self, _delta: u64) {}
    fn message(&self, _text: &str) {}
    fn finish(&self) {}
}
