//! The kernels of each source file, for the emulator.

use stb_kernels::cuda::{Module, modules};

use super::emulator::Emulator;

/// The kernels of a file of `kernels/cuda`.
fn kernels_of(file: &str) -> &'static [&'static str] {
    match file {
        "gemv.cu" => &[
            "gemv_f32_1",
            "gemv_f32_2",
            "gemv_f32_4",
            "gemv_q8_1",
            "gemv_q8_2",
            "gemv_q8_4",
            "dequantize_rows",
        ],
        "gemv_nm.cu" => &[
            "gemv_f32_1",
            "gemv_f32_2",
            "gemv_f32_4",
            "gemv_scaled_1",
            "gemv_scaled_2",
            "gemv_scaled_4",
            "dequantize_rows",
        ],
        "gemm_prepare.cu" => &["gemm_prepare_f16", "gemm_prepare_q8", "gemm_prepare_bf16x2"],
        "gemm_rows.cu" => &["gemm_rows"],
        "gemm_nm.cu" | "gemm_nm_s8.cu" => &["gemm_512x64", "gemm_256x64", "gemm_256x16"],
        "activations.cu" => &["compute_activations"],
        "top_k.cu" => &["top_k"],
        "mixed_rows.cu" => &["gather_results", "scatter_results", "find_rows"],
        "hessian.cu" => {
            &["reverse_to_f64", "reverse_to_f32", "finish_hessian", "copy_submatrix", "block_dots"]
        }
        "attention_prefill.cu" => &[
            "attention_prefill_64",
            "attention_prefill_96",
            "attention_prefill_128",
            "attention_prefill_256",
            "set_slot",
            "clear_slots",
        ],
        "attention_decode.cu" => &[
            "rope_kv",
            "attention_decode_1",
            "attention_decode_4",
            "attention_decode_8",
            "set_slot",
            "clear_slots",
        ],
        _ => panic!("the kernels of {file} are not listed"),
    }
}

/// Whether the kernels of a module read the slots of tokens.
pub fn is_attention(module: &Module) -> bool {
    matches!(module.file, "attention_decode.cu" | "attention_prefill.cu")
}

/// The module with this name.
pub fn module_named(name: &str) -> Module {
    modules().into_iter().find(|m| m.name() == name).unwrap()
}

/// The kernels of a module, with those that set slots if it is of attention; `None` if there is no
/// C++ compiler.
pub fn build(module: &Module) -> Option<Emulator> {
    build_with(&[], module)
}

/// [`build`] with the kernels of further files.
pub fn build_with(files: &[&str], module: &Module) -> Option<Emulator> {
    let slots = concat!(env!("CARGO_MANIFEST_DIR"), "/../kernels/tests/emulator/slots.cu");
    let files = [files, &[module.file]].concat();
    let kernels: Vec<&str> = files.iter().flat_map(|file| kernels_of(file)).copied().collect();
    let mut sources = files;
    sources.extend(is_attention(module).then_some(slots));
    Emulator::build(&sources, &kernels, &module.defines()).unwrap()
}
