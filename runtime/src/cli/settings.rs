//! How answers are sampled: flags of the command line, and the settings of a chat. The flags are the only list of
//! them: a chat reads and shows each by its flag.

use std::time::{SystemTime, UNIX_EPOCH};

use clap::builder::StyledStr;
use clap::{Arg, ArgAction, Args, Command, FromArgMatches};
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;
use stb_runtime::{SamplerOptions, nearest};

/// Sampling options. Flags override the values of the model file.
#[derive(Args, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[command(next_help_heading = "Sampling")]
pub(super) struct SamplingArgs {
    /// Largest number of tokens to generate; -1 for no limit but an end token or a full context
    /// [default: -1]
    #[arg(short = 'n', long = "tokens", aliases = ["predict", "n-predict", "max-tokens"], value_name = "N")]
    #[arg(value_parser = clap::value_parser!(i64).range(-1..))]
    pub tokens: Option<i64>,
    /// Temperature; 0 selects the most likely token [default: 0.8]
    #[arg(long, alias = "temperature", value_name = "T", value_parser = non_negative)]
    pub temp: Option<f32>,
    /// Keep the K most likely tokens; 0 keeps all [default: 40]
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,
    /// Keep the most likely tokens that together have this probability [default: 0.95]
    #[arg(long, value_name = "P", value_parser = share)]
    pub top_p: Option<f32>,
    /// Keep tokens with at least this fraction of the probability of the best one [default: 0.05]
    #[arg(long, value_name = "P", value_parser = share)]
    pub min_p: Option<f32>,
    /// Penalty on the logits of the last 64 tokens; 1 is off [default: 1]
    #[arg(long, value_name = "X", value_parser = positive)]
    pub repeat_penalty: Option<f32>,
    /// Subtracted from the logits of tokens that the answer has already [default: 0]
    #[arg(long, value_name = "X", value_parser = moderate)]
    pub presence_penalty: Option<f32>,
    /// Subtracted from the logits of tokens for each time that the answer has them [default: 0]
    #[arg(long, value_name = "X", value_parser = moderate)]
    pub frequency_penalty: Option<f32>,
    /// Seed of the random choices; default: a new one each time
    #[arg(long, value_name = "N", env = "STB_SEED")]
    pub seed: Option<u64>,
    /// Stop before this text; may be given several times
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// Never choose an end token: continue to -n or the end of the context
    #[arg(long)]
    pub ignore_eos: bool,
}

/// A setting as a chat shows it.
#[derive(Debug)]
pub(super) struct Setting {
    /// The flag without its dashes.
    pub name: String,
    pub value: String,
    /// What the setting does: the help of the flag.
    pub help: String,
}

impl SamplingArgs {
    /// The same settings with a value for each: those of the model file, and a new seed, where no flag was given.
    pub fn with_defaults(&self, suggested: &SamplerOptions) -> Self {
        let clock = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            tokens: self.tokens.or(Some(-1)),
            temp: self.temp.or(Some(suggested.temperature)),
            top_k: self.top_k.or(Some(suggested.top_k)),
            top_p: self.top_p.or(Some(suggested.top_p)),
            min_p: self.min_p.or(Some(suggested.min_p)),
            repeat_penalty: self.repeat_penalty.or(Some(suggested.repeat_penalty)),
            presence_penalty: self.presence_penalty.or(Some(suggested.presence_penalty)),
            frequency_penalty: self.frequency_penalty.or(Some(suggested.frequency_penalty)),
            seed: self.seed.or_else(|| Some(clock().as_nanos() as u64)),
            stop: self.stop.clone(),
            ignore_eos: self.ignore_eos,
        }
    }

    /// The options of the sampler. `suggested` has the values of settings without one.
    pub fn options(&self, suggested: &SamplerOptions) -> SamplerOptions {
        SamplerOptions {
            temperature: self.temp.unwrap_or(suggested.temperature),
            top_k: self.top_k.unwrap_or(suggested.top_k),
            top_p: self.top_p.unwrap_or(suggested.top_p),
            min_p: self.min_p.unwrap_or(suggested.min_p),
            repeat_penalty: self.repeat_penalty.unwrap_or(suggested.repeat_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(suggested.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(suggested.frequency_penalty),
            seed: self.seed.unwrap_or(suggested.seed),
            ..suggested.clone()
        }
    }

    /// The largest number of tokens of an answer; `None` for no limit.
    pub fn max_tokens(&self) -> Option<usize> {
        self.tokens.and_then(|n| usize::try_from(n).ok())
    }

    /// Gives a setting a value. A value of one that takes several is added; an empty one removes them all.
    ///
    /// # Errors
    /// If there is no such setting, or its flag would refuse the value.
    pub fn set(&mut self, name: &str, value: &str) -> Result<(), String> {
        let flags = flags();
        let arg = find(&flags, name)?;
        let (id, long) = (arg.get_id().to_string(), arg.get_long().unwrap_or_default().to_owned());
        let several = matches!(arg.get_action(), ArgAction::Append);
        let mut all = json(self);
        if several && value.is_empty() {
            all[&id] = Json::Array(Vec::new());
        } else if matches!(arg.get_action(), ArgAction::SetTrue) {
            all[&id] = Json::Bool(switch(value).ok_or_else(|| format!("{long} is on or off"))?);
        } else {
            let parsed = flags
                .try_get_matches_from([format!("--{long}={value}")])
                .and_then(|matches| Self::from_arg_matches(&matches))
                .map_err(|e| format!("{long}: {}", reason(&e)))?;
            match (&mut all[&id], json(&parsed)[&id].take()) {
                (Json::Array(list), Json::Array(more)) => list.extend(more),
                (old, new) => *old = new,
            }
        }
        *self = serde_json::from_value(all).map_err(|e| format!("{long}: {e}"))?;
        Ok(())
    }

    /// All settings, in the order of `--help`.
    pub fn list(&self) -> Vec<Setting> {
        let values = json(self);
        let setting = |arg: &Arg| Setting {
            name: arg.get_long().unwrap_or_default().to_owned(),
            value: shown(&values[arg.get_id().as_str()]),
            help: help(arg.get_help()),
        };
        flags().get_arguments().map(setting).collect()
    }

    /// The setting with this name.
    ///
    /// # Errors
    /// If there is none.
    pub fn get(&self, name: &str) -> Result<Setting, String> {
        let flags = flags();
        let long = find(&flags, name)?.get_long().unwrap_or_default();
        let found = self.list().into_iter().find(|setting| setting.name == long);
        found.ok_or_else(|| format!("there is no setting {name}"))
    }

    /// The names of all settings.
    pub fn names() -> Vec<String> {
        flags().get_arguments().filter_map(Arg::get_long).map(str::to_owned).collect()
    }
}

/// A command that has these flags only. The environment counts when the program starts, not here.
fn flags() -> Command {
    let command = Command::new("settings").no_binary_name(true).disable_help_flag(true);
    SamplingArgs::augment_args(command).mut_args(|arg| arg.env(None::<&'static str>))
}

/// The flag with this name or alias; `_` counts as `-`.
fn find<'a>(flags: &'a Command, name: &str) -> Result<&'a Arg, String> {
    let wanted = name.trim_start_matches('-').replace('_', "-");
    let is_wanted = |arg: &&Arg| {
        arg.get_long() == Some(&wanted)
            || arg.get_short().is_some_and(|short| wanted == short.to_string())
            || arg.get_all_aliases().is_some_and(|aliases| aliases.contains(&wanted.as_str()))
    };
    flags.get_arguments().find(is_wanted).ok_or_else(|| {
        let names = flags.get_arguments().filter_map(Arg::get_long);
        match nearest(&wanted, names).first() {
            Some(near) => format!("there is no setting {name}; did you mean {near}?"),
            None => format!("there is no setting {name}; /show lists them"),
        }
    })
}

/// The settings as an object; the key of each is the id of its flag.
fn json(settings: &SamplingArgs) -> Json {
    serde_json::to_value(settings).unwrap_or_default()
}

fn shown(value: &Json) -> String {
    match value {
        Json::Bool(on) => if *on { "on" } else { "off" }.to_owned(),
        Json::Array(list) if list.is_empty() => "none".to_owned(),
        Json::Array(list) => list.iter().map(Json::to_string).collect::<Vec<_>>().join(", "),
        // The numbers are f32; as f64 they have digits that nobody has written.
        Json::Number(n) if n.is_f64() => (n.as_f64().unwrap_or_default() as f32).to_string(),
        other => other.to_string(),
    }
}

/// The help of a flag without its default value, which a chat shows otherwise.
fn help(text: Option<&StyledStr>) -> String {
    let text = text.map(ToString::to_string).unwrap_or_default();
    text.split(" [default").next().unwrap_or_default().to_owned()
}

fn switch(text: &str) -> Option<bool> {
    match text {
        "on" | "true" | "1" | "yes" => Some(true),
        "off" | "false" | "0" | "no" => Some(false),
        _ => None,
    }
}

/// What is wrong with a value, without the advice on command lines.
fn reason(error: &clap::Error) -> String {
    match std::error::Error::source(error) {
        Some(source) => source.to_string(),
        None => {
            let text = error.to_string();
            text.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned()
        }
    }
}

fn number(text: &str, valid: impl Fn(f32) -> bool, what: &str) -> Result<f32, String> {
    let value: f32 = text.parse().map_err(|_| format!("{text} is not a number"))?;
    if valid(value) { Ok(value) } else { Err(format!("{text} is not {what}")) }
}

fn non_negative(text: &str) -> Result<f32, String> {
    number(text, |v| v >= 0.0 && v.is_finite(), "a finite number from 0")
}

fn positive(text: &str) -> Result<f32, String> {
    number(text, |v| v > 0.0 && v.is_finite(), "a finite number above 0")
}

fn share(text: &str) -> Result<f32, String> {
    number(text, |v| (0.0..=1.0).contains(&v), "between 0 and 1")
}

/// The range of OpenAI's penalties.
fn moderate(text: &str) -> Result<f32, String> {
    number(text, |v| (-2.0..=2.0).contains(&v), "between -2 and 2")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> SamplingArgs {
        SamplingArgs::default().with_defaults(&SamplerOptions::default())
    }

    /// Every flag is shown with a value, and the chat can set it to the value shown.
    #[test]
    fn flags_and_settings_are_the_same() {
        let before = settings();
        let list = before.list();
        assert_eq!(list.len(), json(&before).as_object().unwrap().len());
        for setting in list {
            assert!(!setting.help.is_empty() && setting.value != "null", "{setting:?}");
            let value = if setting.value == "none" { "" } else { &setting.value };
            let mut after = before.clone();
            after.set(&setting.name, value).unwrap();
            assert_eq!(after, before, "{setting:?}");
        }
    }

    #[test]
    fn values_are_checked_as_on_the_command_line() {
        let mut settings = settings();
        for (name, value, word) in [
            ("temp", "-1", "finite number"),
            ("temp", "hot", "not a number"),
            ("top-p", "1.5", "between 0 and 1"),
            ("presence-penalty", "3", "between -2 and 2"),
            ("tokens", "-2", "-2"),
            ("seed", "x", "seed"),
            ("ignore-eos", "maybe", "on or off"),
            ("tmep", "1", "did you mean temp"),
            ("volume", "1", "/show"),
        ] {
            let error = settings.set(name, value).unwrap_err();
            assert!(error.contains(word), "{name} {value}: {error}");
        }
        for (name, value) in [
            ("temperature", "0.3"),
            ("top_p", "0.5"),
            ("n", "7"),
            ("max-tokens", "8"),
            ("ignore_eos", "on"),
            ("stop", "END"),
            ("stop", "two words"),
            ("seed", "18446744073709551615"),
            ("frequency-penalty", "-0.5"),
        ] {
            settings.set(name, value).unwrap_or_else(|e| panic!("{name}: {e}"));
        }
        let options = settings.options(&SamplerOptions::default());
        assert_eq!((options.temperature, options.top_p, options.seed), (0.3, 0.5, u64::MAX));
        assert_eq!((options.frequency_penalty, settings.max_tokens()), (-0.5, Some(8)));
        assert_eq!((settings.ignore_eos, settings.stop.len()), (true, 2));
        assert_eq!(settings.get("temp").unwrap().value, "0.3");
        assert_eq!(settings.get("stop").unwrap().value, "\"END\", \"two words\"");
        settings.set("stop", "").unwrap();
        settings.set("tokens", "-1").unwrap();
        assert_eq!((settings.stop.len(), settings.max_tokens()), (0, None));
    }
}
