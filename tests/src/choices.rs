//! Compares tokens chosen from the top-k of a device with tokens chosen from all of its logits.

use stb_runtime::{Engine, Result, Sampler, SamplerInput, SamplerOptions, State};

/// Generates `steps` tokens after `prompt` both ways, with an engine on a device. Returns the number of tokens
/// that differ, and the number chosen from the top-k of the device.
///
/// # Errors
/// As for [`Engine::forward`].
pub fn compared(
    engine: &Engine,
    options: &SamplerOptions,
    prompt: &[u32],
    banned: &[u32],
    steps: usize,
) -> Result<(usize, usize)> {
    let (mut all, mut found) = (Sampler::new(options.clone()), Sampler::new(options.clone()));
    for token in prompt {
        all.accept(*token);
        found.accept(*token);
    }
    let context = prompt.len() + steps;
    let (mut here, mut there) = (State::new(engine, context), State::new(engine, context));
    let (mut next, mut tokens) = (SamplerInput::default(), prompt.to_vec());
    let (mut differ, mut from_device) = (0, 0);
    for _ in 0..steps {
        let logits = engine.forward(&mut here, &tokens)?.to_vec();
        let expected = all.choose(&mut SamplerInput::Logits(logits), banned);
        engine.forward_sampled(&mut there, &tokens, &mut found, banned, &mut next)?;
        from_device += usize::from(matches!(next, SamplerInput::TopK(_)));
        differ += usize::from(found.choose(&mut next, banned) != expected);
        tokens = vec![expected];
    }
    Ok((differ, from_device))
}
