//! Names that a user may have meant.

/// The names of `candidates` that are nearest to `name`, best first: those that differ by a few letters, and those
/// that one of the two begins with.
#[must_use]
pub fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Vec<&'a str> {
    let name = name.to_lowercase();
    // A third of the letters may be wrong. Longer names than any candidate are not compared, for time.
    let tolerance = (name.chars().count().min(30) + 2) / 3;
    let distance = |candidate: &str| {
        if name.len() >= 2 && (candidate.starts_with(&name) || name.starts_with(candidate)) {
            return Some(0);
        }
        let distance = strsim::damerau_levenshtein(name.get(..64).unwrap_or(&name), candidate);
        (distance <= tolerance).then_some(distance)
    };
    let mut near: Vec<_> = candidates.into_iter().filter_map(|c| Some((distance(c)?, c))).collect();
    near.sort_by_key(|(distance, _)| *distance);
    near.into_iter().map(|(_, name)| name).collect()
}

#[cfg(test)]
mod tests {
    use super::nearest;

    #[test]
    fn slips_of_the_keyboard_are_recognized() {
        let names = ["help", "clear", "save", "set", "int4", "int3", "nm-1of8"];
        assert_eq!(nearest("hlep", names), ["help"]);
        assert_eq!(nearest("Sav", names)[0], "save");
        assert_eq!(nearest("int", names), ["int4", "int3"]);
        assert_eq!(nearest("nm-1o8", names), ["nm-1of8"]);
        assert!(nearest("usr", names).is_empty());
        assert!(nearest(&"é".repeat(10_000), names).is_empty());
        assert!(nearest("", names).is_empty());
    }
}
