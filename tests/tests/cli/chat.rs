//! Chats, with lines from a pipe or a terminal.

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value as Json;
use stb_tests::paths::quill;
use stb_tests::programs::{Run, command, program, skip};
use tempfile::TempDir;

use super::{folder, text};

/// Sends `lines` to a chat of the bundled model. What it keeps is in `home`.
fn chat(home: &TempDir, args: &[&str], lines: &[&str]) -> Run {
    let mut command = command("stb-run", &["--interactive"]);
    command.arg(quill()).args(args);
    for (name, value) in [("--temp", "0"), ("-n", "12")] {
        if !args.contains(&name) {
            command.args([name, value]);
        }
    }
    home_in(&mut command, home);
    feed(command, &lines.join("\n"))
}

fn home_in(command: &mut Command, home: &TempDir) {
    command.env("XDG_DATA_HOME", home.path()).env("XDG_STATE_HOME", home.path());
}

fn feed(mut command: Command, input: &str) -> Run {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    Run::from(child.wait_with_output().unwrap())
}

/// Checks that the chat ended well, that standard error has these texts, and returns the answers.
fn answers(run: Run, notes: &[&str]) -> String {
    for note in notes {
        assert!(run.err.contains(note), "no {note:?}: {}", run.err);
    }
    run.success()
}

#[test]
fn a_saved_chat_goes_on_in_another_run() {
    let home = folder();
    let lines = ["/set seed 7", "/set top_p 0.5", "Tell me a story.", "/save first", "/load"];
    let first = chat(&home, &["--system", "Be kind."], &lines);
    let first = answers(first, &["(seed is 7)", "(top-p is 0.5)", "(saved as ", "  first"]);
    let file = home.path().join("stb/chats/first.json");
    let saved: Json = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    assert_eq!(saved["model"], "quill-4m");
    assert_eq!(saved["messages"][0]["content"], "Be kind.");
    assert_eq!(saved["messages"][2]["content"].as_str().unwrap(), first.trim_end());
    assert_eq!((&saved["settings"]["seed"], &saved["settings"]["temp"]), (&7.into(), &0.0.into()));

    let again = chat(&home, &["--temp", "1"], &["/load first", "/show seed", "/regen", "More."]);
    let again = answers(again, &["(loaded 2 messages", "seed              7"]);
    assert!(again.starts_with(&first) && again.len() > first.len(), "{again:?}");

    // Files that are no chats are errors, and the chat goes on.
    std::fs::write(&file, "{\"stb_chat\": 1, \"messages\": [[[").unwrap();
    let lines =
        ["/load first", "/load nothing", "/load ./no/such", "/save a/b/c", "Tell me a story."];
    let after = chat(&home, &["--system", "Be kind."], &lines);
    let after = answers(after, &["no saved chat", "nothing.json", "no/such", "a/b/c"]);
    assert_eq!(after, first);
}

#[test]
fn settings_and_statistics_are_shown() {
    let lines = [
        "/set tmep 1",
        "/set temp -3",
        "/set temp",
        "/set stop \".\"",
        "/show",
        "/stats",
        "Hello.",
        "And now?",
        "/stats",
        "/help",
    ];
    let run = chat(&folder(), &[], &lines);
    let notes = [
        "there is no setting tmep; did you mean temp?",
        "temp: -3 is not a finite number from 0",
        "(stop is \"\\\".\\\"\")",
        "true bits per parameter",
        "0 of 512 tokens used",
        "not measured",
        "presence-penalty  0 ",
        "tokens            12 ",
        "no answer yet",
        "of them reused",
        "KV cache",
        "/stats",
    ];
    let reused = run.err.lines().find(|line| line.contains("of them reused")).unwrap().to_owned();
    assert!(!reused.contains(" 0 of them"), "{reused}");
    assert!(run.err.contains(" reused, "), "{}", run.err);
    let _ = answers(run, &notes);
}

#[test]
fn a_full_context_drops_the_oldest_turns() {
    let lines: Vec<String> = (0..9).map(|i| format!("Tell me story number {i}.")).collect();
    let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
    let run = chat(&folder(), &["-c", "140", "--system", "Be kind."], &lines);
    assert_eq!(run.err.matches("[load ").count(), 9, "{}", run.err);
    let _ = answers(run, &["(the context of 140 tokens is full: dropped the oldest "]);

    // An answer that fills the context ends there, and the chat goes on.
    let lines = ["Tell me a story.", "Another one."];
    let run = chat(&folder(), &["-c", "80", "-n", "-1", "--ignore-eos"], &lines);
    let notes = ["(the context is full, which ends the answer", "dropped the oldest turn)"];
    assert!(answers(run, &notes).lines().count() >= 2);

    // A message that is too long by itself is refused, and the conversation stays as it was.
    let long = "very ".repeat(200);
    let run = chat(&folder(), &["-c", "100"], &["Tell me a story.", &long, "/regen"]);
    assert_eq!(run.err.matches("but the context only 100: shorten it").count(), 1, "{}", run.err);
    let all = answers(run, &[]);
    let (first, again) = all.split_at(all.len() / 2);
    assert_eq!(first, again);
}

#[test]
fn without_a_template_the_model_continues_the_whole_text() {
    let run = chat(&folder(), &["--no-template"], &["Once upon a time", "The dog"]);
    let both = answers(run, &["no chat template"]);
    let whole = |prompt: &str| {
        let quill = quill();
        let args = ["--no-template", "--temp", "0", "-n", "12", "--prompt", prompt, text(&quill)];
        super::run("stb-run", &args).success()
    };
    let first = whole("Once upon a time");
    let second = whole(&format!("Once upon a time{}\nThe dog", first.strip_suffix('\n').unwrap()));
    assert_eq!(both, first + &second);
}

#[test]
fn paths_are_messages_and_mistyped_commands_are_explained() {
    let lines = ["/usr/bin/x is missing", "/hlep", "/exit", "never"];
    let run = chat(&folder(), &["--prompt", "Hello."], &lines);
    assert!(!run.err.contains("/usr/bin/x"), "{}", run.err);
    assert_eq!(run.err.matches("[load ").count(), 2, "{}", run.err);
    let _ = answers(run, &["there is no command /hlep; did you mean /help?"]);
}

/// What the editor writes when it waits for a line: pasted text shall be marked as such.
#[cfg(unix)]
const READY: &str = "\u{1b}[?2004h";

/// Runs a chat with a terminal; `None` without the program `script`.
#[cfg(unix)]
fn on_terminal(home: &Path, more: &str, keys: &str) -> Option<String> {
    let quill = quill();
    let line = format!(
        "{} --quiet --temp 0 -n 4 --device cpu {more} {}",
        text(&program("stb-run")),
        text(&quill)
    );
    Command::new("script").arg("--version").output().ok()?;
    let mut script = Command::new("script");
    script.args(["--quiet", "--return", "--command", &line, "/dev/null"]);
    script.env("XDG_STATE_HOME", home).env("XDG_DATA_HOME", home).env("TERM", "xterm");
    script.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = script.spawn().unwrap();
    let (mut input, mut output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let mut screen = Vec::new();
    for (line, keys) in keys.split_inclusive('\r').enumerate() {
        // Keys that come before the editor is ready for a line may be lost.
        while String::from_utf8_lossy(&screen).matches(READY).count() <= line {
            let mut bytes = [0; 256];
            let count = output.read(&mut bytes).unwrap();
            assert!(count > 0, "{}", String::from_utf8_lossy(&screen));
            screen.extend(&bytes[..count]);
        }
        input.write_all(keys.as_bytes()).unwrap();
    }
    output.read_to_end(&mut screen).unwrap();
    let screen = String::from_utf8_lossy(&screen).into_owned();
    assert!(child.wait().unwrap().success(), "{screen}");
    Some(screen)
}

#[cfg(unix)]
#[test]
fn terminals_have_history_and_completion() {
    use std::os::unix::fs::PermissionsExt;
    let home = folder();
    let history = home.path().join("stb/history");
    // Tab completes the command.
    let Some(screen) = on_terminal(home.path(), "", "/sta\t\rHello there.\r/exit\r") else {
        skip("the program script is not installed");
        return;
    };
    assert!(screen.contains("no answer yet"), "{screen}");
    let kept = std::fs::read_to_string(&history).unwrap();
    assert!(kept.contains("Hello there.") && kept.contains("/stats"), "{kept}");
    assert_eq!(std::fs::metadata(&history).unwrap().permissions().mode() & 0o777, 0o600);
    // Arrow up twice: past /exit to the message of the run before.
    let screen = on_terminal(home.path(), "", "\u{1b}[A\u{1b}[A\r/exit\r").unwrap();
    assert!(screen.contains("Hello there."), "{screen}");
    let before = std::fs::read_to_string(&history).unwrap();
    let _ = on_terminal(home.path(), "--no-history", "Secret.\r/exit\r").unwrap();
    assert_eq!(std::fs::read_to_string(&history).unwrap(), before);
    // A folder that cannot be made is said once.
    let file = home.path().join("file");
    std::fs::write(&file, "").unwrap();
    let screen = on_terminal(&file, "", "One.\rTwo.\r/exit\r").unwrap();
    assert_eq!(screen.matches("(no history in ").count(), 1, "{screen}");
}
