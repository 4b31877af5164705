use super::*;

/// Content and calls of an answer, sent in pieces of every size.
fn read(format: CallFormat, answer: &str) -> (String, Vec<(String, String)>) {
    let all = |size: usize| {
        let mut reader = CallReader::new(format, vec!["f".into(), "g".into()]);
        let characters: Vec<char> = answer.chars().collect();
        let mut parts = Vec::new();
        for piece in characters.chunks(size) {
            parts.extend(reader.push(&piece.iter().collect::<String>()));
        }
        parts.extend(reader.finish());
        let (mut content, mut calls) = (String::new(), Vec::new());
        for part in parts {
            match part {
                Part::Content(text) => content.push_str(&text),
                Part::Call(call) => calls.push((call.name, call.arguments)),
                Part::Reasoning(_) => panic!("no reasoning"),
            }
        }
        (content, calls)
    };
    let first = all(1);
    (2..=answer.len().max(2)).for_each(|size| assert_eq!(all(size), first, "{size}: {answer}"));
    first
}

fn expected(content: &str, calls: &[(&str, &str)]) -> (String, Vec<(String, String)>) {
    let calls = calls.iter().map(|(n, a)| ((*n).to_owned(), (*a).to_owned()));
    (content.to_owned(), calls.collect())
}

#[test]
fn hermes() {
    let read = |answer| read(CallFormat::Hermes, answer);
    let two = "Let me see.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": \"</b>\"}}\n</tool_call>\n\
        <tool_call>{\"name\": \"g\", \"arguments\": {}}</tool_call>\n";
    assert_eq!(read(two), expected("Let me see.", &[("f", r#"{"a":"</b>"}"#), ("g", "{}")]));
    // The end tag may be missing at the end.
    assert_eq!(read("<tool_call>{\"name\": \"f\"}"), expected("", &[("f", "{}")]));
    // What is no call stays text, and so does what only looks like a tag.
    let broken = "<tool_call>f(1)</tool_call> so";
    assert_eq!(read(broken), expected(broken, &[]));
    assert_eq!(read("1 <tool 2 < 3"), expected("1 <tool 2 < 3", &[]));
    assert_eq!(read(""), expected("", &[]));
}

#[test]
fn llama_3() {
    let read = |answer| read(CallFormat::Llama3, answer);
    let call = r#"{"name": "f", "parameters": {"a": 1}}"#;
    assert_eq!(read(call), expected("", &[("f", r#"{"a":1}"#)]));
    let tagged = format!("<|python_tag|>{call}; {call}");
    assert_eq!(read(&tagged), expected("", &[("f", r#"{"a":1}"#), ("f", r#"{"a":1}"#)]));
    let typed = r#"{"type": "function", "function": {"name": "g", "parameters": "{}"}}"#;
    assert_eq!(read(typed), expected("", &[("g", "{}")]));
    // An object that calls no tool is an answer.
    let answer = r#"{"name": "Ann", "age": 7}"#;
    assert_eq!(read(answer), expected(answer, &[]));
    assert_eq!(read("Hello {x}"), expected("Hello {x}", &[]));
}

#[test]
fn mistral() {
    let read = |answer| read(CallFormat::Mistral, answer);
    let array =
        r#"[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]"#;
    assert_eq!(read(array), expected("", &[("f", r#"{"a":1}"#), ("g", "{}")]));
    let named = r#"Well. [TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g{"b": {}}"#;
    assert_eq!(read(named), expected("Well.", &[("f", r#"{"a":1}"#), ("g", r#"{"b":{}}"#)]));
    assert_eq!(read(r#"[{"name": "f"}]"#), expected("", &[("f", "{}")]));
    assert_eq!(read("[1] is a footnote"), expected("[1] is a footnote", &[]));
}

#[test]
fn the_template_tells_the_format() {
    let of = |source: &'static str| CallFormat::of(|text| source.contains(text));
    assert_eq!(of("{{ '[TOOL_CALLS] ' }}"), CallFormat::Mistral);
    assert_eq!(of("{{ '<|python_tag|>' }} ipython"), CallFormat::Llama3);
    assert_eq!(of("<tool_call>"), CallFormat::Hermes);
    assert_eq!(of(""), CallFormat::Hermes);
}
