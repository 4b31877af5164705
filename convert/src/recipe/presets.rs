//! The built-in recipes.

macro_rules! presets {
    (use: $($used:literal)* compare: $($compared:literal)*) => {
        /// Names and texts of the built-in recipes.
        pub const PRESETS: &[(&str, &str)] = &[
            $(($used, include_str!(concat!("../../recipes/", $used, ".toml"))),)*
            $(($compared, include_str!(concat!("../../recipes/", $compared, ".toml"))),)*
        ];

        /// The names of those for use. The others repeat published methods, to compare with.
        pub const FOR_USE: &[&str] = &[$($used),*];
    };
}

presets! {
    use:
    "auto"
    "stbllm-4of8" "stbllm-5of8" "stbllm-6of8" "stbllm-si-4of8"
    "nm-1of8" "nm-1of4" "nm-2of8" "nm-2of4"
    "trellis-1bit" "trellis-1.5bit" "trellis-2bit" "trellis-2.5bit" "trellis-3bit" "trellis-4bit"
    "sign" "int2" "int3" "int4" "int8" "source"
    compare:
    "stbllm-paper-4of8" "stbllm-published-strict" "stbllm-published-code"
    "billm" "billm-6of8" "billm-5of8" "billm-4of8" "pb-llm"
    "gptq-8bit" "gptq-4bit" "gptq-3bit" "gptq-2bit"
    "rtn-8bit" "rtn-4bit" "rtn-3bit" "rtn-2bit"
}

/// The default recipe.
pub const DEFAULT: &str = "auto";
