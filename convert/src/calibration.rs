//! Calibration sequences: windows of a text.

use rand_core::{RngCore, SeedableRng};
use rand_pcg::Pcg64Mcg;
use sha2::{Digest, Sha256};
use stb_runtime::{Error, Result, Tokenizer};

use crate::recipe::Calibration;

/// Public-domain English of several kinds, part of the program. See `data/README.md`.
pub const BUILT_IN: &str = include_str!("../data/calibration.txt");

/// A text and where it is from.
#[derive(Clone, Debug)]
pub struct Source {
    /// `built-in` or the name of a file.
    pub name: String,
    /// The text.
    pub text: String,
}

impl Source {
    /// The text that ships with the program.
    #[must_use]
    pub fn built_in() -> Self {
        Self { name: "built-in".into(), text: BUILT_IN.into() }
    }

    /// A file of the user's.
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

    /// Name, SHA-256 and use of the text: what makes a conversion repeatable.
    #[must_use]
    pub fn describe(&self, options: &Calibration, length: usize) -> String {
        format!(
            "{} sha256:{}, {} windows of {length} tokens, seed {}",
            self.name,
            hex(&Sha256::digest(self.text.as_bytes())),
            options.samples,
            options.seed
        )
    }

    /// Random windows of `length` tokens.
    ///
    /// # Errors
    /// [`Error::Usage`] if the text is too short.
    pub fn windows(
        &self,
        tokenizer: &Tokenizer,
        options: &Calibration,
        length: usize,
    ) -> Result<Vec<Vec<u32>>> {
        let tokens = tokenizer.encode_prompt(&self.text)?;
        let Some(starts) = tokens.len().checked_sub(length) else {
            return Err(Error::usage(format!(
                "the calibration text has {} tokens, a sequence needs {length}: give a longer text \
                 or a smaller --calib-len",
                tokens.len()
            )));
        };
        let mut random = Pcg64Mcg::seed_from_u64(options.seed);
        let mut window = || {
            let start = (random.next_u64() % (starts as u64 + 1)) as usize;
            tokens[start..start + length].to_vec()
        };
        Ok((0..options.samples).map(|_| window()).collect())
    }
}

/// Lower-case hexadecimal digits.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
