//! Products of trellis codes with many q8 tokens by AMX.

use stb_format::encoding::TrellisView;
use stb_format::trellis_rates;

use super::super::expanded_amx::{ExpandedBlock, all_tiles};
use super::super::gemm_task::GemmQ8Task;
use super::levels::{Levels, expand};
use crate::cpu::arch::bytes::{Bytes, TileTask, TileUnit};

pub(super) struct TrellisByTiles<'a, 'y> {
    pub task: GemmQ8Task<'a, 'y, TrellisView<'a>>,
    /// Scratch for expanded blocks.
    pub expanded: &'a mut Vec<ExpandedBlock>,
}

impl TileTask for TrellisByTiles<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Bytes>(self, s: S, unit: &impl TileUnit) {
        let Self { task, expanded } = self;
        let m = task.matrix;
        trellis_rates!(m.spec, |BITS, WEIGHTS| {
            let levels = Levels::<S, WEIGHTS>::new(s, m.tables, true);
            all_tiles(
                s,
                unit,
                task,
                &m.scales(),
                expanded,
                #[inline(always)]
                |tile, block, to| expand::<S, BITS, WEIGHTS>(s, m, &levels, tile, block, to),
            );
        });
    }
}
