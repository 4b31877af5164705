/** Trellis codes, id 80: spec/encodings.md §7. */

import { blockScale, TILE, unusedScalesAreZero, whyInvalid } from './block-scales.js';
import { F16, finiteF16, viewOf } from './bytes.js';
import { byWindows } from './windows.js';

/** Bits of a step and weights of a step that go together. */
const STEPS = new Set(['1/2', '1/1', '3/2', '2/1', '5/2', '3/1', '4/1']);
/** Steps of a unit that belong to one row. */
const ROW_STEPS = 4;
/** Entries of a table, and bytes of the two tables of a step weight. */
const ENTRIES = 16;
const PAIR = 2 * ENTRIES;
const WINDOWS = 256;
const MOST_LEVEL = 127;

/** @typedef {{ stepBits: number, stepWeights: number, scaleBits: number, factors: boolean, block: number }} Settings */

/**
 * What the windows stand for before they are scaled: for each step weight, 256 values.
 * @param {Uint8Array} tables
 * @param {number} stepWeights
 */
function valuesOf(tables, stepWeights) {
  return Array.from({ length: stepWeights }, (_, k) => {
    const first = k * PAIR;
    const second = first + ENTRIES;
    return Float64Array.from({ length: WINDOWS }, (_, w) => tables[first + (w & 15)] + tables[second + ((w ^ (w >> 4)) & 15)] - 64);
  });
}

/**
 * The windows of row `i` of a tile, for all its units.
 * @param {Uint8Array} streams
 * @param {number} base first byte of the tile
 * @param {number} stepBits
 * @param {number} i
 * @param {Uint8Array} row gets the windows, four per unit
 */
function readWindows(streams, base, stepBits, i, row) {
  const size = 8 * stepBits;
  for (let j = 0; j < ROW_STEPS; j++) {
    const bit = stepBits * (i * ROW_STEPS + j);
    const low = bit >> 3;
    const high = (low + 1) % size;
    const shift = bit & 7;
    for (let at = base, k = j; k < row.length; at += size, k += ROW_STEPS) {
      row[k] = (streams[at + low] | (streams[at + high] << 8)) >> shift;
    }
  }
}

/**
 * Writes the weights of a row of a unit into `out`, without factors and scale.
 * @param {Float64Array[]} values for each step weight
 * @param {Uint8Array} row windows of the row
 * @param {number} unit
 * @param {Float32Array} out
 * @param {number} at element of the first column of the unit
 * @param {number} end element behind the last column of the row
 */
function decodeUnit(values, row, unit, out, at, end) {
  for (let k = 0, from = at; k < values.length; k++, from += ROW_STEPS) {
    const count = Math.min(ROW_STEPS, end - from);
    for (let j = 0; j < count; j++) out[from + j] = values[k][row[unit * ROW_STEPS + j]];
  }
}

/**
 * Multiplies the weights of a row, still without scale, by the column factors; the products are exact.
 * @param {DataView} factors
 * @param {Float32Array} weights
 */
function multiply(factors, weights) {
  for (let c = 0; c < weights.length; c++) weights[c] *= F16[factors.getUint16(c * 2, true)];
}

/** @type {import('./windows.js').WindowEncoding} */
const WINDOWED = {
  name: 'trellis',
  matrix: true,
  settings(params, fail) {
    const [stepBits, stepWeights, scaleBits, flags] = [0, 1, 2, 3].map((i) => params.getUint8(i));
    const block = params.getUint16(4, true);
    if (!STEPS.has(`${stepBits}/${stepWeights}`)) fail(`trellis has steps of ${stepBits} bits and ${stepWeights} weights`);
    if (flags > 1) fail(`trellis has the flags ${flags}`);
    const invalid = whyInvalid(scaleBits, block);
    if (invalid) fail(`trellis has ${invalid}`);
    if (params.getUint16(6, true) | params.getInt32(8, true) | params.getInt32(12, true)) fail('unused params of trellis are not zero');
    return { stepBits, stepWeights, scaleBits, factors: flags === 1, block };
  },
  shaped([rows, cols], { stepBits, stepWeights, scaleBits, factors, block }) {
    const units = Math.ceil(cols / (ROW_STEPS * stepWeights));
    const tileBytes = units * 8 * stepBits;
    const tableBytes = stepWeights * PAIR;
    const factorBytes = factors ? cols * 2 : 0;
    const blockBytes = block ? Math.ceil(cols / block) * 2 * scaleBits : 0;
    const tiles = Math.ceil(rows / TILE);
    const slices = (first, end) => {
      const from = Math.floor(first / TILE);
      const to = Math.ceil(end / TILE);
      return [
        [0, tableBytes],
        [0, factorBytes],
        [from * TILE * 2, end * 2],
        [from * blockBytes, to * blockBytes],
        [from * tileBytes, to * tileBytes],
      ];
    };
    const lengths = [tableBytes, factorBytes, rows * 2, tiles * blockBytes, tiles * tileBytes];
    return { rows, cols, step: TILE, lengths, slices, units, tileBytes, blockBytes };
  },
  check({ blockBytes }, { stepWeights, scaleBits }, [tables, factors, rowScales, blockScales], first, end, findings) {
    if (!finiteF16(factors, 0, factors.length)) findings.numbers ??= 'column factors';
    if (!finiteF16(rowScales, 0, rowScales.length)) findings.numbers ??= 'row scales';
    for (let k = 0; k < stepWeights; k++) {
      const largest = (at) => Math.max(...tables.subarray(at, at + ENTRIES));
      const level = largest(k * PAIR) + largest(k * PAIR + ENTRIES);
      if (level > MOST_LEVEL) findings.tables ??= `${level} for weight ${k} of a step`;
    }
    const tiles = Math.ceil((end - first) / TILE);
    const scales = blockScales.subarray((tiles - 1) * blockBytes, tiles * blockBytes);
    if (!unusedScalesAreZero(scales, scaleBits, end - first - (tiles - 1) * TILE)) {
      findings.unused ??= 'block scales of rows that do not exist';
    }
  },
  decode({ cols, units, tileBytes, blockBytes }, settings, [tables, factorBytes, rowScales, blockScales, streams], first, end, out) {
    const { stepBits, stepWeights, scaleBits, block } = settings;
    const values = valuesOf(tables, stepWeights);
    const factors = settings.factors ? viewOf(factorBytes) : null;
    const scales = viewOf(rowScales);
    const row = new Uint8Array(units * ROW_STEPS);
    const base = Math.floor(first / TILE) * TILE;
    for (let r = first; r < end; r++) {
      const tile = Math.floor((r - base) / TILE);
      const i = (r - base) % TILE;
      const rowScale = F16[scales.getUint16((r - base) * 2, true)];
      readWindows(streams, tile * tileBytes, stepBits, i, row);
      const [begin, after] = [(r - first) * cols, (r - first + 1) * cols];
      for (let unit = 0; unit < units; unit++) decodeUnit(values, row, unit, out, begin + unit * ROW_STEPS * stepWeights, after);
      if (factors) multiply(factors, out.subarray(begin, after));
      const span = scaleBits ? block : cols;
      for (let c = 0; c < cols; c += span) {
        const scale = scaleBits ? rowScale * blockScale(blockScales, tile * blockBytes, c / block, scaleBits, i) : rowScale;
        for (let at = begin + c; at < Math.min(begin + c + span, after); at++) out[at] *= scale;
      }
    }
  },
};

export const TRELLIS = byWindows(WINDOWED);
