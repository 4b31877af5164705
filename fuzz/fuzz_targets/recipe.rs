//! Fuzzes recipes. The result must be an error with its line, or a recipe.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stb_convert::Recipe;

fuzz_target!(|text: &str| {
    if let Err(error) = Recipe::parse(text) {
        assert!(!error.to_string().is_empty());
    }
});
