//! What answers with a model: the engine, and what is made when it is first needed.

use std::sync::{Arc, Mutex};

use stb_runtime::scheduler::{Scheduler, SchedulerOptions};
use stb_runtime::{
    ChatInput, ChatMessage, ChatTemplate, Engine, Error, OpenOptions, Result, Tokenizer,
    for_template, without_template,
};

use crate::file::OpenFile;
use crate::waiting::hold;

/// An open model. Its parts live as long as something uses them.
pub(crate) struct Loaded {
    pub file: Arc<OpenFile>,
    pub engine: Arc<Engine>,
    /// The options that the engine was opened with.
    pub options: OpenOptions,
    pub context: Option<usize>,
    texts: Mutex<Option<Arc<Texts>>>,
    scheduler: Mutex<Option<Arc<Scheduler>>>,
}

/// The tokenizer and the chat template of a model.
pub(crate) struct Texts {
    pub tokenizer: Arc<Tokenizer>,
    pub template: Option<ChatTemplate>,
}

impl Loaded {
    pub fn new(
        file: OpenFile,
        engine: Engine,
        options: OpenOptions,
        context: Option<usize>,
    ) -> Self {
        Self {
            file: Arc::new(file),
            engine: Arc::new(engine),
            options,
            context,
            texts: Mutex::default(),
            scheduler: Mutex::default(),
        }
    }

    /// The tokenizer and the template.
    ///
    /// # Errors
    /// [`Error::Invalid`] if they are missing or broken.
    pub fn texts(&self) -> Result<Arc<Texts>> {
        let mut texts = hold(&self.texts);
        if let Some(texts) = &*texts {
            return Ok(Arc::clone(texts));
        }
        let tokenizer = Arc::new(self.engine.model.tokenizer()?);
        let template = self.engine.model.chat_template(&tokenizer)?;
        Ok(Arc::clone(texts.insert(Arc::new(Texts { tokenizer, template }))))
    }

    /// The scheduler, which answers prompts.
    ///
    /// # Errors
    /// Those of [`Loaded::texts`] and [`Scheduler::start`].
    pub fn scheduler(&self) -> Result<Arc<Scheduler>> {
        let texts = self.texts()?;
        let mut scheduler = hold(&self.scheduler);
        if let Some(scheduler) = &*scheduler {
            return Ok(Arc::clone(scheduler));
        }
        let options = SchedulerOptions {
            context: self.context,
            // Whoever asks for many answers waits for them.
            max_queue: usize::MAX,
            ..SchedulerOptions::default()
        };
        let tokenizer = Arc::clone(&texts.tokenizer);
        let started = Scheduler::start(Arc::clone(&self.engine), tokenizer, options)?;
        Ok(Arc::clone(scheduler.insert(Arc::new(started))))
    }
}

impl Texts {
    /// The prompt for a conversation, up to the start of the answer.
    ///
    /// # Errors
    /// [`Error::Usage`] for wrong messages, [`Error::Unsupported`] for tools where the template knows none,
    /// [`Error::Invalid`] if the template rejects the messages.
    pub fn prompt(&self, messages: &[ChatMessage], more: &TemplateInput) -> Result<String> {
        let knows = |word| self.template.as_ref().is_some_and(|template| template.mentions(word));
        let values = for_template(messages, knows("developer"))?;
        if more.tools.is_some() && !knows("tools") {
            return Err(Error::unsupported(
                "the chat template of this model knows no tools: describe them in a message of the system",
            ));
        }
        let Some(template) = &self.template else { return Ok(without_template(&values)) };
        template.render_chat(ChatInput {
            messages: &values,
            tools: more.tools.as_deref(),
            variables: &more.variables,
        })
    }
}

/// What a chat template reads beside the messages.
#[derive(Default)]
pub(crate) struct TemplateInput {
    pub tools: Option<Vec<serde_json::Value>>,
    pub variables: serde_json::Map<String, serde_json::Value>,
}
