//! Describes the content of a file, as a table or as JSON.

use std::collections::HashSet;

use serde::Serialize;
use stb_format::arch::Role;
use stb_format::{Encoding, File, ModelSpec, Quality, Value, ValueRef};
use stb_kernels::cuda::gemm_units;

use crate::quality::QualityReport;

/// The description of a file without its weights.
#[derive(Clone, Debug, Serialize)]
pub struct Inspection {
    /// Format version needed to read it.
    pub min_reader: u16,
    /// Format version of the writer.
    pub written: u16,
    /// Bytes of the file.
    pub file_bytes: u64,
    /// Elements of all tensors.
    pub parameters: u64,
    /// Parameters that a token of a mixture of experts uses.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub active_parameters: Option<u64>,
    /// 8 × file bytes ÷ parameters.
    pub true_bits_per_parameter: f64,
    /// Stored bits per weight of the decoder's linear layers.
    pub body_bits: f64,
    /// What the converter measured; absent in files that do not say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quality: Option<QualityReport>,
    /// Sections in file order.
    pub sections: Vec<Section>,
    /// Metadata in key order; long texts are shortened.
    pub metadata: serde_json::Map<String, serde_json::Value>,
    /// Tensors in file order.
    pub tensors: Vec<Tensor>,
}

/// A section.
#[derive(Clone, Debug, Serialize)]
pub struct Section {
    /// Registered name, or the number of an unregistered kind.
    pub kind: String,
    /// First byte in the file.
    pub offset: u64,
    /// Bytes without the padding after it.
    pub bytes: u64,
}

/// A tensor.
#[derive(Clone, Debug, Serialize)]
pub struct Tensor {
    /// The Hugging Face name.
    pub name: String,
    /// In PyTorch's order: [out, in] for a linear layer.
    pub shape: Vec<u64>,
    /// Name of the encoding.
    pub encoding: String,
    /// Registered id of the encoding.
    pub encoding_id: u32,
    /// First byte in the file.
    pub offset: u64,
    /// Stored bytes.
    pub bytes: u64,
    /// Stored bits per weight.
    pub stored_bits: f64,
    /// The GEMM units for prefill of a linear layer on an NVIDIA GPU; absent if there is no kernel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cuda_prompts: Option<&'static str>,
    /// XXH3-64 of the stored bytes.
    pub checksum: String,
}

/// Texts with more characters are shortened.
const MAX_TEXT: usize = 200;

/// Describes an open file.
#[must_use]
pub fn inspect(file: &File<'_>) -> Inspection {
    let sections = file.sections().iter().map(|s| Section {
        kind: match s.kind {
            1 => "DATA".into(),
            2 => "TENSORS".into(),
            3 => "META".into(),
            other => other.to_string(),
        },
        offset: s.offset,
        bytes: s.bytes.len() as u64,
    });
    // Nothing if the file is valid but not a model.
    let spec = ModelSpec::from_file(file).ok();
    let is_matrix = |role: Role| matches!(role, Role::Linear(_) | Role::Expert(..));
    let linears: HashSet<String> = spec
        .iter()
        .flat_map(|spec| spec.tensors().filter(|t| is_matrix(t.role)).map(|t| t.name))
        .collect();
    let linear = |t: &stb_format::Tensor<'_>| linears.contains(t.name());
    let tensors = file.tensors().iter().map(|t| Tensor {
        name: t.name().to_owned(),
        shape: t.shape().to_vec(),
        encoding: t.encoding().to_string(),
        encoding_id: t.encoding().id(),
        offset: t.offset(),
        bytes: t.payload().len() as u64,
        stored_bits: t.stored_bits(),
        cuda_prompts: if linear(t) { gemm_units(t.encoding()) } else { None },
        checksum: format!("{:016x}", t.checksum()),
    });
    let body = || file.tensors().iter().filter(|t| linear(t));
    let body_bytes: usize = body().map(|t| t.payload().len()).sum();
    let body_weights: u64 = body().map(stb_format::Tensor::elements).sum();
    Inspection {
        min_reader: file.min_reader(),
        written: file.written(),
        file_bytes: file.bytes().len() as u64,
        parameters: file.parameters(),
        active_parameters: spec.filter(|s| s.experts.is_some()).map(|s| s.active_parameters()),
        true_bits_per_parameter: file.true_bits(),
        body_bits: body_bytes as f64 * 8.0 / body_weights.max(1) as f64,
        quality: Quality::read(file.meta()).as_ref().map(QualityReport::from),
        sections: sections.collect(),
        metadata: file.meta().iter().map(|(k, v)| (k.to_owned(), json_value(v))).collect(),
        tensors: tensors.collect(),
    }
}

fn json_value(value: ValueRef<'_>) -> serde_json::Value {
    match value.to_value() {
        Value::Text(text) if text.chars().count() > MAX_TEXT => {
            let start: String = text.chars().take(MAX_TEXT).collect();
            format!("{start}… ({} bytes)", text.len()).into()
        }
        Value::Text(text) => text.into(),
        Value::U64(v) => v.into(),
        Value::F64(v) => v.into(),
        Value::Bool(v) => v.into(),
        Value::U64List(v) => v.into(),
    }
}

/// `text` with control characters escaped, which could steer a terminal, and newlines. Quotes are not escaped.
#[must_use]
pub fn printable(text: &str) -> String {
    text.chars()
        .flat_map(|c| match c {
            '"' | '\'' => c.to_string().chars().collect::<Vec<_>>(),
            _ => c.escape_debug().collect(),
        })
        .collect()
}

impl Inspection {
    /// A table. Text from the file is escaped, so that it cannot steer a terminal.
    #[must_use]
    pub fn table(&self) -> String {
        use std::fmt::Write;
        let mut out = String::new();
        let _ = writeln!(
            out,
            "format {} (readers from {}), {} bytes, {} parameters",
            self.written, self.min_reader, self.file_bytes, self.parameters
        );
        if let Some(active) = self.active_parameters {
            let _ = writeln!(out, "of these, a token uses {active} (mixture of experts)");
        }
        for s in &self.sections {
            let _ =
                writeln!(out, "section {:<8} at {:>12}  {:>12} bytes", s.kind, s.offset, s.bytes);
        }
        let _ = writeln!(out);
        for (key, value) in &self.metadata {
            let text = match value {
                serde_json::Value::String(text) => printable(text),
                other => other.to_string(),
            };
            let _ = writeln!(out, "{key:<32} {text}");
        }
        let width = self.tensors.iter().map(|t| t.name.len()).max().unwrap_or(0).max(6);
        let _ = writeln!(
            out,
            "\n{:<width$}  {:>14}  {:<20} {:>12}  {:>6}",
            "tensor", "shape", "encoding", "bytes", "bits"
        );
        for t in &self.tensors {
            let shape: Vec<String> = t.shape.iter().map(u64::to_string).collect();
            let _ = writeln!(
                out,
                "{:<width$}  {:>14}  {:<20} {:>12}  {:>6.3}",
                t.name,
                shape.join(" x "),
                t.encoding,
                t.bytes,
                t.stored_bits
            );
        }
        let mut units = std::collections::BTreeMap::new();
        for name in self.tensors.iter().filter_map(|t| t.cuda_prompts) {
            *units.entry(name).or_insert(0) += 1;
        }
        for (name, count) in units {
            let _ = write!(out, "\nprompts on a GPU: {count} linear layers by {name}");
        }
        let _ = writeln!(
            out,
            "\ndecoder layers {:.3} stored bits per weight\nwhole file     {:.3} true bits per parameter",
            self.body_bits, self.true_bits_per_parameter
        );
        if let Some(quality) = &self.quality {
            let _ = writeln!(out, "quality        {}", printable(&quality.line()));
        }
        out
    }

    /// The number of tensors with an encoding that this version cannot decode.
    #[must_use]
    pub fn unknown_encodings(&self, file: &File<'_>) -> usize {
        let unknown =
            |t: &&stb_format::Tensor<'_>| matches!(t.encoding(), Encoding::Unknown { .. });
        file.tensors().iter().filter(unknown).count()
    }
}
