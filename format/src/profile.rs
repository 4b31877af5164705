//! The model profile (spec, metadata §2): conversion between the `model.*` metadata keys and
//! [`ModelSpec`], and a check of the tensors.

use crate::arch::{Activation, Architecture, ModelSpec, RopePairing, RopeScaling, TensorSpec};
use crate::error::{Error, Result, Rule};
use crate::meta::{Meta, MetaView, Value, ValueRef};
use crate::num::len_u64;
use crate::reader::File;

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
        let known = |key: &str, allowed: &str| {
            let found = keys.text(key)?;
            if found == allowed { Ok(()) } else { Err(unknown(key, found)) }
        };
        let name = keys.text("model.architecture")?;
        let architecture = Architecture::by_name(name);
        let architecture = architecture.ok_or_else(|| unknown("model.architecture", name))?;
        known("model.norm", "rmsnorm")?;
        known("model.activation", "silu")?;
        let rope_pairing = match keys.text("model.rope.pairing")? {
            "half" => RopePairing::Half,
            "interleaved" => RopePairing::Interleaved,
            other => return Err(unknown("model.rope.pairing", other)),
        };
        let factor = || keys.f64("model.rope.factor");
        let rope_scaling = match keys.text("model.rope.scaling")? {
            "none" => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor: factor()? },
            "llama3" => RopeScaling::Llama3 {
                factor: factor()?,
                low_freq_factor: keys.f64("model.rope.low_freq_factor")?,
                high_freq_factor: keys.f64("model.rope.high_freq_factor")?,
                original_context: keys.u64("model.rope.original_context")?,
            },
            other => return Err(unknown("model.rope.scaling", other)),
        };
        let spec = Self {
            architecture,
            vocab_size: keys.u64("model.vocab_size")?,
            hidden_size: keys.u64("model.hidden_size")?,
            intermediate_size: keys.u64("model.intermediate_size")?,
            layers: keys.u64("model.layers")?,
            heads: keys.u64("model.heads")?,
            kv_heads: keys.u64("model.kv_heads")?,
            head_dim: keys.u64("model.head_dim")?,
            context_length: keys.u64("model.context_length")?,
            norm_eps: keys.f64("model.norm_eps")?,
            rope_theta: keys.f64("model.rope.theta")?,
            rope_pairing,
            rope_scaling,
            tied_embeddings: keys.bool("model.tied_embeddings")?,
            activation: Activation::Silu,
        };
        spec.check()?;
        Ok(spec)
    }

    /// Writes the `model.*` keys of this model to `meta`.
    ///
    /// # Errors
    /// None for a spec that passes [`ModelSpec::check`].
    pub fn write_meta(&self, meta: &mut Meta) -> Result<()> {
        let text = |v: &str| Value::Text(v.to_owned());
        meta.set("model.architecture", text(self.architecture.name()))?;
        meta.set("model.norm", text("rmsnorm"))?;
        meta.set("model.activation", text("silu"))?;
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
        match self.rope_scaling {
            RopeScaling::None => meta.set("model.rope.scaling", text("none")),
            RopeScaling::Linear { factor } => {
                meta.set("model.rope.factor", Value::F64(factor))?;
                meta.set("model.rope.scaling", text("linear"))
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                meta.set("model.rope.factor", Value::F64(factor))?;
                meta.set("model.rope.low_freq_factor", Value::F64(low_freq_factor))?;
                meta.set("model.rope.high_freq_factor", Value::F64(high_freq_factor))?;
                meta.set("model.rope.original_context", Value::U64(original_context))?;
                meta.set("model.rope.scaling", text("llama3"))
            }
        }
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

fn unknown(key: &str, value: &str) -> Error {
    Error::new(
        Rule::ModelArchitecture,
        format!("{key} is {value:?}, which this reader does not support"),
    )
}

/// Typed access to required keys (STB-R-060).
struct Keys<'m, 'a>(&'m MetaView<'a>);

impl<'a> Keys<'_, 'a> {
    fn required(&self, key: &str, kind: &str) -> Result<ValueRef<'a>> {
        self.0.get(key).ok_or_else(|| {
            Error::new(Rule::ModelKey, format!("key {key} is missing, {kind} expected"))
        })
    }

    fn wrong<T>(key: &str, kind: &str) -> Result<T> {
        Err(Error::new(Rule::ModelKey, format!("key {key} does not hold {kind}")))
    }

    fn text(&self, key: &str) -> Result<&'a str> {
        match self.required(key, "text")? {
            ValueRef::Text(v) => Ok(v),
            _ => Self::wrong(key, "text"),
        }
    }

    fn u64(&self, key: &str) -> Result<u64> {
        match self.required(key, "an integer")? {
            ValueRef::U64(v) => Ok(v),
            _ => Self::wrong(key, "an integer"),
        }
    }

    fn f64(&self, key: &str) -> Result<f64> {
        match self.required(key, "a number")? {
            ValueRef::F64(v) => Ok(v),
            _ => Self::wrong(key, "a number"),
        }
    }

    fn bool(&self, key: &str) -> Result<bool> {
        match self.required(key, "a truth value")? {
            ValueRef::Bool(v) => Ok(v),
            _ => Self::wrong(key, "a truth value"),
        }
    }

    fn list(&self, key: &str) -> Result<Vec<u64>> {
        match self.required(key, "a list of integers")?.to_value() {
            Value::U64List(v) => Ok(v),
            _ => Self::wrong(key, "a list of integers"),
        }
    }
}
