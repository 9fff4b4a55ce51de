//! Tables: a grid of cells, made once and rendered for a terminal or for a document.

mod accuracy;
mod compare;
mod grid;
mod harness;
mod paper;
mod render;

pub use accuracy::accuracy_vs_flops;
pub use compare::{Run, against_baseline};
pub use grid::{Align, Cell, Column, Grid};
pub use harness::harness_table;
pub use paper::{PAPER_ROWS, PaperModel, PaperRow, paper_flops};
pub use render::Format;
