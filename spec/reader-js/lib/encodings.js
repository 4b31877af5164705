/** The encodings that this reader knows, by id, and what they have in common: spec/encodings.md §1. */

import { alignUp } from './bytes.js';
import { BF16, F16_DENSE, F32 } from './dense.js';
import { INT_GROUP, ODD_GROUP } from './int-group.js';
import { NM } from './nm.js';
import { STBLLM } from './stbllm.js';

/**
 * @typedef {object} Shaped what an encoding says about one tensor
 * @property {number} rows
 * @property {number} cols elements of a row
 * @property {number} step rows that lie together: ranges of rows are read from a multiple of it
 * @property {number[]} lengths lengths of the segments
 * @property {(first: number, end: number) => number[][]} slices for each segment, the part of it that these rows need
 */

/**
 * What else `shaped` returns is for the encoding itself.
 * @typedef {Shaped & Record<string, any> & { starts: number[], length: number }} Layout with the starts of the segments, and the length of the payload
 */

/**
 * @typedef {object} Findings what the content checks found; the first is a sentence on STB-R-043 or 044
 * @property {{ rule: number, detail: string } | null} states
 * @property {string | null} unused where unused bits are not zero (STB-R-041)
 * @property {string | null} numbers where a number is not finite (STB-R-042)
 */

/**
 * @typedef {object} Encoding
 * @property {string} name
 * @property {boolean} matrix whether it is for tensors of two dimensions only
 * @property {(params: DataView, fail: (detail: string) => never) => object} settings reads params: STB-R-036
 * @property {(shape: number[], settings: object) => Shaped} shaped
 * @property {(layout: Layout, settings: object, parts: Uint8Array[], first: number, end: number, findings: Findings) => void} check
 *   content of the rows first..end, whose parts of the segments are given
 * @property {(layout: Layout, settings: object, parts: Uint8Array[], first: number, end: number, out: Float32Array) => void} decode
 *   weights of rows first..end; the rows of `parts` begin at the multiple of `step` not above `first`, and `out` is zero
 */

/** @type {Map<number, Encoding>} */
const ENCODINGS = new Map([
  [1, F32],
  [2, F16_DENSE],
  [3, BF16],
  [16, INT_GROUP],
  [17, ODD_GROUP],
  [32, STBLLM],
  [48, NM],
]);

/**
 * The encoding with an id, or null if this reader does not know it.
 * @param {number} id
 */
export function encodingOf(id) {
  return ENCODINGS.get(id) ?? null;
}

/**
 * Where the segments of a payload are.
 * @param {Encoding} encoding
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
