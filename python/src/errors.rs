//! Errors of the crates as exceptions of the package.

use std::path::Path;

use pyo3::exceptions::{PyKeyboardInterrupt, PyOSError, PyValueError};
use pyo3::prelude::*;
use stb_convert::interrupt::Interrupted;
use stb_format::Class;
use stb_runtime::Error;

/// The exception for an error of the runtime. The message is that of the programs.
pub(crate) fn exception(error: &Error) -> PyErr {
    with_message(error, error.to_string())
}

/// The exception for an error of the converter.
pub(crate) fn conversion_exception(error: &anyhow::Error) -> PyErr {
    let message = format!("{error:#}");
    if error.is::<Interrupted>() {
        return PyKeyboardInterrupt::new_err(message);
    }
    if let Some(found) = error.chain().find_map(|e| e.downcast_ref::<Error>()) {
        return with_message(found, message);
    }
    match error.chain().find_map(|e| e.downcast_ref::<std::io::Error>()) {
        Some(io) => os_error(None, io),
        None => of_package("Error", message, None),
    }
}

fn with_message(error: &Error, message: String) -> PyErr {
    match error {
        Error::Io { path, error } => os_error(Some(path), error),
        Error::Format { error, .. } => {
            let class = match error.rule().class() {
                Class::Invalid => "FormatError",
                Class::Unsupported => "UnsupportedError",
            };
            of_package(class, message, Some(error))
        }
        Error::Invalid { .. } => of_package("FormatError", message, None),
        Error::Unsupported { .. } => of_package("UnsupportedError", message, None),
        Error::Device { .. } => of_package("DeviceError", message, None),
        Error::Usage { .. } => PyValueError::new_err(message),
        Error::Interrupted => PyKeyboardInterrupt::new_err(message),
        _ => of_package("Error", message, None),
    }
}

/// An exception of `stb.errors` with what it says about the broken rule.
fn of_package(class: &str, message: String, broken: Option<&stb_format::Error>) -> PyErr {
    Python::attach(|py| {
        let made = || {
            let value = py.import("stb.errors")?.getattr(class)?.call1((message,))?;
            if let Some(broken) = broken {
                value.setattr("rule", broken.rule().id())?;
                value.setattr("offset", broken.offset())?;
                value.setattr("tensor", broken.tensor())?;
            }
            Ok(PyErr::from_value(value))
        };
        made().unwrap_or_else(|e: PyErr| e)
    })
}

/// An `OSError`. Python chooses its subclass, such as `FileNotFoundError`, by the number.
fn os_error(path: Option<&Path>, error: &std::io::Error) -> PyErr {
    Python::attach(|py| {
        let made = || {
            let errno = py.import("errno")?;
            let (number, text) = match error.raw_os_error() {
                Some(number) => {
                    (number, py.import("os")?.call_method1("strerror", (number,))?.extract()?)
                }
                None => (errno.getattr(errno_name(error.kind()))?.extract()?, error.to_string()),
            };
            let (number, text): (i32, String) = (number, text);
            Ok(match path {
                Some(path) => PyOSError::new_err((number, text, path.as_os_str().to_owned())),
                None => PyOSError::new_err((number, text)),
            })
        };
        made().unwrap_or_else(|e: PyErr| e)
    })
}

/// The name of the number for an error that the operating system has not made.
fn errno_name(kind: std::io::ErrorKind) -> &'static str {
    use std::io::ErrorKind;
    match kind {
        ErrorKind::NotFound => "ENOENT",
        ErrorKind::PermissionDenied => "EACCES",
        ErrorKind::InvalidInput => "EINVAL",
        ErrorKind::FileTooLarge => "EFBIG",
        _ => "EIO",
    }
}
