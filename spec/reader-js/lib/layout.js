/** Where the segments of a payload are, and what lies between them: spec/encodings.md §1. */

import { alignUp } from './bytes.js';
import { allZero } from './source.js';

/**
 * @typedef {object} Shaped what an encoding says about one tensor
 * @property {number} rows
 * @property {number} cols elements of a row
 * @property {number[]} lengths lengths of the segments
 */

/**
 * What else `shaped` returns is for the encoding itself.
 * @typedef {Shaped & Record<string, any> & { starts: number[], length: number }} Layout with the starts of the segments, and the length of the payload
 */

/**
 * The layout of a payload.
 * @param {{ shaped: (shape: number[], settings: object) => Shaped }} encoding
 * @param {number[]} shape
 * @param {object} settings
 * @returns {Layout}
 */
export function layoutOf(encoding, shape, settings) {
  const shaped = encoding.shaped(shape, settings);
  let end = 0;
  const starts = shaped.lengths.map((length) => {
    const start = alignUp(end, 64);
    end = start + length;
    return start;
  });
  return { ...shaped, starts, length: end };
}

/**
 * Where bytes between segments are not zero (STB-R-041), or null.
 * @param {Layout} layout
 * @param {import('./source.js').Source} payload
 * @returns {Promise<string | null>}
 */
export async function findGap({ starts, lengths }, payload) {
  for (let i = 1; i < starts.length; i++) {
    if (!(await allZero(payload, starts[i - 1] + lengths[i - 1], starts[i]))) return `bytes before segment ${i}`;
  }
  return null;
}
