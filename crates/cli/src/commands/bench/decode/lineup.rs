//! Who decodes: a row for each format and engine.

use anyhow::bail;
use relufy_sparse::bench::{DecoderTimer, Pace, Text, Timed, union};
use relufy_sparse::{Format, Options};
use relufy_spec::flops::{Densities, SiteDensities};

use super::super::subject::Subject;
use super::machine::Machine;
use super::reading::{densities, read_text};
use super::zeros::Forced;
use super::{Choice, Decode};
use crate::calibration::{self, Target};

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
    /// The densities that its thresholds were chosen for.
    pub target: Option<Target>,
    /// Whether it computes what the model does, but for rounding.
    pub exact: bool,
    /// The dense row of the same format.
    pub beside: Option<usize>,
}

/// The engines of one format.
struct Pair {
    format: Format,
    dense: Option<Machine>,
    sparse: Vec<Machine>,
    /// Which of those decodes with each of the densities that are forced.
    forced: Vec<usize>,
    /// Those with thresholds.
    targets: Vec<(Target, Machine)>,
}

/// The engines that forced densities ask for, as few as there are layouts.
#[derive(Default)]
struct Layouts {
    machines: Vec<Machine>,
    forced: Vec<usize>,
}

impl Layouts {
    fn add(
        &mut self,
        subject: &Subject,
        densities: SiteDensities,
        options: &Options,
    ) -> anyhow::Result<()> {
        let densities = Densities::uniform(subject.spec().layers.len(), densities);
        let found = self.machines.iter().position(|machine| machine.suits(&densities));
        let which = match found {
            Some(which) => which,
            None => {
                self.machines.push(Machine::forced(subject, &densities, options)?);
                self.machines.len() - 1
            }
        };
        self.forced.push(which);
        Ok(())
    }
}

/// What sets a row apart from others of its format and engine.
#[derive(Clone, Copy)]
enum Variant<'a> {
    Plain,
    Forced(&'a Forced),
    Target { target: Target, exact: bool },
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
        let room = if reads { 0 } else { context + ROOM };
        let pairs = pairs(args, subject, formats, (zeros, &forced), room)?;
        let Some(machine) =
            pairs.iter().flat_map(|pair| pair.dense.iter().chain(&pair.sparse)).next()
        else {
            bail!("nothing to time");
        };
        let steps = pace.warmup + pace.tokens;
        let text = match reads {
            true => Some(read_text(args, subject, machine, context, steps)?),
            false => None,
        };
        let tokens = match &text {
            Some(text) => (text.steps() / usize::from(args.batch)).saturating_sub(pace.warmup),
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
            lineup.add("decoder", Format::F32, Variant::Plain, timer);
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
            Some(text) => machine.reader(text, batch),
            None => machine.timer(forced.map(|forced| forced.densities), context, batch),
        };
        if let Some(machine) = &pair.dense {
            self.add("dense", format, Variant::Plain, timer(machine, None)?);
        }
        for (forced, machine) in forced.iter().zip(&pair.forced) {
            let timer = timer(&pair.sparse[*machine], Some(forced))?;
            self.add("sparse", format, Variant::Forced(forced), timer);
        }
        if let (Some(machine), true) = (pair.sparse.first(), pair.forced.is_empty()) {
            self.add("sparse", format, Variant::Plain, timer(machine, None)?);
        }
        for (target, machine) in &pair.targets {
            let variant = Variant::Target { target: *target, exact: machine.is_exact() };
            self.add("sparse", format, variant, timer(machine, None)?);
        }
        Ok(())
    }

    fn add(
        &mut self,
        engine: &'static str,
        format: Format,
        variant: Variant<'_>,
        timed: Box<dyn Timed + 'a>,
    ) {
        let (name, forced, target, exact) = match variant {
            Variant::Plain => (format!("{format} {engine}"), None, None, true),
            Variant::Forced(forced) => {
                (format!("{format} {}", forced.name), Some(forced.densities), None, true)
            }
            Variant::Target { target, exact } => {
                let inexact = if exact { "" } else { ", inexact" };
                (format!("{format} target {target}{inexact}"), None, Some(target), exact)
            }
        };
        let dense = |row: &Row| row.engine == "dense" && row.format == format;
        let beside = match engine {
            "sparse" => self.rows.iter().position(dense),
            _ => None,
        };
        self.rows.push(Row { name, engine, format, forced, target, exact, beside });
        self.timed.push(timed);
    }
}

/// Packs the weights, once for each format, engine and layout.
fn pairs(
    args: &Decode,
    subject: &Subject,
    formats: &[Format],
    (zeros, forced): (bool, &[Forced]),
    context: usize,
) -> anyhow::Result<Vec<Pair>> {
    let threads = rayon::current_num_threads();
    let wanted = |choice| args.engine.is_none_or(|only| only == choice);
    let found = match &args.calibration {
        Some(path) => Some((subject.real()?, calibration::read(path, subject.spec())?)),
        None => None,
    };
    let pair = |format: &Format| {
        let options = Options { format: *format, threads, context };
        let machine =
            |skip, wanted: bool| wanted.then(|| Machine::new(subject, skip, &options)).transpose();
        let measured = |target: Option<&Target>| {
            found.as_ref().map(|(real, found)| {
                let calibrated = calibration::calibrated(found, subject.spec(), target);
                Machine::calibrated(real, &calibrated, &options)
            })
        };
        let wanted_sparse = zeros && wanted(Choice::Sparse);
        let mut layouts = Layouts::default();
        for forced in forced.iter().filter(|_| wanted_sparse) {
            let densities = union(forced.densities, usize::from(args.batch));
            layouts.add(subject, densities, &options)?;
        }
        if forced.is_empty() {
            let plain = match (wanted_sparse, measured(None)) {
                (true, Some(machine)) => Some(machine?),
                (sparse, _) => machine(true, sparse)?,
            };
            layouts.machines.extend(plain);
        }
        let mut targets = Vec::new();
        for target in &args.density_target {
            if let Some(machine) = measured(Some(target)) {
                targets.push((*target, machine?));
            }
        }
        let dense = machine(false, wanted(Choice::Dense))?;
        let Layouts { machines: sparse, forced } = layouts;
        Ok(Pair { format: *format, dense, sparse, forced, targets })
    };
    formats.iter().map(pair).collect()
}
