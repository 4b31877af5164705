//! The models of a server: opened in the background, found by name.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use super::calls::CallFormat;
use super::error::ApiError;
use super::grammar::Grammars;
use super::options::ServeOptions;
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::sampler::SamplerOptions;
use crate::scheduler::Scheduler;
use crate::template::ChatTemplate;
use crate::tokenizer::Tokenizer;

/// All models.
pub(crate) struct Models {
    all: Vec<Served>,
    /// When the server was started, in seconds since 1970.
    pub created: i64,
}

/// A model that is being loaded or is ready.
pub(crate) struct Served {
    pub name: String,
    file: PathBuf,
    ready: OnceLock<Arc<Loaded>>,
}

/// A model that is ready.
pub(crate) struct Loaded {
    pub name: String,
    pub engine: Arc<Engine>,
    pub tokenizer: Arc<Tokenizer>,
    pub template: Option<ChatTemplate>,
    /// How the model writes calls of tools.
    pub calls: CallFormat,
    /// Values of absent sampling fields.
    pub defaults: SamplerOptions,
    pub scheduler: Scheduler,
    token_bytes: OnceLock<Vec<Vec<u8>>>,
    grammars: OnceLock<std::result::Result<Grammars, String>>,
}

impl Models {
    /// The models of these files, none of them loaded.
    ///
    /// # Errors
    /// [`Error::Usage`] if two have the same name, or an alias is no name or one too many.
    pub fn new(options: &ServeOptions) -> Result<Self> {
        let aliases = &options.aliases;
        if aliases.len() > options.files.len() {
            let text = format!("{} aliases for {} models", aliases.len(), options.files.len());
            return Err(Error::usage(format!("{text}: give --alias once for each file at most")));
        }
        if aliases.iter().any(|name| name.is_empty() || name.chars().any(char::is_control)) {
            return Err(Error::usage("--alias: a name has letters, and no control characters"));
        }
        let mut all: Vec<Served> = Vec::new();
        for (i, file) in options.files.iter().enumerate() {
            let name = aliases.get(i).cloned().unwrap_or_else(|| name_of(file));
            if let Some(other) = all.iter().find(|m| m.name == name) {
                return Err(Error::usage(format!(
                    "{} and {} would both be called {name}: give them names with --alias",
                    other.file.display(),
                    file.display()
                )));
            }
            all.push(Served { name, file: file.clone(), ready: OnceLock::new() });
        }
        if all.is_empty() {
            return Err(Error::usage("give a model file"));
        }
        Ok(Self { all, created: chrono::Utc::now().timestamp() })
    }

    /// Loads all models, one after the other. `opened` sees each engine.
    ///
    /// # Errors
    /// The errors of [`Engine::open`], of the tokenizer and the template.
    pub fn load(&self, options: &ServeOptions, opened: &dyn Fn(&Engine)) -> Result<()> {
        for model in &self.all {
            let loaded = Loaded::open(model, options, opened)?;
            let _ = model.ready.set(Arc::new(loaded));
        }
        Ok(())
    }

    pub fn iter(&self) -> impl Iterator<Item = &Served> {
        self.all.iter()
    }

    /// The models that are ready.
    pub fn ready(&self) -> impl Iterator<Item = &Arc<Loaded>> {
        self.all.iter().filter_map(|model| model.ready.get())
    }

    /// Whether all models are ready.
    pub fn all_ready(&self) -> bool {
        self.all.iter().all(|model| model.ready.get().is_some())
    }

    /// The model that a request names. A server with one model takes every name, as llama-server does.
    ///
    /// # Errors
    /// 404 for an unknown name, 400 if there are several models and none is named, 503 while the model is loaded.
    pub fn find(&self, name: Option<&str>) -> std::result::Result<Arc<Loaded>, ApiError> {
        let known = || self.all.iter().map(|m| m.name.as_str()).collect::<Vec<_>>().join(", ");
        let model = match (&self.all[..], name) {
            ([only], _) => only,
            (_, None) => {
                let message =
                    format!("`model` has to name one of the models of this server: {}", known());
                return Err(ApiError::field("model", message));
            }
            (all, Some(name)) => all
                .iter()
                .find(|m| m.name == name)
                .ok_or_else(|| ApiError::no_model(name, &known()))?,
        };
        model
            .ready
            .get()
            .cloned()
            .ok_or_else(|| ApiError::unavailable("The model is being loaded."))
    }

    /// The model of exactly this name.
    pub fn named(&self, name: &str) -> std::result::Result<&Served, ApiError> {
        let known = || self.all.iter().map(|m| m.name.as_str()).collect::<Vec<_>>().join(", ");
        self.all.iter().find(|m| m.name == name).ok_or_else(|| ApiError::no_model(name, &known()))
    }
}

impl Loaded {
    fn open(model: &Served, options: &ServeOptions, opened: &dyn Fn(&Engine)) -> Result<Self> {
        let engine = Arc::new(Engine::open(&model.file, &options.open)?);
        opened(&engine);
        let tokenizer = Arc::new(engine.model.tokenizer()?);
        let template = match options.template {
            true => engine.model.chat_template(&tokenizer)?,
            false => None,
        };
        let calls = CallFormat::of(|text| template.as_ref().is_some_and(|t| t.mentions(text)));
        let scheduler =
            Scheduler::start(Arc::clone(&engine), Arc::clone(&tokenizer), options.scheduler)?;
        Ok(Self {
            name: model.name.clone(),
            defaults: engine.model.suggested_sampling(),
            engine,
            tokenizer,
            template,
            calls,
            scheduler,
            token_bytes: OnceLock::new(),
            grammars: OnceLock::new(),
        })
    }

    /// The number of token ids.
    pub fn vocabulary(&self) -> usize {
        self.tokenizer.vocab_size()
    }

    /// The bytes of each token, by id.
    pub fn token_bytes(&self) -> &[Vec<u8>] {
        self.token_bytes.get_or_init(|| self.tokenizer.token_bytes())
    }

    /// The compiler of grammars.
    ///
    /// # Errors
    /// 400 if the model cannot be used with grammars.
    pub fn grammars(&self) -> std::result::Result<&Grammars, ApiError> {
        let build =
            || Grammars::new(&self.tokenizer, self.token_bytes()).map_err(|e| e.to_string());
        self.grammars.get_or_init(build).as_ref().map_err(ApiError::bad_request)
    }
}

/// The name of a model by its file, without the extension; of a folder, its name.
fn name_of(file: &Path) -> String {
    let file = file.canonicalize().unwrap_or_else(|_| file.to_owned());
    let is_folder = file.is_dir();
    let name = if is_folder { file.file_name() } else { file.file_stem() };
    name.unwrap_or_default().to_string_lossy().into_owned()
}
