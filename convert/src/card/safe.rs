//! Text from strangers within Markdown and YAML: it stays the text that it is, and cannot become markup.

use crate::inspect::printable;

/// The largest number of characters of a text within a line.
const MAX_LINE: usize = 200;
/// The largest number of characters of a text of several lines.
const MAX_BLOCK: usize = 8192;

/// `text` on one line, as code. Backticks, which would end the code, and bars, which would end the cell of a table, are
/// escaped as characters that steer a terminal are.
pub(super) fn code(text: &str) -> String {
    let short: String = text.trim().chars().take(MAX_LINE).collect();
    let cut = if text.trim().len() > short.len() { "…" } else { "" };
    let line = printable(&short).replace('`', "\\u{60}").replace('|', "\\u{7c}");
    // Two backticks with nothing between them begin a longer code.
    if line.is_empty() { "(empty)".into() } else { format!("`{line}{cut}`") }
}

/// `text` on one line, with a backslash before whatever may be markup.
pub(super) fn plain(text: &str) -> String {
    let short: String = text.trim().chars().take(MAX_LINE).collect();
    let mut out = String::new();
    for c in printable(&short).chars() {
        if c.is_ascii_punctuation() && !matches!(c, '-' | '.' | ',') {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

/// `text` as a block of code in the language `language`. Its fence is longer than any row of backticks in the text.
pub(super) fn block(language: &str, text: &str) -> String {
    let short: String = text.trim().chars().take(MAX_BLOCK).collect();
    let cut = if text.trim().len() > short.len() { "\n…" } else { "" };
    let lines = short.lines().map(|line| {
        let visible = |c: char| match c {
            '\\' | '"' | '\'' => c,
            c if c.escape_debug().count() == 1 => c,
            _ => char::REPLACEMENT_CHARACTER,
        };
        line.chars().map(visible).collect::<String>()
    });
    let text = lines.collect::<Vec<_>>().join("\n") + cut;
    let longest = text.split(|c| c != '`').map(str::len).max().unwrap_or(0);
    let fence = "`".repeat(longest.max(2) + 1);
    format!("{fence}{language}\n{text}\n{fence}\n")
}

/// `text` as a string of YAML, which has all that JSON has.
pub(super) fn yaml(text: &str) -> String {
    let short: String = text.trim().chars().take(MAX_LINE).collect();
    serde_json::Value::from(printable(&short)).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_stays_on_its_line_and_within_its_marks() {
        assert_eq!(code("a-b_c.safetensors"), "`a-b_c.safetensors`");
        assert_eq!(code("a`b|c\n# d\u{202e}"), r"`a\u{60}b\u{7c}c\n# d\u{202e}`");
        assert_eq!(code(" \n "), "(empty)");
        assert_eq!(code(&"x".repeat(1000)).chars().count(), MAX_LINE + 3);
        assert_eq!(plain("SmolLM2-135M_[x](y) <b>"), r"SmolLM2-135M\_\[x\]\(y\) \<b\>");
        assert_eq!(plain("a\n---\nb"), r"a\\n---\\nb");
        assert_eq!(yaml("a\": b\nlicense: mit\u{2028}x"), r#""a\": b\\nlicense: mit\\u{2028}x""#);
    }

    #[test]
    fn a_block_cannot_be_ended_from_within() {
        assert_eq!(block("toml", "a = 1\n\nb = '\\'\n"), "```toml\na = 1\n\nb = '\\'\n```\n");
        let hostile = block("toml", "x\r\n````\n# title\u{1b}[2J\n\u{2028}");
        assert_eq!(hostile, "`````toml\nx\n````\n# title\u{fffd}[2J\n`````\n");
        let long = block("", &"y\n".repeat(100_000));
        assert!(long.len() < 2 * MAX_BLOCK && long.ends_with("…\n```\n"), "{}", long.len());
    }
}
