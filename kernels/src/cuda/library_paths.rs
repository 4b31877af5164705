//! Folders in which NVIDIA's libraries may be installed.

use std::env;
use std::path::{Path, PathBuf};

/// Folders of the Python packages with libraries: CUDA 13 is one, CUDA 12 one per library.
const PACKAGES: [&str; 5] = ["cu13", "cuda_nvrtc", "cublas", "cusolver", "cu12"];

/// The folders in which the toolkit and the Python packages install libraries.
pub(super) fn folders() -> Vec<PathBuf> {
    let mut folders = Vec::new();
    for variable in ["CUDA_PATH", "CUDA_HOME", "CUDA_ROOT"] {
        if let Some(root) = env::var_os(variable).map(PathBuf::from) {
            folders.extend(["lib64", "lib", "bin"].map(|sub| root.join(sub)));
        }
    }
    for root in children("/usr/local".into(), "cuda") {
        folders.push(root.join("lib64"));
    }
    folders.extend(
        [
            "/usr/lib/x86_64-linux-gnu",
            "/usr/lib/aarch64-linux-gnu",
            "/usr/lib64",
            "/opt/cuda/lib64",
        ]
        .map(PathBuf::from),
    );
    let variable = |name: &str| env::var_os(name).map(PathBuf::from);
    let home = variable("HOME").map(|home| home.join(".local"));
    let prefixes = [variable("VIRTUAL_ENV"), variable("CONDA_PREFIX"), home];
    let system = ["/usr/local", "/usr"].map(PathBuf::from);
    // Environments on the path that are not active.
    let path = env::var_os("PATH").unwrap_or_default();
    let pythons = env::split_paths(&path)
        .filter(|bin| bin.ends_with("bin") && bin.join("python3").is_file())
        .filter_map(|bin| bin.parent().map(Path::to_owned));
    for prefix in prefixes.into_iter().flatten().chain(pythons).chain(system) {
        folders.push(prefix.join("lib"));
        for python in children(prefix.join("lib"), "python3") {
            for packages in ["site-packages", "dist-packages"] {
                let nvidia = python.join(packages).join("nvidia");
                folders.extend(PACKAGES.map(|package| nvidia.join(package).join("lib")));
            }
        }
        // Windows.
        let nvidia = prefix.join("Lib").join("site-packages").join("nvidia");
        folders.extend(PACKAGES.map(|package| nvidia.join(package).join("bin")));
    }
    folders
}

/// The entries of `folder` whose names start with `prefix`, sorted.
fn children(folder: PathBuf, prefix: &str) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut found: Vec<PathBuf> = entries
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
        .map(|entry| entry.path())
        .collect();
    found.sort();
    found
}
