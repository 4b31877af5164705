//! `stb.convert()`, `stb.verify()` and `stb.recipes()`.

use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::mpsc::Sender;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use stb_convert::interrupt::{Interrupted, interrupt, reset};
use stb_convert::recipe::PRESETS;
use stb_convert::request::{ConversionGoal, ConversionRequest};
use stb_convert::system::default_threads;
use stb_convert::verify::verify_file;
use stb_convert::{Progress, Recipe};
use stb_runtime::DeviceChoice;

use crate::errors::{conversion_exception, exception};
use crate::options::{Options, to_python};
use crate::waiting::{lock, pool, run};

/// Held by the conversion that runs: the request to stop is one for the whole process.
static CONVERTING: Mutex<()> = Mutex::new(());

/// What a conversion has to say.
enum Message {
    Step(u64, u64, String),
    Note(String),
}

/// Sends the progress of a conversion to the thread that called it.
struct Reporter(Sender<Message>);

impl Progress for Reporter {
    fn step(&self, done: u64, all: u64, what: &str) {
        // Nobody listens after an exception.
        let _ = self.0.send(Message::Step(done, all, what.to_owned()));
    }

    fn layer(&self, index: usize, all: usize, error: f64, encoding: &str, seconds: f64) {
        self.note(&format!(
            "layer {} of {all}: {encoding}, relative error {error:.4}, {seconds:.1} s",
            index + 1
        ));
    }

    fn note(&self, text: &str) {
        let _ = self.0.send(Message::Note(text.to_owned()));
    }
}

/// Converts a checkpoint to the ``.stb`` file ``out``, measures the file, and returns the report of ``stb-convert
/// --report``.
///
/// ``source`` is a folder in the Hugging Face layout, a .safetensors or .gguf file, or the id of a model in the local
/// cache of the hub. At most one of these says what to reach, else the default recipe does: ``recipe``, a name or a .toml
/// file; ``bits``, the size of the whole file in true bits per parameter; ``max_kl``, the largest KL divergence from the
/// source in nats per token, for which the smallest file is searched.
///
/// ``progress(done, total, text)`` is called with units of work, which begin again at 0 in each phase; notes come with
/// the numbers of the last step. An exception in it ends the conversion, as Ctrl-C does; finished layers are kept, and
/// the same call resumes.
///
/// The other options are those of ``stb-convert``: ``check=False`` does not measure the file; ``calib`` is a text file
/// for calibration, ``calib_samples`` and ``calib_len`` (tokens) its sequences, ``seed`` their seed; ``distill_layers``
/// and ``distill`` are passes of distillation; ``force`` replaces an existing file; ``threads`` is by default all that
/// the process may use; ``device`` is ``cpu``, ``cuda``, ``cuda:N`` or ``auto``. One conversion runs at a time; a second
/// waits.
#[pyfunction]
#[pyo3(signature = (source, out, **options))]
#[pyo3(
    text_signature = "(source, out, *, recipe=None, bits=None, max_kl=None, progress=None, check=True, calib=None, calib_samples=None, calib_len=None, seed=None, distill_layers=None, distill=None, force=False, threads=None, device='cpu')"
)]
pub(crate) fn convert<'py>(
    py: Python<'py>,
    source: PathBuf,
    out: PathBuf,
    options: Option<&Bound<'py, PyDict>>,
) -> PyResult<Bound<'py, PyAny>> {
    let given = Options::new("convert", options);
    let progress: Option<Py<PyAny>> = given.take("progress")?;
    let threads = given.take::<u16>("threads")?.map_or_else(default_threads, usize::from);
    let request = ConversionRequest {
        goal: goal(&given)?,
        check: given.take("check")?.unwrap_or(true),
        calibration: given.take("calib")?,
        samples: given.take("calib_samples")?,
        length: given.take("calib_len")?,
        seed: given.take("seed")?,
        distill_layers: given.take("distill_layers")?,
        distill: given.take("distill")?,
        force: given.take("force")?.unwrap_or(false),
        device: device(given.take("device")?)?,
        ..ConversionRequest::new(&source)
    };
    given.finish()?;
    let _running = lock(py, &CONVERTING)?;
    reset();
    let mut last = (0, 0);
    let (done, outcome) = run(
        py,
        || {
            interrupt();
        },
        |py, message| {
            let text = match message {
                Message::Step(done, all, text) => {
                    last = (done, all);
                    text
                }
                Message::Note(text) => text,
            };
            match &progress {
                Some(progress) => progress.call1(py, (last.0, last.1, text)).map(drop),
                None => Ok(()),
            }
        },
        |sender| {
            let pool = pool(threads)?;
            pool.install(|| request.convert(&out, &Reporter(sender)))
        },
    );
    if let Err(stopped) = outcome {
        if let Some(error) = done.as_ref().err().filter(|e| e.is::<Interrupted>()) {
            // What is kept, and how to discard it. Python before 3.11 has no notes.
            let _ = stopped.value(py).call_method1("add_note", (error.to_string(),));
        }
        return Err(stopped);
    }
    let done = done.map_err(|e: anyhow::Error| conversion_exception(&e))?;
    to_python(py, &done.report)
}

/// What the conversion is to reach.
fn goal(given: &Options<'_>) -> PyResult<ConversionGoal> {
    let recipe: Option<PathBuf> = given.take("recipe")?;
    let bits: Option<f64> = given.take("bits")?;
    let max_kl: Option<f64> = given.take("max_kl")?;
    match (recipe, bits, max_kl) {
        (None, None, None) => Ok(ConversionRequest::new("".as_ref()).goal),
        (Some(recipe), None, None) => {
            Ok(ConversionGoal::Recipe(recipe.to_string_lossy().into_owned()))
        }
        (None, Some(bits), None) => Ok(ConversionGoal::Bits(bits)),
        (None, None, Some(kl)) => Ok(ConversionGoal::MaxKl(kl)),
        _ => Err(PyValueError::new_err("give one of recipe, bits and max_kl")),
    }
}

fn device(name: Option<String>) -> PyResult<DeviceChoice> {
    name.map_or(Ok(DeviceChoice::default()), |name| name.parse().map_err(PyValueError::new_err))
}

/// Checks every rule of the format and every checksum of a file, and returns what it is: a dict with ``model`` (whether
/// it is a model; otherwise it is a set of tensors), ``tensors`` (their number) and ``unknown_encodings`` (those of a
/// newer version, of which only the checksum was checked).
///
/// Raises FormatError with the first broken rule, OSError if the file cannot be read.
#[pyfunction]
pub(crate) fn verify<'py>(py: Python<'py>, path: PathBuf) -> PyResult<Bound<'py, PyAny>> {
    let found = py.detach(|| verify_file(&path)).map_err(|e| exception(&e))?;
    to_python(py, &found)
}

/// The recipes of ``convert()``: their names with their descriptions.
#[pyfunction]
pub(crate) fn recipes(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let dict = PyDict::new(py);
    for (name, text) in PRESETS {
        dict.set_item(name, Recipe::parse(text).map_err(|e| exception(&e))?.description)?;
    }
    Ok(dict)
}
