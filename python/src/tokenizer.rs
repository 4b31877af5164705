//! `stb.Tokenizer`.

use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::errors::exception;
use crate::loaded::{TemplateInput, Texts};
use crate::options::from_python;

/// The tokenizer and the chat template of a model.
#[pyclass(frozen, module = "stb")]
pub(crate) struct Tokenizer {
    texts: Arc<Texts>,
}

impl Tokenizer {
    pub fn new(texts: Arc<Texts>) -> Self {
        Self { texts }
    }
}

#[pymethods]
impl Tokenizer {
    /// The token ids of a text. Special tokens in the text are recognized. With ``add_bos``, the begin token comes
    /// first if the model uses one and the text does not start with it.
    #[pyo3(signature = (text, *, add_bos = true))]
    fn encode(&self, py: Python<'_>, text: &str, add_bos: bool) -> PyResult<Vec<u32>> {
        let tokenizer = &self.texts.tokenizer;
        let encode = || match add_bos {
            true => tokenizer.encode_prompt(text),
            false => tokenizer.encode(text),
        };
        py.detach(encode).map_err(|e| exception(&e))
    }

    /// The text of token ids without special tokens. Ids without a token are left out.
    fn decode(&self, py: Python<'_>, ids: Vec<u32>) -> PyResult<String> {
        py.detach(|| self.texts.tokenizer.decode(&ids)).map_err(|e| exception(&e))
    }

    /// The id of the begin token, if texts of this model start with one.
    #[getter]
    fn bos(&self) -> Option<u32> {
        self.texts.tokenizer.bos
    }

    /// The ids of the end tokens.
    #[getter]
    fn eos(&self) -> Vec<u32> {
        self.texts.tokenizer.eos.clone()
    }

    /// The number of rows of the embeddings, so of logits per token.
    #[getter]
    fn vocab_size(&self) -> usize {
        self.texts.tokenizer.vocab_size()
    }

    /// The written form of a token, such as ``<s>``; None if there is no such token.
    fn token(&self, id: u32) -> Option<String> {
        self.texts.tokenizer.token_text(id)
    }

    /// The id of a token by its written form; None if there is no such token.
    fn token_id(&self, token: &str) -> Option<u32> {
        self.texts.tokenizer.token_id(token)
    }

    /// Whether the model has a chat template.
    #[getter]
    fn has_chat_template(&self) -> bool {
        self.texts.template.is_some()
    }

    /// The prompt for a conversation, up to the start of the answer. ``messages`` are those of ``Model.chat()``;
    /// ``tools`` are functions in OpenAI's format; other arguments become variables of the template. Without a template,
    /// the texts are joined by line breaks.
    ///
    /// Raises ValueError for wrong messages, FormatError if the template rejects them, UnsupportedError for tools if
    /// the template knows none.
    #[pyo3(signature = (messages, *, tools = None, **variables))]
    fn apply_chat_template(
        &self,
        messages: &Bound<'_, PyAny>,
        tools: Option<&Bound<'_, PyAny>>,
        variables: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<String> {
        let tools = tools.map(|tools| from_python(tools, "tools")).transpose()?;
        let variables = match variables {
            Some(variables) => from_python(variables, "variables")?,
            None => serde_json::Map::new(),
        };
        let messages: Vec<_> = from_python(messages, "messages")?;
        self.texts.prompt(&messages, &TemplateInput { tools, variables }).map_err(|e| exception(&e))
    }

    fn __repr__(&self) -> String {
        format!("<stb.Tokenizer of {} tokens>", self.texts.tokenizer.vocab_size())
    }
}
