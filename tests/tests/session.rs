//! Conversations through the library: the KV cache is reused, answers stream and can be canceled.

use std::ops::ControlFlow;
use std::sync::Arc;

use stb_runtime::{
    CancelToken, Engine, Finish, GenerateRequest, Generated, Message, OpenOptions, PromptInput,
    Sampler, SamplerOptions, Session, SessionOptions,
};
use stb_tests::paths::quill;

fn session() -> Session {
    let engine = Engine::open(&quill(), &OpenOptions::exact()).unwrap();
    Session::new(Arc::new(engine), SessionOptions::default()).unwrap()
}

fn greedy() -> Sampler {
    Sampler::new(SamplerOptions { temperature: 0.0, ..SamplerOptions::default() })
}

/// Generates at most 12 tokens. Also returns the text that was streamed.
fn answer(session: &mut Session, prompt: PromptInput<'_>) -> (Generated, String) {
    let request = GenerateRequest { max_tokens: Some(12), ..GenerateRequest::new(prompt) };
    let mut streamed = String::new();
    let answer = session.generate(&request, &mut greedy(), |piece| {
        streamed.push_str(piece.text);
        ControlFlow::Continue(())
    });
    (answer.unwrap(), streamed)
}

#[test]
fn a_common_start_is_computed_once() {
    let mut session = session();
    let first = [Message::new("user", "Tell me a story that begins: One day, a cat sat down.")];
    let (answer_1, streamed) = answer(&mut session, PromptInput::Messages(&first));
    assert_eq!(answer_1.text, streamed);
    assert_eq!(answer_1.timings.decode_tokens, answer_1.tokens.len());
    let whole = session.encode(PromptInput::Messages(&first)).unwrap().len();
    assert_eq!(answer_1.timings.prefill_tokens, whole);

    let second = [
        first[0].clone(),
        Message::new("assistant", &answer_1.text),
        Message::new("user", "Tell me another story."),
    ];
    let (answer_2, _) = answer(&mut session, PromptInput::Messages(&second));
    let whole = session.encode(PromptInput::Messages(&second)).unwrap().len();
    assert!(answer_2.timings.prefill_tokens < whole, "{:?}", answer_2.timings);
    let (fresh, _) = answer(&mut session.fork(), PromptInput::Messages(&second));
    assert_eq!(fresh.timings.prefill_tokens, whole);
    assert_eq!(fresh.tokens, answer_2.tokens);
}

#[test]
fn answers_are_canceled_from_another_thread() {
    let mut session = session();
    let cancel = CancelToken::default();
    let request = GenerateRequest {
        ignore_end: true,
        cancel: Some(&cancel),
        ..GenerateRequest::new(PromptInput::Text("Once upon a time"))
    };
    // The session runs on its own thread; this thread cancels after the first piece.
    let (first_piece, waiting) = std::sync::mpsc::channel();
    let answer = std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            session.generate(&request, &mut greedy(), |_| {
                let _ = first_piece.send(());
                ControlFlow::Continue(())
            })
        });
        waiting.recv().unwrap();
        assert!(!cancel.cancel());
        worker.join().unwrap().unwrap()
    });
    assert_eq!(answer.finish, Finish::Interrupted);
    assert!(!answer.tokens.is_empty());
    // Canceled before it begins: nothing is generated until the token is reset.
    let none = session.generate(&request, &mut greedy(), |_| ControlFlow::Continue(()));
    assert!(none.unwrap().tokens.is_empty());
    cancel.reset();
    let stopped = session.generate(&request, &mut greedy(), |_| ControlFlow::Break(()));
    assert_eq!(stopped.unwrap().tokens.len(), 1);
}
