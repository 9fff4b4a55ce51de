//! One grid, five forms.

use std::fmt::Write;
use std::str::FromStr;

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use serde_json::{Map, Value, json};

use super::grid::{Align, Cell, Column, Grid};

/// How a table is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// For a terminal, as wide as it needs.
    #[default]
    Terminal,
    /// GitHub's Markdown.
    Markdown,
    /// Comma-separated values (RFC 4180), numbers in full, standard errors in columns of
    /// their own.
    Csv,
    /// A `tabular` with booktabs rules.
    Latex,
    /// Rows as objects, numbers in full, and the notes.
    Json,
}

impl FromStr for Format {
    type Err = String;

    fn from_str(name: &str) -> Result<Format, String> {
        Ok(match name {
            "terminal" => Format::Terminal,
            "markdown" => Format::Markdown,
            "csv" => Format::Csv,
            "latex" => Format::Latex,
            "json" => Format::Json,
            other => {
                return Err(format!(
                    "unknown format `{other}`; known: terminal, markdown, csv, latex, json"
                ));
            }
        })
    }
}

impl Grid {
    /// The table as text, with a line break at its end.
    pub fn render(&self, format: Format) -> String {
        match format {
            Format::Terminal => self.terminal(),
            Format::Markdown => self.markdown(),
            Format::Csv => self.csv(),
            Format::Latex => self.latex(),
            Format::Json => self.json(),
        }
    }

    /// The columns that a person reads.
    fn shown(&self) -> impl Iterator<Item = &Column> {
        self.columns.iter().filter(|column| !column.machine_only)
    }

    /// The cells of those columns.
    fn readable(&self) -> impl Iterator<Item = Vec<String>> {
        self.rows.iter().map(|row| {
            let cells = self.columns.iter().zip(row).filter(|(column, _)| !column.machine_only);
            cells.map(|(_, cell)| cell.readable()).collect()
        })
    }

    fn terminal(&self) -> String {
        let mut table = Table::new();
        table
            .load_style(presets::UTF8_FULL_CONDENSED)
            .set_content_arrangement(ContentArrangement::Disabled)
            .set_header(self.shown().map(|column| column.title.as_str()));
        for (index, column) in self.shown().enumerate() {
            if let (Align::Right, Some(column)) = (column.align, table.column_mut(index)) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        table.add_rows(self.readable());
        let mut text = format!("{table}\n");
        for note in &self.notes {
            let _ = writeln!(text, "{note}");
        }
        text
    }

    fn markdown(&self) -> String {
        let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
        let escape = |text: &str| text.replace('|', "\\|").replace('\n', " ");
        let mut text = line(self.shown().map(|column| escape(&column.title)).collect());
        text += &line(
            self.shown()
                .map(|column| if column.align == Align::Right { "---:" } else { "---" }.to_owned())
                .collect(),
        );
        for row in self.readable() {
            text += &line(row.iter().map(|cell| escape(cell)).collect());
        }
        for note in &self.notes {
            let _ = write!(text, "\n{note}\n");
        }
        text
    }

    fn csv(&self) -> String {
        let with_stderr: Vec<bool> = (0..self.columns.len())
            .map(|at| {
                self.rows
                    .iter()
                    .any(|row| matches!(row.get(at), Some(Cell::Number { stderr: Some(_), .. })))
            })
            .collect();
        let mut head = Vec::new();
        for (column, with_stderr) in self.columns.iter().zip(&with_stderr) {
            head.push(csv_field(&column.key));
            if *with_stderr {
                head.push(csv_field(&format!("{}_stderr", column.key)));
            }
        }
        let mut text = head.join(",") + "\r\n";
        for row in &self.rows {
            let mut fields = Vec::new();
            for (cell, with_stderr) in row.iter().zip(&with_stderr) {
                let (value, error) = match cell {
                    Cell::Empty => (String::new(), None),
                    Cell::Text(text) => (csv_field(text), None),
                    Cell::Count(count) => (count.to_string(), None),
                    Cell::Number { value, stderr, .. } => (value.to_string(), *stderr),
                };
                fields.push(value);
                if *with_stderr {
                    fields.push(error.map_or(String::new(), |error| error.to_string()));
                }
            }
            text += &(fields.join(",") + "\r\n");
        }
        text
    }

    fn latex(&self) -> String {
        let line = |cells: Vec<String>| format!("{} \\\\\n", cells.join(" & "));
        let aligns: String = self
            .shown()
            .map(|column| if column.align == Align::Right { 'r' } else { 'l' })
            .collect();
        let mut text = format!("\\begin{{tabular}}{{{aligns}}}\n\\toprule\n");
        text += &line(self.shown().map(|column| latex(&column.title)).collect());
        text += "\\midrule\n";
        for row in self.readable() {
            text += &line(row.iter().map(|cell| latex(cell)).collect());
        }
        text += "\\bottomrule\n\\end{tabular}\n";
        for note in &self.notes {
            let _ = writeln!(text, "% {}", note.replace('\n', " "));
        }
        text
    }

    fn json(&self) -> String {
        let rows: Vec<Value> = self
            .rows
            .iter()
            .map(|row| {
                let mut object = Map::new();
                for (column, cell) in self.columns.iter().zip(row) {
                    let value = match cell {
                        Cell::Empty => Value::Null,
                        Cell::Text(text) => json!(text),
                        Cell::Count(count) => json!(count),
                        Cell::Number { value, .. } => number(*value),
                    };
                    object.insert(column.key.clone(), value);
                    if let Cell::Number { stderr: Some(stderr), .. } = cell {
                        object.insert(format!("{}_stderr", column.key), number(*stderr));
                    }
                }
                Value::Object(object)
            })
            .collect();
        format!("{:#}\n", json!({ "rows": rows, "notes": self.notes }))
    }
}

/// A JSON number, or its name where JSON has none.
fn number(value: f64) -> Value {
    if value.is_finite() { json!(value) } else { json!(value.to_string()) }
}

/// A CSV field, quoted where it must be.
fn csv_field(text: &str) -> String {
    if text.contains(['"', ',', '\n', '\r']) {
        format!("\"{}\"", text.replace('"', "\"\""))
    } else {
        text.to_owned()
    }
}

/// Text that LaTeX prints as it stands.
fn latex(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' | '%' | '$' | '#' | '_' | '{' | '}' => out.extend(['\\', c]),
            '\\' => out += "\\textbackslash{}",
            '~' => out += "\\textasciitilde{}",
            '^' => out += "\\textasciicircum{}",
            '±' => out += "$\\pm$",
            '\n' => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grid() -> Grid {
        let share = Cell::Number { value: 51.25, stderr: Some(1.5), decimals: 1 };
        Grid {
            columns: vec![
                Column::text("model", "Model"),
                Column::number("flops", "FLOPs (G)"),
                Column::number("acc", "acc %"),
                Column::number("seed", "Seed").machine_only(),
            ],
            rows: vec![
                vec![
                    Cell::Text("a, \"b\"_c | d".into()),
                    Cell::number(6.607, 2),
                    share,
                    Cell::number(7.0, 0),
                ],
                vec![
                    Cell::Text("x".into()),
                    Cell::number(f64::INFINITY, 2),
                    Cell::Empty,
                    Cell::Empty,
                ],
            ],
            notes: vec!["a note".into()],
        }
    }

    #[test]
    fn terminal() {
        insta::assert_snapshot!(grid().render(Format::Terminal));
    }

    #[test]
    fn markdown() {
        insta::assert_snapshot!(grid().render(Format::Markdown));
    }

    #[test]
    fn csv() {
        assert_eq!(
            grid().render(Format::Csv),
            "model,flops,acc,acc_stderr,seed\r\n\"a, \"\"b\"\"_c | d\",6.607,51.25,1.5,7\r\nx,inf,,,\r\n"
        );
    }

    #[test]
    fn latex() {
        insta::assert_snapshot!(grid().render(Format::Latex));
    }

    #[test]
    fn json_keeps_numbers_whole() {
        let read: Value = serde_json::from_str(&grid().render(Format::Json)).unwrap();
        assert_eq!(read["rows"][0]["acc"], 51.25);
        assert_eq!(read["rows"][0]["acc_stderr"], 1.5);
        assert_eq!(read["rows"][1]["flops"], "inf");
        assert_eq!(read["rows"][1]["acc"], Value::Null);
        assert_eq!(read["notes"][0], "a note");
    }

    #[test]
    fn every_format_has_its_name() {
        assert_eq!("latex".parse(), Ok(Format::Latex));
        assert!("html".parse::<Format>().unwrap_err().contains("html"));
    }
}
