/** Integer groups, ids 16 and 17: spec/encodings.md §3. */

import { F16, finiteF16, isZero, viewOf } from './bytes.js';
import { byWindows } from './windows.js';

/** Codes by bits: element q is what the bits q of a code mean. */
const CODES = {
  1: [-1, 1],
  2: [-3, -1, 1, 3],
  3: [-7, -5, -3, -1, 1, 3, 5, 7],
  4: Array.from({ length: 16 }, (_, q) => q - 8),
  8: Array.from({ length: 256 }, (_, q) => (q < 128 ? q : q - 256)),
};

/** The widths of the planes of a row. */
const planesOf = (bits) => (bits === 3 ? [2, 1] : [bits]);

/**
 * The bits of all codes of a row, padding included.
 * @param {Uint8Array} codes
 * @param {number} at first byte of the row
 * @param {number} bits
 * @param {Uint8Array} row gets the codes; its length is a multiple of 32
 */
function unpack(codes, at, bits, row) {
  row.fill(0);
  let shift = 0;
  for (const width of planesOf(bits)) {
    const stride = 4 * width;
    const mask = (1 << width) - 1;
    for (let unit = 0; unit < row.length; unit += 32) {
      for (let k = 0; k < stride; k++) {
        const byte = codes[at++];
        for (let c = unit + k, low = 0; low < 8; c += stride, low += width) row[c] |= ((byte >> low) & mask) << shift;
      }
    }
    shift += width;
  }
}

/**
 * An encoding of integer groups.
 * @param {string} name
 * @param {number[]} widths bits that a code may have
 * @returns {import('./windows.js').WindowEncoding}
 */
function intGroup(name, widths) {
  return {
    name,
    matrix: true,
    settings(params, fail) {
      const bits = params.getUint8(0);
      const group = params.getUint16(2, true);
      if (!widths.includes(bits)) fail(`${name} has ${bits} bits`);
      if (![32, 64, 128].includes(group)) fail(`${name} has groups of ${group}`);
      const unused = params.getUint8(1) | params.getInt32(4, true) | params.getInt32(8, true) | params.getInt32(12, true);
      if (unused) fail(`unused params of ${name} are not zero`);
      return { bits, group };
    },
    shaped([rows, cols], { bits, group }) {
      const groups = Math.ceil(cols / group);
      const codes = (groups * group * bits) / 8;
      const slices = (first, end) => [
        [first * codes, end * codes],
        [first * groups * 2, end * groups * 2],
      ];
      return { rows, cols, step: 1, lengths: [rows * codes, rows * groups * 2], slices };
    },
    check({ cols }, { bits, group }, [codes, scales], first, end, findings) {
      if (!finiteF16(scales, 0, scales.length)) findings.numbers ??= 'scales';
      if (cols % group === 0) return;
      const row = new Uint8Array(Math.ceil(cols / group) * group);
      for (let r = first; r < end; r++) {
        unpack(codes, ((r - first) * row.length * bits) / 8, bits, row);
        if (!isZero(row, cols, row.length)) {
          findings.unused ??= `codes after the last column of row ${r}`;
          return;
        }
      }
    },
    decode({ cols }, { bits, group }, [codes, scales], first, end, out) {
      const groups = Math.ceil(cols / group);
      const row = new Uint8Array(groups * group);
      const values = CODES[bits];
      const view = viewOf(scales);
      for (let r = 0; r < end - first; r++) {
        unpack(codes, (r * row.length * bits) / 8, bits, row);
        for (let k = 0; k < groups; k++) {
          const scale = F16[view.getUint16((r * groups + k) * 2, true)];
          const last = Math.min(cols, (k + 1) * group);
          for (let c = k * group; c < last; c++) out[r * cols + c] = scale * values[row[c]];
        }
      }
    },
  };
}

export const INT_GROUP = byWindows(intGroup('int group', [4, 8]));
export const ODD_GROUP = byWindows(intGroup('odd group', [1, 2, 3]));
