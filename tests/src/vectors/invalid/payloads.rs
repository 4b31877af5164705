//! The content of payloads, and the keys of models.

use stb_format::encoding::{Dense, Encoding};
use stb_format::{Rule, Value};

use super::tables::{
    int_file, mixed_file, nm_file, pair, single, stbllm_file, trellis_factors_file, trellis_file,
};
use crate::vectors::patch::*;
use crate::vectors::valid;
use crate::vectors::vector::VectorList;

pub(super) fn payloads(list: &mut VectorList) {
    let base = pair();
    let mut gap = base.clone();
    let (start, length) = payload(&base, 0);
    gap[start + length] = 1;
    list.add(Rule::TensorPadding, "gap", "a byte between two payloads", gap);
    let mut damaged = base.clone();
    let (start, _) = payload(&base, 1);
    damaged[start] ^= 1;
    list.add(Rule::TensorChecksum, "bit", "one bit of a payload has flipped", damaged);

    let mut edit = |rule, name: &str, about, base: &[u8], change: &dyn Fn(&mut [u8])| {
        list.add(rule, name, about, edit_payload(base, 0, |p| change(p)));
    };
    let padding = Rule::PayloadPadding;
    // 4 bits, 2 x 40: rows of 32 bytes; column 40 is in byte 16 + 8 of a row.
    let int4 = int_file(4, 2, 40);
    edit(padding, "int4-column", "a nibble of a column that does not exist", &int4, &|p| {
        p[24] |= 1
    });
    let int8 = int_file(8, 1, 40);
    edit(padding, "int8-column", "a code of a column that does not exist", &int8, &|p| p[63] = 1);
    let odd = int_file(8, 1, 96);
    edit(padding, "int8-segment", "a byte between codes and scales", &odd, &|p| p[96] = 1);
    // 1 x 21: one unit; segments at 0, 64, 128, 192.
    let stbllm = stbllm_file(4, 1, 21);
    edit(padding, "stbllm-salient", "a salient column that does not exist", &stbllm, &|p| {
        p[2] |= 0x20
    });
    edit(padding, "stbllm-state", "a state of a column that does not exist", &stbllm, &|p| {
        p[64 + 7] |= 1
    });
    edit(
        padding,
        "stbllm-both",
        "a salient state 3 of a column that does not exist",
        &stbllm,
        &|p| {
            p[2] |= 0x20;
            p[64 + 2] |= 0x20;
            p[72 + 2] |= 0x20;
        },
    );
    edit(padding, "stbllm-sign", "a sign of a weight that does not exist", &stbllm, &|p| {
        p[128 + 3] |= 0x80
    });
    // 17 x 40, 1:8: 5 groups, 2 quads, 1 vector per tile; row scales at 0, codes at 64.
    let nm = nm_file(1, 8, 17, 40, 0, false);
    edit(padding, "nm-row", "a code of a row that does not exist", &nm, &|p| p[64 + 64 + 1] |= 1);
    edit(padding, "nm-group", "a code of a group that does not exist", &nm, &|p| {
        p[64 + 16] |= 0x10
    });
    let scaled = nm_file(1, 8, 1, 40, 4, false);
    edit(padding, "nm-scale", "a scale of a row that does not exist", &scaled, &|p| p[64] |= 0x10);

    // 1 x 40: tables at 0, 32 bytes; the row scale at 64, two block scales of 8 bytes at 128, streams at 192.
    let trellis = trellis_file(2, 1, 1, 40, 4);
    edit(padding, "trellis-segment", "a byte between tables and row scales", &trellis, &|p| {
        p[32] = 1
    });
    edit(padding, "trellis-scale", "a scale of a row that does not exist", &trellis, &|p| {
        p[128] |= 0x10
    });
    let tables = Rule::TrellisTables;
    edit(tables, "sum", "largest entries of two tables that add up to 128", &trellis, &|p| {
        p[..32].fill(64)
    });
    let both = "the same, and an infinite row scale, which is checked first";
    edit(Rule::PayloadFinite, "trellis-scale-and-sum", both, &trellis, &|p| {
        p[..32].fill(64);
        p[64..66].copy_from_slice(&[0, 0x7c]);
    });
    let pairs = trellis_file(3, 2, 1, 40, 0);
    edit(tables, "second", "the same of the second weight of a step", &pairs, &|p| {
        p[32..64].fill(255)
    });

    let finite = Rule::PayloadFinite;
    // 1 x 40: tables at 0, factors at 64, 80 bytes, the row scale at 192.
    let factors = trellis_factors_file(1, 40);
    edit(padding, "trellis-factors", "a byte after the column factors", &factors, &|p| p[144] = 1);
    edit(finite, "trellis-factor", "an infinite column factor", &factors, &|p| {
        p[142..144].copy_from_slice(&[0, 0x7c])
    });
    edit(finite, "trellis-row-scale", "an infinite row scale", &trellis, &|p| {
        p[64..66].copy_from_slice(&[0, 0x7c])
    });
    let nan = f32::NAN.to_le_bytes();
    edit(finite, "f32-nan", "a weight that is no number", &base, &|p| {
        p[4..8].copy_from_slice(&nan)
    });
    let f16 = single([1, 2], Encoding::Dense(Dense::F16), vec![0; 4]);
    edit(finite, "f16-infinite", "an infinite weight", &f16, &|p| {
        p[2..4].copy_from_slice(&[0x00, 0x7c])
    });
    let bf16 = single([1, 2], Encoding::Dense(Dense::Bf16), vec![0; 4]);
    edit(finite, "bf16-infinite", "an infinite weight", &bf16, &|p| {
        p[2..4].copy_from_slice(&[0x80, 0xff])
    });
    let infinite = |p: &mut [u8]| {
        let end = p.len();
        p[end - 1] = 0x7c;
        p[end - 2] = 0;
    };
    edit(finite, "int-scale", "an infinite scale", &int4, &infinite);
    edit(finite, "odd-scale", "an infinite scale", &int_file(3, 1, 40), &infinite);
    edit(finite, "stbllm-scale", "an infinite scale", &stbllm, &infinite);
    edit(finite, "nm-row-scale", "a row scale that is no number", &nm, &|p| {
        p[..2].copy_from_slice(&[1, 0x7e])
    });
    let factors = nm_file(1, 4, 1, 8, 0, true);
    edit(finite, "nm-factor", "an infinite column factor", &factors, &|p| {
        p[..2].copy_from_slice(&[0, 0xfc])
    });

    // 2 rows of 3 listed: list at 0, 8 bytes; 2 x 40 with 8 bits at 64, 128 bytes of codes and 8 of scales, the second
    // segment at 64 + 128; 3 x 40 signs at 256, 24 bytes of codes, scales at 256 + 64.
    let mixed = mixed_file();
    edit(padding, "mixed-list", "a byte between the list and the listed rows", &mixed, &|p| {
        p[8] = 1
    });
    edit(padding, "mixed-between", "a byte between the listed rows and all rows", &mixed, &|p| {
        p[255] = 1
    });
    edit(
        padding,
        "mixed-listed",
        "a code of a column of a listed row that does not exist",
        &mixed,
        &|p| p[64 + 63] = 1,
    );
    edit(padding, "mixed-all", "a code of a column that does not exist", &mixed, &|p| {
        p[256 + 7] = 0x80
    });
    edit(finite, "mixed-listed", "an infinite scale of a listed row", &mixed, &|p| {
        p[192..194].copy_from_slice(&[0, 0x7c])
    });
    edit(finite, "mixed-all", "an infinite scale", &mixed, &infinite);
    let list = Rule::PayloadRows;
    edit(list, "twice", "the same row twice", &mixed, &|p| p[4..8].copy_from_slice(&[0; 4]));
    edit(list, "order", "rows in falling order", &mixed, &|p| {
        p[0] = 2;
        p[4] = 1;
    });
    edit(list, "outside", "a row that does not exist", &mixed, &|p| p[4] = 3);
    edit(list, "far-outside", "row 2^32 - 1", &mixed, &|p| p[4..8].copy_from_slice(&[255; 4]));

    // One weight more: the first group of the low plane becomes full.
    let count = Rule::StbllmCount;
    edit(count, "more", "eight weights kept where four may be", &stbllm, &|p| p[64] = 0xff);
    edit(count, "fewer", "a group without weights", &stbllm, &|p| {
        p[64 + 1] = 0;
        p[64 + 9] = 0;
    });
    edit(
        count,
        "last-group",
        "five of five weights kept in a last group of 5 columns",
        &stbllm,
        &|p| p[64 + 2] = 0x1f,
    );
    edit(
        Rule::StbllmState,
        "state-3",
        "a weight of a salient column in the sparse region",
        &stbllm,
        &|p| {
            // Makes the first kept weight's column salient and its state 3.
            let kept = p[64] | p[72];
            let lowest = kept & kept.wrapping_neg();
            p[64] |= lowest;
            p[72] |= lowest;
            p[0] |= lowest;
        },
    );
}

pub(super) fn models(list: &mut VectorList) {
    let mut with = |rule, name: &str, about, changes: &[(&str, Option<Value>)]| {
        list.add(rule, name, about, valid::changed_model(changes));
    };
    let text = |t: &str| Some(Value::Text(t.to_owned()));
    let number = |n| Some(Value::U64(n));
    with(Rule::ModelKey, "missing", "no hidden size", &[("model.hidden_size", None)]);
    with(Rule::ModelKey, "type", "a number where a text belongs", &[("model.norm", number(1))]);
    with(
        Rule::ModelKey,
        "scaling",
        "llama3 scaling without its factor",
        &[("model.rope.factor", None)],
    );
    with(Rule::ModelKey, "tokenizer", "no tokenizer", &[("tokenizer.json", None)]);
    with(
        Rule::ModelKey,
        "bos",
        "a begin token is asked for and not named",
        &[("tokenizer.bos_id", None)],
    );
    with(Rule::ModelKey, "parameters", "no parameter count", &[("model.parameters", None)]);
    let unknown = Rule::ModelArchitecture;
    with(
        unknown,
        "architecture",
        "an architecture of the future",
        &[("model.architecture", text("zebra"))],
    );
    with(unknown, "activation", "an unknown activation", &[("model.activation", text("relu3"))]);
    with(unknown, "pairing", "an unknown pairing", &[("model.rope.pairing", text("thirds"))]);
    with(unknown, "scaling", "an unknown rotary scaling", &[("model.rope.scaling", text("yarn"))]);
    let value = Rule::ModelValue;
    with(value, "zero", "no layers", &[("model.layers", number(0))]);
    with(value, "huge", "2^60 layers", &[("model.layers", number(1 << 60))]);
    with(value, "heads", "3 key heads for 4 heads", &[("model.kv_heads", number(3))]);
    with(value, "odd", "heads of width 7", &[("model.head_dim", number(7))]);
    with(value, "epsilon", "a negative epsilon", &[("model.norm_eps", Some(Value::F64(-1.0)))]);
    with(
        value,
        "range",
        "an empty llama3 range",
        &[("model.rope.high_freq_factor", Some(Value::F64(1.0)))],
    );
    with(
        value,
        "eos",
        "an end token outside the vocabulary",
        &[("tokenizer.eos_ids", Some(Value::U64List(vec![1, 40])))],
    );
    with(value, "bos", "a begin token outside the vocabulary", &[("tokenizer.bos_id", number(40))]);
    let wrong = Rule::ModelTensor;
    with(
        wrong,
        "shape",
        "an intermediate size that the tensors do not have",
        &[("model.intermediate_size", number(56))],
    );
    with(wrong, "missing", "three layers stated, two there", &[("model.layers", number(3))]);
    with(wrong, "extra", "one layer stated, two there", &[("model.layers", number(1))]);
    with(
        wrong,
        "head",
        "embeddings not tied, but no head",
        &[("model.tied_embeddings", Some(Value::Bool(false)))],
    );
    with(
        Rule::ModelParameters,
        "count",
        "one parameter more than there are",
        &[("model.parameters", number(1))],
    );
}
