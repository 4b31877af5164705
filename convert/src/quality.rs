//! The quality of a converted file in words and numbers, for reports.

use serde::{Deserialize, Serialize};
use stb_format::{Quality, Verdict};

use crate::calibration::text_name;

/// The quality of a file, as in reports.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct QualityReport {
    /// `close`, `worse`, `poor`, `broken` or `unchecked`.
    pub verdict: String,
    /// The verdict in words.
    pub meaning: String,
    /// The figures; absent if nobody has measured, or if the predictions were not finite.
    #[serde(default, flatten, skip_serializing_if = "Option::is_none")]
    pub figures: Option<ReportedFigures>,
}

/// The figures of a check. Standard errors are over windows; absent for a single window.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReportedFigures {
    /// KL divergence from the original model, in nats per token.
    pub kl: f64,
    /// One standard error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kl_standard_error: Option<f64>,
    /// Share of tokens for which both models have the same most likely prediction.
    pub top1: f64,
    /// One standard error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top1_standard_error: Option<f64>,
    /// Perplexity of the file.
    pub perplexity: f64,
    /// One standard error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub perplexity_standard_error: Option<f64>,
    /// Perplexity of the original model.
    pub source_perplexity: f64,
    /// One standard error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_perplexity_standard_error: Option<f64>,
    /// Tokens predicted.
    pub tokens: u64,
    /// Windows of the text.
    pub windows: u64,
    /// Name and SHA-256 of the text.
    pub text: String,
}

impl From<&Quality> for QualityReport {
    fn from(quality: &Quality) -> Self {
        let figures = quality.figures.as_ref().map(|f| ReportedFigures {
            kl: f.kl.value,
            kl_standard_error: f.kl.error,
            top1: f.top1.value,
            top1_standard_error: f.top1.error,
            perplexity: f.perplexity.value,
            perplexity_standard_error: f.perplexity.error,
            source_perplexity: f.source_perplexity.value,
            source_perplexity_standard_error: f.source_perplexity.error,
            tokens: f.tokens,
            windows: f.windows,
            text: f.text.clone(),
        });
        let (verdict, meaning) = (quality.verdict.name().into(), quality.verdict.phrase().into());
        Self { verdict, meaning, figures }
    }
}

/// `value ± standard error`; without the error if it is unknown.
pub(crate) fn plus_minus(value: f64, error: Option<f64>, digits: usize) -> String {
    match error {
        Some(error) => format!("{value:.digits$} ± {error:.digits$}"),
        None => format!("{value:.digits$}"),
    }
}

impl QualityReport {
    /// One line: the verdict and the figures. The name of the text may hold anything, also control characters.
    #[must_use]
    pub fn line(&self) -> String {
        let Some(f) = &self.figures else {
            return match self.is_broken() {
                true => format!("{}: its predictions are not finite", self.meaning),
                false => self.meaning.clone(),
            };
        };
        let percent = |share: f64| 100.0 * share;
        // The SHA-256 is in the metadata.
        let name = text_name(&f.text);
        format!(
            "{}: KL divergence {} nats per token, same top token {} %, perplexity {} (original {}), on {} tokens of \
             {name} that calibration has not seen",
            self.meaning,
            plus_minus(f.kl, f.kl_standard_error, 4),
            plus_minus(percent(f.top1), f.top1_standard_error.map(percent), 1),
            plus_minus(f.perplexity, f.perplexity_standard_error, 2),
            plus_minus(f.source_perplexity, f.source_perplexity_standard_error, 2),
            f.tokens
        )
    }

    /// Whether the file is broken.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.verdict == Verdict::Broken.name()
    }

    /// The KL divergence in nats per token; `None` if it was not measured or is not finite.
    #[must_use]
    pub fn kl(&self) -> Option<f64> {
        self.figures.as_ref().map(|figures| figures.kl)
    }
}

/// A question and the answers to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AnswerPair {
    /// The question.
    pub question: String,
    /// The answer of the dense model, cut off after a few tokens.
    pub source: String,
    /// The answer of the file, cut off after a few tokens.
    pub file: String,
}
