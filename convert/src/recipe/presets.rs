//! The built-in recipes.

macro_rules! presets {
    ($($name:literal)*) => {
        /// Names and texts of the built-in recipes.
        pub const PRESETS: &[(&str, &str)] = &[
            $(($name, include_str!(concat!("../../recipes/", $name, ".toml")))),*
        ];
    };
}

presets! {
    "auto"
    "stbllm-4of8" "stbllm-5of8" "stbllm-6of8" "stbllm-si-4of8"
    "nm-1of8" "nm-1of4" "nm-2of8" "nm-2of4"
    "sign" "int2" "int3" "int4" "int8" "source"
    "stbllm-paper-4of8" "stbllm-published-strict" "stbllm-published-code"
    "billm" "billm-6of8" "billm-5of8" "billm-4of8" "pb-llm"
    "gptq-8bit" "gptq-4bit" "gptq-3bit" "gptq-2bit"
    "rtn-8bit" "rtn-4bit" "rtn-3bit" "rtn-2bit"
}

/// The default recipe.
pub const DEFAULT: &str = "auto";
