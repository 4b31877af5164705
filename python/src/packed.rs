//! Products and rows of packed matrices in the memory of the caller, for other frameworks.

use std::sync::{Arc, Mutex};

use numpy::{PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray2};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use stb_format::Encoding;
use stb_format::encoding::MatrixView;
use stb_kernels::{Isa, Pool, packed};
use stb_runtime::{
    Error, LinearScratch, LinearWeight, Rows, Threads, apply_packed, default_threads,
};

use crate::errors::exception;
use crate::waiting::hold;

/// The threads of all products; made when first needed.
static POOL: Mutex<Option<Arc<Pool>>> = Mutex::new(None);
/// Buffers that no product uses at present.
static SCRATCH: Mutex<Vec<LinearScratch>> = Mutex::new(Vec::new());

/// A number of an encoding with its parameters, as files have them.
#[derive(FromPyObject)]
pub(crate) struct EncodingNumbers(u32, [u8; 16]);

impl EncodingNumbers {
    /// A matrix of `rows` × `cols` weights in `payload`.
    fn view<'a>(&self, rows: u64, cols: u64, payload: &'a [u8]) -> PyResult<MatrixView<'a>> {
        let wrong = |e: stb_format::Error| PyValueError::new_err(e.to_string());
        let encoding = Encoding::parse(self.0, self.1).map_err(wrong)?;
        if rows == 0 || cols == 0 {
            return Err(PyValueError::new_err("the matrix is empty"));
        }
        encoding.view(rows, cols, payload).map_err(wrong)
    }
}

/// Sets the number of threads of ``linear()``; by default one per physical core.
#[pyfunction]
pub(crate) fn set_threads(threads: u16) -> PyResult<()> {
    *hold(&POOL) = Some(new_pool(usize::from(threads))?);
    Ok(())
}

fn new_pool(threads: usize) -> PyResult<Arc<Pool>> {
    let made = Pool::new(threads).map_err(|e| {
        exception(&Error::usage(format!("cannot start {threads} threads: {e}; try fewer")))
    });
    made.map(Arc::new)
}

fn pool() -> PyResult<Arc<Pool>> {
    let mut pool = hold(&POOL);
    if let Some(pool) = &*pool {
        return Ok(Arc::clone(pool));
    }
    Ok(Arc::clone(pool.insert(new_pool(default_threads())?)))
}

/// The product of activations ``x``, float32 ``[tokens, in]``, and the transpose of a packed matrix ``[out, in]``: a new
/// float32 array ``[tokens, out]``.
///
/// ``payload`` has the stored bytes, uint8, of the encoding ``(id, params)``, and ``out`` rows. Unless ``exact``,
/// activations are quantized to 8 bits if a kernel supports it.
///
/// Raises ValueError if the payload is no such matrix.
#[pyfunction]
pub(crate) fn linear<'py>(
    py: Python<'py>,
    x: PyReadonlyArray2<'py, f32>,
    payload: PyReadonlyArray1<'py, u8>,
    encoding: EncodingNumbers,
    out: u64,
    exact: bool,
) -> PyResult<Bound<'py, PyArray2<f32>>> {
    let (view, dimensions) = (x.as_array(), x.as_array().dim());
    let x = view.as_slice().ok_or_else(|| PyValueError::new_err("x is not contiguous"))?;
    let matrix = encoding.view(out, dimensions.1 as u64, payload.as_slice()?)?;
    let pool = pool()?;
    let isa = Isa::detect().map_err(|e| exception(&Error::usage(e.to_string())))?;
    let bytes = payload.as_slice()?.len();
    let product = || {
        let mut scratch = match exact {
            true => LinearScratch::new(false),
            false => hold(&SCRATCH).pop().unwrap_or_else(|| LinearScratch::new(true)),
        };
        let mut y = Vec::new();
        let weight = LinearWeight { matrix: packed(&matrix), bytes };
        let threads = Threads { isa, pool: &pool };
        let rows = Rows::of_prompt(x, dimensions.1);
        apply_packed(threads, &mut scratch, [weight], rows, [&mut y]);
        if !exact {
            hold(&SCRATCH).push(scratch);
        }
        y
    };
    let y = py.detach(product);
    PyArray1::from_vec(py, y).reshape([dimensions.0, out as usize])
}

/// Rows of a packed matrix ``[rows, cols]`` by their numbers, int64: a new float32 array ``[numbers, cols]``.
///
/// Raises ValueError if the payload is no such matrix, or a number is outside.
#[pyfunction]
pub(crate) fn rows<'py>(
    py: Python<'py>,
    numbers: PyReadonlyArray1<'py, i64>,
    payload: PyReadonlyArray1<'py, u8>,
    encoding: EncodingNumbers,
    shape: (u64, u64),
) -> PyResult<Bound<'py, PyArray2<f32>>> {
    let matrix = encoding.view(shape.0, shape.1, payload.as_slice()?)?;
    let numbers = numbers.as_slice()?;
    let outside = numbers.iter().find(|n| u64::try_from(**n).map_or(true, |n| n >= shape.0));
    if let Some(outside) = outside {
        let text = format!("row {outside} is outside the matrix of {} rows", shape.0);
        return Err(PyValueError::new_err(text));
    }
    let cols = shape.1 as usize;
    let decode = || {
        let mut values = vec![0.0; numbers.len() * cols];
        for (number, row) in numbers.iter().zip(values.chunks_exact_mut(cols)) {
            matrix.decode_row(*number as usize, row);
        }
        values
    };
    PyArray1::from_vec(py, py.detach(decode)).reshape([numbers.len(), cols])
}
