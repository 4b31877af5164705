//! The same answers on every instruction set and with any number of threads.

use std::path::Path;

use stb_tests::paths::quill;
use stb_tests::programs::{Run, command, convert, note, run};

/// The instruction sets of this machine, as `stb-run --version` lists them.
fn isas() -> Vec<String> {
    let version = run("stb-run", &["--version"]).success();
    let (_, list) = version.split_once("instruction sets here: ").unwrap();
    list.trim().trim_end_matches(')').split(", ").map(str::to_owned).collect()
}

fn greedy(file: &Path, isa: &str, more: &[&str]) -> String {
    let options = ["--temp", "0", "-n", "200", "--ignore-eos", "--no-template", "--quiet"];
    // The prompt is long enough for GEMM.
    let prompt = "Once upon a time there was a little dog who lived in a big house near the lake. He \
                  liked to play with his friends, and one day";
    let mut command = command("stb-run", &options);
    command.arg(file).args(["--prompt", prompt]).args(more).env("STB_ISA", isa);
    Run::from(command.output().unwrap()).success()
}

#[test]
fn greedy_answers_are_the_same_everywhere() {
    let isas = isas();
    note(&format!("instruction sets: {}", isas.join(", ")));
    let folder = tempfile::tempdir().unwrap();
    for recipe in ["nm-2of4", "nm-1of8", "stbllm-6of8", "int4"] {
        let file = folder.path().join(format!("{recipe}.stb"));
        let calibration = ["--recipe", recipe, "--calib-samples", "8"];
        convert(&quill(), &file, &calibration);
        for cache in [&["--kv", "q8"][..], &["--kv", "f16"], &["--exact"]] {
            let expected = greedy(&file, "", &[cache, &["-t", "1"]].concat());
            assert!(expected.len() > 200, "{recipe} {cache:?}: {expected}");
            for isa in &isas {
                // The portable code is slow, so it is tested with one kind of cache.
                if isa == "scalar" && cache[0] != "--kv" {
                    continue;
                }
                let found = greedy(&file, isa, &[cache, &["-t", "3"]].concat());
                assert_eq!(found, expected, "{recipe} {cache:?} {isa}");
            }
        }
    }
}
