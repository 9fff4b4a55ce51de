//! Progress of downloads, tokenisation and evaluation, drawn on the terminal.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use relufy_data::Progress;

use crate::out;

/// Draws one bar for the task at hand on standard error; silent where that is no terminal.
#[derive(Default)]
pub struct Bars {
    current: Mutex<Option<ProgressBar>>,
}

const BAR: &str = "{msg:24} {wide_bar} {pos}/{len} ({per_sec}, {eta} left)";
const SPINNER: &str = "{msg:24} {spinner} {pos} ({per_sec})";

/// A style from a template; the plain default where the template does not parse.
pub fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("━╸─")
}

impl Bars {
    fn with(&self, act: impl FnOnce(&mut Option<ProgressBar>)) {
        act(&mut self.current.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

impl Progress for Bars {
    fn start(&self, what: &str, total: Option<u64>) {
        let bar = match total {
            Some(total) => ProgressBar::new(total).with_style(style(BAR)),
            None => ProgressBar::new_spinner().with_style(style(SPINNER)),
        };
        bar.set_message(what.to_owned());
        bar.enable_steady_tick(Duration::from_millis(200));
        self.with(|current| *current = Some(bar));
    }

    fn advance(&self, delta: u64) {
        self.with(|current| {
            if let Some(bar) = current {
                bar.inc(delta);
            }
        });
    }

    fn message(&self, text: &str) {
        self.with(|current| match current {
            Some(bar) if !bar.is_hidden() => bar.println(text),
            _ => out::warn(text),
        });
    }

    fn finish(&self) {
        self.with(|current| {
            if let Some(bar) = current.take() {
                bar.finish_and_clear();
            }
        });
    }
}
