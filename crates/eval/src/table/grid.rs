//! A table before it is rendered: columns, cells that keep their numbers, notes.

/// A table before it is rendered.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Grid {
    /// The columns.
    pub columns: Vec<Column>,
    /// The rows; each has a cell for every column.
    pub rows: Vec<Vec<Cell>>,
    /// Remarks below the table.
    pub notes: Vec<String>,
}

/// A column's head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Column {
    /// The key in JSON and CSV; plain ASCII without blanks.
    pub key: String,
    /// What a person reads.
    pub title: String,
    /// How its cells stand.
    pub align: Align,
    /// Only JSON and CSV have it.
    pub machine_only: bool,
}

/// How the cells of a column stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Align {
    /// Text.
    Left,
    /// Numbers.
    Right,
}

/// One cell.
#[derive(Clone, Debug, PartialEq)]
pub enum Cell {
    /// Nothing to say.
    Empty,
    /// Text.
    Text(String),
    /// A whole number; a person reads thousands as `k`, millions as `M`.
    Count(u64),
    /// A number, kept whole for JSON and CSV.
    Number {
        /// The number.
        value: f64,
        /// Its standard error.
        stderr: Option<f64>,
        /// Digits after the point that a person reads.
        decimals: usize,
    },
}

impl Column {
    /// A column of text.
    pub fn text(key: impl Into<String>, title: impl Into<String>) -> Column {
        Column::new(key.into(), title.into(), Align::Left)
    }

    /// A column of numbers.
    pub fn number(key: impl Into<String>, title: impl Into<String>) -> Column {
        Column::new(key.into(), title.into(), Align::Right)
    }

    /// The same column, in JSON and CSV only.
    pub fn machine_only(self) -> Column {
        Column { machine_only: true, ..self }
    }

    fn new(key: String, title: String, align: Align) -> Column {
        Column { key, title, align, machine_only: false }
    }
}

impl Cell {
    /// A number without standard error.
    pub fn number(value: f64, decimals: usize) -> Cell {
        Cell::Number { value, stderr: None, decimals }
    }

    /// What a person reads.
    pub(super) fn readable(&self) -> String {
        match self {
            Cell::Empty => String::new(),
            Cell::Text(text) => text.clone(),
            Cell::Count(count) => readable_count(*count),
            Cell::Number { value, stderr, decimals } => {
                let value = readable(*value, *decimals);
                match stderr {
                    Some(stderr) => format!("{value} ± {}", readable(*stderr, *decimals)),
                    None => value,
                }
            }
        }
    }
}

/// A number as a person reads it; what is too large for that gets an exponent.
fn readable(value: f64, decimals: usize) -> String {
    if value.is_finite() && value.abs() >= 1e6 {
        return format!("{value:.2e}");
    }
    let text = format!("{value:.decimals$}");
    // What rounds to zero has no sign.
    match text.strip_prefix('-') {
        Some(rest) if !rest.contains(|c: char| c != '0' && c != '.') => rest.to_owned(),
        _ => text,
    }
}

/// A count in three digits or so.
fn readable_count(count: u64) -> String {
    let value = count as f64;
    match count {
        0..1_000 => count.to_string(),
        1_000..1_000_000 => format!("{:.0}k", value / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1}M", value / 1e6),
        _ => format!("{:.1}B", value / 1e9),
    }
}
