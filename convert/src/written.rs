//! Calibration text that the dense model itself writes: it continues openings of the built-in text, sampled at
//! temperature 1, many sequences at a time.

use std::collections::VecDeque;
use std::path::Path;

use rayon::prelude::*;
use stb_kernels::Pool;
use stb_kernels::kv::KvKind;
use stb_runtime::{Checkpoint, Engine, Error, Sampler, SamplerOptions, SourceFile, State};

use crate::calibration::{CalibrationText, DocumentEncoder, Openings};
use crate::digest::digest;
use crate::interrupt::check_interrupt;
use crate::pipeline::Progress;
use crate::recipe::Calibration;
use crate::resume::{read_hashed, write_hashed};

/// Sequences that are written together: the weights are read once for a token of each.
const BATCH: usize = 32;
/// The most tokens of a sequence.
const SEQUENCE: u64 = 512;
/// Of the most likely tokens, those are drawn from that together have this probability.
const TOP_P: f32 = 0.95;
/// The most tokens to draw from; hardly ever fewer than [`TOP_P`] asks for, and quick to find.
const TOP_K: usize = 1000;

/// Lets the model of `checkpoint` write the text for a calibration: what its windows and those of a distillation need,
/// and the part that is held out. The result is the same for any number of threads. It is kept in `folder`, if there
/// is one, and read from there if the same model has written the same before.
///
/// # Errors
/// [`Error::Invalid`] for a tokenizer that is missing or broken, [`Error::Unsupported`] for a block that this version
/// lacks, [`Error::Io`] if the text cannot be kept; [`crate::interrupt::Interrupted`].
pub fn write_text(
    checkpoint: &Checkpoint,
    calibration: &Calibration,
    folder: Option<&Path>,
    progress: &dyn Progress,
) -> anyhow::Result<CalibrationText> {
    let target = tokens(checkpoint, calibration);
    let seed = calibration.seed;
    let key = key(checkpoint, seed, target);
    let path = folder.map(|folder| folder.join(format!(".stb-self-{}", &key[..16])));
    if let Some(path) = &path
        && let Some(sequences) = read_hashed(path).as_deref().and_then(decode)
    {
        progress.note(&format!("calibration text of this model: {}", path.display()));
        return Ok(CalibrationText::written(sequences));
    }
    progress.note(&format!(
        "the model writes its calibration text, {target} tokens, {BATCH} at a time: {} passes over \
         {} MB of weights",
        target / BATCH as u64,
        checkpoint.files.iter().map(|file| file.bytes.len() as u64).sum::<u64>() / 1_000_000
    ));
    let mut engine = Engine::from_checkpoint(checkpoint)?;
    let threads = rayon::current_num_threads();
    engine.pool = Pool::new(threads)
        .map_err(|e| Error::usage(format!("cannot start {threads} threads: {e}")))?;
    engine.kv = KvKind::F16;
    let author = Author {
        engine: &engine,
        encoder: DocumentEncoder::new(&engine.model)?,
        openings: Openings::new(seed),
        queue: VecDeque::new(),
        pass: 0,
        started: 0,
        seed,
        limit: sequence_limit(checkpoint) as usize,
    };
    let sequences = author.write(target, progress)?;
    if let Some(path) = &path {
        write_hashed(path, &[&encode(&sequences)])?;
        progress.note(&format!(
            "the text is kept in {} for other conversions of this model; remove it when there are none",
            path.display()
        ));
    }
    Ok(CalibrationText::written(sequences))
}

/// An upper estimate of the memory needed to write a text, besides the mapped checkpoint, in bytes.
#[must_use]
pub fn memory(checkpoint: &Checkpoint) -> u64 {
    let spec = &checkpoint.spec;
    let keys_and_values = 2 * spec.layers * spec.kv_heads * spec.head_dim * 2;
    let batch = BATCH as u64;
    let logits = batch * spec.vocab_size * 12;
    checkpoint.owned_bytes() + batch * sequence_limit(checkpoint) * keys_and_values + logits
}

/// The most tokens of a sequence.
fn sequence_limit(checkpoint: &Checkpoint) -> u64 {
    checkpoint.spec.context_length.min(SEQUENCE)
}

/// Tokens to write.
fn tokens(checkpoint: &Checkpoint, calibration: &Calibration) -> u64 {
    let length = (calibration.length as u64).min(checkpoint.spec.context_length);
    let epochs = calibration.distill.map_or(0, |options| options.epochs as u64);
    let windows = (calibration.samples as u64).saturating_mul(1 + epochs);
    // About a tenth is held out.
    windows.saturating_mul(length).saturating_mul(7) / 6
}

/// Everything on which the text depends, as a hash.
fn key(checkpoint: &Checkpoint, seed: u64, target: u64) -> String {
    let hash = |file: &SourceFile| digest(&**file.bytes);
    let files: Vec<String> = checkpoint.files.par_iter().map(hash).collect();
    let built_in = CalibrationText::built_in();
    let version = env!("CARGO_PKG_VERSION");
    digest(format!("{version} {} {seed} {target} {BATCH} {SEQUENCE}\n{files:?}", built_in.hash()))
}

/// The model, and what it is to write.
struct Author<'a> {
    engine: &'a Engine,
    encoder: DocumentEncoder,
    openings: Openings,
    /// The next openings.
    queue: VecDeque<Vec<u32>>,
    /// Passes over the openings so far.
    pass: usize,
    /// Sequences begun so far.
    started: u64,
    seed: u64,
    /// The most tokens of a sequence.
    limit: usize,
}

/// A sequence in progress.
struct Sequence {
    tokens: Vec<u32>,
    sampler: Sampler,
}

impl Sequence {
    fn sample(&mut self, logits: &[f32]) {
        self.tokens.push(self.sampler.sample(logits));
    }
}

impl Author<'_> {
    /// Writes sequences of `target` tokens in all.
    fn write(mut self, target: u64, progress: &dyn Progress) -> anyhow::Result<Vec<Vec<u32>>> {
        let engine = self.engine;
        let mut states: Vec<State> = (0..BATCH).map(|_| State::new(engine, self.limit)).collect();
        let mut writing: Vec<Sequence> = Vec::new();
        for state in &mut states {
            writing.push(self.begin(state)?);
        }
        let mut done: Vec<Vec<u32>> = Vec::new();
        loop {
            check_interrupt()?;
            for (sequence, state) in writing.iter_mut().zip(&mut states) {
                while self.is_finished(&sequence.tokens) {
                    let finished = std::mem::replace(sequence, self.begin(state)?);
                    done.push(finished.tokens);
                }
            }
            let written = done.iter().chain(writing.iter().map(|s| &s.tokens)).map(Vec::len);
            let written = written.sum::<usize>() as u64;
            progress.step(written.min(target), target, "writing the calibration text");
            if written >= target {
                break;
            }
            let last: Vec<u32> = writing.iter().filter_map(|s| s.tokens.last().copied()).collect();
            let logits = engine.forward_batch(&mut states, &last)?;
            writing
                .par_iter_mut()
                .zip(logits.par_chunks_exact(engine.model.embeddings.rows()))
                .for_each(|(sequence, logits)| sequence.sample(logits));
        }
        done.extend(writing.into_iter().map(|sequence| sequence.tokens));
        Ok(done)
    }

    /// Begins the next sequence: an opening and one token.
    fn begin(&mut self, state: &mut State) -> anyhow::Result<Sequence> {
        let opening = self.next_opening()?;
        let options = SamplerOptions {
            temperature: 1.0,
            top_k: TOP_K,
            top_p: TOP_P,
            min_p: 0.0,
            seed: self.seed.wrapping_add(self.started),
            ..SamplerOptions::default()
        };
        self.started += 1;
        let mut sequence = Sequence { tokens: opening, sampler: Sampler::new(options) };
        state.truncate(0);
        sequence.sample(self.engine.forward(state, &sequence.tokens)?);
        Ok(sequence)
    }

    /// The next opening that leaves room for an answer.
    fn next_opening(&mut self) -> anyhow::Result<Vec<u32>> {
        if self.queue.is_empty() {
            let mut openings = self.openings.pass(&self.encoder, self.pass)?;
            openings.retain(|tokens| (1..=self.limit / 2).contains(&tokens.len()));
            self.queue.extend(openings);
            self.pass += 1;
        }
        let opening = self.queue.pop_front();
        Ok(opening.ok_or_else(|| {
            Error::unsupported("the context of this model is too short for it to write a text")
        })?)
    }

    fn is_finished(&self, tokens: &[u32]) -> bool {
        tokens.len() >= self.limit || tokens.last().is_some_and(|t| self.encoder.is_end(*t))
    }
}

/// Each sequence: its length and its tokens, 4 bytes each.
fn encode(sequences: &[Vec<u32>]) -> Vec<u8> {
    let words =
        sequences.iter().flat_map(|s| std::iter::once(s.len() as u32).chain(s.iter().copied()));
    words.flat_map(u32::to_le_bytes).collect()
}

/// The inverse of [`encode`]; `None` for other bytes.
fn decode(bytes: &[u8]) -> Option<Vec<Vec<u32>>> {
    let (words, rest) = bytes.as_chunks::<4>();
    let words: Vec<u32> = words.iter().map(|word| u32::from_le_bytes(*word)).collect();
    let mut sequences = Vec::new();
    let mut left = &words[..];
    while let Some((length, tokens)) = left.split_first() {
        let (sequence, next) = tokens.split_at_checked(*length as usize)?;
        sequences.push(sequence.to_vec());
        left = next;
    }
    rest.is_empty().then_some(sequences)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequences_survive_and_damage_is_found() {
        let sequences = vec![vec![1, 2, 3], vec![], vec![u32::MAX]];
        let bytes = encode(&sequences);
        assert_eq!(decode(&bytes), Some(sequences));
        assert_eq!(decode(&bytes[..bytes.len() - 1]), None);
        assert_eq!(decode(&bytes[..bytes.len() - 4]), None);
        assert_eq!(decode(&[255; 8]), None);
    }
}
