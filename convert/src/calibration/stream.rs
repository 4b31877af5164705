//! The order of documents, and windows of consecutive tokens.

use rand_core::{RngCore, SeedableRng};
use rand_pcg::Pcg64Mcg;
use rayon::prelude::*;
use stb_runtime::Result;

use super::document::{Document, DocumentEncoder};
use super::{Drawn, too_short};

/// Bytes of the parts into which long texts are cut, per token of a window: a part has a few windows.
const PART_BYTES: usize = 16;
/// Documents that are encoded together.
const ENCODED: usize = 64;
/// Offsets of the first cut in passes over the same text.
const OFFSETS: usize = 7;

/// Documents in a random order in which the kinds alternate.
pub(super) struct Stream<'a> {
    /// The documents of each kind.
    pub(super) kinds: Vec<Vec<Document<'a>>>,
    /// The seed of the order.
    pub(super) seed: u64,
}

impl<'a> Stream<'a> {
    /// Window numbers `first..first + count` of `length` tokens: windows do not overlap until the text is used up. Then it
    /// begins again, in another order and cut elsewhere.
    ///
    /// # Errors
    /// [`stb_runtime::Error::Usage`] if the text is shorter than a window; errors of the tokenizer.
    pub(super) fn windows(
        &self,
        encoder: &DocumentEncoder,
        length: usize,
        first: usize,
        count: usize,
    ) -> Result<Drawn> {
        let mut drawn = Drawn { windows: Vec::new(), fresh: usize::MAX };
        let (mut number, mut rest) = (0, Vec::new());
        for pass in 0.. {
            let mut tokens = 0;
            for documents in self.order(pass, length * PART_BYTES).chunks(ENCODED) {
                let encoded: Vec<Vec<u32>> = documents
                    .par_iter()
                    .map(|document| encoder.encode_separated(*document))
                    .collect::<Result<_>>()?;
                tokens += encoded.iter().map(Vec::len).sum::<usize>();
                rest.extend(encoded.into_iter().flatten());
                let whole = rest.len() / length * length;
                for window in rest[..whole].chunks_exact(length) {
                    if number >= first && drawn.windows.len() < count {
                        drawn.windows.push(window.to_vec());
                    }
                    number += 1;
                }
                rest.drain(..whole);
                if drawn.windows.len() == count {
                    drawn.fresh = drawn.fresh.saturating_sub(first).min(count);
                    return Ok(drawn);
                }
            }
            if pass == 0 {
                if tokens < length {
                    return Err(too_short(tokens, length));
                }
                drawn.fresh = number;
            }
        }
        Ok(drawn)
    }

    /// The number of tokens of the text, counted up to at least `enough`.
    ///
    /// # Errors
    /// Errors of the tokenizer.
    pub(super) fn tokens(&self, encoder: &DocumentEncoder, enough: usize) -> Result<usize> {
        let mut tokens = 0;
        for document in self.order(0, enough.saturating_mul(PART_BYTES)) {
            tokens += encoder.encode_separated(document)?.len();
            if tokens >= enough {
                break;
            }
        }
        Ok(tokens)
    }

    /// The documents of one pass. Kinds alternate so that each has the share of the bytes so far that it has of all;
    /// the documents of a kind are shuffled. Texts are cut into parts of at most about `part` bytes.
    pub(super) fn order(&self, pass: usize, part: usize) -> Vec<Document<'a>> {
        let mut kinds: Vec<std::vec::IntoIter<Document<'a>>> = Vec::new();
        for (kind, documents) in self.kinds.iter().enumerate() {
            let first = (part / OFFSETS).max(1) * (OFFSETS - pass % OFFSETS);
            let mut parts: Vec<Document<'a>> =
                documents.iter().flat_map(|document| cut(*document, first, part)).collect();
            let mut random = Pcg64Mcg::seed_from_u64(self.seed);
            // Each pass and kind has its own part of the random sequence.
            random.advance((((pass as u128) << 64) + kind as u128) << 32);
            // Fisher-Yates.
            for i in (1..parts.len()).rev() {
                parts.swap(i, (random.next_u64() % (i as u64 + 1)) as usize);
            }
            kinds.push(parts.into_iter());
        }
        let sizes: Vec<usize> =
            self.kinds.iter().map(|kind| kind.iter().map(Document::size).sum()).collect();
        let mut used = vec![0; kinds.len()];
        let mut order = Vec::new();
        loop {
            let share = |k: &usize| used[*k] as f64 / sizes[*k].max(1) as f64;
            let left = (0..kinds.len()).filter(|k| kinds[*k].len() > 0);
            let Some(next) = left.min_by(|a, b| share(a).total_cmp(&share(b))) else {
                return order;
            };
            if let Some(document) = kinds[next].next() {
                used[next] += document.size();
                order.push(document);
            }
        }
    }
}

/// Cuts a text into a part of `first` bytes and parts of at most about `part` bytes.
fn cut(document: Document<'_>, first: usize, part: usize) -> Vec<Document<'_>> {
    let (mut parts, mut rest, mut size) = (Vec::new(), document, first);
    while rest.size() > part
        && let Some((head, tail)) = rest.split(size)
    {
        parts.push(head);
        (rest, size) = (tail, part);
    }
    parts.push(rest);
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream<'a>(kinds: &[&'a [String]], seed: u64) -> Stream<'a> {
        let documents = |kind: &&'a [String]| kind.iter().map(|t| Document::text(t)).collect();
        Stream { kinds: kinds.iter().map(documents).collect(), seed }
    }

    /// Every document comes once per pass, in an order that seed and pass decide, and kinds alternate.
    #[test]
    fn kinds_alternate() {
        let long: Vec<String> = (0..30).map(|i| format!("{i:0>90}")).collect();
        let short: Vec<String> = (0..30).map(|i| format!("{i:0>30}")).collect();
        let of = |seed, pass| stream(&[&long, &short], seed).order(pass, 1000);
        let order = of(1, 0);
        assert!(order == of(1, 0) && order != of(2, 0) && order != of(1, 1));
        let mut sorted: Vec<String> = order.iter().map(|d| format!("{d:?}")).collect();
        sorted.sort();
        sorted.dedup();
        assert_eq!(sorted.len(), 60);
        for part in order.chunks(10) {
            let longs = part.iter().filter(|d| d.size() == 90).count();
            assert!((4..=6).contains(&longs), "{part:?}");
        }
    }

    #[test]
    fn long_texts_are_cut_and_complete() {
        let text: String = (0..500).map(|i| format!("word{i} ")).collect();
        for pass in 0..3 {
            let all = [text.clone()];
            let parts = stream(&[&all], 0).order(pass, 300);
            assert!(parts.len() > 10 && parts.iter().all(|p| p.size() <= 300));
            let mut texts: Vec<&str> = parts
                .iter()
                .map(|part| match part {
                    Document::Text { text, .. } => *text,
                    _ => panic!("not a text"),
                })
                .collect();
            texts.sort_by_key(|part| part.as_ptr());
            assert_eq!(texts.concat(), text);
            let begins = |d: &&Document<'_>| matches!(d, Document::Text { begins: true, .. });
            assert_eq!(parts.iter().filter(begins).count(), 1);
        }
    }
}
