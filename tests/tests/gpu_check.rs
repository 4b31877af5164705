//! `gpu-check` on a machine without a GPU.

use std::process::Command;

use stb_tests::programs::own_program;

#[test]
fn without_a_device_it_reports_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let done = Command::new(own_program("gpu-check"))
        .current_dir(folder.path())
        // Hides the devices of machines that have one.
        .env("CUDA_VISIBLE_DEVICES", "")
        .output()
        .unwrap();
    let said = String::from_utf8(done.stderr).unwrap();
    assert_eq!(done.status.code(), Some(5), "{said}");
    assert!(said.starts_with("gpu-check: no CUDA device: "), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(done.stdout.is_empty());
    assert_eq!(folder.path().read_dir().unwrap().count(), 0, "nothing is written");
}
