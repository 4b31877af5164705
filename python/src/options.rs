//! Keyword arguments of functions that have many, and values that pass as JSON.

use std::cell::RefCell;

use pyo3::conversion::FromPyObjectOwned;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use serde::Serialize;
use serde::de::DeserializeOwned;
use stb_runtime::{Error, nearest};

use crate::errors::exception;

/// The keyword arguments of a call.
pub(crate) struct Options<'py> {
    function: &'static str,
    given: Option<Bound<'py, PyDict>>,
    known: RefCell<Vec<&'static str>>,
}

impl<'py> Options<'py> {
    /// The keyword arguments of a call of `function`.
    pub fn new(function: &'static str, given: Option<&Bound<'py, PyDict>>) -> Self {
        Self { function, given: given.cloned(), known: RefCell::default() }
    }

    /// The value of an argument; `None` if it is absent or `None`.
    ///
    /// # Errors
    /// `TypeError` for a value of another type, `ValueError` for a number that is too large, both with the name.
    pub fn take<T: FromPyObjectOwned<'py>>(&self, name: &'static str) -> PyResult<Option<T>> {
        self.known.borrow_mut().push(name);
        let value = match &self.given {
            Some(given) => given.get_item(name)?,
            None => None,
        };
        let Some(value) = value.filter(|value| !value.is_none()) else { return Ok(None) };
        value.extract::<T>().map(Some).map_err(|e| self.wrong(value.py(), name, e))
    }

    /// The exception for a value that could not be converted.
    fn wrong(&self, py: Python<'_>, name: &str, error: impl Into<PyErr>) -> PyErr {
        let error: PyErr = error.into();
        let what = error.value(py).str().map(|s| s.to_string()).unwrap_or_default();
        let text = format!("{}(): {name}: {what}", self.function);
        match error.is_instance_of::<PyTypeError>(py) {
            true => PyTypeError::new_err(text),
            false => PyValueError::new_err(text),
        }
    }

    /// Refuses arguments that nobody has asked for.
    ///
    /// # Errors
    /// `TypeError` that names the argument, and the one that was meant.
    pub fn finish(self) -> PyResult<()> {
        let Some(given) = self.given else { return Ok(()) };
        let known = self.known.into_inner();
        for name in given.keys() {
            let name: String = name.extract()?;
            if known.contains(&name.as_str()) {
                continue;
            }
            let meant = match nearest(&name, known.iter().copied()).first() {
                Some(near) => format!("; did you mean {near}?"),
                None => String::new(),
            };
            let function = self.function;
            return Err(PyTypeError::new_err(format!(
                "{function}() got an unexpected keyword argument '{name}'{meant}"
            )));
        }
        Ok(())
    }
}

/// A text or several.
#[derive(FromPyObject)]
pub(crate) enum OneOrMany {
    /// One text.
    One(String),
    /// Several texts.
    Many(Vec<String>),
}

/// Python's value of something that can be written as JSON.
pub(crate) fn to_python<'py>(
    py: Python<'py>,
    value: &impl Serialize,
) -> PyResult<Bound<'py, PyAny>> {
    let text = serde_json::to_string(value)
        .map_err(|e| exception(&Error::Internal { what: e.to_string() }))?;
    py.import("json")?.call_method1("loads", (text,))
}

/// A value of Python, which JSON can express, as `T`. `name` is the argument, for messages.
///
/// # Errors
/// `TypeError` if JSON cannot express it, `ValueError` if it is no `T`.
pub(crate) fn from_python<T: DeserializeOwned>(
    value: &Bound<'_, PyAny>,
    name: &str,
) -> PyResult<T> {
    let text: String = value.py().import("json")?.call_method1("dumps", (value,))?.extract()?;
    serde_json::from_str(&text).map_err(|e| {
        let text = e.to_string();
        // The position in the JSON text means nothing to the caller.
        let what = text.split(" at line ").next().unwrap_or_default();
        PyValueError::new_err(format!("{name}: {what}"))
    })
}
