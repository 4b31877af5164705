//! Calibration sequences: windows of a text.
//!
//! A text is a list of documents, by kind. Each is a sequence of tokens; chats are rendered by the model's own template.
//! Windows are cut from the stream of all documents in a random order (`stream`), so that they do not overlap until
//! the text is used up. A part of the text is held out: it is only for measurements.

mod built_in;
mod document;
mod python;
mod stream;

use document::{Document, Line, split_text};
use stb_runtime::{Error, Model, Result, is_json_lines, read_text};

pub(crate) use self::document::DocumentEncoder;
use self::stream::Stream;
use crate::digest::digest;
use crate::recipe::{Calibration, Draw};

/// The name for a text that the model itself writes, in place of a file.
pub const SELF_WRITTEN: &str = "self";
/// One in this many documents, or the last part of a file in this proportion, is held out.
const HELD_OUT: usize = 10;
/// From this many bytes on, a part of a file is held out.
const LONG_FILE: usize = 32 << 10;
/// The tokens on which a file is measured. 4096 tokens give the KL divergence to a few per cent, and cost little
/// against the 32 768 tokens of the default calibration, which run through the layers several times.
pub(crate) const HELD_OUT_TOKENS: usize = 4096;
/// The most tokens of a window on which a file is measured. Longer windows would be fewer, and the standard errors,
/// which are over windows, less certain.
pub(crate) const HELD_OUT_WINDOW: usize = 512;
/// Held-out windows are shortened rather than fewer.
const FEWEST: usize = 4;
/// Tokens with which a text that the model writes begins.
const OPENING: usize = 8;

/// A text for calibration and its source.
#[derive(Clone, Debug)]
pub struct CalibrationText {
    /// `built-in`, `self` or the name of a file.
    pub name: String,
    content: Content,
    /// The SHA-256 of the text.
    hash: String,
}

/// Where the documents are.
#[derive(Clone, Debug)]
enum Content {
    /// In the program.
    BuiltIn,
    /// A text file.
    Text(String),
    /// The lines of a `.jsonl` file.
    Lines(Vec<Line>),
    /// Sequences of tokens that the model has written.
    Written(Vec<Vec<u32>>),
}

/// Windows of a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drawn {
    /// The windows, of one length.
    pub windows: Vec<Vec<u32>>,
    /// The first `fresh` of them come before the text is used up; later ones repeat parts of it, cut elsewhere.
    pub fresh: usize,
}

/// Windows for measurements: no token of them is in a window of the same text for calibration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldOut {
    /// The windows, all of one length of at least 2 tokens, which do not overlap.
    pub windows: Vec<Vec<u32>>,
    /// Name and SHA-256 of the text: `NAME sha256:DIGITS`.
    pub text: String,
}

impl HeldOut {
    /// The name of the text.
    #[must_use]
    pub fn name(&self) -> &str {
        text_name(&self.text)
    }
}

/// The name in a description of a text, `NAME sha256:DIGITS`.
pub(crate) fn text_name(text: &str) -> &str {
    text.split(" sha256:").next().unwrap_or_default()
}

/// The documents of each kind, for calibration and held out.
struct Split<'a> {
    calibration: Vec<Vec<Document<'a>>>,
    held_out: Vec<Vec<Document<'a>>>,
}

impl CalibrationText {
    /// The text that ships with the program.
    #[must_use]
    pub fn built_in() -> Self {
        let hash = built_in::hash().to_owned();
        Self { name: "built-in".into(), content: Content::BuiltIn, hash }
    }

    /// Reads a text file, or a `.jsonl` file whose lines are chats or texts.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Invalid`] if it is not UTF-8 or has a line of another form.
    pub fn file(path: &std::path::Path) -> Result<Self> {
        let text = read_text(path)?;
        let hash = digest(&text);
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let content = match is_json_lines(path) {
            true => Content::Lines(Line::parse(&text, &name)?),
            false => Content::Text(text),
        };
        Ok(Self { name, content, hash })
    }

    /// The text of a recipe: the file that it names, or the built-in text.
    ///
    /// # Errors
    /// As for [`CalibrationText::file`]; [`Error::Usage`] for a text that the model is to write.
    pub fn of(options: &Calibration) -> Result<Self> {
        match options.text.as_deref() {
            Some(SELF_WRITTEN) => Err(Error::usage(
                "a text that the model itself writes (self) is only for `stb-convert SRC OUT`; name a file, which may \
                 be called ./self",
            )),
            Some(path) => Self::file(std::path::Path::new(path)),
            None => Ok(Self::built_in()),
        }
    }

    /// A text that the model has written, as sequences of tokens.
    #[must_use]
    pub(crate) fn written(sequences: Vec<Vec<u32>>) -> Self {
        let bytes: Vec<u8> = sequences.iter().flatten().flat_map(|t| t.to_le_bytes()).collect();
        let hash = digest(bytes);
        Self { name: SELF_WRITTEN.into(), content: Content::Written(sequences), hash }
    }

    /// A text that the model would write, to compute the size of a file that names it.
    #[must_use]
    pub fn unwritten() -> Self {
        Self::written(Vec::new())
    }

    /// The SHA-256 of the text in hexadecimal digits.
    #[must_use]
    pub fn hash(&self) -> &str {
        &self.hash
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
            self.name, self.hash, options.samples, options.seed
        )
    }

    /// The windows of a calibration: the first `samples`, of `length` tokens.
    ///
    /// # Errors
    /// [`Error::Usage`] if the text is shorter than a window; [`Error::Invalid`] if the tokenizer fails.
    pub fn windows(
        &self,
        model: &Model,
        options: &Calibration,
        length: usize,
    ) -> Result<Vec<Vec<u32>>> {
        Ok(self.draw(model, options, length, 0, options.samples)?.windows)
    }

    /// Windows number `first..first + count` of `length` tokens.
    ///
    /// # Errors
    /// As for [`CalibrationText::windows`].
    pub fn draw(
        &self,
        model: &Model,
        options: &Calibration,
        length: usize,
        first: usize,
        count: usize,
    ) -> Result<Drawn> {
        let encoder = DocumentEncoder::new(model)?;
        let kinds = self.split(options).calibration;
        if options.draw == Draw::Python {
            let documents = kinds.into_iter().flatten();
            let tokens: Vec<Vec<u32>> =
                documents.map(|document| encoder.encode(document)).collect::<Result<_>>()?;
            let windows = python::windows(&tokens.concat(), options.seed, length, first, count)?;
            return Ok(Drawn { windows, fresh: count });
        }
        Stream { kinds, seed: options.seed }.windows(&encoder, length, first, count)
    }

    /// At most `count` of the windows of a calibration, evenly spaced, so that they have all kinds of documents; the
    /// first ones if they are drawn as in Python, where each is random.
    ///
    /// # Errors
    /// As for [`CalibrationText::windows`].
    pub fn sample(
        &self,
        model: &Model,
        options: &Calibration,
        length: usize,
        count: usize,
    ) -> Result<Vec<Vec<u32>>> {
        let mut windows = self.windows(model, options, length)?;
        if options.draw == Draw::Pcg && count > 0 {
            let all = windows.len();
            let chosen = (0..count.min(all)).map(|i| i * all / count.min(all));
            return Ok(chosen.map(|i| std::mem::take(&mut windows[i])).collect());
        }
        windows.truncate(count);
        Ok(windows)
    }

    /// At most `count` windows of at most `length` tokens for measurements, the same for every seed, and shorter ones
    /// rather than fewer than four. They come from the part of the text that calibration does not use; from that
    /// part of the built-in text if all of a file is used, because it is short or its windows are drawn as in Python.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the tokenizer fails, or makes no tokens of the built-in text.
    pub fn held_out(
        &self,
        model: &Model,
        options: &Calibration,
        length: usize,
        count: usize,
    ) -> Result<HeldOut> {
        let encoder = DocumentEncoder::new(model)?;
        let built_in = Self::built_in();
        for (source, options) in [(self, options), (&built_in, &Calibration::default())] {
            let stream = Stream { kinds: source.split(options).held_out, seed: 0 };
            let length = length.min(stream.tokens(&encoder, length * FEWEST)? / FEWEST);
            if length >= 2 {
                let mut drawn = stream.windows(&encoder, length, 0, count)?;
                drawn.windows.truncate(drawn.fresh);
                let text = format!("{} sha256:{}", source.name, source.hash);
                return Ok(HeldOut { windows: drawn.windows, text });
            }
        }
        Err(Error::invalid("the tokenizer makes no tokens of the built-in text"))
    }

    /// The documents for calibration and those that are held out.
    fn split(&self, options: &Calibration) -> Split<'_> {
        let file = match &self.content {
            Content::BuiltIn => return every_tenth(built_in::kinds()),
            Content::Written(sequences) => {
                let documents = sequences.iter().map(|s| Document::Tokens(s)).collect();
                return every_tenth(vec![documents]);
            }
            Content::Text(text) => split_text(text, options.separator.as_deref()),
            Content::Lines(lines) => lines.iter().map(Line::document).collect(),
        };
        match options.draw {
            Draw::Pcg => last_part(file),
            Draw::Python => Split { calibration: vec![file], held_out: Vec::new() },
        }
    }
}

/// The openings of texts that a model is to write: of the documents of the built-in text, in a random order.
pub(crate) struct Openings(Stream<'static>);

impl Openings {
    /// The openings in the order of `seed`.
    pub(crate) fn new(seed: u64) -> Self {
        Self(Stream { kinds: every_tenth(built_in::kinds()).calibration, seed })
    }

    /// The openings of all documents as tokens: chats begin with a question, texts with a few tokens, more of them in
    /// each `pass` over the documents.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the tokenizer fails.
    pub(crate) fn pass(&self, encoder: &DocumentEncoder, pass: usize) -> Result<Vec<Vec<u32>>> {
        let count = OPENING.saturating_mul(pass + 1);
        let documents = self.0.order(pass, usize::MAX);
        documents.into_iter().map(|document| encoder.opening(document, count)).collect()
    }
}

/// Holds out one in ten documents of each kind.
fn every_tenth(kinds: Vec<Vec<Document<'_>>>) -> Split<'_> {
    let mut split = Split { calibration: Vec::new(), held_out: Vec::new() };
    for documents in kinds {
        let (mut calibration, mut held_out) = (Vec::new(), Vec::new());
        for (i, document) in documents.into_iter().enumerate() {
            let is_held_out = i % HELD_OUT == HELD_OUT - 1;
            if is_held_out { held_out.push(document) } else { calibration.push(document) }
        }
        split.calibration.push(calibration);
        split.held_out.push(held_out);
    }
    split
}

/// Holds out the last tenth of the documents of a file; nothing if it is short. A text across the border is split.
fn last_part(documents: Vec<Document<'_>>) -> Split<'_> {
    let size: usize = documents.iter().map(Document::size).sum();
    if size < LONG_FILE {
        return Split { calibration: vec![documents], held_out: Vec::new() };
    }
    let border = size - size / HELD_OUT;
    let (mut calibration, mut held_out, mut done) = (Vec::new(), Vec::new(), 0);
    for document in documents {
        let size = document.size();
        if done >= border {
            held_out.push(document);
        } else if done + size > border
            && let Some((head, tail)) = document.split(border - done)
        {
            calibration.push(head);
            held_out.push(tail);
        } else {
            calibration.push(document);
        }
        done += size;
    }
    Split { calibration: vec![calibration], held_out: vec![held_out] }
}

/// The error for a text of `tokens` tokens that is shorter than a window of `length`.
fn too_short(tokens: usize, length: usize) -> Error {
    Error::usage(format!(
        "the calibration text has {tokens} tokens, a sequence needs {length}: give a longer text or a smaller --calib-len"
    ))
}
