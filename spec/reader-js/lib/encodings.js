/** The encodings that this reader knows, by id. */

import { BF16, F16_DENSE, F32 } from './dense.js';
import { INT_GROUP, ODD_GROUP } from './int-group.js';
import { MIXED_ROWS } from './mixed-rows.js';
import { NM } from './nm.js';
import { STBLLM } from './stbllm.js';
import { TRELLIS } from './trellis.js';

/**
 * @typedef {object} Content a payload and what is known about it
 * @property {string} name what errors call it
 * @property {import('./layout.js').Layout} layout
 * @property {any} settings of the encoding
 * @property {import('./source.js').Source} payload
 */

/**
 * @typedef {object} Encoding
 * @property {string} name
 * @property {boolean} matrix whether it is for tensors of two dimensions only
 * @property {(params: DataView, fail: (detail: string) => never) => any} settings reads params: STB-R-036
 * @property {(shape: number[], settings: any) => import('./layout.js').Shaped} shaped
 * @property {(content: Content) => Promise<void>} check STB-R-041 to 046, in the order of the encoding
 * @property {(content: Content, first: number, end: number, out: Float32Array) => Promise<void>} decode weights of rows
 *   first..end; `out` is zero
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
  [64, MIXED_ROWS],
  [80, TRELLIS],
]);

/**
 * The encoding with an id, or null if this reader does not know it.
 * @param {number} id
 */
export function encodingOf(id) {
  return ENCODINGS.get(id) ?? null;
}
