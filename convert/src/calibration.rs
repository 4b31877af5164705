//! Calibration sequences: windows of a text.

use rand_core::{RngCore, SeedableRng};
use rand_pcg::Pcg64Mcg;
use rayon::prelude::*;
use stb_runtime::{Error, Result, Tokenizer};

use crate::digest::digest;
use crate::recipe::{Calibration, Draw};

/// Public-domain English of several kinds, part of the program. See `data/README.md`.
pub const BUILT_IN: &str = include_str!("../data/calibration.txt");

/// The most tokens that are held back from calibration to measure the file with. 4096 tokens give the KL divergence to
/// a few per cent, and cost little against the 32 768 tokens of the default calibration, which run through the
/// layers several times.
pub(crate) const HELD_OUT_TOKENS: usize = 4096;
/// At most one token of this many is held back.
const HELD_OUT_SHARE: usize = 8;
/// The most tokens of a window that is held back. Longer windows would be fewer, and the standard errors, which
/// are over windows, less certain.
pub(crate) const HELD_OUT_WINDOW: usize = 512;

/// Windows of a text that share no token with the windows of the calibration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldOut {
    /// The windows, all of one length of at least 2 tokens.
    pub windows: Vec<Vec<u32>>,
    /// Name and SHA-256 of the text.
    pub text: String,
}

/// A text for calibration and its source.
#[derive(Clone, Debug)]
pub struct CalibrationText {
    /// `built-in` or the name of a file.
    pub name: String,
    /// The text.
    pub text: String,
}

impl CalibrationText {
    /// The text that ships with the program.
    #[must_use]
    pub fn built_in() -> Self {
        Self { name: "built-in".into(), text: BUILT_IN.into() }
    }

    /// Reads a text file.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Invalid`] if it is not UTF-8.
    pub fn file(path: &std::path::Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
        let text = String::from_utf8(bytes)
            .map_err(|_| Error::invalid(format!("{} is not UTF-8 text", path.display())))?;
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Self { name, text })
    }

    /// The text of a recipe: the file that it names, or the built-in text.
    ///
    /// # Errors
    /// As for [`CalibrationText::file`].
    pub fn of(options: &Calibration) -> Result<Self> {
        match &options.text {
            Some(path) => Self::file(std::path::Path::new(path)),
            None => Ok(Self::built_in()),
        }
    }

    /// Describes name, SHA-256 and windows of the text, so that a conversion can be repeated.
    #[must_use]
    pub fn describe(&self, options: &Calibration, length: usize) -> String {
        let documents = match &options.separator {
            Some(separator) => format!(", documents separated by {separator:?}"),
            None => String::new(),
        };
        let draw = if options.draw == Draw::Python { " of Python" } else { "" };
        format!(
            "{} sha256:{}{documents}, {} windows of {length} tokens, seed {}{draw}",
            self.name,
            digest(self.text.as_bytes()),
            options.samples,
            options.seed
        )
    }

    /// Random windows of `length` tokens from the part of the text that is not held back.
    ///
    /// # Errors
    /// [`Error::Usage`] if the text is too short.
    pub fn windows(
        &self,
        tokenizer: &Tokenizer,
        options: &Calibration,
        length: usize,
    ) -> Result<Vec<Vec<u32>>> {
        let mut tokens = self.tokens(tokenizer, options.separator.as_deref())?;
        tokens.truncate(tokens.len() - self.held_back(options, tokens.len()));
        let too_short = || {
            Error::usage(format!(
                "the calibration text has {} tokens for calibration, a sequence needs {length}: give a longer \
                 text or a smaller --calib-len",
                tokens.len()
            ))
        };
        let starts = tokens.len().checked_sub(length).ok_or_else(too_short)? as u64;
        let window = |start: u64| tokens[start as usize..start as usize + length].to_vec();
        match options.draw {
            Draw::Pcg => {
                let mut random = Pcg64Mcg::seed_from_u64(options.seed);
                let start = |_| random.next_u64() % (starts + 1);
                Ok((0..options.samples).map(start).map(window).collect())
            }
            Draw::Python => {
                // `random.randint(0, n - length - 1)`: the last start is never drawn.
                let starts = u32::try_from(starts).ok().filter(|n| *n > 0).ok_or_else(too_short)?;
                let mut random = PythonRandom::new(options.seed);
                let start = |_| u64::from(random.below(starts));
                Ok((0..options.samples).map(start).map(window).collect())
            }
        }
    }

    /// The last part of the text, as windows of at most `context` tokens. If windows of a file are drawn as Python
    /// draws them, all of it is for calibration, as in the programs whose results this repeats, and the held-out
    /// windows come from the built-in text.
    ///
    /// # Errors
    /// [`Error::Usage`] if the text is too short.
    pub fn held_out(
        &self,
        tokenizer: &Tokenizer,
        options: &Calibration,
        context: usize,
    ) -> Result<HeldOut> {
        if self.is_all_for_calibration(options) {
            let options = Calibration { separator: None, ..options.clone() };
            return Self::built_in().held_out(tokenizer, &options, context);
        }
        let tokens = self.tokens(tokenizer, options.separator.as_deref())?;
        let held = self.held_back(options, tokens.len());
        let length = HELD_OUT_WINDOW.min(context).min(held / 2);
        if length < 2 {
            return Err(Error::usage(format!(
                "the calibration text has {} tokens, too few to hold some back for measuring the file: give a \
                 longer text, or --no-check",
                tokens.len()
            )));
        }
        let windows = tokens[tokens.len() - held..].chunks_exact(length).map(<[u32]>::to_vec);
        let text = format!("{} sha256:{}", self.name, digest(self.text.as_bytes()));
        Ok(HeldOut { windows: windows.collect(), text })
    }

    /// The number of tokens at the end of the text, of `all`, that are held back from calibration.
    fn held_back(&self, options: &Calibration, all: usize) -> usize {
        match self.is_all_for_calibration(options) {
            true => 0,
            false => (all / HELD_OUT_SHARE).min(HELD_OUT_TOKENS),
        }
    }

    fn is_all_for_calibration(&self, options: &Calibration) -> bool {
        options.draw == Draw::Python && self.text != BUILT_IN
    }

    /// The tokens of the text; with a separator, of its documents, concatenated.
    fn tokens(&self, tokenizer: &Tokenizer, separator: Option<&str>) -> Result<Vec<u32>> {
        let Some(separator) = separator.filter(|s| !s.is_empty()) else {
            return tokenizer.encode_prompt(&self.text);
        };
        let documents: Vec<&str> =
            self.text.split(separator).map(str::trim).filter(|d| !d.is_empty()).collect();
        let parts: Vec<Vec<u32>> =
            documents.par_iter().map(|d| tokenizer.encode_prompt(d)).collect::<Result<_>>()?;
        Ok(parts.concat())
    }
}

/// `random.seed(n)` and `random.randrange(n)` of Python 3.2 and newer.
struct PythonRandom(rand_mt::Mt);

impl PythonRandom {
    fn new(seed: u64) -> Self {
        // 32-bit words of the seed, least significant first; a zero high word is dropped.
        let words = [seed as u32, (seed >> 32) as u32];
        let used = if words[1] == 0 { 1 } else { 2 };
        Self(rand_mt::Mt::new_with_key(words.into_iter().take(used)))
    }

    /// A random integer below `n`, which is at least 1.
    fn below(&mut self, n: u32) -> u32 {
        let bits = u32::BITS - n.leading_zeros();
        loop {
            let value = self.0.next_u32() >> (u32::BITS - bits);
            if value < n {
                return value;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The windows of calibration come from all of the text but its end, which is held out.
    #[test]
    fn held_out_windows_share_no_token_with_calibration() {
        let model =
            std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models/quill-4m");
        let engine = stb_runtime::Engine::open(&model, &stb_runtime::OpenOptions::default());
        let tokenizer = engine.unwrap().model.tokenizer().unwrap();
        let text = |text: &str| CalibrationText { name: "a text".into(), text: text.into() };
        let built_in = CalibrationText::built_in();
        for (source, window) in [(built_in.clone(), 300), (text(&BUILT_IN[..4000]), 40)] {
            for draw in [Draw::Pcg, Draw::Python] {
                let options = Calibration { draw, samples: 1, ..Calibration::default() };
                let held = source.held_out(&tokenizer, &options, window).unwrap();
                let all = source.tokens(&tokenizer, None).unwrap();
                let held_tokens = held.windows.concat();
                if draw == Draw::Python && source.text != BUILT_IN {
                    // All of the file is for calibration.
                    assert!(held.text.starts_with("built-in sha256:"), "{}", held.text);
                    continue;
                }
                assert!(held.text.starts_with(&source.name), "{}", held.text);
                assert!(held.windows.len() >= 2 && held.windows[0].len() <= window);
                assert!(held.windows.iter().all(|w| w.len() == held.windows[0].len()));
                let back = (all.len() / HELD_OUT_SHARE).min(HELD_OUT_TOKENS);
                assert!(held_tokens.len() * 10 >= back * 9, "{} of {back}", held_tokens.len());
                let front = all.len() - back;
                assert!(all[front..].starts_with(&held_tokens));
                // Python never draws the last start.
                let longest = front - usize::from(draw == Draw::Python);
                let window = &source.windows(&tokenizer, &options, longest).unwrap()[0];
                assert_eq!(window[..], all[..longest]);
                assert!(source.windows(&tokenizer, &options, longest + 1).is_err());
            }
        }
        let short = text("Once").held_out(&tokenizer, &Calibration::default(), 64);
        assert!(short.unwrap_err().to_string().contains("--no-check"));
    }

    /// `random.seed(0); [random.randint(0, 99999) for _ in range(5)]` and so on, from Python 3.
    #[test]
    fn python_draws() {
        let draw = |seed: u64, n: u32| {
            let mut random = PythonRandom::new(seed);
            [(); 5].map(|()| random.below(n))
        };
        assert_eq!(draw(0, 100_000), [50494, 99346, 55125, 5306, 33936]);
        assert_eq!(draw((1 << 40) + 7, 256), [243, 128, 64, 192, 185]);
    }
}
