//! Model cards: what they say, and that metadata from strangers cannot become markup. Man pages.

use std::path::{Path, PathBuf};

use stb_format::encoding::Dense;
use stb_format::{Figure, File, Meta, MetaPatch, Quality, QualityFigures, Value};
use stb_tests::paths::root;
use stb_tests::programs::{convert, run};
use stb_tests::tiny;
use tempfile::TempDir;

use super::{folder, text};

const RECIPE: &str =
    "name = \"int4\"\ndescription = \"4-bit integers\"\n\n[linear]\nmethod = \"int\"\nbits = 4\n";

/// The model of the test vectors with these metadata beside its own.
fn file(
    folder: &TempDir,
    name: &str,
    quality: Option<&Quality>,
    texts: &[(&str, &str)],
) -> PathBuf {
    let mut bytes = std::fs::read(root().join("spec/vectors/valid/model.stb")).unwrap();
    let file = File::open(&bytes).unwrap();
    let mut meta = Meta::new();
    for (key, value) in file.meta().iter() {
        meta.set(key, value.to_value()).unwrap();
    }
    if let Some(quality) = quality {
        quality.write(&mut meta).unwrap();
    }
    for (key, value) in texts {
        meta.set(key, Value::Text((*value).to_owned())).unwrap();
    }
    let patch = MetaPatch::new(&file, &meta).unwrap().unwrap();
    bytes.truncate(usize::try_from(patch.offset).unwrap());
    bytes.extend(&patch.meta);
    bytes[..patch.head.len()].copy_from_slice(&patch.head);
    let path = folder.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

fn measured(text: &str) -> Quality {
    let figure = |value, error| Figure { value, error: Some(error) };
    Quality::measured(QualityFigures {
        kl: figure(0.1387, 0.0093),
        top1: figure(0.7581, 0.0184),
        perplexity: figure(44.14, 6.485),
        source_perplexity: figure(39.5, 5.626),
        tokens: 4088,
        windows: 8,
        text: text.to_owned(),
    })
}

fn card(path: &Path, options: &[&str]) -> String {
    run("stb-convert", &[&["card", text(path)], options].concat()).success()
}

/// The golden file is accepted with `STB_BLESS=1`, as help texts are.
#[test]
fn a_card_says_what_the_metadata_say() {
    let folder = folder();
    let digest = "6eea7d32fc18cba094189707527a5ce32a40186ab4896fc6546f047c35b3449a";
    let sources = format!("model.safetensors 538092760 sha256:{digest}");
    let built_in = format!("built-in sha256:{digest}");
    let calibration = format!("{built_in}, 128 windows of 256 tokens, seed 0");
    let config = tiny::config().to_string();
    let texts = [
        ("provenance.converter", "stb-convert 0.1.0"),
        ("provenance.recipe", RECIPE),
        ("provenance.sources", &sources),
        ("provenance.calibration", &calibration),
        ("provenance.license", "Apache-2.0"),
        ("source.config.json", &config),
        ("tokenizer.chat_template", "{{ messages }}"),
    ];
    let model = file(&folder, "tiny-int4.stb", Some(&measured(&built_in)), &texts);
    let found = card(&model, &["--base-model", "org/tiny-1.0"]);
    let path = root().join("tests/golden/card.md");
    if std::env::var_os("STB_BLESS").is_some() {
        std::fs::write(&path, &found).unwrap();
    }
    assert_eq!(found, std::fs::read_to_string(&path).unwrap_or_default());

    let out = folder.path().join("README.md");
    let write = ["card", text(&model), "--base-model", "org/tiny-1.0", "-o", text(&out)];
    assert_eq!(run("stb-convert", &write).success(), "");
    assert_eq!(std::fs::read_to_string(&out).unwrap(), found);
    let error = run("stb-convert", &write).failure(2);
    assert!(error.contains("README.md exists; --force replaces it"), "{error}");
    let _ = run("stb-convert", &[&write[..], &["--force"]].concat()).success();
    // What the user says replaces what the file says.
    assert!(card(&model, &["--license", "MIT"]).starts_with("---\nlicense: mit\nlibrary_name"));
}

#[test]
fn what_is_unknown_is_called_unknown() {
    let folder = folder();
    let silent = card(&file(&folder, "a b.stb", None, &[]), &[]);
    assert!(silent.starts_with("---\nlicense: unknown\nlibrary_name: stb\n"), "{silent}");
    for line in [
        "| original model | not stated |",
        "| recipe | not stated |",
        "Not measured: the file says nothing of its quality.",
        "- Source files: not stated",
    ] {
        assert!(silent.lines().any(|l| l == line), "{line}: {silent}");
    }
    assert!(silent.contains("License of the weights: unknown"), "{silent}");
    // A name that a shell would split.
    assert!(silent.contains("stb-run model.stb "), "{silent}");
    let unchecked = card(&file(&folder, "b.stb", Some(&Quality::unchecked()), &[]), &[]);
    assert!(unchecked.contains("Not measured: KL divergence"), "{unchecked}");

    let model = folder.path().join("b.stb");
    let error = run("stb-convert", &["card", text(&model), "--base-model", "a b/c"]).failure(2);
    assert!(error.contains("owner/name"), "{error}");
    let tensors = root().join("spec/vectors/valid/dense.stb");
    let error = run("stb-convert", &["card", text(&tensors)]).failure(5);
    assert!(error.contains("not a model"), "{error}");
}

/// The lines of `card` without blocks of code, and without code within lines.
fn outside_of_code(card: &str) -> Vec<String> {
    let mut fence: Option<&str> = None;
    let mut lines = Vec::new();
    for line in card.lines() {
        match fence {
            // Only a fence of the same length or longer ends a block.
            Some(open) => fence = Some(open).filter(|open| !line.starts_with(open)),
            None if line.starts_with("```") => fence = Some(line.trim_end_matches(|c| c != '`')),
            None => {
                assert_eq!(line.matches('`').count() % 2, 0, "{line}");
                lines.push(line.split('`').step_by(2).collect());
            }
        }
    }
    assert_eq!(fence, None, "a block does not end");
    lines
}

#[test]
fn metadata_cannot_become_markup() {
    let folder = folder();
    let evil = "EVIL\n---\nlicense: mit\n\n# EVIL\n```\n~~~\n</td>`<script>EVIL</script>` | [EVIL](x) ![EVIL](y)\n\
                \u{202e}\u{1b}[31m\u{2028}&lt;\r\r\n    ````\n";
    let long = evil.repeat(3000);
    let recipe =
        format!("name = {}\n# {}\n```\n````\n`````\n# EVIL\n", serde_json::json!(evil), "x");
    let recipe_of_comments = format!("# {}", evil.replace('\n', "\n# "));
    for evil in [evil, &long, &recipe, &recipe_of_comments] {
        let keys = [
            "provenance.converter",
            "provenance.recipe",
            "provenance.sources",
            "provenance.calibration",
            "provenance.license",
            "source.config.json",
            "tokenizer.chat_template",
        ];
        let texts = keys.map(|key| (key, evil));
        let model = file(&folder, "<b>`EVIL`|[x].stb", Some(&measured(evil)), &texts);
        let found = card(&model, &[]);
        assert!(found.len() < 40_000, "{} bytes", found.len());
        let (front, body) = found.strip_prefix("---\n").unwrap().split_once("\n---\n").unwrap();
        let (license, rest) = front.split_once('\n').unwrap();
        assert_eq!(license, "license: other");
        let (name, rest) = rest.split_once('\n').unwrap();
        let name = name.strip_prefix("license_name: ").unwrap();
        let name: String = serde_json::from_str(name).unwrap();
        assert!(name.starts_with("EVIL") || name.starts_with("name =") || name.starts_with('#'));
        assert_eq!(
            rest,
            "library_name: stb\npipeline_tag: text-generation\ntags:\n- stb\n- quantized\n- conversational"
        );
        assert!(found.chars().all(|c| c == '\n' || !c.is_control()), "{found:?}");
        assert!(!found.contains(['\u{202e}', '\u{2028}']), "{found:?}");
        let lines = outside_of_code(body);
        let title = r"# \<b\>\`EVIL\`\|\[x\]";
        assert!(body.contains(title), "{body}");
        let headings: Vec<_> = lines.iter().filter(|line| line.starts_with("## ")).collect();
        assert_eq!(headings.len(), 4, "{headings:?}");
        for line in lines.iter().filter(|line| !line.starts_with(r"# \<b\>")) {
            assert!(!line.contains("EVIL") && !line.contains('<'), "{line}");
            assert!(!line.starts_with("# ") && !line.starts_with("---"), "{line}");
        }
        // Bars make cells: none comes from the file.
        for row in lines.iter().filter(|line| line.starts_with('|')) {
            assert!([3, 4].contains(&row.matches('|').count()), "{row}");
        }
    }
}

/// The pages do not depend on the machine that writes them.
#[test]
fn man_pages_and_completions_know_every_command() {
    for (program, commands) in [
        ("stb-run", &["serve", "perplexity", "zero-shot", "bench", "completions", "man"][..]),
        (
            "stb-convert",
            &[
                "inspect",
                "verify",
                "export",
                "card",
                "recipes",
                "study",
                "flips",
                "completions",
                "man",
            ],
        ),
    ] {
        let folder = folder();
        let _ = run(program, &["man", text(folder.path())]).success();
        let page = |name: &str| std::fs::read_to_string(folder.path().join(name)).unwrap();
        let title = format!(".TH {program} 1  \"{program} {}\"", env!("CARGO_PKG_VERSION"));
        let main = page(&format!("{program}.1"));
        assert!(main.lines().any(|line| line.trim_end() == title), "{main}");
        for command in commands {
            assert!(main.contains(&command.replace('-', r"\-")), "{command}: {main}");
            let own = page(&format!("{program}-{command}.1"));
            assert!(own.contains(".SH SYNOPSIS"), "{own}");
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), commands.len() + 1);
        for shell in ["bash", "zsh", "fish"] {
            let script = run(program, &["completions", shell]).success();
            for command in commands {
                assert!(script.contains(command), "{shell}: {command}");
            }
        }
        let error = run(program, &["man", text(&folder.path().join("missing"))]).failure(3);
        assert!(error.contains("missing"), "{error}");
    }
}

/// The license of the card beside the weights reaches the card of the file.
#[test]
fn the_license_of_the_checkpoint_is_kept() {
    let folder = folder();
    let source = folder.path().join("model");
    tiny::write(&source, &tiny::config(), Dense::F16, |_, _| {});
    std::fs::write(source.join("README.md"), "---\nlicense: llama3.2\n---\n# A model\n").unwrap();
    let file = folder.path().join("model.stb");
    convert(&source, &file, &["--recipe", "source"]);
    let inspected = run("stb-convert", &["inspect", text(&file)]).success();
    assert!(inspected.contains("LicenseRef-llama3.2"), "{inspected}");
    assert!(card(&file, &[]).starts_with("---\nlicense: llama3.2\n"));
}
