//! The test vectors of the specification: files that readers must accept, and files that they must refuse by a
//! certain rule.

pub(crate) mod content;
mod decoders;
mod documents;
mod invalid;
mod patch;
mod valid;
mod vector;

use std::path::Path;

use serde_json::{Value as Json, json};
use sha2::{Digest, Sha256};
use stb_format::{File, ModelSpec, Rule, ValueRef};

pub use documents::{example_page, registry};
pub use invalid::invalid;
pub use valid::valid;
pub use vector::Vector;
use vector::hex;

/// All generated files under `spec/`, with their contents.
#[must_use]
pub fn generated() -> Vec<(String, Vec<u8>)> {
    let (valid, invalid) = (valid(), invalid());
    let manifest = json!({
        "valid": valid.iter().map(expected).collect::<Vec<_>>(),
        "invalid": invalid.iter().map(refused).collect::<Vec<_>>(),
    });
    let mut files = vec![
        ("vectors/manifest.json".to_owned(), pretty(&manifest)),
        ("registry.json".to_owned(), pretty(&registry())),
        ("example.md".to_owned(), example_page(&valid[0].bytes).into_bytes()),
    ];
    files.extend(valid.into_iter().map(|v| (format!("vectors/valid/{}", v.name), v.bytes)));
    files.extend(invalid.into_iter().map(|v| (format!("vectors/invalid/{}", v.name), v.bytes)));
    files
}

/// JSON with sorted keys, so that the text depends on its content alone.
fn pretty(json: &Json) -> Vec<u8> {
    let mut sorted = json.clone();
    sorted.sort_all_objects();
    let mut text = serde_json::to_string_pretty(&sorted).expect("JSON of plain values");
    text.push('\n');
    text.into_bytes()
}

/// The decoded content of a valid file.
fn expected(vector: &Vector) -> Json {
    let file = File::open(&vector.bytes).unwrap_or_else(|e| panic!("{}: {e}", vector.name));
    file.verify().unwrap_or_else(|e| panic!("{}: {e}", vector.name));
    let tensor = |t: &stb_format::Tensor<'_>| match t.decode() {
        Ok(values) => {
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            json!({
                "name": t.name(),
                "shape": t.shape(),
                "encoding": t.encoding().id(),
                "sha256_f32_le": hex(&Sha256::digest(&bytes)),
            })
        }
        Err(e) => json!({
            "name": t.name(),
            "shape": t.shape(),
            "encoding": t.encoding().id(),
            "error": e.rule().id(),
        }),
    };
    let model = file.meta().get("model.architecture").is_some();
    if model {
        ModelSpec::from_file(&file).unwrap_or_else(|e| panic!("{}: {e}", vector.name));
    }
    json!({
        "file": format!("valid/{}", vector.name),
        "about": vector.about,
        "model": model,
        "parameters": file.parameters(),
        "metadata": file.meta().iter().map(|(k, v)| (k.to_owned(), value(v))).collect::<serde_json::Map<_, _>>(),
        "tensors": file.tensors().iter().map(tensor).collect::<Vec<_>>(),
    })
}

/// A metadata value; numbers as text where JSON would round them.
fn value(value: ValueRef<'_>) -> Json {
    match value {
        ValueRef::Text(v) => json!({ "text": v }),
        ValueRef::U64(v) => json!({ "u64": v.to_string() }),
        ValueRef::F64(v) => json!({ "f64_bits": format!("{:016x}", v.to_bits()) }),
        ValueRef::Bool(v) => json!({ "bool": v }),
        ValueRef::U64List(v) => {
            let items = v.iter().map(|b| u64::from_le_bytes(*b).to_string());
            json!({ "u64_list": items.collect::<Vec<_>>() })
        }
    }
}

fn refused(vector: &Vector) -> Json {
    json!({
        "file": format!("invalid/{}", vector.name),
        "about": vector.about,
        "rule": vector.rule.map(Rule::id),
    })
}

/// The rule by which this crate refuses a file at the level *run*; `None` if it accepts it.
#[must_use]
pub fn verdict(bytes: &[u8]) -> Option<Rule> {
    let check = || {
        let file = File::open(bytes)?;
        file.verify()?;
        if file.meta().get("model.architecture").is_some() {
            ModelSpec::from_file(&file)?;
        }
        Ok::<(), stb_format::Error>(())
    };
    check().err().map(|e| e.rule())
}

/// Writes all generated files below `spec`, replacing earlier ones.
///
/// # Errors
/// Errors of the file system.
pub fn write(spec: &Path) -> std::io::Result<()> {
    for folder in ["vectors/valid", "vectors/invalid"] {
        let folder = spec.join(folder);
        if folder.exists() {
            std::fs::remove_dir_all(&folder)?;
        }
        std::fs::create_dir_all(&folder)?;
    }
    for (name, bytes) in generated() {
        std::fs::write(spec.join(name), bytes)?;
    }
    Ok(())
}
