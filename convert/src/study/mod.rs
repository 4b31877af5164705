//! Studies: models × recipes × texts, measured cell by cell and shown as one table.
//!
//! Every finished cell is a file in `OUT/cells`, named by a hash of all it depends on. A second start
//! with the same folder computes what is missing, after a kill as after a change of the study; studies
//! that share a folder share their cells.

mod cell;
mod definition;
mod run;
mod table;

pub use cell::{Cell, CellInputs, Measured, fingerprint, write_whole};
pub use definition::{
    CalibrationEntry, Definition, ModelEntry, RecipeEntry, Study, StudyModel, StudyRecipe,
    StudyText, TextEntry,
};
pub use run::{CellOutcome, Events, StudyCell, StudyTable, convert_file, run};
