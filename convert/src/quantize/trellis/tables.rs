//! The tables that the quantizer uses: for weights with a normal distribution.

use stb_format::encoding::{Trellis, TrellisTables};

/// Tables of a rate.
pub(super) struct RateTables {
    bits: usize,
    weights: usize,
    /// The standard deviation of the weights that the tables are for, in units of the scale.
    pub deviation: f32,
    /// For each weight of a step.
    pub tables: &'static [TrellisTables],
}

/// The tables of the rate of `spec`.
pub(super) fn tables_of(spec: Trellis) -> &'static RateTables {
    let rate = (spec.step_bits(), spec.step_weights());
    let found = TABLES.iter().find(|t| (t.bits, t.weights) == rate);
    found.expect("every rate of the format has tables")
}

/// Fitted to samples by turns: the streams of many sequences by the Viterbi algorithm, and the entries by least squares.
const TABLES: &[RateTables] = &[
    RateTables {
        bits: 1,
        weights: 2,
        deviation: 36.56,
        tables: &[
            [
                [16, 39, 11, 8, 15, 49, 12, 26, 15, 36, 23, 30, 54, 0, 30, 17],
                [10, 39, 37, 42, 61, 10, 65, 34, 54, 25, 21, 73, 40, 61, 8, 61],
            ],
            [
                [8, 32, 17, 17, 1, 17, 22, 2, 32, 15, 1, 4, 13, 0, 5, 18],
                [32, 68, 16, 88, 56, 64, 35, 74, 80, 21, 66, 36, 18, 72, 62, 29],
            ],
        ],
    },
    RateTables {
        bits: 1,
        weights: 1,
        deviation: 30.97,
        tables: &[[
            [16, 62, 41, 33, 44, 29, 0, 46, 27, 28, 46, 49, 38, 38, 13, 9],
            [63, 8, 38, 23, 60, 13, 60, 44, 9, 44, 1, 38, 17, 65, 14, 1],
        ]],
    },
    RateTables {
        bits: 3,
        weights: 2,
        deviation: 24.62,
        tables: &[
            [
                [23, 36, 13, 31, 36, 19, 54, 0, 28, 14, 30, 18, 39, 30, 26, 32],
                [42, 52, 14, 3, 56, 31, 17, 44, 39, 71, 62, 4, 38, 33, 73, 31],
            ],
            [
                [7, 11, 11, 28, 17, 17, 25, 0, 10, 18, 19, 39, 0, 16, 27, 33],
                [34, 84, 35, 35, 54, 5, 74, 46, 62, 34, 13, 65, 31, 35, 64, 71],
            ],
        ],
    },
    RateTables {
        bits: 2,
        weights: 1,
        deviation: 22.29,
        tables: &[[
            [21, 66, 38, 37, 43, 31, 0, 49, 24, 35, 48, 54, 37, 38, 15, 11],
            [61, 14, 33, 23, 47, 25, 51, 42, 6, 33, 3, 26, 22, 50, 21, 4],
        ]],
    },
    RateTables {
        bits: 5,
        weights: 2,
        deviation: 18.45,
        tables: &[
            [
                [12, 13, 24, 21, 44, 36, 21, 0, 30, 13, 36, 33, 29, 47, 43, 22],
                [13, 9, 43, 50, 41, 12, 35, 66, 47, 29, 30, 36, 44, 61, 53, 30],
            ],
            [
                [10, 23, 14, 27, 33, 21, 33, 31, 22, 33, 15, 30, 28, 48, 5, 0],
                [19, 54, 55, 44, 38, 37, 45, 41, 27, 50, 63, 79, 11, 25, 64, 30],
            ],
        ],
    },
    RateTables {
        bits: 3,
        weights: 1,
        deviation: 20.49,
        tables: &[[
            [14, 15, 28, 25, 45, 42, 26, 0, 36, 12, 37, 36, 32, 54, 52, 28],
            [13, 1, 38, 45, 39, 10, 26, 66, 44, 24, 28, 34, 57, 57, 48, 18],
        ]],
    },
    RateTables {
        bits: 4,
        weights: 1,
        deviation: 20.57,
        tables: &[[
            [16, 16, 30, 27, 46, 44, 28, 0, 38, 14, 40, 38, 35, 56, 51, 30],
            [12, 1, 37, 43, 38, 7, 25, 65, 41, 21, 28, 33, 51, 56, 46, 17],
        ]],
    },
];
