//! Models that are named by their id on the Hugging Face hub, `owner/name`, and lie in the hub's cache on this machine.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Endings of files, which no id has.
const ENDINGS: [&str; 6] = [".stb", ".gguf", ".safetensors", ".json", ".bin", ".pth"];

/// `source` itself, or the folder in the cache if it is an id of the hub and no file.
///
/// # Errors
/// [`Error::Io`] if it may be an id and the cache does not have it.
pub(crate) fn resolve(source: &Path) -> Result<Cow<'_, Path>> {
    let Some((owner, name)) = id(source).filter(|_| !source.exists()) else {
        return Ok(source.into());
    };
    let cached = caches().find_map(|cache| snapshot(&cache, owner, name));
    cached.map(Cow::Owned).ok_or_else(|| {
        let what = format!(
            "there is no such file or folder. If this is a model of the Hugging Face hub, run `hf download \
             {owner}/{name}` (from the Python package huggingface_hub), and then the same command again"
        );
        Error::io(source, std::io::Error::new(std::io::ErrorKind::NotFound, what))
    })
}

/// Owner and name, if a path has the form of an id.
fn id(source: &Path) -> Option<(&str, &str)> {
    let (owner, name) = source.to_str()?.split_once('/')?;
    let is_part = |part: &str| {
        let is_allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        !part.is_empty() && !part.starts_with('.') && part.chars().all(is_allowed)
    };
    let is_file = ENDINGS.iter().any(|ending| name.ends_with(ending));
    (is_part(owner) && is_part(name) && !is_file).then_some((owner, name))
}

/// The folders in which the hub's programs keep models.
fn caches() -> impl Iterator<Item = PathBuf> {
    let variable =
        |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let below = |name, folder| variable(name).map(|base| base.join(folder));
    let all = [
        variable("HF_HUB_CACHE"),
        below("HF_HOME", "hub"),
        below("XDG_CACHE_HOME", "huggingface/hub"),
        below("HOME", ".cache/huggingface/hub"),
    ];
    all.into_iter().flatten()
}

/// The folder of the main revision of a model in `cache`.
fn snapshot(cache: &Path, owner: &str, name: &str) -> Option<PathBuf> {
    let model = cache.join(format!("models--{owner}--{name}"));
    let revision = std::fs::read_to_string(model.join("refs/main")).ok()?;
    let revision = revision.trim();
    // A file of the cache does not choose a folder outside of it.
    let is_hash = !revision.is_empty() && revision.chars().all(|c| c.is_ascii_alphanumeric());
    Some(model.join("snapshots").join(revision)).filter(|folder| is_hash && folder.is_dir())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_have_two_parts_and_are_no_files() {
        assert_eq!(id(Path::new("meta-llama/Llama-3.2-1B")), Some(("meta-llama", "Llama-3.2-1B")));
        for path in ["model", "a/b/c", "/a/b", "./a", "../a", "a/b.gguf", "a/b.stb", "a/", "a b/c"]
        {
            assert_eq!(id(Path::new(path)), None, "{path}");
        }
    }

    #[test]
    fn the_cache_has_the_main_revision() {
        let cache = tempfile::tempdir().unwrap();
        let model = cache.path().join("models--org--tiny");
        assert_eq!(snapshot(cache.path(), "org", "tiny"), None);
        std::fs::create_dir_all(model.join("refs")).unwrap();
        std::fs::create_dir_all(model.join("snapshots/0af1")).unwrap();
        for (revision, found) in [("0af1\n", true), ("0af2", false), ("..", false), ("", false)] {
            std::fs::write(model.join("refs/main"), revision).unwrap();
            assert_eq!(snapshot(cache.path(), "org", "tiny").is_some(), found, "{revision}");
        }
    }
}
