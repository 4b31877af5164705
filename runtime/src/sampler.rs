//! Chooses the next token from logits.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};

use rand_core::RngCore;
use rand_core::SeedableRng;
use rand_pcg::Pcg64Mcg;
use stb_kernels::cuda::{TopK, TopKRequest};

/// Sampling parameters, in the order in which they apply.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplerOptions {
    /// Added to the logits of these tokens. Tokens outside the vocabulary are ignored.
    pub logit_bias: Vec<(u32, f32)>,
    /// Positive logits of recent tokens are divided by the penalty, negative ones multiplied; 1 is off.
    pub repeat_penalty: f32,
    /// The number of recent tokens that are penalized.
    pub repeat_last: usize,
    /// Subtracted from the logits of tokens that the answer has; 0 is off.
    pub presence_penalty: f32,
    /// Subtracted from the logits of tokens for each time that the answer has them; 0 is off.
    pub frequency_penalty: f32,
    /// Divides the logits. 0 selects the most likely token and ignores the fields below.
    pub temperature: f32,
    /// Keep the K most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep the most likely tokens that together have this probability; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens with at least this fraction of the probability of the best one; 0 keeps all.
    pub min_p: f32,
    /// Seed of the random generator.
    pub seed: u64,
}

impl Default for SamplerOptions {
    fn default() -> Self {
        Self {
            logit_bias: Vec::new(),
            repeat_penalty: 1.0,
            repeat_last: 64,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            temperature: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            seed: 0,
        }
    }
}

/// A sampling parameter with a range, by its field in [`SamplerOptions`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplingRange {
    /// The field.
    pub name: &'static str,
    /// The least value.
    pub low: f32,
    /// The largest value.
    pub high: f32,
}

impl SamplingRange {
    /// The ranges that servers and libraries accept.
    pub const ALL: [Self; 6] = [
        Self { name: "temperature", low: 0.0, high: f32::MAX },
        Self { name: "top_p", low: 0.0, high: 1.0 },
        Self { name: "min_p", low: 0.0, high: 1.0 },
        Self { name: "repeat_penalty", low: f32::MIN_POSITIVE, high: 100.0 },
        Self { name: "presence_penalty", low: -2.0, high: 2.0 },
        Self { name: "frequency_penalty", low: -2.0, high: 2.0 },
    ];

    /// What is wrong with a value of the field called `name`; `None` if nothing is.
    #[must_use]
    pub fn problem(name: &str, value: f32) -> Option<String> {
        let range = Self::ALL.iter().find(|range| range.name == name);
        range.and_then(|range| range.refuse(value))
    }

    /// What is wrong with a value; `None` if nothing is.
    #[must_use]
    pub fn refuse(&self, value: f32) -> Option<String> {
        let Self { name, low, high } = *self;
        if value.is_finite() && (low..=high).contains(&value) {
            return None;
        }
        let bounds = match (low == f32::MIN_POSITIVE, high == f32::MAX) {
            (true, _) => format!("above 0 and at most {high}"),
            (_, true) => format!("a finite number from {low}"),
            _ => format!("from {low} to {high}"),
        };
        Some(format!("`{name}` is {value}, but must be {bounds}"))
    }
}

/// A seed from the operating system, for answers that are to differ.
#[must_use]
pub fn random_seed() -> u64 {
    // The standard library takes the keys of its hashers from the operating system.
    RandomState::new().hash_one(0)
}

/// The smallest number of candidates among which the best are selected.
const SORTED_AT_ONCE: usize = 256;

/// The input of a [`Sampler`] for the next token.
#[derive(Clone, Debug, PartialEq)]
pub enum SamplerInput {
    /// The logits of all tokens, `[vocab]`.
    Logits(Vec<f32>),
    /// Token ids and logits of the most likely tokens, as many as the sampler requests, with
    /// penalties applied, best first.
    TopK(Vec<(u32, f32)>),
}

impl Default for SamplerInput {
    fn default() -> Self {
        Self::TopK(Vec::new())
    }
}

/// Chooses tokens from logits.
#[derive(Debug)]
pub struct Sampler {
    options: SamplerOptions,
    random: Pcg64Mcg,
    recent: Vec<u32>,
    /// The tokens of the answer with their counts, if they are penalized.
    counts: BTreeMap<u32, u32>,
    logits: Vec<f32>,
    order: Vec<u32>,
    best: Vec<(u32, f32)>,
    seen: Vec<u32>,
}

impl Sampler {
    /// A sampler at the start of its random sequence.
    #[must_use]
    pub fn new(options: SamplerOptions) -> Self {
        let random = Pcg64Mcg::seed_from_u64(options.seed);
        Self {
            options,
            random,
            recent: Vec::new(),
            counts: BTreeMap::new(),
            logits: Vec::new(),
            order: Vec::new(),
            best: Vec::new(),
            seen: Vec::new(),
        }
    }

    /// Samples with other options from now on. The random sequence goes on unless the seed is another one.
    pub fn change(&mut self, options: SamplerOptions) {
        if options.seed != self.options.seed {
            self.random = Pcg64Mcg::seed_from_u64(options.seed);
        }
        self.options = options;
    }

    /// Begins an answer to `prompt`, whose tokens the repeat penalty includes.
    pub fn start(&mut self, prompt: &[u32]) {
        self.counts.clear();
        prompt.iter().for_each(|token| self.accept(*token));
    }

    /// Records a token for the repeat penalty.
    pub fn accept(&mut self, token: u32) {
        self.recent.push(token);
        let surplus = self.recent.len().saturating_sub(self.options.repeat_last);
        self.recent.drain(..surplus);
    }

    /// The top-k selection that gives the next input of the sampler, if a device can compute it. The
    /// logits of `banned` tokens count as −∞.
    pub(crate) fn top_k_request<'a>(&'a mut self, banned: &'a [u32]) -> Option<TopKRequest<'a>> {
        let greedy = self.options.temperature <= 0.0;
        let count = if greedy { 1 } else { self.options.top_k };
        if self.counts_tokens() || !self.options.logit_bias.is_empty() {
            return None;
        }
        let penalty = self.options.repeat_penalty;
        let penalized = if penalty == 1.0 { &[][..] } else { self.penalized() };
        let fits = (1..=TopK::MAX_COUNT).contains(&count)
            && penalized.len() + banned.len() <= TopK::MAX_CHANGED;
        fits.then_some(TopKRequest { count, greedy, penalty, penalized, banned })
    }

    /// Chooses the next token. `banned` tokens are never chosen unless all tokens are banned; top-k
    /// input already excludes them.
    ///
    /// # Panics
    /// If `next` is empty.
    pub fn choose(&mut self, next: &mut SamplerInput, banned: &[u32]) -> u32 {
        match next {
            SamplerInput::Logits(logits) => {
                for token in banned {
                    if let Some(logit) = logits.get_mut(*token as usize) {
                        *logit = f32::NEG_INFINITY;
                    }
                }
                self.sample(logits)
            }
            SamplerInput::TopK(best) => {
                let greedy = self.options.temperature <= 0.0;
                let token = if greedy { best[0].0 } else { self.draw(best) };
                self.accept(token);
                token
            }
        }
    }

    /// Chooses the next token from `logits`, `[vocab]`. Ties go to the lower id.
    ///
    /// # Panics
    /// If `logits` is empty.
    pub fn sample(&mut self, logits: &[f32]) -> u32 {
        self.logits.clear();
        self.logits.extend_from_slice(logits);
        self.penalize();
        let token = if self.options.temperature <= 0.0 {
            argmax(&self.logits)
        } else {
            let mut best = std::mem::take(&mut self.best);
            self.find_best(&mut best);
            let token = self.draw(&best);
            self.best = best;
            token
        };
        self.accept(token);
        if self.counts_tokens() {
            *self.counts.entry(token).or_default() += 1;
        }
        token
    }

    /// Whether penalties depend on the tokens of the answer.
    fn counts_tokens(&self) -> bool {
        self.options.presence_penalty != 0.0 || self.options.frequency_penalty != 0.0
    }

    /// Recent tokens, each once.
    fn penalized(&mut self) -> &[u32] {
        self.seen.clone_from(&self.recent);
        self.seen.sort_unstable();
        self.seen.dedup();
        &self.seen
    }

    fn penalize(&mut self) {
        for (token, bias) in &self.options.logit_bias {
            if let Some(logit) = self.logits.get_mut(*token as usize) {
                *logit += bias;
            }
        }
        let penalty = self.options.repeat_penalty;
        if penalty != 1.0 {
            self.penalized();
            for token in &self.seen {
                if let Some(logit) = self.logits.get_mut(*token as usize) {
                    *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
                }
            }
        }
        for (token, count) in &self.counts {
            if let Some(logit) = self.logits.get_mut(*token as usize) {
                let frequency = self.options.frequency_penalty * *count as f32;
                *logit -= self.options.presence_penalty + frequency;
            }
        }
    }

    /// Writes the tokens that top-k keeps to `best`, best first.
    fn find_best(&mut self, best: &mut Vec<(u32, f32)>) {
        let Self { options, logits, order, .. } = self;
        let by_logit = |a: &u32, b: &u32| {
            let (x, y) = (logits[*a as usize], logits[*b as usize]);
            y.total_cmp(&x).then(a.cmp(b))
        };
        order.clear();
        let keep = if options.top_k == 0 { logits.len() } else { options.top_k.min(logits.len()) };
        // Most tokens are worse than the worst of the best ones so far; a later one of equal logit comes after it.
        let room = (4 * keep).max(SORTED_AT_ONCE);
        let mut bar = None;
        for (id, logit) in logits.iter().enumerate() {
            if bar.is_none_or(|bar| logit.total_cmp(&bar).is_gt()) {
                order.push(id as u32);
            }
            if order.len() == room || id + 1 == logits.len() && order.len() > keep {
                order.select_nth_unstable_by(keep - 1, by_logit);
                order.truncate(keep);
                bar = Some(logits[order[keep - 1] as usize]);
            }
        }
        order.sort_unstable_by(by_logit);
        best.clear();
        best.extend(order.iter().map(|id| (*id, logits[*id as usize])));
    }

    /// Applies top-p and min-p to `order`, sorted best first, and draws a token.
    fn draw(&mut self, order: &[(u32, f32)]) -> u32 {
        let Self { options, random, .. } = self;
        let best = order[0].1;
        let weight = |logit: f32| f64::from((logit - best) / options.temperature).exp();
        let total: f64 = order.iter().map(|(_, logit)| weight(*logit)).sum();
        let mut kept = 0.0;
        let mut end = 0;
        for (_, logit) in order {
            let share = weight(*logit);
            let enough = kept >= f64::from(options.top_p) * total;
            if end > 0 && (enough || share < f64::from(options.min_p)) {
                break;
            }
            kept += share;
            end += 1;
        }
        // 53 random bits give a uniform number in 0..1.
        let mut rest = (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64 * kept;
        for (id, logit) in &order[..end] {
            rest -= weight(*logit);
            if rest < 0.0 {
                return *id;
            }
        }
        order[end - 1].0
    }
}

/// The index of the largest value, ignoring NaN; ties go to the lower index.
fn argmax(values: &[f32]) -> u32 {
    let mut best = 0;
    for (i, v) in values.iter().enumerate() {
        if *v > values[best] || values[best].is_nan() {
            best = i;
        }
    }
    best as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(change: impl Fn(&mut SamplerOptions)) -> Sampler {
        let mut options = SamplerOptions {
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            temperature: 1.0,
            ..SamplerOptions::default()
        };
        change(&mut options);
        Sampler::new(options)
    }

    fn counts(sampler: &mut Sampler, logits: &[f32], draws: usize) -> Vec<usize> {
        let mut counts = vec![0; logits.len()];
        for _ in 0..draws {
            counts[sampler.sample(logits) as usize] += 1;
        }
        counts
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let logits = [0.0, 2f32.ln(), 5f32.ln()];
        let counts = counts(&mut sampler(|_| {}), &logits, 8000);
        for (count, expected) in counts.iter().zip([1000, 2000, 5000]) {
            assert!(count.abs_diff(expected) < 200, "{counts:?}");
        }
    }

    #[test]
    fn filters_keep_the_expected_number_of_tokens() {
        let logits = [5f32.ln(), 3f32.ln(), 1.5f32.ln(), 0.5f32.ln()];
        let kept = |change: fn(&mut SamplerOptions)| {
            let counts = counts(&mut sampler(change), &logits, 2000);
            counts.iter().filter(|c| **c > 0).count()
        };
        assert_eq!(kept(|_| {}), 4);
        assert_eq!(kept(|o| o.top_k = 2), 2);
        assert_eq!(kept(|o| o.top_p = 0.55), 2);
        assert_eq!(kept(|o| o.min_p = 0.2), 3);
        assert_eq!(kept(|o| o.temperature = 0.0), 1);
        assert_eq!(kept(|o| o.top_p = 0.0), 1);
    }

    #[test]
    fn the_most_likely_tokens_are_found_among_many() {
        let logits: Vec<f32> = (0..5000).map(|i| (i * 7919 % 1009) as f32).collect();
        let mut all: Vec<u32> = (0..5000).collect();
        all.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)));
        for top_k in [1, 40, 300, 4999, 5000, 9000, 0] {
            let mut sampler = sampler(|o| o.top_k = top_k);
            sampler.logits.clone_from(&logits);
            let mut best = Vec::new();
            sampler.find_best(&mut best);
            let keep = if top_k == 0 { 5000 } else { top_k.min(5000) };
            assert!(best.iter().map(|(id, _)| id).eq(&all[..keep]), "{top_k}");
        }
    }

    #[test]
    fn greedy_breaks_ties_by_index_and_penalty_changes_the_choice() {
        assert_eq!(argmax(&[f32::NAN, 1.0, 3.0, 3.0]), 2);
        let mut greedy = sampler(|o| {
            o.temperature = 0.0;
            o.repeat_penalty = 2.0;
        });
        let picks: Vec<u32> = (0..3).map(|_| greedy.sample(&[1.0, 0.9, -0.1])).collect();
        assert_eq!(picks, [0, 1, 0]);
    }

    #[test]
    fn biases_and_penalties_of_the_answer_change_the_choice() {
        let pick = |change: fn(&mut SamplerOptions)| {
            let mut greedy = sampler(|o| {
                o.temperature = 0.0;
                change(o);
            });
            greedy.start(&[0, 0, 0]);
            (0..4).map(|_| greedy.sample(&[1.0, 0.7, -0.1])).collect::<Vec<u32>>()
        };
        assert_eq!(pick(|_| {}), [0, 0, 0, 0]);
        assert_eq!(pick(|o| o.logit_bias = vec![(2, 2.0), (0, -100.0), (9, 1.0)]), [2, 2, 2, 2]);
        assert_eq!(pick(|o| o.presence_penalty = 0.5), [0, 1, 0, 0]);
        assert_eq!(pick(|o| o.frequency_penalty = 0.2), [0, 0, 1, 0]);
    }

    #[test]
    fn values_out_of_range_are_named() {
        for (name, value, word) in [
            ("temperature", -0.1, "a finite number from 0"),
            ("temperature", f32::INFINITY, "finite"),
            ("top_p", 1.5, "from 0 to 1"),
            ("repeat_penalty", 0.0, "above 0 and at most 100"),
            ("presence_penalty", f32::NAN, "from -2 to 2"),
        ] {
            let problem = SamplingRange::problem(name, value).unwrap();
            assert!(problem.contains(name) && problem.contains(word), "{problem}");
        }
        assert_eq!(SamplingRange::problem("min_p", 1.0), None);
        assert_eq!(SamplingRange::problem("temperature", 0.0), None);
        assert_ne!(random_seed(), random_seed());
    }

    #[test]
    fn a_seed_fixes_the_sequence() {
        let logits: Vec<f32> = (0..50).map(|i| (i % 7) as f32).collect();
        let run = |seed| {
            let mut s = sampler(|o| o.seed = seed);
            (0..20).map(|_| s.sample(&logits)).collect::<Vec<u32>>()
        };
        assert_eq!(run(1), run(1));
        assert_ne!(run(1), run(2));
    }
}
