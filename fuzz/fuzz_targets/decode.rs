//! Fuzzes payloads of any encoding and shape. Decoding and all kernels must stay within their buffers,
//! and a payload that passes the content check must be canonical.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stb_format::Encoding;
use stb_format::encoding::MatrixView;
use stb_kernels::{GemvScratch, Isa, Panels, gemm, gemv, packed};

fuzz_target!(|data: &[u8]| {
    let Some((head, rest)) = data.split_at_checked(19) else { return };
    let id = [1, 2, 3, 16, 17, 32, 48, 64][usize::from(head[0]) % 8];
    let (rows, cols) = (1 + u64::from(head[1]) % 40, 1 + u64::from(head[2]) * 2);
    let mut params = [0; 16];
    // Only mixed rows use more than six bytes; the others are refused unless the rest is zero.
    let used = if id == 64 { 16 } else { 6 };
    params[..used].copy_from_slice(&head[3..3 + used]);
    let Ok(encoding) = Encoding::parse(id, params) else { return };
    let Ok(Some(length)) = encoding.payload_len(&[rows, cols]) else { return };
    // The input is repeated up to the payload length.
    let payload: Vec<u8> = rest.iter().chain(&[0]).cycle().take(length as usize).copied().collect();
    let view = encoding.view(rows, cols, &payload).expect("the length is right");
    let weights = view.decode();
    let valid = encoding.check_payload(rows, cols, &payload).is_ok();
    if valid {
        assert!(weights.iter().all(|w| w.is_finite()));
        let packed = match view {
            MatrixView::Dense(_) => payload.clone(),
            MatrixView::IntGroup(v) => v.unpack().pack(),
            MatrixView::Stbllm(v) => v.unpack().pack(),
            MatrixView::Nm(v) => v.unpack().pack(),
            MatrixView::MixedRows(v) => v.unpack().pack(),
        };
        assert!(packed == payload);
    }
    kernels(&view, &weights, valid);
});

/// Runs GEMV and GEMM on all instruction sets and compares valid results with `weights`.
fn kernels(view: &MatrixView<'_>, weights: &[f32], valid: bool) {
    let (matrix, rows, cols) = (packed(view), view.rows(), view.cols());
    let x: Vec<f32> = (0..cols).map(|i| (i % 5) as f32 - 2.0).collect();
    let mut panels = Panels::default();
    panels.pack(&x, cols);
    for isa in Isa::available() {
        let mut scratch = GemvScratch::default();
        let (mut y, mut z) = (vec![0.0; rows], vec![0.0; rows * panels.all().row_stride()]);
        gemv(isa, matrix, matrix.prepare(isa, &x, &mut scratch), 0, &mut y);
        gemm(isa, matrix, panels.all(), 0, &mut z);
        // Results with quantized activations are not compared.
        let mut y_q8 = vec![0.0; rows];
        gemv(isa, matrix, matrix.prepare_q8(isa, &x, &mut scratch), 0, &mut y_q8);
        if !valid {
            continue;
        }
        for (r, w) in weights.chunks_exact(cols).enumerate() {
            let terms = || w.iter().zip(&x).map(|(w, x)| f64::from(*w) * f64::from(*x));
            let (sum, magnitude) = (terms().sum::<f64>(), terms().map(f64::abs).sum::<f64>());
            for found in [y[r], z[r * panels.all().row_stride()]] {
                let error = (f64::from(found) - sum).abs();
                assert!(error <= 1e-4 * magnitude + 1e-30 || magnitude > 1e38, "{found} for {sum}");
            }
        }
    }
}
