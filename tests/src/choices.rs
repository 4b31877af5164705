//! Tokens chosen from what a device finds beside those chosen from all of its logits.

use stb_runtime::{Model, Next, Result, Sampler, SamplerOptions, State};

/// Generates `steps` tokens from `prompt` both ways, on a model that is on a device: how many differ, and how many were chosen
/// from what the device found.
///
/// # Errors
/// As for [`Model::forward`].
pub fn compared(
    model: &Model,
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
    let (mut here, mut there) = (State::new(model, context), State::new(model, context));
    let (mut next, mut tokens) = (Next::default(), prompt.to_vec());
    let (mut differ, mut from_device) = (0, 0);
    for _ in 0..steps {
        let logits = model.forward(&mut here, &tokens)?.to_vec();
        let expected = all.choose(&mut Next::Logits(logits), banned);
        model.next(&mut there, &tokens, &mut found, banned, &mut next)?;
        from_device += usize::from(matches!(next, Next::Best(_)));
        differ += usize::from(found.choose(&mut next, banned) != expected);
        tokens = vec![expected];
    }
    Ok((differ, from_device))
}
