//! Licenses as the Hugging Face hub names them.

use super::safe::{code, yaml};

/// Licenses of weights that the hub knows by an id, which is the SPDX identifier in lower case where there is one.
const HUB_IDS: [&str; 27] = [
    "apache-2.0",
    "mit",
    "bsd-2-clause",
    "bsd-3-clause",
    "bigscience-bloom-rail-1.0",
    "bigscience-openrail-m",
    "cc-by-3.0",
    "cc-by-4.0",
    "cc-by-nc-3.0",
    "cc-by-nc-4.0",
    "cc-by-nc-nd-4.0",
    "cc-by-nc-sa-4.0",
    "cc-by-nd-4.0",
    "cc-by-sa-3.0",
    "cc-by-sa-4.0",
    "cc0-1.0",
    "gemma",
    "llama2",
    "llama3",
    "llama3.1",
    "llama3.2",
    "llama3.3",
    "llama4",
    "mpl-2.0",
    "openrail",
    "odc-by",
    "unlicense",
];

/// The lines of the front matter.
pub(super) fn front_matter(license: Option<&str>) -> String {
    let Some(license) = license.filter(|text| !text.trim().is_empty()) else {
        return "license: unknown\n".into();
    };
    let ids: Option<Vec<&str>> = license.split(" OR ").map(hub_id).collect();
    match ids.as_deref() {
        Some([id]) => format!("license: {id}\n"),
        Some(ids) => {
            let lines: String = ids.iter().map(|id| format!("- {id}\n")).collect();
            format!("license:\n{lines}")
        }
        None => {
            let name = license.strip_prefix("LicenseRef-").unwrap_or(license);
            format!("license: other\nlicense_name: {}\n", yaml(name))
        }
    }
}

/// The sentence about the license.
pub(super) fn sentence(license: Option<&str>) -> String {
    match license.filter(|text| !text.trim().is_empty()) {
        Some(license) => format!("License of the weights: {}.", code(license)),
        None => "License of the weights: unknown; the file does not name it. Look for the license of the original \
                 model, and name it here and in the first lines of this card."
            .into(),
    }
}

/// The hub's id of an SPDX identifier.
fn hub_id(spdx: &str) -> Option<&'static str> {
    let name = spdx.trim().to_ascii_lowercase();
    // Licenses without an SPDX identifier, such as that of Llama 3.2.
    let name = name.strip_prefix("licenseref-").unwrap_or(&name);
    HUB_IDS.into_iter().find(|id| *id == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn licenses_get_the_names_of_the_hub() {
        assert_eq!(front_matter(None), "license: unknown\n");
        assert_eq!(front_matter(Some(" ")), "license: unknown\n");
        assert_eq!(front_matter(Some("Apache-2.0")), "license: apache-2.0\n");
        assert_eq!(front_matter(Some("MIT OR Apache-2.0")), "license:\n- mit\n- apache-2.0\n");
        assert_eq!(front_matter(Some("LicenseRef-llama3.2")), "license: llama3.2\n");
        let named = front_matter(Some("LicenseRef-Mine-1"));
        assert_eq!(named, "license: other\nlicense_name: \"Mine-1\"\n");
        let own = front_matter(Some("mit\ntags: [x]"));
        assert_eq!(own, "license: other\nlicense_name: \"mit\\\\ntags: [x]\"\n");
    }
}
