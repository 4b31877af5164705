//! [`StopFilter`] finds stop texts across the pieces of a stream.

/// Removes stop texts from a stream. Text that may be the beginning of a stop text is held back.
pub(crate) struct StopFilter {
    stops: Vec<String>,
    held: String,
    /// All text that was returned.
    pub released: String,
    /// Whether a stop text has been found.
    pub stopped: bool,
}

impl StopFilter {
    pub fn new(stops: &[String]) -> Self {
        Self { stops: stops.to_vec(), held: String::new(), released: String::new(), stopped: false }
    }

    /// Appends `new` and returns the text that can be shown now.
    pub fn push(&mut self, new: &str) -> String {
        if self.stopped {
            return String::new();
        }
        self.held.push_str(new);
        let found = self.stops.iter().filter(|s| !s.is_empty());
        if let Some(at) = found.filter_map(|s| self.held.find(s.as_str())).min() {
            self.stopped = true;
            self.held.truncate(at);
            return self.release(at);
        }
        let may_start_stop = |at: &usize| {
            let tail = &self.held[*at..];
            self.stops.iter().any(|s| s.starts_with(tail))
        };
        let starts = self.held.char_indices().map(|(at, _)| at);
        let safe = starts.into_iter().find(may_start_stop).unwrap_or(self.held.len());
        self.release(safe)
    }

    /// Returns the text that was held back, at the end of the stream.
    pub fn flush(&mut self) -> String {
        self.release(self.held.len())
    }

    fn release(&mut self, bytes: usize) -> String {
        let text: String = self.held.drain(..bytes).collect();
        self.released.push_str(&text);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let stops: Vec<String> = stops.iter().map(|s| (*s).to_owned()).collect();
        let mut filter = StopFilter::new(&stops);
        let mut shown = String::new();
        for piece in pieces {
            shown.push_str(&filter.push(piece));
        }
        shown.push_str(&filter.flush());
        assert_eq!(shown, filter.released);
        (shown, filter.stopped)
    }

    #[test]
    fn stop_texts_are_found_across_pieces_and_never_shown() {
        assert_eq!(run(&["END"], &["abE", "N", "D more"]), ("ab".into(), true));
        assert_eq!(run(&["END"], &["abE", "Nx"]), ("abENx".into(), false));
        assert_eq!(run(&["aab"], &["aa", "ab"]), ("a".into(), true));
        assert_eq!(run(&["é!"], &["caf", "é", "?"]), ("café?".into(), false));
        assert_eq!(run(&["long stop", "x"], &["lo", "x"]), ("lo".into(), true));
        assert_eq!(run(&[], &["a", "b"]), ("ab".into(), false));
        assert_eq!(run(&["END"], &["abEN"]), ("abEN".into(), false));
    }
}
