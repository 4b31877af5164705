//! How close a file is to the model that it was made from: the keys `quality.*` (spec, metadata §2.8).

use crate::error::Result;
use crate::meta::{Meta, MetaView, Value, ValueRef};

/// The verdict on a file. It follows from the KL divergence from the original model alone ([`Verdict::of`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// Close to the original: the answers are of the same kind.
    Close,
    /// Noticeably worse than the original.
    Worse,
    /// Much worse than the original: simple questions are still answered.
    Poor,
    /// Broken: the text is nonsense.
    Broken,
    /// Nobody has measured.
    Unchecked,
}

/// The verdicts that have a limit, with the divergence in nats per token below which they hold; above the last limit
/// a file is broken. SmolLM2-135M-Instruct answers as before at 0.18, still answers simple questions at 0.82, and
/// writes nonsense at 1.47.
const LIMITS: [(Verdict, f64); 3] =
    [(Verdict::Close, 0.1), (Verdict::Worse, 0.5), (Verdict::Poor, 1.0)];

/// Names in files, and phrases for people.
const NAMES: [(Verdict, &str, &str); 5] = [
    (Verdict::Close, "close", "close to the original"),
    (Verdict::Worse, "worse", "noticeably worse than the original"),
    (Verdict::Poor, "poor", "much worse than the original"),
    (Verdict::Broken, "broken", "broken"),
    (Verdict::Unchecked, "unchecked", "not checked"),
];

impl Verdict {
    /// The verdict on a file with a mean KL divergence of `kl` nats per token from the original model.
    #[must_use]
    pub fn of(kl: f64) -> Self {
        let found = LIMITS.iter().find(|(_, limit)| kl < *limit);
        found.map_or(Self::Broken, |(verdict, _)| *verdict)
    }

    /// The divergence, in nats per token, below which a file is not broken.
    #[must_use]
    pub fn broken_limit() -> f64 {
        LIMITS.iter().map(|(_, limit)| *limit).fold(0.0, f64::max)
    }

    /// The value of `quality.verdict`.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.texts().0
    }

    /// A phrase for people.
    #[must_use]
    pub fn phrase(self) -> &'static str {
        self.texts().1
    }

    fn texts(self) -> (&'static str, &'static str) {
        let found = NAMES.iter().find(|(verdict, ..)| *verdict == self);
        found.map_or(("", ""), |(_, name, phrase)| (name, phrase))
    }

    fn from_name(name: &str) -> Option<Self> {
        NAMES.iter().find(|(_, known, _)| *known == name).map(|(verdict, ..)| *verdict)
    }
}

/// A mean over windows of a text.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Figure {
    /// The mean.
    pub value: f64,
    /// One standard error over windows; `None` for a single window.
    pub error: Option<f64>,
}

/// What has been measured with a file, on a text that was not used to make it.
#[derive(Clone, Debug, PartialEq)]
pub struct QualityFigures {
    /// KL divergence of the predictions from those of the original model, in nats per token.
    pub kl: Figure,
    /// Share of tokens for which both models have the same most likely prediction.
    pub top1: Figure,
    /// Perplexity of the file.
    pub perplexity: Figure,
    /// Perplexity of the original model.
    pub source_perplexity: Figure,
    /// Tokens predicted.
    pub tokens: u64,
    /// Windows of the text; every token is predicted from those before it in its window.
    pub windows: u64,
    /// Name and SHA-256 of the text.
    pub text: String,
}

/// The verdict on a file, with the figures that it follows from.
#[derive(Clone, Debug, PartialEq)]
pub struct Quality {
    /// The verdict.
    pub verdict: Verdict,
    /// What was measured; `None` if nobody has measured, or if the predictions were not finite.
    pub figures: Option<QualityFigures>,
}

/// The key of the verdict.
const VERDICT: &str = "quality.verdict";
/// The key of the text.
const TEXT: &str = "quality.text";

impl Quality {
    /// A file that nobody has measured.
    #[must_use]
    pub fn unchecked() -> Self {
        Self { verdict: Verdict::Unchecked, figures: None }
    }

    /// The verdict that follows from `figures`.
    #[must_use]
    pub fn measured(figures: QualityFigures) -> Self {
        Self { verdict: Verdict::of(figures.kl.value), figures: Some(figures) }
    }

    /// The quality that takes most bytes in a file, for figures on a text with this description.
    #[must_use]
    pub fn longest(text: &str) -> Self {
        let figure = Figure { value: 0.0, error: Some(0.0) };
        let figures = QualityFigures {
            kl: figure,
            top1: figure,
            perplexity: figure,
            source_perplexity: figure,
            tokens: 0,
            windows: 0,
            text: text.to_owned(),
        };
        Self { verdict: Verdict::Unchecked, figures: Some(figures) }
    }

    /// The quality that a file states; `None` if it has none, or a verdict of a later revision.
    #[must_use]
    pub fn read(meta: &MetaView<'_>) -> Option<Self> {
        let verdict = Verdict::from_name(meta.text(VERDICT)?)?;
        Some(Self { verdict, figures: read_figures(meta) })
    }

    /// Sets the keys `quality.*` of `meta`, and removes those that do not apply.
    ///
    /// # Errors
    /// The rule that a value breaks: figures have to be finite.
    pub fn write(&self, meta: &mut Meta) -> Result<()> {
        meta.remove_prefix("quality.");
        meta.set(VERDICT, Value::Text(self.verdict.name().to_owned()))?;
        let Some(figures) = &self.figures else { return Ok(()) };
        for (name, figure) in [
            ("kl", figures.kl),
            ("top1", figures.top1),
            ("perplexity", figures.perplexity),
            ("source_perplexity", figures.source_perplexity),
        ] {
            meta.set(&format!("quality.{name}"), Value::F64(figure.value))?;
            if let Some(error) = figure.error {
                meta.set(&format!("quality.{name}_error"), Value::F64(error))?;
            }
        }
        meta.set("quality.tokens", Value::U64(figures.tokens))?;
        meta.set("quality.windows", Value::U64(figures.windows))?;
        meta.set(TEXT, Value::Text(figures.text.clone()))
    }
}

/// The figures; `None` if one of them is missing or has another type.
fn read_figures(meta: &MetaView<'_>) -> Option<QualityFigures> {
    let number = |key: String| match meta.get(&key) {
        Some(ValueRef::F64(value)) => Some(value),
        _ => None,
    };
    let figure = |name: &str| {
        let value = number(format!("quality.{name}"))?;
        Some(Figure { value, error: number(format!("quality.{name}_error")) })
    };
    let count = |key: &str| match meta.get(key) {
        Some(ValueRef::U64(value)) => Some(value),
        _ => None,
    };
    Some(QualityFigures {
        kl: figure("kl")?,
        top1: figure("top1")?,
        perplexity: figure("perplexity")?,
        source_perplexity: figure("source_perplexity")?,
        tokens: count("quality.tokens")?,
        windows: count("quality.windows")?,
        text: meta.text(TEXT)?.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts_follow_from_the_divergence() {
        for (kl, verdict) in [
            (0.0, Verdict::Close),
            (0.0999, Verdict::Close),
            (0.1, Verdict::Worse),
            (0.5, Verdict::Poor),
            (1.0, Verdict::Broken),
            (f64::INFINITY, Verdict::Broken),
            (f64::NAN, Verdict::Broken),
        ] {
            assert_eq!(Verdict::of(kl), verdict, "{kl}");
        }
        assert_eq!(Verdict::broken_limit(), 1.0);
    }

    #[test]
    fn every_quality_survives_writing() {
        let read = |quality: &Quality| {
            let mut meta = Meta::new();
            // Keys of an earlier measurement do not stay.
            Quality::longest("an older text").write(&mut meta).unwrap();
            quality.write(&mut meta).unwrap();
            let bytes = meta.to_bytes().unwrap();
            Quality::read(&MetaView::parse(&bytes, 0, 2).unwrap())
        };
        let figure = |value| Figure { value, error: Some(value / 9.0) };
        let figures = QualityFigures {
            kl: figure(0.3),
            top1: Figure { value: 0.75, error: None },
            perplexity: figure(21.0),
            source_perplexity: figure(17.5),
            tokens: 4088,
            windows: 8,
            text: "a text".into(),
        };
        let measured = Quality::measured(figures);
        assert_eq!(measured.verdict, Verdict::Worse);
        let broken = Quality { verdict: Verdict::Broken, figures: None };
        for quality in [measured, broken, Quality::unchecked(), Quality::longest("t")] {
            assert_eq!(read(&quality), Some(quality));
        }
        let mut longest = Meta::new();
        Quality::longest("text").write(&mut longest).unwrap();
        for (verdict, ..) in NAMES {
            let mut meta = Meta::new();
            Quality { verdict, ..Quality::longest("text") }.write(&mut meta).unwrap();
            assert!(meta.len() <= longest.len());
        }
    }

    #[test]
    fn what_is_unknown_counts_as_absent() {
        let mut meta = Meta::new();
        Quality::longest("t").write(&mut meta).unwrap();
        let read =
            |meta: &Meta| Quality::read(&MetaView::parse(&meta.to_bytes().unwrap(), 0, 2).unwrap());
        meta.set("quality.kl", Value::U64(1)).unwrap();
        assert_eq!(read(&meta), Some(Quality::unchecked()));
        meta.set(VERDICT, Value::Text("splendid".into())).unwrap();
        assert_eq!(read(&meta), None);
        assert_eq!(read(&Meta::new()), None);
        assert!(Quality::longest("t").write(&mut meta).is_ok());
        let mut infinite = Quality::longest("t");
        infinite.figures.as_mut().unwrap().kl.value = f64::INFINITY;
        assert!(infinite.write(&mut meta).is_err());
    }
}
