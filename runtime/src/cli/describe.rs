//! What a chat says of its model and its settings.

use std::fmt::Write;

use super::answer::Answerer;
use super::conversation::Conversation;
use super::settings::Setting;
use super::terminal;

/// The model, its size and quality, and how full the context is.
pub(super) fn model(answerer: &Answerer<'_>, conversation: &Conversation) -> String {
    let session = &answerer.session;
    let model = &session.engine().model;
    let parameters = model.parameters();
    let bits = 8.0 * model.file_bytes as f64 / parameters.max(1) as f64;
    let architecture = model.architecture().unwrap_or("unknown architecture");
    let recipe = model.recipe().map(|name| format!(", recipe {name}")).unwrap_or_default();
    let quality = match model.quality() {
        None => "not measured".to_owned(),
        Some(quality) => {
            let kl = quality.figures.as_ref().map(|f| {
                format!(", KL divergence {:.4} nats per token from the original", f.kl.value)
            });
            format!("{}{}", quality.verdict.phrase(), kl.unwrap_or_default())
        }
    };
    let template = if conversation.template { "yes" } else { "none: plain text" };
    let instructions = conversation.instructions.as_deref().unwrap_or("none");
    let rows = [
        ("model", format!("{} ({architecture}{recipe})", answerer.name())),
        (
            "size",
            format!(
                "{}, {:.1} million parameters, {bits:.3} true bits per parameter",
                terminal::bytes(model.file_bytes),
                parameters as f64 / 1e6
            ),
        ),
        ("quality", quality),
        ("context", format!("{} of {} tokens used", session.cached().len(), session.context())),
        ("template", template.to_owned()),
        ("system", instructions.to_owned()),
        ("messages", conversation.messages.len().to_string()),
    ];
    let mut out = String::new();
    for (name, value) in rows {
        let _ = writeln!(out, "{name:<17} {value}");
    }
    out
}

/// A line with a setting.
pub(super) fn setting(setting: &Setting) -> String {
    format!("{:<17} {:<8} {}\n", setting.name, setting.value, setting.help)
}
