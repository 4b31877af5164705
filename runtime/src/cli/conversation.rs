//! The messages of a chat, and which of them fit into the context.

use stb_runtime::{Message, PromptInput};

/// System instructions, and the messages of the user and the model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Conversation {
    pub instructions: Option<String>,
    /// Without the instructions.
    pub messages: Vec<Message>,
    /// Whether the model has a chat template. Without one, the conversation is a plain text.
    pub template: bool,
}

/// A conversation as the model gets it.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum ChatPrompt {
    Messages(Vec<Message>),
    Text(String),
}

impl ChatPrompt {
    pub fn input(&self) -> PromptInput<'_> {
        match self {
            Self::Messages(messages) => PromptInput::Messages(messages),
            Self::Text(text) => PromptInput::Text(text),
        }
    }
}

/// How a conversation was made to fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fit {
    /// Turns that were dropped.
    pub dropped: usize,
    /// Tokens of the prompt.
    pub tokens: usize,
}

impl Conversation {
    pub fn new(instructions: Option<String>, template: bool) -> Self {
        Self { instructions, messages: Vec::new(), template }
    }

    pub fn push_question(&mut self, text: &str) {
        self.messages.push(Message::new("user", text));
    }

    /// Adds an answer. A plain text keeps it as the model has written it; templates trim answers anyway.
    pub fn push_answer(&mut self, text: &str) {
        let text = if self.template { text.trim_end() } else { text };
        self.messages.push(Message::new("assistant", text));
    }

    /// Removes the last answer.
    pub fn reopen(&mut self) {
        self.messages.pop_if(|m| m.role == "assistant");
    }

    /// Whether there is a message to answer, or to answer again.
    pub fn has_question(&self) -> bool {
        self.messages.iter().rev().take(2).any(|m| m.role == "user")
    }

    /// The instructions, if there are any, and the messages.
    pub fn with_instructions(&self) -> Vec<Message> {
        let instructions = self.instructions.iter().map(|text| Message::new("system", text));
        instructions.chain(self.messages.iter().cloned()).collect()
    }

    /// What the model gets.
    pub fn prompt(&self) -> ChatPrompt {
        if self.template {
            return ChatPrompt::Messages(self.with_instructions());
        }
        let mut text = String::new();
        for message in self.with_instructions() {
            // An answer continues its question; anything else begins on a line of its own.
            if message.role != "assistant" && !text.is_empty() && !text.ends_with('\n') {
                text.push('\n');
            }
            text.push_str(&message.content);
        }
        ChatPrompt::Text(text)
    }

    /// Drops the oldest turns, a question with its answer each, if the conversation and an answer do not fit into
    /// `context` tokens: as many as leave half of the context free, so that not every further question drops one. The
    /// instructions and the last question stay. `answer` is the largest number of tokens of the answer, and `count`
    /// counts the tokens of a conversation.
    ///
    /// The result may still be too long. It is up to the caller not to use it then.
    ///
    /// # Errors
    /// Those of `count`.
    pub fn fit<E>(
        &mut self,
        context: usize,
        answer: Option<usize>,
        count: impl Fn(&Self) -> Result<usize, E>,
    ) -> Result<Fit, E> {
        let room = answer.unwrap_or(usize::MAX).min(context / 8).max(1);
        let mut fit = Fit { dropped: 0, tokens: count(self)? };
        if fit.tokens.saturating_add(room) <= context {
            return Ok(fit);
        }
        while fit.tokens > context / 2 && self.drop_oldest() {
            fit = Fit { dropped: fit.dropped + 1, tokens: count(self)? };
        }
        Ok(fit)
    }

    /// Drops the oldest question and what answers it, unless it is the last question. Returns whether it did.
    fn drop_oldest(&mut self) -> bool {
        let mut later = self.messages.iter().enumerate().skip(1);
        let Some((next, _)) = later.find(|(_, m)| m.role == "user") else { return false };
        self.messages.drain(..next);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A chat of `turns` questions of 10 letters, all but the last with an answer of 9 letters.
    fn chat(turns: usize) -> Conversation {
        let mut chat = Conversation::new(Some("be short".into()), true);
        for i in 0..turns {
            chat.push_question(&format!("question {i}"));
            if i + 1 < turns {
                chat.push_answer(&format!("answer {i:>2} "));
            }
        }
        chat
    }

    /// Counts letters as tokens.
    fn letters(chat: &Conversation) -> Result<usize, ()> {
        Ok(chat.with_instructions().iter().map(|m| m.content.len()).sum())
    }

    #[test]
    fn a_conversation_that_fits_is_kept() {
        let mut five = chat(5);
        let fit = five.fit(200, None, letters).unwrap();
        assert_eq!((fit.dropped, &five), (0, &chat(5)));
        // A short answer needs less room.
        let tokens = letters(&five).unwrap();
        assert_eq!(five.fit(tokens + 1, Some(1), letters).unwrap(), Fit { dropped: 0, tokens });
        assert!(five.fit(tokens + 1, None, letters).unwrap().dropped > 0);
    }

    #[test]
    fn the_oldest_turns_go_and_the_instructions_stay() {
        let mut many = chat(9);
        let fit = many.fit(100, None, letters).unwrap();
        assert!(fit.tokens <= 50 && fit.tokens == letters(&many).unwrap());
        assert_eq!(fit.dropped, 7);
        assert_eq!(many.instructions.as_deref(), Some("be short"));
        let texts: Vec<_> = many.messages.iter().map(|m| m.content.as_str()).collect();
        assert_eq!(texts, ["question 7", "answer  7", "question 8"]);
    }

    #[test]
    fn the_last_question_is_never_dropped() {
        let mut one = chat(1);
        assert_eq!(one.fit(10, None, letters).unwrap(), Fit { dropped: 0, tokens: 18 });
        let mut several = chat(4);
        assert_eq!(several.fit(4, None, letters).unwrap(), Fit { dropped: 3, tokens: 18 });
        assert_eq!(several.messages, [Message::new("user", "question 3")]);
        assert!(several.fit(4, None, |_| Err(())).is_err());
        // A file may hold a conversation that begins with an answer, or has none.
        let mut odd = Conversation::new(None, true);
        odd.push_answer("answer");
        odd.push_answer("answer");
        odd.push_question("question");
        assert_eq!(odd.fit(10, None, letters).unwrap(), Fit { dropped: 1, tokens: 8 });
        assert!(!Conversation::default().drop_oldest());
    }

    #[test]
    fn without_a_template_the_conversation_is_a_text() {
        let mut plain = Conversation::new(None, false);
        plain.push_question("Once upon");
        plain.push_answer(" a time ");
        plain.push_question("The end");
        assert_eq!(plain.prompt(), ChatPrompt::Text("Once upon a time \nThe end".into()));
        plain.instructions = Some("A story:".into());
        plain.messages.truncate(1);
        assert_eq!(plain.prompt(), ChatPrompt::Text("A story:\nOnce upon".into()));
        assert!(plain.has_question());
        plain.push_answer(" a time");
        assert!(plain.has_question());
        plain.reopen();
        assert_eq!(plain.messages, [Message::new("user", "Once upon")]);
        plain.messages.clear();
        assert!(!plain.has_question());
    }
}
