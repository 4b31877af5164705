//! One pass over the weights for any number of tokens of each of many sequences: prompts in pieces and single tokens
//! together. A sequence gets the same bits as alone, see [`crate::linear`] and [`crate::attention`].

use stb_kernels::{Pool, ops};

use crate::attention::{AttendLayer, AttentionSettings, QkvRows, attend};
use crate::block::{NormWeights, run_block};
use crate::cpu::{CpuOps, CpuScratch};
use crate::device::{DeviceCaches, DeviceModel};
use crate::elementwise::{Elementwise, MIN_PARALLEL_ELEMENTS};
use crate::engine::{Engine, Tail};
use crate::error::{Error, Result};
use crate::linear::{RowKind, Rows, Threads, apply};
use crate::pass::{Output, OutputKind, OutputSink, Pass, Segment, prefill_rows};
use crate::scratch::{ForwardScratch, HeadScratch};

/// Tokens whose logits are computed at a time.
const LOGITS_BATCH: usize = 64;
/// Logits per task of the soft cap.
const CAPPED_LOGITS: usize = 1 << 14;

impl Engine {
    /// Appends tokens to sequences in one pass over the weights. After an error the sequences have their former
    /// length. `segments` is reordered: prefill rows come first.
    ///
    /// # Errors
    /// [`Error::Usage`] if there are no tokens or they do not fit into the context of their sequence,
    /// [`Error::Invalid`] if a token is not in the vocabulary, [`Error::Unsupported`] for outputs or batches that
    /// a device lacks, [`Error::Device`] if the device fails.
    pub(crate) fn run_pass(
        &self,
        segments: &mut [Segment<'_>],
        sink: &mut OutputSink<'_>,
    ) -> Result<()> {
        if segments.is_empty() || segments.iter().any(|segment| segment.tokens.is_empty()) {
            return Err(Error::usage("there are no tokens to continue from; give a prompt"));
        }
        for segment in &*segments {
            segment.cache.check_room(segment.count)?;
            self.check_vocabulary(segment.tokens)?;
        }
        segments.sort_by_key(|segment| segment.kind);
        let mut scratch = self.scratch.take(!self.exact);
        let done = self.run_layers(segments, &mut scratch, sink);
        self.scratch.put(scratch);
        if done.is_ok() {
            segments.iter_mut().for_each(|segment| segment.cache.advance(segment.count));
        }
        done
    }

    fn run_layers(
        &self,
        segments: &mut [Segment<'_>],
        scratch: &mut ForwardScratch,
        sink: &mut OutputSink<'_>,
    ) -> Result<()> {
        scratch.tokens.clear();
        segments.iter().for_each(|segment| scratch.tokens.extend_from_slice(segment.tokens));
        match &self.tail {
            Tail::Cpu => {
                self.run_host_layers(segments, scratch)?;
                self.send_outputs(segments, scratch, sink);
                Ok(())
            }
            Tail::Cuda(device) => {
                let output = device_output(segments)?;
                let on_host = self.host_layers() > 0;
                if on_host {
                    self.run_host_layers(segments, scratch)?;
                }
                let hidden = on_host.then_some(&scratch.hidden[..]);
                let pass = Pass { tokens: &scratch.tokens, output };
                run_tail(device, segments, pass, hidden, sink)
            }
        }
    }

    /// Embeds the tokens and runs the layers on the CPU. The result, [tokens, hidden], is in
    /// `scratch.hidden`.
    fn run_host_layers(
        &self,
        segments: &mut [Segment<'_>],
        scratch: &mut ForwardScratch,
    ) -> Result<()> {
        let ForwardScratch { tokens, hidden, angles, attention, block, cpu, .. } = scratch;
        let prefill = prefill_rows(segments);
        let places = segments.iter().flat_map(|segment| {
            let (first, limit) = (segment.cache.len(), segment.cache.limit());
            (first..first + segment.count).map(move |position| (position, limit))
        });
        let positions = places.clone().map(|(position, _)| position);
        self.embed_rows((&self.model.embeddings, prefill), tokens, positions, hidden)?;
        self.rope.angles(places, angles);
        segments.iter_mut().for_each(|segment| segment.cache.reserve(segment.count));
        let threads = Threads { isa: self.isa, pool: &self.pool };
        for (i, layer) in self.model.layers[..self.host_layers()].iter().enumerate() {
            let mut ops = CpuOps {
                isa: self.isa,
                pool: &self.pool,
                norm: self.model.spec.norm(),
                activation: self.model.spec.activation,
                head_dim: self.model.spec.head_dim as usize,
                angles,
                attend: |x: QkvRows<'_>, settings: AttentionSettings| {
                    attend(AttendLayer { threads, settings, layer: i }, segments, attention, x);
                },
                scratch: cpu,
                observer: &mut (),
                prefill,
            };
            // The CPU cannot fail, and no observer stops the layer.
            let Ok(_) = run_block(&mut ops, layer, block, hidden);
        }
        Ok(())
    }

    /// Computes the outputs that the segments request from `scratch.hidden`, [tokens, hidden].
    fn send_outputs(
        &self,
        segments: &[Segment<'_>],
        scratch: &mut ForwardScratch,
        sink: &mut OutputSink<'_>,
    ) {
        let ForwardScratch { hidden, selected, head, cpu, .. } = scratch;
        let width = self.model.hidden_size();
        selected.clear();
        let mut rest = &hidden[..];
        for segment in segments {
            let (rows, more) = rest.split_at(segment.count * width);
            rest = more;
            match segment.output {
                OutputKind::CacheOnly => {}
                OutputKind::LastLogits | OutputKind::TopK(_) => {
                    selected.extend_from_slice(&rows[rows.len() - width..]);
                }
                OutputKind::AllLogits => {
                    for (i, rows) in rows.chunks(LOGITS_BATCH * width).enumerate() {
                        let logits = self.logits(rows, segment.kind, head, cpu);
                        let (id, first) = (segment.id, i * LOGITS_BATCH);
                        sink(Output::Logits { id, first, logits });
                    }
                }
                OutputKind::Hidden => {
                    let rows = self.final_rows(rows, &mut head.normed);
                    sink(Output::Hidden { id: segment.id, rows });
                }
            }
        }
        let mut last = segments.iter().filter(|segment| {
            matches!(segment.output, OutputKind::LastLogits | OutputKind::TopK(_))
        });
        let vocabulary = self.model.embeddings.rows();
        for rows in selected.chunks(LOGITS_BATCH * width) {
            let logits = self.logits(rows, RowKind::Decode, head, cpu);
            for (logits, segment) in logits.chunks_exact(vocabulary).zip(&mut last) {
                sink(Output::Logits { id: segment.id, first: segment.count - 1, logits });
            }
        }
    }

    /// The logits, [n, vocab], for rows of the residual stream, [n, hidden], all of one role.
    fn logits<'s>(
        &self,
        hidden: &[f32],
        kind: RowKind,
        scratch: &'s mut HeadScratch,
        cpu: &mut CpuScratch,
    ) -> &'s [f32] {
        let HeadScratch { normed, projected, logits } = scratch;
        let mut x = self.final_rows(hidden, normed);
        let prefill = match kind {
            RowKind::Prefill => hidden.len() / self.model.hidden_size(),
            RowKind::Decode => 0,
        };
        if let Some(project_out) = &self.model.project_out {
            let rows = Rows { x, prefill };
            apply(self.isa, &self.pool, &mut cpu.linear, [project_out], rows, [&mut *projected]);
            x = projected;
        }
        // [n, vocab] = [n, embedding] · [vocab, embedding]ᵀ
        let (lm_head, rows) = (self.model.lm_head(), Rows { x, prefill });
        apply(self.isa, &self.pool, &mut cpu.linear, [lm_head], rows, [&mut *logits]);
        if let Some(cap) = self.model.spec.logit_soft_cap {
            self.pool.or_serial(logits.len() > MIN_PARALLEL_ELEMENTS).run_chunks(
                logits,
                CAPPED_LOGITS,
                |_, x| ops::soft_cap(self.isa, cap as f32, x),
            );
        }
        logits
    }

    /// Rows of the residual stream, [n, hidden], after the last norm, if the model has one.
    fn final_rows<'s>(&self, hidden: &'s [f32], normed: &'s mut Vec<f32>) -> &'s [f32] {
        if !self.model.spec.has_final_norm() {
            return hidden;
        }
        self.last_norm(&self.pool, hidden, normed);
        normed
    }

    /// The last norm of the model for `hidden`, [tokens, hidden], into `out`, which is resized.
    pub(crate) fn last_norm(&self, pool: &Pool, hidden: &[f32], out: &mut Vec<f32>) {
        let weights = NormWeights { weight: &self.model.norm, bias: self.model.norm_bias.as_ref() };
        let elementwise = Elementwise { isa: self.isa, pool };
        elementwise.norm_rows(hidden, weights, self.model.spec.norm(), out);
    }
}

/// The output of a pass on a device: of the one sequence, or the logits of one token of each of several.
///
/// # Errors
/// [`Error::Unsupported`] for other passes.
fn device_output<'a>(segments: &[Segment<'a>]) -> Result<OutputKind<'a>> {
    let is_last = |s: &Segment<'_>| s.count == 1 && matches!(s.output, OutputKind::LastLogits);
    match segments {
        [one] if !matches!(one.output, OutputKind::Hidden) => Ok(one.output),
        [_, _, ..] if segments.iter().all(is_last) => Ok(OutputKind::AllLogits),
        _ => Err(Error::unsupported(
            "a GPU computes tokens of one sequence, or one token of each of several; use --device cpu",
        )),
    }
}

/// Runs the layers on a device and sends its outputs.
fn run_tail(
    device: &DeviceModel,
    segments: &mut [Segment<'_>],
    pass: Pass<'_>,
    hidden: Option<&[f32]>,
    sink: &mut OutputSink<'_>,
) -> Result<()> {
    let ids: Vec<usize> = segments.iter().map(|segment| segment.id).collect();
    let mut caches = DeviceCaches::new(segments.iter_mut().map(|segment| &mut *segment.cache));
    device.run(&mut caches, pass, hidden, &mut |output| match output {
        Output::Logits { first, logits, .. } if ids.len() > 1 => {
            let rows = logits.chunks_exact(device.vocabulary());
            for (id, logits) in ids[first..].iter().zip(rows) {
                sink(Output::Logits { id: *id, first: 0, logits });
            }
        }
        Output::Logits { first, logits, .. } => sink(Output::Logits { id: ids[0], first, logits }),
        other => sink(other),
    })
}
