//! The specification, its vectors and this implementation agree.

use std::collections::BTreeSet;
use std::path::Path;

use stb_format::encoding::{
    Dense, Encoding, IntGroup, IntGroupParts, Nm, NmParts, Stbllm, StbllmParts, Trellis,
    TrellisParts,
};
use stb_format::half::f16;
use stb_format::{File, Rule};
use stb_tests::paths::root;
use stb_tests::vectors::{generated, invalid, valid, verdict};

fn spec() -> std::path::PathBuf {
    root().join("spec")
}

fn page(name: &str) -> String {
    std::fs::read_to_string(spec().join(name)).unwrap()
}

/// The generated files of `spec/` are up to date. Run `cargo run -p stb-tests --example make-vectors` after a
/// deliberate change.
#[test]
fn committed_files_are_the_generated_ones() {
    let mut names = BTreeSet::new();
    for (name, bytes) in generated() {
        let committed = std::fs::read(spec().join(&name)).unwrap_or_default();
        assert!(committed == bytes, "spec/{name} is not what make-vectors writes");
        names.insert(name);
    }
    for folder in ["vectors/valid", "vectors/invalid"] {
        for entry in std::fs::read_dir(spec().join(folder)).unwrap() {
            let name = format!("{folder}/{}", entry.unwrap().file_name().to_str().unwrap());
            assert!(names.contains(&name), "spec/{name} is not made by make-vectors");
        }
    }
}

#[test]
fn every_vector_gets_its_verdict() {
    for vector in valid().into_iter().chain(invalid()) {
        assert_eq!(verdict(&vector.bytes), vector.rule, "{}: {}", vector.name, vector.about);
    }
}

#[test]
fn every_rule_is_in_the_text_and_has_a_vector() {
    let text: String =
        ["README.md", "container.md", "metadata.md", "encodings.md"].map(page).concat();
    let broken: BTreeSet<_> = invalid().iter().filter_map(|v| v.rule).map(Rule::id).collect();
    for rule in Rule::ALL {
        // Reading a tensor of unknown encoding breaks this rule; its vector is a valid file.
        if *rule != Rule::EncodingUnknown {
            assert!(broken.contains(rule.id()), "{} has no invalid vector", rule.id());
            assert!(text.contains(&format!("**{}**", rule.id())), "{} is not defined", rule.id());
        }
        assert!(text.contains(rule.id()), "{} is not in the text", rule.id());
    }
    for id in text.split("STB-R-").skip(1).filter_map(|rest| rest.get(..3)) {
        if id.bytes().all(|b| b.is_ascii_digit()) {
            let id = format!("STB-R-{id}");
            assert!(Rule::ALL.iter().any(|r| r.id() == id), "the text has an unknown {id}");
        }
    }
}

#[test]
fn unknown_encodings_leave_the_rest_readable() {
    let bytes = std::fs::read(spec().join("vectors/valid/unknown-encoding.stb")).unwrap();
    let file = File::open(&bytes).unwrap();
    assert_eq!(file.tensor("strange").unwrap().decode().unwrap_err().rule(), Rule::EncodingUnknown);
    assert_eq!(file.tensor("after").unwrap().decode().unwrap(), [3.0, 4.0]);
}

/// The worked examples of encodings.md, computed by hand there and by the encoder here.
#[test]
fn worked_examples_are_right() {
    // Lines may break within an example.
    let text = page("encodings.md").split_whitespace().collect::<Vec<_>>().join(" ");
    let check = |encoding: Encoding,
                 shape: [u64; 2],
                 payload: &[u8],
                 parts: &[(usize, &str)],
                 weights: &[f32]| {
        let mut expected = vec![0u8; payload.len()];
        for (at, hex) in parts {
            assert!(text.contains(hex), "{encoding}: the text lacks {hex}");
            for (i, byte) in hex.split(' ').enumerate() {
                expected[at + i] = u8::from_str_radix(byte, 16).unwrap();
            }
        }
        assert_eq!(payload, expected, "{encoding}");
        encoding.check_payload(shape[0], shape[1], payload).unwrap();
        assert_eq!(
            encoding.view(shape[0], shape[1], payload).unwrap().decode(),
            weights,
            "{encoding}"
        );
    };
    let half = |values: &[f32]| values.iter().map(|v| f16::from_f32(*v)).collect::<Vec<_>>();

    let f16s = [1.0, -0.5, 65504.0];
    let dense = Encoding::Dense(Dense::F16);
    check(dense, [1, 3], &Dense::F16.encode(&f16s), &[(0, "00 3c 00 b8 ff 7b")], &f16s);

    let spec = IntGroup::new(4, 32).unwrap();
    let codes = vec![-8, 7, 0, 1, -1];
    let payload = IntGroupParts { spec, rows: 1, cols: 5, codes, scales: half(&[0.5]) }.pack();
    assert_eq!(payload.len(), 66);
    let parts = [(0, "00 0f 08 09 07"), (64, "00 38")];
    check(Encoding::IntGroup(spec), [1, 5], &payload, &parts, &[-4.0, 3.5, 0.0, 0.5, -0.5]);

    let spec = IntGroup::new(3, 32).unwrap();
    let codes = vec![-7, 7, 1, -1, 3];
    let payload = IntGroupParts { spec, rows: 1, cols: 5, codes, scales: half(&[0.5]) }.pack();
    assert_eq!(payload.len(), 66);
    let parts = [(0, "00 03 00 03 01 00 00 00"), (8, "02 01 01 00"), (64, "00 38")];
    check(Encoding::IntGroup(spec), [1, 5], &payload, &parts, &[-3.5, 3.5, 0.5, -0.5, 1.5]);

    let spec = Stbllm::new(4, 32).unwrap();
    let payload = StbllmParts {
        spec,
        rows: 1,
        cols: 8,
        salient: (0..8).map(|c| c == 2).collect(),
        states: vec![1, 0, 2, 3, 0, 2, 0, 0],
        negative: (0..8).map(|c| c == 0 || c == 5).collect(),
        scales: half(&[0.25, 0.5, 1.0, 0.75, 0.125]),
    }
    .pack();
    assert_eq!(payload.len(), 202);
    let parts = [
        (0, "04 00 00 00 00 00 00 00"),
        (64, "09 00 00 00 00 00 00 00 2c 00 00 00 00 00 00 00"),
        (128, "09 00 00 00"),
        (192, "00 34 00 38 00 3c 00 3a 00 30"),
    ];
    let weights = [-0.25, 0.0, 0.625, 1.0, 0.0, -0.5, 0.0, 0.0];
    check(Encoding::Stbllm(spec), [1, 8], &payload, &parts, &weights);

    let spec = Nm::new(2, 8, 4, 32, false).unwrap();
    let payload = NmParts {
        spec,
        rows: 1,
        cols: 16,
        col_factors: vec![],
        row_scales: half(&[2.0]),
        block_codes: vec![7],
        codes: vec![78, 91],
    }
    .pack();
    assert_eq!(payload.len(), 320);
    assert_eq!(spec.code((1, false), Some((6, true))), Some(78));
    assert_eq!(spec.code((3, true), None), Some(91));
    let parts =
        [(0, "00 40"), (64, "07"), (128, "0e"), (144, "0b"), (208, "01"), (256, "01"), (272, "01")];
    let mut weights = [0.0; 16];
    weights[1] = 1.0;
    weights[6] = -1.0;
    weights[11] = -1.0;
    check(Encoding::Nm(spec), [1, 16], &payload, &parts, &weights);

    let spec = Trellis::new(2, 1, 0, 0).unwrap();
    let entries = |first: u8| std::array::from_fn(|i| first + i as u8);
    let mut streams = vec![0; 16];
    streams[..2].copy_from_slice(&[0x1b, 0xe4]);
    let plain = TrellisParts {
        spec,
        rows: 1,
        cols: 4,
        tables: vec![[entries(0), entries(56)]],
        col_factors: vec![],
        row_scales: half(&[2.0]),
        block_codes: vec![],
        streams,
    };
    let payload = plain.pack();
    assert_eq!(payload.len(), 144);
    let tables = [
        (0, "00 01 02 03 04 05 06 07 08 09 0a 0b 0c 0d 0e 0f"),
        (16, "38 39 3a 3b 3c 3d 3e 3f 40 41 42 43 44 45 46 47"),
    ];
    let parts = [tables.as_slice(), &[(64, "00 40"), (128, "1b e4")]].concat();
    check(Encoding::Trellis(spec), [1, 4], &payload, &parts, &[26.0, 8.0, -4.0, 2.0]);

    let spec = spec.with_col_factors(true);
    let factors = half(&[1.0, 0.5, 1.0, 2.0]);
    let payload = TrellisParts { spec, col_factors: factors, ..plain }.pack();
    let rest = [(64, "00 3c 00 38 00 3c 00 40"), (128, "00 40"), (192, "1b e4")];
    let parts = [tables.as_slice(), &rest].concat();
    check(Encoding::Trellis(spec), [1, 4], &payload, &parts, &[26.0, 4.0, -4.0, 4.0]);
}

/// The check values of checksum.md equal those of the library.
#[test]
fn checksum_page_is_right() {
    let mut rows = 0;
    for line in page("checksum.md").lines() {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let [_, n, sum, _] = cells.as_slice() else { continue };
        let Ok(n) = n.parse::<usize>() else { continue };
        let input: Vec<u8> = (0..n).map(|i| (i * 37 + 11) as u8).collect();
        assert_eq!(*sum, format!("`{:016x}`", stb_format::checksum(&input)), "{n} bytes");
        rows += 1;
    }
    assert!(rows >= 18, "{rows} check values");
}

/// A file cut anywhere, or with any byte of its head and tables changed, is refused or decodes without a panic.
#[test]
fn cut_and_flipped_files_never_panic() {
    let cut = |bytes: &[u8], name: &str| {
        for end in (0..bytes.len().min(4096)).chain((1..64).map(|k| bytes.len() * k / 64)) {
            assert!(verdict(&bytes[..end]).is_some(), "{name} cut at {end} is accepted");
        }
    };
    for vector in valid() {
        if ["smallest.stb", "model.stb", "metadata.stb"].contains(&vector.name.as_str()) {
            cut(&vector.bytes, &vector.name);
            let mut bytes = vector.bytes.clone();
            for at in 0..bytes.len() {
                bytes[at] ^= 1 << (at % 8);
                assert!(verdict(&bytes).is_some(), "{}: byte {at} is not covered", vector.name);
                bytes[at] ^= 1 << (at % 8);
            }
        }
    }
}

#[test]
fn pages_link_to_what_exists() {
    for name in ["README.md", "container.md", "metadata.md", "encodings.md", "write-a-reader.md"] {
        for target in page(name).split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if !target.starts_with("http") {
                assert!(spec().join(Path::new(target)).exists(), "{name} links to {target}");
            }
        }
    }
}
