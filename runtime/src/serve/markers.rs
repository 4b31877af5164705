//! Finds marker texts in a stream whose pieces may cut them.

/// Text that arrives in pieces.
#[derive(Debug, Default)]
pub(crate) struct Pending {
    text: String,
}

/// What a search for markers gave.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// The text before the first marker, and which marker it is. Both have been removed.
    Marker(String, usize),
    /// Text without a marker, which has been removed. What may begin a marker stays.
    Text(String),
}

impl Pending {
    /// Appends a piece.
    pub fn push(&mut self, piece: &str) {
        self.text.push_str(piece);
    }

    /// Removes the text up to and including the first of `markers`, or all that cannot begin one.
    pub fn until(&mut self, markers: &[&str]) -> Found {
        let first =
            markers.iter().enumerate().filter_map(|(i, m)| Some((self.text.find(m)?, i))).min();
        if let Some((at, which)) = first {
            let before = self.text[..at].to_owned();
            self.text.drain(..at + markers[which].len());
            return Found::Marker(before, which);
        }
        let begins_marker = |at: &usize| markers.iter().any(|m| m.starts_with(&self.text[*at..]));
        let longest = markers.iter().map(|m| m.len()).max().unwrap_or(0);
        let from = self.text.len().saturating_sub(longest);
        let ends = (from..self.text.len()).filter(|at| self.text.is_char_boundary(*at));
        let safe = ends.into_iter().find(begins_marker).unwrap_or(self.text.len());
        Found::Text(self.text.drain(..safe).collect())
    }

    /// The text that is held.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Removes white space at the start.
    pub fn trim_start(&mut self) {
        let spaces = self.text.len() - self.text.trim_start().len();
        self.text.drain(..spaces);
    }

    /// Removes and returns all text.
    pub fn take(&mut self) -> String {
        std::mem::take(&mut self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markers_are_found_across_pieces() {
        let mut pending = Pending::default();
        let text = |t: &str| Found::Text(t.into());
        pending.push("ab<t");
        assert_eq!(pending.until(&["<tag>", "</tag>"]), text("ab"));
        pending.push("a");
        assert_eq!(pending.until(&["<tag>", "</tag>"]), text(""));
        pending.push("g>é");
        assert_eq!(pending.until(&["</tag>", "<tag>"]), Found::Marker(String::new(), 1));
        assert_eq!(pending.until(&["<tag>"]), text("é"));
        pending.push("<<tag");
        assert_eq!(pending.until(&["<tag>"]), text("<"));
        assert_eq!(pending.take(), "<tag");
    }
}
