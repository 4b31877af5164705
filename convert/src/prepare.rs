//! From a recipe to a plan and the metadata of the file.

use stb_format::Meta;
use stb_runtime::Checkpoint;

use crate::allocation::allocate;
use crate::budget;
use crate::calibration::CalibrationText;
use crate::metadata::metadata;
use crate::plan::{Plan, plan};
use crate::recipe::Recipe;

/// Plans the conversion and makes the metadata of the file. Allocates N to the layers or fits all encodings to a
/// size budget if the recipe has these options.
///
/// # Errors
/// Those of [`plan`], [`allocate`], [`metadata`] and [`budget::fit`].
pub fn prepare(
    checkpoint: &Checkpoint,
    recipe: &Recipe,
    source: &CalibrationText,
) -> anyhow::Result<(Plan, Meta)> {
    let mut plan = plan(checkpoint, recipe)?;
    allocate(&mut plan, checkpoint, recipe, source)?;
    let bits = recipe.linear.target_bits();
    let length = recipe.calibration.length.min(checkpoint.spec.context_length as usize);
    let calibration = if plan.needs_calibration() || bits.is_some() {
        source.describe(&recipe.calibration, length)
    } else {
        String::new()
    };
    let meta = metadata(checkpoint, recipe, &calibration, plan.parameters())?;
    if let Some(bits) = bits {
        budget::fit(&mut plan, checkpoint, recipe, source, &meta, bits)?;
    }
    Ok((plan, meta))
}
