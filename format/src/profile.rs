//! The model profile (spec, metadata §2): conversion between the `model.*` metadata keys and
//! [`ModelSpec`], and a check of the tensors.

mod decoder;
mod keys;
mod quality;

use self::keys::{Keys, unknown};
pub use self::quality::{Figure, Quality, QualityFigures, Verdict};
use crate::arch::{Activation, ModelSpec, NormKind, RopePairing, TensorSpec};
use crate::error::{Error, Result, Rule};
use crate::meta::{Meta, MetaView, Value};
use crate::num::len_u64;
use crate::reader::File;

/// `model.architecture` of models that compute as LLaMA does.
const LLAMA: &str = "llama";
/// `model.architecture` of all others: the keys of the specification, metadata §2.5, say how they differ.
const DECODER: &str = "decoder";

impl ModelSpec {
    /// Reads and checks the profile of an open file (STB-R-060 to STB-R-064).
    ///
    /// # Errors
    /// The first broken rule.
    pub fn from_file(file: &File<'_>) -> Result<Self> {
        let spec = Self::from_meta(file.meta())?;
        spec.check_tensors(file)?;
        let keys = Keys(file.meta());
        let stated = keys.u64("model.parameters")?;
        if stated != file.parameters() {
            let detail = format!("{stated} stated, {} stored", file.parameters());
            return Err(Error::new(Rule::ModelParameters, detail));
        }
        keys.text("tokenizer.json")?;
        keys.bool("tokenizer.add_bos")?;
        let mut ids = keys.list("tokenizer.eos_ids")?;
        if file.meta().get("tokenizer.bos_id").is_some() || keys.bool("tokenizer.add_bos")? {
            ids.push(keys.u64("tokenizer.bos_id")?);
        }
        if let Some(id) = ids.into_iter().find(|id| *id >= spec.vocab_size) {
            let detail = format!("token id {id} with a vocabulary of {}", spec.vocab_size);
            return Err(Error::new(Rule::ModelValue, detail));
        }
        Ok(spec)
    }

    /// Reads and checks the `model.*` keys.
    fn from_meta(meta: &MetaView<'_>) -> Result<Self> {
        let keys = Keys(meta);
        let is_decoder = match keys.text("model.architecture")? {
            LLAMA => false,
            DECODER => true,
            other => return Err(unknown("model.architecture", other)),
        };
        let norm_kind = match keys.text("model.norm")? {
            "rmsnorm" => NormKind::Rms,
            "rmsnorm_plus_one" if is_decoder => NormKind::RmsPlusOne,
            "layernorm" if is_decoder => NormKind::Layer,
            other => return Err(unknown("model.norm", other)),
        };
        let activation = match keys.text("model.activation")? {
            "silu" => Activation::Silu,
            "relu" if is_decoder => Activation::Relu,
            "gelu" if is_decoder => Activation::Gelu,
            "gelu_tanh" if is_decoder => Activation::GeluTanh,
            other => return Err(unknown("model.activation", other)),
        };
        let rope_pairing = match keys.text("model.rope.pairing")? {
            "half" => RopePairing::Half,
            "interleaved" => RopePairing::Interleaved,
            other => return Err(unknown("model.rope.pairing", other)),
        };
        let rope_scaling = decoder::read_scaling(&keys, is_decoder)?;
        let spec = Self {
            vocab_size: keys.u64("model.vocab_size")?,
            hidden_size: keys.u64("model.hidden_size")?,
            intermediate_size: keys.u64("model.intermediate_size")?,
            layers: keys.u64("model.layers")?,
            heads: keys.u64("model.heads")?,
            kv_heads: keys.u64("model.kv_heads")?,
            head_dim: keys.u64("model.head_dim")?,
            context_length: keys.u64("model.context_length")?,
            norm_kind,
            norm_eps: keys.f64("model.norm_eps")?,
            rope_theta: keys.f64("model.rope.theta")?,
            rope_pairing,
            rope_scaling,
            tied_embeddings: keys.bool("model.tied_embeddings")?,
            activation,
            ..Self::default()
        };
        let spec = if is_decoder { decoder::read(&keys, spec)? } else { spec };
        spec.check()?;
        Ok(spec)
    }

    /// The value of `model.architecture` in a file: `llama`, which readers of revision 1.1 know, if the model
    /// computes as LLaMA does.
    #[must_use]
    pub fn architecture(&self) -> &'static str {
        if self.is_llama() { LLAMA } else { DECODER }
    }

    /// Writes the `model.*` keys of this model to `meta`.
    ///
    /// # Errors
    /// None for a spec that passes [`ModelSpec::check`].
    pub fn write_meta(&self, meta: &mut Meta) -> Result<()> {
        let text = |v: &str| Value::Text(v.to_owned());
        meta.set("model.architecture", text(self.architecture()))?;
        let norm = match self.norm_kind {
            NormKind::Rms => "rmsnorm",
            NormKind::RmsPlusOne => "rmsnorm_plus_one",
            NormKind::Layer => "layernorm",
        };
        meta.set("model.norm", text(norm))?;
        let activation = match self.activation {
            Activation::Silu => "silu",
            Activation::Relu => "relu",
            Activation::Gelu => "gelu",
            Activation::GeluTanh => "gelu_tanh",
        };
        meta.set("model.activation", text(activation))?;
        for (key, value) in [
            ("model.vocab_size", self.vocab_size),
            ("model.hidden_size", self.hidden_size),
            ("model.intermediate_size", self.intermediate_size),
            ("model.layers", self.layers),
            ("model.heads", self.heads),
            ("model.kv_heads", self.kv_heads),
            ("model.head_dim", self.head_dim),
            ("model.context_length", self.context_length),
        ] {
            meta.set(key, Value::U64(value))?;
        }
        meta.set("model.norm_eps", Value::F64(self.norm_eps))?;
        meta.set("model.rope.theta", Value::F64(self.rope_theta))?;
        meta.set("model.tied_embeddings", Value::Bool(self.tied_embeddings))?;
        let pairing = match self.rope_pairing {
            RopePairing::Half => "half",
            RopePairing::Interleaved => "interleaved",
        };
        meta.set("model.rope.pairing", text(pairing))?;
        decoder::write_scaling(&self.rope_scaling, meta)?;
        if self.is_llama() { Ok(()) } else { decoder::write(self, meta) }
    }

    /// STB-R-063: the file has exactly the tensors of the model, in any order.
    fn check_tensors(&self, file: &File<'_>) -> Result<()> {
        let stored: std::collections::HashMap<&str, &[u64]> =
            file.tensors().iter().map(|t| (t.name(), t.shape())).collect();
        let mut expected = 0u64;
        for TensorSpec { name, shape, .. } in self.tensors() {
            expected = expected.saturating_add(1);
            let found = stored.get(name.as_str());
            if found != Some(&shape.as_slice()) {
                let detail = match found {
                    Some(found) => format!("shape {found:?}, the model keys give {shape:?}"),
                    None => format!("missing, the model keys give it shape {shape:?}"),
                };
                return Err(Error::new(Rule::ModelTensor, detail).in_tensor(&name));
            }
        }
        if expected != len_u64(stored.len()) {
            let names: std::collections::HashSet<String> = self.tensors().map(|t| t.name).collect();
            let extra = stored.keys().find(|name| !names.contains(**name)).copied().unwrap_or("");
            return Err(Error::new(Rule::ModelTensor, "not part of the model").in_tensor(extra));
        }
        Ok(())
    }
}
