//! Who decodes: a row for each format and engine.

use anyhow::bail;
use relufy_sparse::bench::{DecoderTimer, Pace, Text, Timed};
use relufy_sparse::{Format, Options};
use relufy_spec::flops::SiteDensities;

use super::machine::Machine;
use super::reading::{densities, read_text};
use super::subject::Subject;
use super::zeros::Forced;
use super::{Choice, Decode};

/// Positions that a timer may fill after those that it finds.
const ROOM: usize = 8;

/// Everybody who decodes, and a plain read of the memory that the weights lie in.
pub struct Lineup<'a> {
    pub rows: Vec<Row>,
    pub timed: Vec<Box<dyn Timed + 'a>>,
    pub read: Box<dyn FnMut() -> relufy_sparse::Result<f64>>,
    /// Tokens that each decodes: what was asked for, or what the text has.
    pub tokens: usize,
    /// Positions that are filled before; of a text, of each document.
    pub context: usize,
    /// `None` on a GPU.
    pub threads: Option<usize>,
    /// What a model's matrices read in the text.
    pub densities: Option<SiteDensities>,
    /// Whether the text is not the model's own.
    pub foreign: bool,
}

/// What a row is.
pub struct Row {
    pub name: String,
    /// `dense`, `sparse` or `decoder`.
    pub engine: &'static str,
    pub format: Format,
    pub forced: Option<SiteDensities>,
    /// The dense row of the same format.
    pub beside: Option<usize>,
}

/// The engines of one format.
struct Pair {
    format: Format,
    dense: Option<Machine>,
    sparse: Option<Machine>,
}

impl<'a> Lineup<'a> {
    pub fn new(
        args: &Decode,
        subject: &'a Subject,
        formats: &[Format],
        zeros: bool,
        pace: &Pace,
    ) -> anyhow::Result<Lineup<'a>> {
        let forced = if zeros { args.forced(subject) } else { Vec::new() };
        let reads = matches!(subject, Subject::Model { .. }) && args.densities.is_empty();
        let context = args.context.unwrap_or(if reads { 0 } else { 16 });
        let most = subject.spec().max_positions;
        if context >= most {
            bail!(
                "--context {context}: {} has {most} positions, and one is decoded",
                subject.name()
            );
        }
        let pairs = pairs(args, subject, formats, zeros, if reads { 0 } else { context + ROOM })?;
        let Some(machine) =
            pairs.iter().flat_map(|pair| [&pair.dense, &pair.sparse]).flatten().next()
        else {
            bail!("nothing to time");
        };
        let steps = pace.warmup + pace.tokens;
        let text = match reads {
            true => Some(read_text(args, subject, machine, context, steps)?),
            false => None,
        };
        let tokens = match &text {
            Some(text) => text.steps().saturating_sub(pace.warmup),
            None => pace.tokens,
        };
        if tokens == 0 {
            bail!("the text leaves nothing to time after {} tokens to warm up", pace.warmup);
        }
        let mut lineup = Lineup {
            rows: Vec::new(),
            timed: Vec::new(),
            read: machine.plain_read()?,
            tokens,
            context: text.as_ref().map_or(context, Text::before),
            threads: machine.threads(),
            densities: None,
            foreign: args.corpus.is_some(),
        };
        if let (Some(text), true) = (&text, zeros) {
            lineup.densities = Some(densities(&subject.real()?.decoder, text)?);
        }
        if let (Some(text), true) = (&text, args.decoder) {
            let timer = Box::new(DecoderTimer::new(&subject.real()?.decoder, text.clone())?);
            lineup.add("decoder", Format::F32, None, timer);
        }
        for pair in &pairs {
            lineup.add_pair(pair, &forced, text.as_ref(), usize::from(args.batch))?;
        }
        Ok(lineup)
    }

    /// The rows of one format.
    fn add_pair(
        &mut self,
        pair: &Pair,
        forced: &[Forced],
        text: Option<&Text>,
        batch: usize,
    ) -> anyhow::Result<()> {
        let (format, context) = (pair.format, self.context);
        let timer = |machine: &Machine, forced: Option<&Forced>| match text {
            Some(text) => machine.reader(text.clone()),
            None => machine.timer(forced.map(|forced| forced.densities), context, batch),
        };
        if let Some(machine) = &pair.dense {
            self.add("dense", format, None, timer(machine, None)?);
        }
        let Some(machine) = &pair.sparse else { return Ok(()) };
        let forced: Vec<Option<&Forced>> =
            if forced.is_empty() { vec![None] } else { forced.iter().map(Some).collect() };
        for forced in forced {
            self.add("sparse", format, forced, timer(machine, forced)?);
        }
        Ok(())
    }

    fn add(
        &mut self,
        engine: &'static str,
        format: Format,
        forced: Option<&Forced>,
        timed: Box<dyn Timed + 'a>,
    ) {
        let name = match forced {
            Some(forced) => format!("{format} {}", forced.name),
            None => format!("{format} {engine}"),
        };
        let dense = |row: &Row| row.engine == "dense" && row.format == format;
        let beside = match engine {
            "sparse" => self.rows.iter().position(dense),
            _ => None,
        };
        let forced = forced.map(|forced| forced.densities);
        self.rows.push(Row { name, engine, format, forced, beside });
        self.timed.push(timed);
    }
}

/// Packs the weights, once for each format and engine.
fn pairs(
    args: &Decode,
    subject: &Subject,
    formats: &[Format],
    zeros: bool,
    context: usize,
) -> anyhow::Result<Vec<Pair>> {
    let threads = rayon::current_num_threads();
    let wanted = |choice| args.engine.is_none_or(|only| only == choice);
    let pair = |format: &Format| {
        let options = Options { format: *format, threads, context };
        let machine =
            |skip, wanted: bool| wanted.then(|| Machine::new(subject, skip, &options)).transpose();
        Ok(Pair {
            format: *format,
            dense: machine(false, wanted(Choice::Dense))?,
            sparse: machine(true, zeros && wanted(Choice::Sparse))?,
        })
    };
    formats.iter().map(pair).collect()
}
