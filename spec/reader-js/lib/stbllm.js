/** STBLLM, id 32: spec/encodings.md §4. Units of 64 columns are taken as eight groups, whose bits are bytes. */

import { F16, finiteF16, viewOf } from './bytes.js';
import { byWindows } from './windows.js';

const POPCOUNT = Uint8Array.from({ length: 256 }, (_, byte) => byte.toString(2).replaceAll('0', '').length);
const UNIT = 64;

/** The columns of a group that exist, as bits of a byte. */
function existing(cols, unit, group) {
  const count = cols - unit * UNIT - group * 8;
  return count >= 8 ? 0xff : count > 0 ? (1 << count) - 1 : 0;
}

/** The sign bits of a group: N bits of the number of 8·N bits that begins at byte `at`. */
function signsOf(signs, at, n, group) {
  const bit = group * n;
  const byte = at + (bit >> 3);
  const two = signs[byte] | ((bit & 7) + n > 8 ? signs[byte + 1] << 8 : 0);
  return (two >> (bit & 7)) & ((1 << n) - 1);
}

/**
 * Checks the states of a unit of row `first + r`: STB-R-043 for its groups, then 044.
 * @param {import('./windows.js').Layout} layout
 * @param {number} n
 * @param {Uint8Array} salient
 * @param {Uint8Array} states
 * @param {number} r
 * @param {number} unit
 * @param {number} first
 * @returns {{ rule: number, detail: string } | null} what is broken
 */
function checkStates({ cols, units }, n, salient, states, r, unit, first) {
  const at = (r * units + unit) * 16;
  let notAllowed = 0;
  for (let group = 0; group < 8; group++) {
    const exists = existing(cols, unit, group);
    const low = states[at + group];
    const high = states[at + 8 + group];
    const kept = POPCOUNT[(low | high) & exists];
    const expected = Math.ceil((n * POPCOUNT[exists]) / 8);
    if (kept !== expected) return { rule: 43, detail: `row ${first + r}, group ${unit * 8 + group} keeps ${kept} weights, not ${expected}` };
    notAllowed |= low & high & salient[unit * 8 + group] & exists;
  }
  return notAllowed ? { rule: 44, detail: `row ${first + r} has state 3 in a salient column of unit ${unit}` } : null;
}

/** Whether the unused bits of a unit are zero: of columns that do not exist, and signs of weights that are not kept. */
function unusedIsZero(layout, n, states, signs, index, unit) {
  for (let group = 0; group < 8; group++) {
    const exists = existing(layout.cols, unit, group);
    const kept = states[index * 16 + group] | states[index * 16 + 8 + group];
    if (kept & ~exists) return false;
    if (signsOf(signs, index * n, n, group) >> POPCOUNT[kept]) return false;
  }
  return true;
}

/** Weights of a group of 8 columns into `out` from `at` on; `magnitudes` are s0 to s4. */
function decodeGroup(low, high, salient, signs, magnitudes, out, at) {
  let sign = signs;
  for (let kept = low | high, i = 0; kept >> i; i++) {
    if (!((kept >> i) & 1)) continue;
    const state = ((low >> i) & 1) + 2 * ((high >> i) & 1);
    const isSalient = (salient >> i) & 1;
    const magnitude = magnitudes[isSalient ? 3 : state - 1];
    const value = sign & 1 ? -magnitude : magnitude;
    sign >>= 1;
    out[at + i] = !isSalient ? value : state === 1 ? value + magnitudes[4] : value - magnitudes[4];
  }
}

/** @type {import('./windows.js').WindowEncoding} */
const WINDOWED = {
  name: 'stbllm',
  matrix: true,
  settings(params, fail) {
    const n = params.getUint8(0);
    const block = params.getUint16(2, true);
    if (n < 1 || n > 8) fail(`stbllm has N ${n}`);
    if (block === 0 || block % 32) fail(`stbllm has blocks of ${block}`);
    const unused = params.getUint8(1) | params.getInt32(4, true) | params.getInt32(8, true) | params.getInt32(12, true);
    if (unused) fail('unused params of stbllm are not zero');
    return { n, block };
  },
  shaped([rows, cols], { n, block }) {
    const units = Math.ceil(cols / UNIT);
    const blocks = Math.ceil(cols / block);
    const slices = (first, end) => [
      [0, units * 8],
      [first * units * 16, end * units * 16],
      [first * units * n, end * units * n],
      [first * blocks * 10, end * blocks * 10],
    ];
    return { rows, cols, step: 1, units, lengths: [units * 8, rows * units * 16, rows * units * n, rows * blocks * 10], slices };
  },
  check(layout, { n }, [salient, states, signs, scales], first, end, findings) {
    const { units, cols } = layout;
    for (let r = 0; r < end - first && !findings.states; r++) {
      for (let unit = 0; unit < units && !findings.states; unit++) {
        findings.states = checkStates(layout, n, salient, states, r, unit, first);
      }
    }
    for (let group = 0; group < 8; group++) {
      if (salient[(units - 1) * 8 + group] & ~existing(cols, units - 1, group)) findings.unused ??= 'salient columns that do not exist';
    }
    for (let index = 0; index < (end - first) * units && !findings.unused; index++) {
      if (unusedIsZero(layout, n, states, signs, index, index % units)) continue;
      findings.unused = `row ${first + Math.floor(index / units)}, unit ${index % units}`;
    }
    if (!finiteF16(scales, 0, scales.length)) findings.numbers ??= 'scales';
  },
  decode(layout, { n, block }, [salient, states, signs, scales], first, end, out) {
    const { units, cols } = layout;
    const blocks = Math.ceil(cols / block);
    const view = viewOf(scales);
    const magnitudes = new Float64Array(5);
    for (let r = 0; r < end - first; r++) {
      let loaded = -1;
      for (let c = 0; c < cols; c += 8) {
        const unit = Math.floor(c / UNIT);
        const group = (c % UNIT) / 8;
        const k = Math.floor(c / block);
        if (k !== loaded) {
          for (let i = 0; i < 5; i++) magnitudes[i] = F16[view.getUint16(((r * blocks + k) * 5 + i) * 2, true)];
          loaded = k;
        }
        const index = r * units + unit;
        const low = states[index * 16 + group];
        const high = states[index * 16 + 8 + group];
        const sign = signsOf(signs, index * n, n, group);
        decodeGroup(low, high, salient[unit * 8 + group], sign, magnitudes, out, r * cols + c);
      }
    }
  },
};

export const STBLLM = byWindows(WINDOWED);
