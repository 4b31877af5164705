//! The license of a checkpoint as an SPDX expression.

use std::io::Read;
use std::path::Path;

/// The front matter of a README stands in its first bytes.
const README_BYTES: u64 = 64 << 10;
/// The longest name of a license that is kept.
const MAX_NAME: usize = 64;

/// SPDX identifiers of the licenses that weights have. The Hugging Face hub writes them in lower case.
const SPDX: [&str; 20] = [
    "AGPL-3.0",
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "CC-BY-3.0",
    "CC-BY-4.0",
    "CC-BY-NC-3.0",
    "CC-BY-NC-4.0",
    "CC-BY-NC-ND-4.0",
    "CC-BY-NC-SA-4.0",
    "CC-BY-ND-4.0",
    "CC-BY-SA-3.0",
    "CC-BY-SA-4.0",
    "CC0-1.0",
    "GPL-3.0",
    "ISC",
    "LGPL-3.0",
    "MIT",
    "MPL-2.0",
    "Unlicense",
];

/// The license that the front matter of the folder's `README.md` states.
pub(super) fn of_folder(folder: &Path) -> Option<String> {
    let mut bytes = Vec::new();
    let file = std::fs::File::open(folder.join("README.md")).ok()?;
    file.take(README_BYTES).read_to_end(&mut bytes).ok()?;
    of_readme(&String::from_utf8_lossy(&bytes))
}

/// The license in the front matter of a model card: YAML between two lines `---`.
fn of_readme(text: &str) -> Option<String> {
    let mut lines = text.trim_start_matches('\u{feff}').lines();
    lines.next().filter(|line| line.trim_end() == "---")?;
    let (mut ids, mut name, mut in_list) = (Vec::new(), None, false);
    for line in lines.take_while(|line| line.trim_end() != "---") {
        if let Some(item) = line.trim_start().strip_prefix("- ").filter(|_| in_list) {
            ids.push(value(item));
            continue;
        }
        in_list = false;
        if let Some(rest) = line.strip_prefix("license:") {
            let rest = value(rest);
            in_list = rest.is_empty();
            let list = rest.trim_start_matches('[').trim_end_matches(']');
            ids = list.split(',').map(value).filter(|id| !id.is_empty()).collect();
        } else if let Some(rest) = line.strip_prefix("license_name:") {
            name = Some(value(rest));
        }
    }
    expression(&ids, name)
}

/// A scalar of YAML without quotes and comment.
fn value(text: &str) -> &str {
    let text = text.split(" #").next().unwrap_or_default().trim();
    text.trim_matches(['"', '\''])
}

/// The SPDX expression of licenses by the hub's ids; `name` is that of the license `other`. `None` if nothing is known.
pub(super) fn expression(ids: &[&str], name: Option<&str>) -> Option<String> {
    let spdx = |id: &&str| {
        let id = if id.eq_ignore_ascii_case("other") { name.unwrap_or_default() } else { *id };
        if let Some(known) = SPDX.into_iter().find(|known| known.eq_ignore_ascii_case(id)) {
            return Some(known.to_owned());
        }
        // A license with a text of its own: the name may have letters, digits, points and hyphens.
        let is_allowed = |c: char| c.is_ascii_alphanumeric() || ".-".contains(c);
        let name: String =
            id.chars().map(|c| if is_allowed(c) { c } else { '-' }).take(MAX_NAME).collect();
        let is_known = !name.trim_matches('-').is_empty() && !id.eq_ignore_ascii_case("unknown");
        is_known.then(|| format!("LicenseRef-{name}"))
    };
    let found: Vec<String> = ids.iter().filter_map(spdx).take(8).collect();
    (!found.is_empty()).then(|| found.join(" OR "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn model_cards_name_their_license() {
        let found = |front: &str| of_readme(&format!("---\n{front}\n---\n# Model\nlicense: mit\n"));
        assert_eq!(found("tags:\n- x\nlicense: apache-2.0").as_deref(), Some("Apache-2.0"));
        assert_eq!(found("license: 'MIT' # yes").as_deref(), Some("MIT"));
        let two = Some("MIT OR Apache-2.0");
        assert_eq!(found("license:\n- mit\n- apache-2.0\ntags:\n- y").as_deref(), two);
        assert_eq!(found("license: [mit, apache-2.0]").as_deref(), two);
        assert_eq!(found("license: llama3.2").as_deref(), Some("LicenseRef-llama3.2"));
        let own = found("license_name: My License/1\nlicense: other");
        assert_eq!(own.as_deref(), Some("LicenseRef-My-License-1"));
        for nothing in ["license: other", "license: unknown", "license:", "tags: [license]"] {
            assert_eq!(found(nothing), None, "{nothing}");
        }
        assert_eq!(of_readme("# Model\nlicense: mit\n"), None);
        let long = "x".repeat(1000);
        assert!(found(&format!("license: {long}")).unwrap().len() < 100);
    }
}
