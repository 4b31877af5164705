//! The smallest file whose measured divergence from the dense model is within a limit. Each size that is tried is a
//! whole conversion with the check; the cost model is measured once.
//!
//! The folder of the unfinished conversion holds the report of each finished one, and the best file so far, so that
//! an interrupted search resumes.

mod search;

use std::path::{Path, PathBuf};
use std::time::Instant;

use stb_kernels::Isa;
use stb_runtime::{Error, Result};

use self::search::{Next, Search, Tried};
use crate::interrupt::Interrupted;
use crate::metadata;
use crate::output::{move_into_place, refuse_existing};
use crate::pipeline::Progress;
use crate::prepare::{Order, Prepared};
use crate::recipe::Goal;
use crate::report::{Attempt, Report};
use crate::resume::Workspace;

impl Prepared {
    /// Converts to the file of `order`: once, or until the size is found.
    ///
    /// # Errors
    /// Those of a conversion; [`Error::Usage`] if even the largest file exceeds the KL divergence of a search.
    pub fn convert(self, order: &Order<'_>, progress: &dyn Progress) -> anyhow::Result<Report> {
        match self.max_kl {
            Some(kl) => search_size(self, order, kl, progress),
            None => self.convert_once(order, progress),
        }
    }
}

/// Converts until the smallest file is found whose divergence is at most `limit` nats per token.
///
/// # Errors
/// Those of a conversion; [`Error::Usage`] if even the largest file exceeds the limit.
fn search_size(
    prepared: Prepared,
    order: &Order<'_>,
    limit: f64,
    progress: &dyn Progress,
) -> anyhow::Result<Report> {
    refuse_existing(order.target, order.force)?;
    let workspace = Workspace::open(order.target, &key(&prepared, order, limit)?)?;
    if workspace.discarded {
        progress.note(
            "discarding an unfinished conversion to this file: its source, recipe, calibration or \
             version differs",
        );
    }
    let mut attempts =
        Attempts { folder: workspace.folder().to_owned(), finished: 0, order, progress };
    let result = attempts.run(prepared, limit);
    let Err(error) = &result else {
        workspace.remove();
        return result;
    };
    let stopped = error.is::<Interrupted>();
    let io = error.downcast_ref::<Error>().is_some_and(|e| matches!(e, Error::Io { .. }));
    match (stopped || io) && workspace.has_conversions() {
        false => workspace.remove(),
        true => workspace.release(),
    }
    match stopped && attempts.finished > 0 {
        true => {
            let Attempts { finished: conversions, folder, .. } = attempts;
            Err(Interrupted::Searching { conversions, folder }.into())
        }
        false => result,
    }
}

/// A text with everything on which the search depends.
fn key(prepared: &Prepared, order: &Order<'_>, limit: f64) -> anyhow::Result<String> {
    let mut meta = prepared.meta.clone();
    metadata::add_hashes(&mut meta, order.checkpoint)?;
    let isa = Isa::detect().map_err(|e| Error::usage(e.to_string()))?;
    let device = order.device.as_ref().map_or("", |device| &device.info().name);
    Ok(format!("search for {limit}\n{meta:?}\n{} {device}\n", isa.name()))
}

/// The conversions of a search.
struct Attempts<'a> {
    folder: PathBuf,
    /// Conversions that are finished.
    finished: usize,
    order: &'a Order<'a>,
    progress: &'a dyn Progress,
}

impl Attempts<'_> {
    fn run(&mut self, mut prepared: Prepared, limit: f64) -> anyhow::Result<Report> {
        let internal = |what: &str| Error::Internal { what: what.into() };
        let costs = prepared.costs.take().ok_or_else(|| internal("a search without costs"))?;
        let range = costs.range(&prepared.plan, &prepared.meta)?;
        let first = prepared.clone();
        let estimate = |t: Tried, kl: f64| {
            Ok(costs.scaled_size(&first.plan, &first.meta, (t.bits, t.kl), kl)?)
        };
        let search =
            Search { limit, smallest: range.smallest, largest: range.largest, estimate: &estimate };
        let Some(Goal::Bits(mut bits)) = prepared.recipe.linear.goal() else {
            return Err(internal("a search without a first size").into());
        };
        let mut tried: Vec<Tried> = Vec::new();
        let mut reports: Vec<Report> = Vec::new();
        let seconds = Instant::now();
        loop {
            self.progress.note(&format!(
                "conversion {} of the search for a divergence of {limit}: {bits} true bits per parameter",
                tried.len() + 1
            ));
            let Order { checkpoint, calibration, .. } = self.order;
            prepared.set_size(&costs, checkpoint, calibration, bits)?;
            let report = self.attempt(&prepared, bits)?;
            let kl = report.quality.kl().unwrap_or(f64::INFINITY);
            tried.push(Tried { bits, kl });
            reports.push(report);
            self.finished = tried.len();
            self.progress.note(&format!("{bits} true bits per parameter: {kl:.4} nats per token"));
            self.drop_superseded(&tried, limit)?;
            match search.next(&tried)? {
                Next::Try(next) => bits = next,
                Next::Done(found) => {
                    let index = tried.iter().position(|t| t.bits == found);
                    let index = index.ok_or_else(|| internal("a result that was not tried"))?;
                    let path = self.path(found);
                    if !path.exists() {
                        // A run that was killed has moved the file, or lost it.
                        prepared.set_size(&costs, checkpoint, calibration, found)?;
                        let order = Order { target: &path, force: true, ..self.order.clone() };
                        let _ = prepared.convert_once(&order, self.progress)?;
                    }
                    move_into_place(&path, self.order.target, self.order.force)?;
                    let mut report = reports.swap_remove(index);
                    report.seconds = seconds.elapsed().as_secs_f64();
                    let kl = |t: &Tried| Some(t.kl).filter(|kl| kl.is_finite());
                    report.search =
                        tried.iter().map(|t| Attempt { bits: t.bits, kl: kl(t) }).collect();
                    return Ok(report);
                }
                Next::Impossible(kl) => {
                    return Err(Error::usage(format!(
                        "no file has a KL divergence of at most {limit} nats per token: the largest, of {bits} true \
                         bits per parameter, has {kl:.6}. Allow more with --max-kl"
                    ))
                    .into());
                }
            }
        }
    }

    /// The file of a size.
    fn path(&self, bits: f64) -> PathBuf {
        self.folder.join(format!("{bits}.stb"))
    }

    /// Converts, unless an interrupted search has done so.
    fn attempt(&self, prepared: &Prepared, bits: f64) -> anyhow::Result<Report> {
        let target = self.path(bits);
        let path = target.with_extension("stb.json");
        if let Some(report) = saved_report(&path) {
            return Ok(report);
        }
        let order = Order { target: &target, force: true, ..self.order.clone() };
        let report = prepared.convert_once(&order, self.progress)?;
        let json =
            serde_json::to_vec(&report).map_err(|e| Error::Internal { what: e.to_string() })?;
        crate::study::write_whole(&path, &String::from_utf8_lossy(&json))?;
        Ok(report)
    }

    /// Removes the files of sizes that are not the result: those above the limit, and larger ones than the best.
    fn drop_superseded(&self, tried: &[Tried], limit: f64) -> Result<()> {
        let good = tried.iter().filter(|t| t.kl <= limit);
        let best = good.map(|t| t.bits).min_by(f64::total_cmp);
        for t in tried.iter().filter(|t| Some(t.bits) != best) {
            let path = self.path(t.bits);
            match std::fs::remove_file(&path) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                    return Err(Error::io(&path, e));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// A report that [`Attempts::attempt`] has saved; `None` if it is missing or damaged.
fn saved_report(path: &Path) -> Option<Report> {
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}
