//! Subcommands for existing files and recipes: inspect, verify, export, card, recipes; and man pages.

use std::path::Path;

use clap::CommandFactory;
use stb_convert::card::{CardOptions, model_card};
use stb_convert::export::source_type;
use stb_convert::inspect::inspect as describe;
use stb_convert::output::refuse_existing;
use stb_convert::recipe::{FOR_USE, PRESETS};
use stb_convert::verify::verify_file;
use stb_format::encoding::Dense;
use stb_runtime::{Bytes, Error, open_stb_file};

use super::args::{CardArgs, Cli, Dtype};
use super::output::{note, print};

pub(super) fn inspect(path: &Path, json: bool) -> anyhow::Result<()> {
    let bytes = Bytes::open(path, true)?;
    let file = open_stb_file(path, &bytes)?;
    let inspection = describe(&file);
    if json {
        print(serde_json::to_string_pretty(&inspection)?)?;
    } else {
        print(inspection.table().trim_end())?;
    }
    Ok(())
}

pub(super) fn verify(path: &Path, json: bool) -> anyhow::Result<()> {
    let found = match verify_file(path) {
        Ok(found) => found,
        Err(error) => {
            if json {
                let rule = match &error {
                    Error::Format { error, .. } => Some(error.rule().id()),
                    _ => None,
                };
                print(serde_json::json!({
                    "valid": false, "rule": rule, "error": error.to_string(),
                }))?;
            }
            return Err(error.into());
        }
    };
    if json {
        return Ok(print(serde_json::to_string(&found)?)?);
    }
    let note = match found.unknown_encodings {
        0 => String::new(),
        n => format!(
            "; {n} have an encoding of a newer version, of which only the checksum was checked"
        ),
    };
    let kind =
        if found.model { "a valid model" } else { "valid, but not a model: a set of tensors" };
    let tensors = found.tensors;
    print(format_args!(
        "{}: {kind}, {tensors} tensors match their checksums{note}",
        path.display()
    ))?;
    Ok(())
}

/// Endings of files that are no folders.
const FILE_ENDINGS: [&str; 4] = ["gguf", "safetensors", "stb", "bin"];

pub(super) fn export(path: &Path, folder: &Path, dtype: Option<Dtype>) -> anyhow::Result<()> {
    if folder.extension().is_some_and(|e| FILE_ENDINGS.iter().any(|ending| e == *ending)) {
        return Err(Error::usage(format!(
            "export writes a folder with safetensors files, not the file {}: give the folder a name without this \
             ending. For a GGUF file, run llama.cpp's convert_hf_to_gguf.py on the folder",
            folder.display()
        ))
        .into());
    }
    let bytes = Bytes::open(path, true)?;
    let file = open_stb_file(path, &bytes)?;
    for tensor in file.tensors() {
        tensor
            .verify_checksum()
            .and_then(|()| tensor.verify_payload())
            .map_err(|e| Error::format(path, e))?;
    }
    let kind = match dtype {
        None => source_type(&file),
        Some(Dtype::F32) => Dense::F32,
        Some(Dtype::F16) => Dense::F16,
        Some(Dtype::Bf16) => Dense::Bf16,
    };
    let elements: u64 = file.tensors().iter().map(|t| t.shape().iter().product::<u64>()).sum();
    note(format_args!(
        "writing {:.1} MB of {kind} weights to {}",
        (elements * kind.bytes()) as f64 / 1e6,
        folder.display()
    ));
    stb_convert::export::export(&file, path, folder, kind)?;
    print(format_args!("{}: {} tensors", folder.display(), file.tensors().len()))?;
    Ok(())
}

pub(super) fn card(args: CardArgs) -> anyhow::Result<()> {
    if let Some(output) = &args.output {
        refuse_existing(output, args.force)?;
    }
    let bytes = Bytes::open(&args.file, true)?;
    let file = open_stb_file(&args.file, &bytes)?;
    let options = CardOptions { base_model: args.base_model, license: args.license };
    let card = model_card(&file, &args.file, &options)?;
    let Some(output) = &args.output else { return Ok(print(card.trim_end())?) };
    std::fs::write(output, card).map_err(|e| Error::io(output, e))?;
    note(format_args!("{}: written; read it before you publish it", output.display()));
    Ok(())
}

pub(super) fn man(folder: &Path) -> anyhow::Result<()> {
    clap_mangen::generate_to(Cli::command(), folder).map_err(|e| Error::io(folder, e))?;
    Ok(())
}

pub(super) fn recipes(name: Option<&str>) -> anyhow::Result<()> {
    if let Some(name) = name {
        return match PRESETS.iter().find(|(preset, _)| *preset == name) {
            Some((_, text)) => Ok(print(text.trim_end())?),
            None => Err(stb_convert::Recipe::load(name).err().map_or_else(
                || anyhow::anyhow!("{name} is a file, not a recipe of the program"),
                anyhow::Error::from,
            )),
        };
    }
    let is_for_use = |name: &str| FOR_USE.contains(&name);
    print("For use, with the stored bits per weight of the decoder's linear layers:")?;
    for (name, text) in PRESETS.iter().filter(|(name, _)| is_for_use(name)) {
        list_recipe(name, text)?;
    }
    print("\nFor comparison: published methods, and variants of them:")?;
    for (name, text) in PRESETS.iter().filter(|(name, _)| !is_for_use(name)) {
        list_recipe(name, text)?;
    }
    Ok(())
}

fn list_recipe(name: &str, text: &str) -> anyhow::Result<()> {
    let recipe = stb_convert::Recipe::parse(text)?;
    let mark = if name == stb_convert::recipe::DEFAULT { " (default)" } else { "" };
    let bits = match recipe.body_bits() {
        Some(bits) => format!("{bits:.3}"),
        None if recipe.linear.goal().is_some() => "chosen".into(),
        None => "as is".into(),
    };
    print(format_args!("  {name:<23} {bits:>6}  {}{mark}", recipe.description))?;
    Ok(())
}
