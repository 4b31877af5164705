//! Fuzzes chat templates. The result must be an error, or a text of bounded length in bounded time.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stb_runtime::{ChatTemplate, Message};

/// No template may write more.
const MOST: usize = 256 << 20;

fuzz_target!(|source: &str| {
    let Ok(template) = ChatTemplate::new(source, "<s>", "</s>") else { return };
    let template = template.at_fixed_date();
    let turns = [
        Message::new("system", "Be brief."),
        Message::new("user", "Hello <b>\"world\"</b> é"),
        Message::new("assistant", "Yes."),
        Message::new("user", "Why?"),
    ];
    if let Ok(text) = template.render(&turns) {
        assert!(text.len() <= MOST);
    }
});
