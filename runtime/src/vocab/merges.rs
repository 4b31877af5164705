//! Merges of BPE: from the list of a file, or derived from scores.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};

use crate::error::{Error, Result};

/// Two tokens that become one.
pub(super) type Merge<'t> = (&'t str, &'t str);

/// Deriving merges takes time and text in proportion to the sum of the squares of the lengths of all
/// tokens. Gemma's 256,000 tokens have a tenth of this.
const MAX_WORK: usize = 1 << 28;

/// The merges of a list, each two tokens with a space between them. A repeated merge counts where it
/// is first.
///
/// # Errors
/// [`Error::Invalid`] for a merge that is not of two tokens, or whose result is not a token.
pub(super) fn from_list<'t>(
    list: &'t [String],
    ids: &HashMap<&str, u32>,
) -> Result<Vec<Merge<'t>>> {
    let mut seen = HashSet::with_capacity(list.len());
    let mut merges = Vec::with_capacity(list.len());
    let mut joined = String::new();
    for (rank, merge) in list.iter().enumerate() {
        let wrong = |why: &str| Error::invalid(format!("merge {rank} ({merge:?}) {why}"));
        // The first token may itself start with a space.
        let space = merge.bytes().skip(1).position(|byte| byte == b' ');
        let space = space.ok_or_else(|| wrong("is not two tokens"))?;
        let (left, right) = (&merge[..=space], &merge[space + 2..]);
        joined.clear();
        joined.extend([left, right]);
        if let Some(missing) = [left, right, &joined].into_iter().find(|t| !ids.contains_key(t)) {
            return Err(wrong(&format!("needs the token {missing:?}, which does not exist")));
        }
        if seen.insert((left, right)) {
            merges.push((left, right));
        }
    }
    Ok(merges)
}

/// The merges that lead to the tokens of `parts` in descending order of their scores: every way to
/// split a token into two tokens. `parts` are the indices of the tokens that take part.
///
/// # Errors
/// [`Error::Invalid`] if that would take too long.
pub(super) fn from_scores<'t>(
    texts: &'t [Cow<'_, str>],
    parts: &[usize],
    score: impl Fn(usize) -> f32,
) -> Result<Vec<Merge<'t>>> {
    let work: usize = parts.iter().map(|id| texts[*id].len().pow(2)).sum();
    if work > MAX_WORK {
        return Err(Error::invalid("the tokens of the vocabulary are too long to derive merges"));
    }
    let known: HashSet<&str> = parts.iter().map(|id| texts[*id].as_ref()).collect();
    let mut found = Vec::new();
    for id in parts {
        let text = texts[*id].as_ref();
        for (middle, _) in text.char_indices().skip(1) {
            let (left, right) = text.split_at(middle);
            if known.contains(left) && known.contains(right) {
                found.push((score(*id), *id, (left, right)));
            }
        }
    }
    // Within a token the longer left part comes first: runs of one character are merged from the left,
    // so what is left over is on the right.
    found.sort_by(|(a, i, (left, _)), (b, j, (other, _))| {
        b.total_cmp(a).then(i.cmp(j)).then(other.len().cmp(&left.len()))
    });
    Ok(found.into_iter().map(|(_, _, merge)| merge).collect())
}

/// Merges that make one token of every run of line feeds that is a token. The list of a file lacks
/// them, because its lines cannot hold line feeds; llama.cpp takes such runs whole.
pub(super) fn of_line_feeds<'t>(texts: &'t [Cow<'_, str>]) -> Result<Vec<Merge<'t>>> {
    let is_run = |text: &str| text.bytes().all(|byte| byte == b'\n');
    let runs: Vec<usize> = (0..texts.len()).filter(|id| is_run(&texts[*id])).collect();
    from_scores(texts, &runs, |id| -(texts[id].len() as f32))
}
