//! Multiple-choice tasks: reads files of questions and builds the prompts of lm-evaluation-harness
//! (version 0.4.13, `lm_eval/tasks/*`, zero-shot).

use std::path::Path;

use serde::Deserialize;

use crate::error::{Error, Result};

/// A task of the harness.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// Which of two names fits into the blank. The text after the blank is scored.
    Winogrande,
    /// Elementary science questions (`OpenBookQA`), without the facts.
    OpenBookQa,
    /// How a scene continues.
    HellaSwag,
    /// Yes-or-no questions about a passage.
    BoolQ,
    /// AI2 reasoning challenge, easy set.
    ArcEasy,
    /// AI2 reasoning challenge, challenge set.
    ArcChallenge,
    /// Whether one sentence entails another.
    Rte,
    /// How a physical goal is reached.
    Piqa,
}

impl Task {
    /// All tasks: those of Table 4 of the STBLLM paper in its order, then PIQA.
    pub const ALL: [Self; 8] = [
        Self::Winogrande,
        Self::OpenBookQa,
        Self::HellaSwag,
        Self::BoolQ,
        Self::ArcEasy,
        Self::ArcChallenge,
        Self::Rte,
        Self::Piqa,
    ];

    /// The name of the task in the harness.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Winogrande => "winogrande",
            Self::OpenBookQa => "openbookqa",
            Self::HellaSwag => "hellaswag",
            Self::BoolQ => "boolq",
            Self::ArcEasy => "arc_easy",
            Self::ArcChallenge => "arc_challenge",
            Self::Rte => "rte",
            Self::Piqa => "piqa",
        }
    }

    /// The task called `name`, ignoring case. Accepts `-` for `_`, and the short names `obqa`, `arc_e`
    /// and `arc_c`.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        let name = name.to_ascii_lowercase().replace('-', "_");
        match name.as_str() {
            "obqa" => Some(Self::OpenBookQa),
            "arc_e" => Some(Self::ArcEasy),
            "arc_c" => Some(Self::ArcChallenge),
            _ => Self::ALL.into_iter().find(|task| task.name() == name),
        }
    }

    /// The task whose name is a prefix of the file name.
    #[must_use]
    pub fn from_file(path: &Path) -> Option<Self> {
        let name = path.file_stem()?.to_str()?.to_ascii_lowercase().replace('-', "_");
        let starts = |task: &Self| {
            let rest = name.strip_prefix(task.name());
            rest.is_some_and(|rest| !rest.starts_with(|c: char| c.is_ascii_alphanumeric()))
        };
        Self::ALL.into_iter().find(starts)
    }

    /// Whether the harness reports `acc_norm`, the accuracy by likelihood per character.
    #[must_use]
    pub fn has_acc_norm(self) -> bool {
        matches!(
            self,
            Self::OpenBookQa | Self::HellaSwag | Self::ArcEasy | Self::ArcChallenge | Self::Piqa
        )
    }

    /// Reads the questions of a JSON Lines file, at most `limit`.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read; [`Error::Invalid`] with the line number if a line is not
    /// a question of this task, or if the file has no questions.
    pub fn read(self, path: &Path, limit: Option<usize>) -> Result<Vec<Question>> {
        let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
        let text = String::from_utf8(bytes)
            .map_err(|_| Error::invalid(format!("{} is not UTF-8 text", path.display())))?;
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let items = lines.take(limit.unwrap_or(usize::MAX)).map(|(i, line)| {
            self.item(line)
                .map_err(|e| Error::invalid(format!("{}, line {}: {e}", path.display(), i + 1)))
        });
        let items: Vec<Question> = items.collect::<Result<_>>()?;
        if items.is_empty() {
            return Err(Error::invalid(format!("{} has no questions", path.display())));
        }
        Ok(items)
    }

    /// Parses one line of a file.
    ///
    /// # Errors
    /// A description of the problem, without the line number.
    pub fn item(self, line: &str) -> std::result::Result<Question, String> {
        let row: TaskLine = serde_json::from_str(line).map_err(|e| e.to_string())?;
        let choices = row.choices.as_deref().ok_or("there is no field \"choices\"")?;
        let gold = row.gold.ok_or("there is no field \"gold\"")?;
        if choices.len() < 2 {
            return Err(format!(
                "\"choices\" has {} entries, at least 2 are needed",
                choices.len()
            ));
        }
        if gold >= choices.len() {
            return Err(format!("\"gold\" is {gold}, but there are {} choices", choices.len()));
        }
        let prompts = self.prompts(&row, choices)?;
        if let Some(i) = prompts.iter().position(|p| p.choice_length == 0) {
            return Err(format!("choice {i} is empty"));
        }
        if let Some(i) = prompts.iter().position(|p| p.continuation.trim().is_empty()) {
            return Err(format!("there is nothing to predict after choice {i}"));
        }
        Ok(Question { prompts, gold })
    }

    fn prompts(
        self,
        row: &TaskLine,
        choices: &[String],
    ) -> std::result::Result<Vec<ChoicePrompt>, String> {
        let after = |context: &str, choices: &[String]| -> Vec<ChoicePrompt> {
            choices.iter().map(|choice| ChoicePrompt::new(context, choice)).collect()
        };
        let prompts = match self {
            Self::Winogrande => {
                let (before, rest) = field(&row.sentence, "sentence")?
                    .split_once('_')
                    .ok_or("\"sentence\" has no blank: put _ where the name belongs")?;
                let fill = |choice: &String| ChoicePrompt {
                    context: format!("{before}{choice}"),
                    continuation: format!(" {}", rest.trim()),
                    choice_length: choice.chars().count(),
                };
                choices.iter().map(fill).collect()
            }
            Self::OpenBookQa => after(field(&row.query, "query")?, choices),
            Self::HellaSwag => {
                let choices: Vec<String> = choices.iter().map(|c| without_markup(c)).collect();
                after(&without_markup(field(&row.query, "query")?), &choices)
            }
            Self::BoolQ => {
                check_words(choices, &["no", "yes"])?;
                let (passage, question) =
                    (field(&row.passage, "passage")?, field(&row.question, "question")?);
                after(&format!("{passage}\nQuestion: {question}?\nAnswer:"), choices)
            }
            Self::Rte => {
                check_words(choices, &["entailment", "not_entailment"])?;
                let answer = |c: &String| if c == "entailment" { "True" } else { "False" }.into();
                let choices: Vec<String> = choices.iter().map(answer).collect();
                let (first, second) =
                    (field(&row.sentence1, "sentence1")?, field(&row.sentence2, "sentence2")?);
                let context = format!("{first}\nQuestion: {second} True or False?\nAnswer:");
                after(&context, &choices)
            }
            Self::ArcEasy | Self::ArcChallenge | Self::Piqa => {
                let query = field(&row.query, "query")?;
                after(&format!("Question: {query}\nAnswer:"), choices)
            }
        };
        Ok(prompts)
    }
}

/// A question with one prompt per choice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// The prompts of the choices.
    pub prompts: Vec<ChoicePrompt>,
    /// The index of the correct choice.
    pub gold: usize,
}

/// The prompt of a choice. The likelihood of the continuation after the context is its score.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChoicePrompt {
    /// The text before the continuation.
    pub context: String,
    /// The continuation that is scored. It begins with a space.
    pub continuation: String,
    /// Characters of the choice without that space. `acc_norm` divides by this number.
    pub choice_length: usize,
}

impl ChoicePrompt {
    fn new(context: &str, choice: &str) -> Self {
        Self {
            context: context.to_owned(),
            continuation: format!(" {choice}"),
            choice_length: choice.chars().count(),
        }
    }
}

/// A line of a file. The task determines which fields are required.
#[derive(Deserialize)]
struct TaskLine {
    query: Option<String>,
    sentence: Option<String>,
    sentence1: Option<String>,
    sentence2: Option<String>,
    passage: Option<String>,
    question: Option<String>,
    choices: Option<Vec<String>>,
    gold: Option<usize>,
}

fn field<'a>(value: &'a Option<String>, name: &str) -> std::result::Result<&'a str, String> {
    value.as_deref().ok_or_else(|| format!("there is no field {name:?}"))
}

/// Checks that `choices` are these two words, in either order.
fn check_words(choices: &[String], words: &[&str; 2]) -> std::result::Result<(), String> {
    let matches = choices.len() == 2 && words.iter().all(|word| choices.iter().any(|c| c == word));
    if matches { Ok(()) } else { Err(format!("\"choices\" has to be {words:?}")) }
}

/// The preprocessing of `HellaSwag` in the harness: removes the marks in square brackets of `WikiHow`
/// texts.
fn without_markup(text: &str) -> String {
    let text = text.trim().replace(" [title]", ". ");
    let mut out = String::new();
    let mut rest = text.as_str();
    while let Some(open) = rest.find('[') {
        let inside = &rest[open..];
        // A mark ends on the line where it begins.
        let Some(close) = inside.find([']', '\n']).filter(|i| inside[*i..].starts_with(']')) else {
            out += &rest[..=open];
            rest = &rest[open + 1..];
            continue;
        };
        out += &rest[..open];
        rest = &inside[close + 1..];
    }
    out += rest;
    out.replace("  ", " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompts(task: Task, line: &str) -> Vec<(String, String, usize)> {
        let item = task.item(line).unwrap();
        item.prompts.into_iter().map(|p| (p.context, p.continuation, p.choice_length)).collect()
    }

    /// Expected prompts are written by hand from the task definitions of the harness.
    #[test]
    fn prompts_match_the_harness() {
        let line = r#"{"sentence": "The cup is in the box so _ is small.", "choices": ["cup", "box"], "gold": 0}"#;
        assert_eq!(
            prompts(Task::Winogrande, line),
            [
                ("The cup is in the box so cup".into(), " is small.".into(), 3),
                ("The cup is in the box so box".into(), " is small.".into(), 3)
            ]
        );
        let line = r#"{"query": "Predators eat", "choices": ["grass", "Käse"], "gold": 1}"#;
        let obqa = prompts(Task::OpenBookQa, line);
        assert_eq!(obqa[0], ("Predators eat".into(), " grass".into(), 5));
        // Characters, not bytes.
        assert_eq!(obqa[1], ("Predators eat".into(), " Käse".into(), 4));
        for task in [Task::ArcEasy, Task::ArcChallenge, Task::Piqa] {
            let found = prompts(task, line);
            assert_eq!(found[0].0, "Question: Predators eat\nAnswer:");
            assert_eq!(found[0].1, " grass");
        }
        let line = r#"{"passage": "Snow is white.", "question": "is snow white", "choices": ["no", "yes"], "gold": 1}"#;
        assert_eq!(
            prompts(Task::BoolQ, line)[1],
            ("Snow is white.\nQuestion: is snow white?\nAnswer:".into(), " yes".into(), 3)
        );
        let line = r#"{"sentence1": "A.", "sentence2": "B.", "choices": ["entailment", "not_entailment"], "gold": 1}"#;
        let rte = prompts(Task::Rte, line);
        assert_eq!(rte[0], ("A.\nQuestion: B. True or False?\nAnswer:".into(), " True".into(), 4));
        assert_eq!(rte[1].1, " False");
        let line = r#"{"query": "Home: How to [title] Dig [step] a hole ", "choices": ["Start [substeps] now.", "[a b"], "gold": 0}"#;
        let hellaswag = prompts(Task::HellaSwag, line);
        assert_eq!(hellaswag[0].0, "Home: How to.  Dig a hole".replace("  ", " "));
        assert_eq!((hellaswag[0].1.as_str(), hellaswag[1].1.as_str()), (" Start now.", " [a b"));
    }

    #[test]
    fn tasks_are_found_by_name() {
        for (file, task) in [
            ("arc_easy_test.jsonl", Some(Task::ArcEasy)),
            ("data/ARC-Challenge.jsonl", Some(Task::ArcChallenge)),
            ("winogrande.jsonl", Some(Task::Winogrande)),
            ("boolq_dev_subset.jsonl", Some(Task::BoolQ)),
            ("rtex.jsonl", None),
            ("questions.jsonl", None),
        ] {
            assert_eq!(Task::from_file(Path::new(file)), task, "{file}");
        }
        assert_eq!(Task::from_name("ARC-e"), Some(Task::ArcEasy));
        assert_eq!(Task::from_name("obqa"), Some(Task::OpenBookQa));
        assert_eq!(Task::from_name("mmlu"), None);
    }

    #[test]
    fn wrong_lines_are_explained() {
        let refuse = |task: Task, line: &str, word: &str| {
            let error = task.item(line).unwrap_err();
            assert!(error.contains(word), "{line:.200}: {error}");
        };
        refuse(Task::Piqa, "{", "EOF");
        refuse(Task::Piqa, "[]", "invalid");
        refuse(Task::Piqa, r#"{"query": 7}"#, "invalid type");
        refuse(Task::Piqa, r#"{"query": "a"}"#, "choices");
        refuse(Task::Piqa, r#"{"query": "a", "choices": ["b", "c"]}"#, "gold");
        refuse(Task::Piqa, r#"{"query": "a", "choices": [], "gold": 0}"#, "0 entries");
        refuse(
            Task::Piqa,
            r#"{"query": "a", "choices": ["b", ""], "gold": 0}"#,
            "choice 1 is empty",
        );
        refuse(Task::Piqa, r#"{"query": "a", "choices": ["b", "c"], "gold": 2}"#, "2 choices");
        refuse(Task::Piqa, r#"{"query": "a", "choices": ["b", "c"], "gold": -1}"#, "-1");
        refuse(Task::Piqa, r#"{"choices": ["b", "c"], "gold": 1}"#, "query");
        refuse(
            Task::Winogrande,
            r#"{"sentence": "a b", "choices": ["b", "c"], "gold": 1}"#,
            "blank",
        );
        refuse(
            Task::Winogrande,
            r#"{"sentence": "a _", "choices": ["b", "c"], "gold": 1}"#,
            "nothing",
        );
        refuse(Task::HellaSwag, r#"{"query": "a", "choices": ["[x]", "c"], "gold": 1}"#, "empty");
        let line = r#"{"passage": "a", "question": "b", "choices": ["no", "maybe"], "gold": 1}"#;
        refuse(Task::BoolQ, line, "yes");
        let line = r#"{"sentence1": "a", "choices": ["entailment", "not_entailment"], "gold": 1}"#;
        refuse(Task::Rte, line, "sentence2");
        refuse(Task::Piqa, &"[".repeat(100_000), "invalid type");
        // Unused fields are skipped without recursion, at any depth.
        refuse(Task::Piqa, &format!("{{\"id\": {}", "[".repeat(100_000)), "EOF");
    }
}
