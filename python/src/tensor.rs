//! `stb.Tensor`.

use std::sync::Arc;

use numpy::{IxDyn, PyArray1, PyArrayDyn, PyArrayMethods};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::errors::exception;
use crate::file::{OpenFile, TensorEntry};

/// A tensor of an open file. It keeps the file mapped.
#[pyclass(frozen, module = "stb")]
pub(crate) struct Tensor {
    file: Arc<OpenFile>,
    index: usize,
}

impl Tensor {
    pub fn new(file: Arc<OpenFile>, index: usize) -> Self {
        Self { file, index }
    }

    fn entry(&self) -> &TensorEntry {
        &self.file.tensors[self.index]
    }
}

#[pymethods]
impl Tensor {
    /// The Hugging Face name, such as ``model.layers.0.self_attn.q_proj.weight``.
    #[getter]
    fn name(&self) -> &str {
        &self.entry().name
    }

    /// The dimensions in PyTorch's order: ``(out, in)`` for a linear layer.
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.entry().shape)
    }

    /// The encoding with its parameters, as ``stb-convert inspect`` prints it.
    #[getter]
    fn encoding(&self) -> String {
        self.entry().encoding.to_string()
    }

    /// The registered number of the encoding.
    #[getter]
    fn encoding_id(&self) -> u32 {
        self.entry().encoding.id()
    }

    /// The 16 parameter bytes of the encoding.
    #[getter]
    fn encoding_params(&self) -> [u8; 16] {
        self.entry().encoding.params()
    }

    /// Stored bits per weight: 8 times the stored bytes, divided by the number of weights.
    #[getter]
    fn bits_per_weight(&self) -> f64 {
        self.entry().bits
    }

    /// Stored bytes.
    #[getter]
    fn bytes(&self) -> usize {
        self.entry().range.len()
    }

    /// The weights as a new float32 array of the tensor's shape.
    ///
    /// Raises UnsupportedError for an encoding of a newer version.
    fn dequantize<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArrayDyn<f32>>> {
        let entry = self.entry();
        let values = py.detach(|| self.file.decode(entry)).map_err(|e| exception(&e))?;
        let shape: Vec<usize> = entry.shape.iter().map(|n| *n as usize).collect();
        PyArray1::from_vec(py, values).reshape(IxDyn(&shape))
    }

    /// The stored bytes, packed as the file has them, as a new uint8 array of one dimension.
    fn packed<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<u8>> {
        let entry = self.entry();
        let payload = py.detach(|| self.file.payload(entry).to_vec());
        PyArray1::from_vec(py, payload)
    }

    fn __repr__(&self) -> String {
        let entry = self.entry();
        let shape: Vec<String> = entry.shape.iter().map(u64::to_string).collect();
        format!(
            "<stb.Tensor {} [{}] {} {:.3} bits per weight>",
            entry.name,
            shape.join(", "),
            entry.encoding,
            entry.bits
        )
    }
}
