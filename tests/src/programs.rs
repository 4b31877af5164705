//! Builds and runs the programs as a user would.

use std::ffi::OsStr;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Once;

use crate::paths::root;

/// The folder of the profile of this test, `target/PROFILE`.
fn profile_folder() -> PathBuf {
    // Tests are in target/PROFILE/deps, the developer programs in target/PROFILE/examples.
    let this = std::env::current_exe().expect("the path of the test");
    let mut folder = this.parent().expect("a folder").to_owned();
    if folder.ends_with("deps") || folder.ends_with("examples") {
        folder.pop();
    }
    folder
}

/// Builds targets of the packages with programs, with the profile of the tests.
fn build(targets: &[&str]) {
    let mut build = Command::new(env!("CARGO"));
    build.current_dir(root()).args(["build", "--quiet", "-p", "stb-runtime", "-p", "stb-convert"]);
    build.args(targets);
    if profile_folder().ends_with("release") {
        build.arg("--release");
    }
    assert!(build.status().expect("cargo").success(), "the programs do not build");
}

/// The path of `stb-run` or `stb-convert`, built with the profile of the tests.
///
/// # Panics
/// If they do not build.
#[must_use]
pub fn program(name: &str) -> PathBuf {
    static BUILT: Once = Once::new();
    BUILT.call_once(|| build(&["--bins"]));
    profile_folder().join(name)
}

/// The path of a developer program of this package, built with the profile of the tests.
///
/// # Panics
/// If it does not build.
#[must_use]
pub fn own_program(name: &str) -> PathBuf {
    build(&["-p", "stb-tests", "--example", name]);
    profile_folder().join("examples").join(name)
}

/// The outcome of a program.
#[derive(Debug)]
pub struct Run {
    /// The exit code; `None` if a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl From<Output> for Run {
    fn from(output: Output) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("output is UTF-8");
        Self { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
    }
}

impl Run {
    /// Checks that the program succeeded and returns standard output.
    ///
    /// # Panics
    /// If it failed.
    #[must_use]
    pub fn success(self) -> String {
        assert_eq!(self.code, Some(0), "{}", self.err);
        self.out
    }

    /// Checks that the program ended with `code` and an error message, and returns the message.
    ///
    /// # Panics
    /// If the program ended otherwise, or panicked.
    #[must_use]
    pub fn failure(self, code: i32) -> String {
        assert_eq!(self.code, Some(code), "{}{}", self.out, self.err);
        assert!(!self.err.contains("panicked"), "{}", self.err);
        assert!(!self.err.trim().is_empty(), "no error message");
        self.err
    }
}

/// A program with arguments, without the environment variables that change its behavior.
#[must_use]
pub fn command<S: AsRef<OsStr>>(name: &str, args: &[S]) -> Command {
    let mut command = Command::new(program(name));
    command.args(args).stdin(std::process::Stdio::null());
    for variable in [
        "STB_ISA",
        "STB_THREADS",
        "STB_CTX",
        "STB_SEED",
        "STB_VERIFY",
        "STB_NO_MMAP",
        "STB_EXACT",
        "STB_KV",
        "STB_MLOCK",
        "STB_NGL",
        "STB_API_KEY",
    ] {
        command.env_remove(variable);
    }
    // Tests use the CPU also on machines with a GPU.
    command.env("STB_DEVICE", "cpu");
    command
}

/// Runs a program to its end.
///
/// # Panics
/// If it cannot be started.
#[must_use]
pub fn run<S: AsRef<OsStr>>(name: &str, args: &[S]) -> Run {
    command(name, args).output().expect("the program starts").into()
}

/// Converts a checkpoint.
///
/// # Panics
/// If that fails.
pub fn convert(source: &Path, target: &Path, options: &[&str]) {
    let mut command = command("stb-convert", options);
    command.arg("--quiet").arg(source).arg(target);
    let run: Run = command.output().expect("the program starts").into();
    let _ = run.success();
}

/// Reports on standard error, which is not captured, that something was not tested.
pub fn skip(what: &str) {
    note(&format!("SKIPPED: {what}"));
}

/// Writes a line to standard error.
pub fn note(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Writes a text to standard output.
pub fn print(text: &str) {
    let _ = write!(std::io::stdout(), "{text}");
}
