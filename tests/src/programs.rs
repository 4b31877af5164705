//! Building and running the programs as a user would.

use std::ffi::OsStr;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use crate::paths::root;

/// The folder of the profile of this test, `target/PROFILE`.
fn profile_folder() -> PathBuf {
    // Test programs lie in target/PROFILE/deps, others in target/PROFILE.
    let this = std::env::current_exe().expect("the path of the test");
    let mut folder = this.parent().expect("a folder").to_owned();
    if folder.ends_with("deps") {
        folder.pop();
    }
    folder
}

/// The path of `stb-run` or `stb-convert`, built with the profile of the tests.
///
/// # Panics
/// If they do not build.
#[must_use]
pub fn program(name: &str) -> PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        let folder = profile_folder();
        let mut build = Command::new(env!("CARGO"));
        build.current_dir(root()).args(["build", "--quiet", "--bins"]);
        build.args(["-p", "stb-runtime", "-p", "stb-convert"]);
        if folder.ends_with("release") {
            build.arg("--release");
        }
        assert!(build.status().expect("cargo").success(), "the programs do not build");
        folder
    });
    folder.join(name)
}

/// The path of a program of this package, which Cargo builds before its tests. (Cargo's own variable for
/// it has a hyphen in its name, which a compiler behind a shell script does not get to see.)
#[must_use]
pub fn own_program(name: &str) -> PathBuf {
    profile_folder().join(name)
}

/// What a program did.
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
    /// Checks that it went well and returns standard output.
    ///
    /// # Panics
    /// If it did not.
    #[must_use]
    pub fn success(self) -> String {
        assert_eq!(self.code, Some(0), "{}", self.err);
        self.out
    }

    /// Checks that it ended with `code` and one clear error, and returns that.
    ///
    /// # Panics
    /// If it did not, or panicked.
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
    ] {
        command.env_remove(variable);
    }
    // What is expected of programs is the same on machines with a GPU.
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

/// Tells, past the capture of test output, that something was not tested.
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
