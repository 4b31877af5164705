//! `stb.Model` and `stb.open()`.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use numpy::{PyArray1, PyArray2, PyArrayMethods};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyMappingProxy, PyTuple};
use stb_format::Value;
use stb_runtime::scheduler::Job;
use stb_runtime::{Checkpoint, Engine, Error, KvKind, OpenOptions, SHORT_PROMPT, State, Verify};

use crate::answer::{Generation, apply_options};
use crate::errors::exception;
use crate::evaluation::{Perplexity, perplexity};
use crate::file::OpenFile;
use crate::loaded::{Loaded, TemplateInput};
use crate::options::{Options, from_python, to_python};
use crate::tensor::Tensor;
use crate::tokenizer::Tokenizer;
use crate::waiting::hold;

/// Prompt tokens between two looks for signals.
const CHUNK: usize = 512;

/// An open model. Close it with ``close()`` or a ``with`` block.
///
/// The file is mapped into memory, and weights are used in place. All methods may be called from several threads.
#[pyclass(frozen, module = "stb")]
pub(crate) struct Model {
    path: PathBuf,
    loaded: Mutex<Option<Arc<Loaded>>>,
    tensors: Mutex<Option<Py<PyMappingProxy>>>,
}

/// Opens an ``.stb`` file.
///
/// ``threads`` is the number of threads, by default one per physical core. ``context`` is the largest number of tokens
/// of a prompt with its answer, by default the context length of the model. With ``exact``, activations are not
/// quantized to 8 bits and the KV cache is float32: slower. ``verify`` is ``auto`` (checksums), ``full`` (checksums and
/// content) or ``off``. With ``mmap=False``, the file is read into memory.
///
/// Raises OSError if the file cannot be read, FormatError if it is not valid, UnsupportedError if this version cannot
/// run it.
#[pyfunction]
#[pyo3(signature = (path, **options))]
#[pyo3(
    text_signature = "(path, *, threads=None, context=None, exact=False, verify='auto', mmap=True)"
)]
pub(crate) fn open(
    py: Python<'_>,
    path: PathBuf,
    options: Option<&Bound<'_, PyDict>>,
) -> PyResult<Model> {
    let given = Options::new("open", options);
    let threads = given.take::<u16>("threads")?.map(usize::from);
    let context = given.take::<usize>("context")?;
    let exact = given.take("exact")?.unwrap_or(false);
    let verify: Option<String> = given.take("verify")?;
    let map = given.take("mmap")?.unwrap_or(true);
    given.finish()?;
    let verify = match verify.as_deref() {
        None | Some("auto") => Verify::Auto,
        Some("full") => Verify::Full,
        Some("off") => Verify::Off,
        Some(other) => {
            let text = format!("verify is {other:?}, but must be auto, full or off");
            return Err(PyValueError::new_err(text));
        }
    };
    let kv = if exact { KvKind::F32 } else { KvKind::F16 };
    let options = OpenOptions { map, verify, exact, kv, threads, ..OpenOptions::default() };
    let load = || {
        if Checkpoint::is_checkpoint(&path) {
            return Err(Error::unsupported(format!(
                "{} is a checkpoint, not an .stb file: stb.convert() converts it",
                path.display()
            )));
        }
        let file = OpenFile::open(&path, map)?;
        let engine = Engine::open_stb(&path, &options)?;
        Ok(Loaded::new(file, engine, options, context))
    };
    let loaded = py.detach(load).map_err(|e| exception(&e))?;
    Ok(Model { path, loaded: Mutex::new(Some(Arc::new(loaded))), tensors: Mutex::default() })
}

impl Model {
    fn loaded(&self) -> PyResult<Arc<Loaded>> {
        let loaded = hold(&self.loaded).clone();
        loaded.ok_or_else(|| PyValueError::new_err("the model is closed: open it again"))
    }

    /// Starts an answer to `prompt`; `chat` says whether special tokens end it.
    fn answer(
        &self,
        py: Python<'_>,
        prompt: Vec<u32>,
        chat: bool,
        options: Options<'_>,
    ) -> PyResult<Generation> {
        let loaded = self.loaded()?;
        let mut job = Job::new(prompt, loaded.engine.model.suggested_sampling());
        apply_options(&mut job, &options)?;
        options.finish()?;
        job.stop_at_special = chat && !job.ignore_end;
        let scheduler = py.detach(|| loaded.scheduler()).map_err(|e| exception(&e))?;
        Generation::start(scheduler, job)
    }
}

#[pymethods]
impl Model {
    /// Where the file is.
    #[getter]
    fn path(&self) -> PathBuf {
        self.path.clone()
    }

    /// All metadata of the file: texts, numbers, truth values and lists of numbers by their keys.
    #[getter]
    fn metadata<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        for (key, value) in &self.loaded()?.file.metadata {
            match value {
                Value::Text(text) => dict.set_item(key, text)?,
                Value::U64(n) => dict.set_item(key, n)?,
                Value::F64(x) => dict.set_item(key, x)?,
                Value::Bool(b) => dict.set_item(key, b)?,
                Value::U64List(list) => dict.set_item(key, list)?,
            }
        }
        Ok(dict)
    }

    /// The ``model_type`` of the configuration that the model comes from, such as ``llama``.
    #[getter]
    fn architecture(&self) -> PyResult<Option<String>> {
        Ok(self.loaded()?.engine.model.architecture().map(str::to_owned))
    }

    /// The name of the recipe that the file was converted with.
    #[getter]
    fn recipe(&self) -> PyResult<Option<String>> {
        Ok(self.loaded()?.engine.model.recipe().map(str::to_owned))
    }

    /// The number of parameters.
    #[getter]
    fn parameters(&self) -> PyResult<u64> {
        Ok(self.loaded()?.file.parameters)
    }

    /// Bytes of the file.
    #[getter]
    fn file_bytes(&self) -> PyResult<u64> {
        Ok(self.loaded()?.engine.model.file_bytes)
    }

    /// True bits per parameter: 8 times the bytes of the whole file, divided by the number of parameters.
    #[getter]
    fn true_bits(&self) -> PyResult<f64> {
        Ok(self.loaded()?.file.true_bits)
    }

    /// What the converter measured: a dict with ``verdict``, ``meaning`` and, unless it is unchecked, the figures (KL
    /// divergence in nats per token, perplexities, shares from 0 to 1, standard errors); None in files that do not say.
    #[getter]
    fn quality<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let loaded = self.loaded()?;
        loaded.file.quality.as_ref().map(|quality| to_python(py, quality)).transpose()
    }

    /// The largest number of tokens of a prompt with its answer.
    #[getter]
    fn context(&self) -> PyResult<usize> {
        let loaded = self.loaded()?;
        Ok(loaded.context.unwrap_or(loaded.engine.model.spec.context_length as usize))
    }

    /// The number of threads.
    #[getter]
    fn threads(&self) -> PyResult<usize> {
        Ok(self.loaded()?.engine.pool.threads())
    }

    /// The tensors by their names, in file order.
    #[getter]
    fn tensors(&self, py: Python<'_>) -> PyResult<Py<PyMappingProxy>> {
        let loaded = self.loaded()?;
        if let Some(tensors) = &*hold(&self.tensors) {
            return Ok(tensors.clone_ref(py));
        }
        let dict = PyDict::new(py);
        for (index, tensor) in loaded.file.tensors.iter().enumerate() {
            dict.set_item(&tensor.name, Tensor::new(Arc::clone(&loaded.file), index))?;
        }
        let tensors = PyMappingProxy::new(py, dict.as_mapping()).unbind();
        *hold(&self.tensors) = Some(tensors.clone_ref(py));
        Ok(tensors)
    }

    /// The tokenizer with the chat template.
    ///
    /// Raises FormatError if the file has none, or a broken one.
    #[getter]
    fn tokenizer(&self, py: Python<'_>) -> PyResult<Tokenizer> {
        let loaded = self.loaded()?;
        py.detach(|| loaded.texts()).map(Tokenizer::new).map_err(|e| exception(&e))
    }

    /// Continues a prompt, a text or token ids, and returns the answer as an iterator of pieces of text.
    ///
    /// A begin token is added to a text if the model uses one. Absent options have the values of the file, else those of
    /// ``stb-run --help``. ``temperature=0`` selects the most likely token; ``max_tokens=None`` stops at an end token or
    /// a full context; ``seed=None`` gives another answer each time; ``stop`` has texts that end the answer and are not
    /// part of it; with ``ignore_eos``, no end token is chosen.
    ///
    /// Raises ValueError for values out of range and for a prompt that is empty or too long.
    #[pyo3(signature = (prompt, **options))]
    #[pyo3(
        text_signature = "($self, prompt, *, max_tokens=None, temperature=None, top_k=None, top_p=None, min_p=None, repeat_penalty=None, presence_penalty=None, frequency_penalty=None, seed=None, stop=None, ignore_eos=False)"
    )]
    fn generate(
        &self,
        py: Python<'_>,
        prompt: Prompt,
        options: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Generation> {
        let loaded = self.loaded()?;
        let tokens = match prompt {
            Prompt::Text(text) => {
                let encode = || loaded.texts()?.tokenizer.encode_prompt(&text);
                py.detach(encode).map_err(|e| exception(&e))?
            }
            Prompt::Tokens(tokens) => tokens,
        };
        self.answer(py, tokens, false, Options::new("generate", options))
    }

    /// Answers a conversation, and returns the answer as an iterator of pieces of text.
    ///
    /// ``messages`` are dicts as in OpenAI's API: ``role`` is ``system``, ``user``, ``assistant`` or ``tool``, and
    /// ``content`` is a text or a list of parts of the type ``text``. The chat template of the model makes the prompt;
    /// without one, the texts are joined by line breaks. ``tools`` are functions in OpenAI's format, and
    /// ``template_variables`` are more variables of the template. The other options are those of ``generate()``.
    ///
    /// Raises ValueError for wrong messages and options, FormatError if the template rejects the messages,
    /// UnsupportedError for tools if the template knows none.
    #[pyo3(signature = (messages, **options))]
    #[pyo3(
        text_signature = "($self, messages, *, tools=None, template_variables=None, max_tokens=None, temperature=None, top_k=None, top_p=None, min_p=None, repeat_penalty=None, presence_penalty=None, frequency_penalty=None, seed=None, stop=None, ignore_eos=False)"
    )]
    fn chat(
        &self,
        py: Python<'_>,
        messages: &Bound<'_, PyAny>,
        options: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Generation> {
        let loaded = self.loaded()?;
        let given = Options::new("chat", options);
        let tools: Option<Bound<'_, PyAny>> = given.take("tools")?;
        let variables: Option<Bound<'_, PyAny>> = given.take("template_variables")?;
        let more = TemplateInput {
            tools: tools.map(|tools| from_python(&tools, "tools")).transpose()?,
            variables: match variables {
                Some(variables) => from_python(&variables, "template_variables")?,
                None => serde_json::Map::new(),
            },
        };
        let messages: Vec<_> = from_python(messages, "messages")?;
        let encode = || {
            let texts = loaded.texts()?;
            let tokens = texts.tokenizer.encode_prompt(&texts.prompt(&messages, &more)?)?;
            Ok((tokens, texts.template.is_some()))
        };
        let (tokens, has_template) = py.detach(encode).map_err(|e: Error| exception(&e))?;
        self.answer(py, tokens, has_template, given)
    }

    /// The logits after each token of a sequence, a new float32 array ``[tokens, vocab_size]``.
    ///
    /// Raises ValueError for an empty sequence, one that is longer than the context, and unknown tokens.
    fn logits<'py>(
        &self,
        py: Python<'py>,
        tokens: Vec<u32>,
    ) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let loaded = self.loaded()?;
        let (engine, context) = (&loaded.engine, self.context()?);
        let vocab = engine.model.embeddings.rows();
        if tokens.is_empty() || tokens.len() > context {
            return Err(PyValueError::new_err(format!(
                "there are {} tokens, but must be from 1 to {context}, the context",
                tokens.len()
            )));
        }
        if let Some(token) = tokens.iter().find(|token| **token as usize >= vocab) {
            let text = format!("token {token} is outside the vocabulary of {vocab}");
            return Err(PyValueError::new_err(text));
        }
        let mut state = State::new(engine, tokens.len());
        let mut all: Vec<f32> = Vec::with_capacity(tokens.len() * vocab);
        let mut rest = &tokens[..];
        while !rest.is_empty() {
            // Chunks of a long prompt are long, since a short prompt is computed in another way.
            let count = if rest.len() < CHUNK + SHORT_PROMPT { rest.len() } else { CHUNK };
            let (chunk, later) = rest.split_at(count);
            let run = || engine.forward_all(&mut state, chunk, |_, rows| all.extend(rows));
            py.detach(run).map_err(|e| exception(&e))?;
            py.check_signals()?;
            rest = later;
        }
        PyArray1::from_vec(py, all).reshape([tokens.len(), vocab])
    }

    /// Measures the perplexity of the model on a text, as ``stb-run perplexity`` does: exact activations and KV cache,
    /// and windows of ``context`` tokens that do not overlap.
    ///
    /// ``text`` is the text itself, or a path (``os.PathLike``) of a text file, which may be .jsonl and compressed with
    /// gzip. ``windows`` is the largest number of windows. ``reference`` is the path of a model to compare with, usually
    /// the dense checkpoint. ``separator`` splits the text into documents; with ``rows``, lines are rows of a data set.
    /// ``progress(done, total)`` is called after each window; an exception in it ends the measurement.
    ///
    /// Raises ValueError if the text is shorter than a window, FormatError if the models cannot be compared.
    #[pyo3(signature = (text, **options))]
    #[pyo3(
        text_signature = "($self, text, *, context=None, windows=None, reference=None, separator=None, rows=False, threads=None, progress=None)"
    )]
    fn perplexity(
        &self,
        py: Python<'_>,
        text: &Bound<'_, PyAny>,
        options: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Perplexity> {
        let loaded = self.loaded()?;
        perplexity(py, &loaded, text, Options::new("perplexity", options))
    }

    /// How a checkpoint of the model's family has the tensors: a dict with ``config`` (JSON) and ``tensors``. For
    /// ``stb.transformers``.
    fn _layout<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let loaded = self.loaded()?;
        to_python(py, &py.detach(|| loaded.file.layout()).map_err(|e| exception(&e))?)
    }

    /// Whether ``close()`` was called.
    #[getter]
    fn closed(&self) -> bool {
        hold(&self.loaded).is_none()
    }

    /// Closes the model. Answers that are being generated go on, and tensors stay usable; the file is released when the
    /// last of them is gone.
    fn close(&self, py: Python<'_>) {
        let (loaded, tensors) = (hold(&self.loaded).take(), hold(&self.tensors).take());
        drop(tensors);
        // The thread that answers is waited for.
        py.detach(|| drop(loaded));
    }

    fn __enter__(this: PyRef<'_, Self>) -> PyRef<'_, Self> {
        this
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, py: Python<'_>, _exception: &Bound<'_, PyTuple>) {
        self.close(py);
    }

    fn __repr__(&self) -> String {
        let path = self.path.display();
        match self.loaded() {
            Err(_) => format!("<stb.Model {path}, closed>"),
            Ok(loaded) => format!(
                "<stb.Model {path}: {} parameters, {:.3} true bits per parameter>",
                loaded.file.parameters, loaded.file.true_bits
            ),
        }
    }
}

/// A text or token ids.
#[derive(FromPyObject)]
enum Prompt {
    /// A text.
    Text(String),
    /// Token ids.
    Tokens(Vec<u32>),
}
