//! Names that a user may have meant.

/// The names of `candidates` that are nearest to `name`, best first: those that differ by a few letters, and those
/// that one of the two begins with.
#[must_use]
pub fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Vec<&'a str> {
    let name = name.to_lowercase();
    // A third of the letters may be wrong. Longer names than any candidate are not compared, for time.
    let tolerance = name.chars().count().min(30).div_ceil(3);
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

/// What is wrong with a command line of `program` that has an argument too many, or a first one that is no file.
/// `first` is the first argument, `other` the one that is too many, `commands` the names of the commands.
#[must_use]
pub fn command_mistake(
    program: &str,
    first: &str,
    other: Option<&str>,
    commands: &[&str],
) -> Option<String> {
    if let Some(command) = other.filter(|word| commands.contains(word)) {
        return Some(format!("a command comes first: {program} {command} {first}"));
    }
    let may_be_command =
        !first.starts_with('-') && !first.contains(['/', '\\', '.']) && !commands.contains(&first);
    if !may_be_command || std::path::Path::new(first).exists() {
        return None;
    }
    let near = nearest(first, commands.iter().copied());
    near.first().map(|near| format!("there is no command {first}; did you mean {program} {near}?"))
}

#[cfg(test)]
mod tests {
    use super::{command_mistake, nearest};

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

    #[test]
    fn commands_are_found_where_they_do_not_belong() {
        let mistake = |first, other| command_mistake("stb-run", first, other, &["serve", "bench"]);
        assert!(mistake("a.stb", Some("bench")).unwrap().ends_with(": stb-run bench a.stb"));
        assert!(mistake("serv", Some("a.stb")).unwrap().contains("did you mean stb-run serve?"));
        assert!(mistake("serv", None).unwrap().contains("serve"));
        for (first, other) in
            [("serve", None), ("serv.stb", None), ("./serv", None), ("model", None)]
        {
            assert_eq!(mistake(first, other), None, "{first}");
        }
        assert_eq!(mistake("a.stb", Some("Hello")), None);
    }
}
