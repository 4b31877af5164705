/** Scales of blocks of columns, for the rows of a tile: spec/encodings.md §5.3. Ids 48 and 80 have them. */

import { isZero } from './bytes.js';

/** Rows of a tile. */
export const TILE = 16;

/** What is wrong with two parameters, or null: STB-R-036. @returns {string | null} */
export function whyInvalid(scaleBits, block) {
  if (![0, 4, 8].includes(scaleBits)) return `block scales of ${scaleBits} bits`;
  if (scaleBits ? block === 0 || block % 32 : block) return `blocks of ${block} with block scales of ${scaleBits} bits`;
  return null;
}

/** Whether the block scales of rows that do not exist are zero; `scales` are those of one tile. */
export function unusedScalesAreZero(scales, scaleBits, rowsHere) {
  if (rowsHere === TILE) return true;
  for (let at = 0; at < scales.length; at += 2 * scaleBits) {
    if (scaleBits === 8) {
      if (!isZero(scales, at + rowsHere, at + TILE)) return false;
      continue;
    }
    for (let k = 0; k < 8; k++) {
      const used = (k < rowsHere ? 0x0f : 0) | (k + 8 < rowsHere ? 0xf0 : 0);
      if (scales[at + k] & ~used) return false;
    }
  }
  return true;
}

/** The multiplier of row `i` of a tile for block `k`; `at` is the first byte of the tile's block scales. */
export function blockScale(scales, at, k, scaleBits, i) {
  const from = at + k * 2 * scaleBits;
  const code = scaleBits === 8 ? scales[from + i] : (scales[from + (i % 8)] >> (i >= 8 ? 4 : 0)) & 15;
  return (code + 1) / 2 ** scaleBits;
}
