//! Pages of the specification that are generated from code and vectors.

use serde_json::{Value, json};
use stb_format::{Class, Rule};

use super::vector::hex;

/// The registry for programs.
#[must_use]
pub fn registry() -> Value {
    let rule = |rule: &Rule| {
        json!({
            "id": rule.id(),
            "title": rule.title(),
            "kind": match rule.class() {
                Class::Invalid => "invalid",
                Class::Unsupported => "unsupported",
            },
        })
    };
    json!({
        "format_version": stb_format::VERSION,
        "magic": hex(&stb_format::MAGIC),
        "section_types": [
            { "id": 1, "name": "DATA" },
            { "id": 2, "name": "TENSORS" },
            { "id": 3, "name": "META" },
            { "id": 16, "name": "strong digest", "status": "reserved" },
            { "id": 17, "name": "signature", "status": "reserved" },
            { "from": 0x8000_0000u32, "to": 0xffff_ffffu32, "name": "private use" },
        ],
        "encodings": [
            { "id": 1, "name": "f32" },
            { "id": 2, "name": "f16" },
            { "id": 3, "name": "bf16" },
            { "id": 16, "name": "int group" },
            { "id": 17, "name": "odd group" },
            { "id": 32, "name": "stbllm" },
            { "id": 48, "name": "nm" },
            { "id": 64, "name": "mixed rows" },
            { "id": 80, "name": "trellis" },
            { "from": 0x8000_0000u32, "to": 0xffff_ffffu32, "name": "private use" },
        ],
        "value_types": [
            { "id": 1, "name": "text" },
            { "id": 2, "name": "u64" },
            { "id": 3, "name": "f64" },
            { "id": 4, "name": "bool" },
            { "id": 5, "name": "u64 list" },
            { "id": 6, "name": "deflated text", "min_reader": 2 },
        ],
        "keys": keys(),
        "private_key_prefix": "x.",
        "architectures": ["llama", "decoder"],
        "norms": ["rmsnorm", "rmsnorm_plus_one", "layernorm"],
        "norm_placements": ["pre", "post", "sandwich"],
        "qk_norms": ["none", "head", "full"],
        "activations": ["silu", "relu", "gelu", "gelu_tanh"],
        "mlps": ["gated", "plain"],
        "positions": ["rope", "learned"],
        "rope_pairings": ["half", "interleaved"],
        "rope_scalings": ["none", "linear", "llama3", "dynamic", "yarn", "longrope"],
        "limits": {
            "sections": stb_format::MAX_SECTIONS,
            "tensors": stb_format::MAX_TENSORS,
            "name_bytes": stb_format::MAX_NAME_BYTES,
            "dimensions": stb_format::MAX_DIMS,
            "dimension": stb_format::MAX_DIM,
            "elements": stb_format::MAX_ELEMENTS,
            "metadata_entries": stb_format::MAX_META_ENTRIES,
            "metadata_value_bytes": stb_format::MAX_META_VALUE_BYTES,
            "inflated_bytes": stb_format::MAX_INFLATED_BYTES,
        },
        "rules": Rule::ALL.iter().map(rule).collect::<Vec<_>>(),
    })
}

/// The metadata keys, from the tables of the text itself.
fn keys() -> Vec<Value> {
    let types = ["text", "u64", "f64", "bool", "u64 list"];
    let mut keys = Vec::new();
    for line in include_str!("../../../spec/metadata.md").lines() {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let [_, names, kind, ..] = cells[..] else { continue };
        if types.contains(&kind) && names.contains('.') {
            keys.extend(names.split(", ").map(|name| json!({ "key": name, "type": kind })));
        }
    }
    keys
}

/// A field of the example: length, meaning.
type Field = (usize, &'static str);

const HEADER: &[Field] = &[
    (8, "magic"),
    (2, "min_reader 1"),
    (2, "written 2"),
    (4, "header_size 64"),
    (8, "file_size"),
    (4, "section_count 3"),
    (4, "section_entry_size 48"),
    (8, "flags"),
    (24, "reserved"),
];

const SECTION: &[Field] = &[
    (4, "type"),
    (4, "flags: critical"),
    (8, "offset"),
    (8, "length"),
    (8, "checksum"),
    (16, "reserved"),
];

const TABLE: &[Field] = &[
    (4, "count 1"),
    (4, "entry_size 96"),
    (8, "names_length 1"),
    (4, "name_offset 0"),
    (2, "name_length 1"),
    (1, "ndim 1"),
    (1, "reserved"),
    (4, "encoding 1: f32"),
    (4, "reserved"),
    (16, "params"),
    (32, "dims: [1]"),
    (8, "offset 0 in DATA"),
    (8, "length 4"),
    (8, "checksum of the payload"),
    (8, "reserved"),
    (1, "the name \"w\""),
];

/// The annotated dump of the smallest valid file.
#[must_use]
pub fn example_page(bytes: &[u8]) -> String {
    let mut page = format!(
        "# The smallest valid file\n\n\
         `vectors/valid/smallest.stb`, {} bytes: one tensor called `w` with the single weight 1.0, and \
         no metadata.\nBytes that are not shown are zero. This page is made from that file by a \
         program.\n\n",
        bytes.len()
    );
    let mut at = 0;
    let mut part = |title: &str, start: usize, fields: &[Field]| {
        page.push_str(&format!("## {title}\n\n```\n"));
        at = start;
        for (length, meaning) in fields {
            page.push_str(&line(bytes, at, *length, meaning));
            at += length;
        }
        page.push_str("```\n\n");
    };
    part("Header", 0, HEADER);
    part("Directory: DATA", 64, SECTION);
    part("Directory: TENSORS", 112, SECTION);
    part("Directory: META", 160, SECTION);
    part("End of the head", 4088, &[(8, "XXH3-64 of bytes 0..4088")]);
    part("DATA", 4096, &[(4, "1.0 as f32")]);
    part("TENSORS", 8192, TABLE);
    part("META", 12288, &[(4, "count 0"), (4, "reserved")]);
    page.truncate(page.trim_end().len());
    page.push('\n');
    page
}

/// Offset, bytes, meaning; long fields are wrapped.
fn line(bytes: &[u8], at: usize, length: usize, meaning: &str) -> String {
    let mut out = String::new();
    for (i, chunk) in bytes[at..at + length].chunks(8).enumerate() {
        let hex: Vec<String> = chunk.iter().map(|b| format!("{b:02x}")).collect();
        let meaning = if i == 0 { meaning } else { "" };
        let text = format!("{:>6}  {:<23}  {meaning}", at + 8 * i, hex.join(" "));
        out.push_str(text.trim_end());
        out.push('\n');
    }
    out
}
