/** Encodings whose rows lie one after another: they are checked and decoded by windows of rows, so that memory stays small. */

import { broken, require, StbLimitError } from './errors.js';
import { findGap } from './layout.js';
import { CHUNK, readAll } from './source.js';

/** Bytes that the smallest window of a segment, a row or 16 rows, may have. */
const WINDOW_LIMIT = 2 ** 30;

/** @typedef {import('./encodings.js').Encoding} Encoding */

/**
 * @typedef {object} WindowShaped
 * @property {number} step rows that lie together: ranges of rows are read from a multiple of it
 * @property {(first: number, end: number) => number[][]} slices for each segment, the part of it that these rows need
 */

/** @typedef {import('./layout.js').Layout & WindowShaped} Layout */

/**
 * @typedef {object} Findings what the content checks found; the first is a sentence on STB-R-043 or 044
 * @property {{ rule: number, detail: string } | null} states
 * @property {string | null} unused where unused bits are not zero (STB-R-041)
 * @property {string | null} numbers where a number is not finite (STB-R-042)
 * @property {string | null} tables which largest entries add up to more than is allowed (STB-R-046)
 */

/**
 * @typedef {object} WindowEncoding
 * @property {string} name
 * @property {boolean} matrix whether it is for tensors of two dimensions only
 * @property {(params: DataView, fail: (detail: string) => never) => object} settings reads params: STB-R-036
 * @property {(shape: number[], settings: object) => import('./layout.js').Shaped & WindowShaped} shaped
 * @property {(layout: Layout, settings: object, parts: Uint8Array[], first: number, end: number, findings: Findings) => void} check
 *   content of the rows first..end, whose parts of the segments are given
 * @property {(layout: Layout, settings: object, parts: Uint8Array[], first: number, end: number, out: Float32Array) => void} decode
 *   weights of rows first..end; the rows of `parts` begin at the multiple of `step` not above `first`, and `out` is zero
 */

/**
 * The windows of rows first..end that a payload is read in.
 * @returns {Generator<[number, number]>}
 */
function* windows({ rows, step, length }, first, end) {
  const bytesPerStep = (length / rows) * step;
  const size = Math.max(1, Math.floor(CHUNK / bytesPerStep)) * step;
  for (let from = first; from < end; ) {
    const to = Math.min(end, Math.floor(from / step) * step + size);
    yield [from, to];
    from = to;
  }
}

/** The parts of the segments that rows first..end need. */
async function readParts(layout, payload, first, end) {
  const parts = [];
  for (const [i, [from, to]] of layout.slices(first, end).entries()) {
    if (to - from > WINDOW_LIMIT) {
      throw new StbLimitError(`the smallest readable part of a tensor has ${to - from} bytes; this reader takes ${WINDOW_LIMIT}`);
    }
    parts.push(await readAll(payload, layout.starts[i] + from, layout.starts[i] + to));
  }
  return parts;
}

/**
 * The encoding that works on whole payloads by means of one that works on windows of rows.
 * @param {WindowEncoding} encoding
 * @returns {Encoding}
 */
export function byWindows(encoding) {
  return {
    name: encoding.name,
    matrix: encoding.matrix,
    settings: encoding.settings,
    shaped: encoding.shaped,
    async check({ name, layout, settings, payload }) {
      /** @type {Findings} */
      const findings = { states: null, unused: null, numbers: null, tables: null };
      for (const [first, end] of windows(layout, 0, layout.rows)) {
        const parts = await readParts(layout, payload, first, end);
        encoding.check(layout, settings, parts, first, end, findings);
        if (findings.states) break;
      }
      const { states, numbers, tables } = findings;
      if (states) throw broken(states.rule, `${name}: ${states.detail}`);
      const unused = findings.unused ?? (await findGap(layout, payload));
      require(unused === null, 41, `${name} has unused bits that are not zero (${unused})`);
      require(numbers === null, 42, `${name} has a number that is not finite (${numbers})`);
      require(tables === null, 46, `${name} has tables whose largest entries add up to more than 127 (${tables})`);
    },
    async decode({ layout, settings, payload }, first, end, out) {
      for (const [from, to] of windows(layout, first, end)) {
        const parts = await readParts(layout, payload, from, to);
        encoding.decode(layout, settings, parts, from, to, out.subarray((from - first) * layout.cols, (to - first) * layout.cols));
      }
    },
  };
}
