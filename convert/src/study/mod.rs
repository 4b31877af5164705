//! Studies: models × recipes × texts, measured cell by cell and shown as one table.
//!
//! Every finished cell is a file in `OUT/cells`, named by a hash of everything on which it depends. A run with an existing
//! folder measures only missing cells, after an interruption or a change of the study; studies that share a folder
//! share their cells.

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
