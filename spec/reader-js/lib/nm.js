/** N:M sparse signs, id 48: spec/encodings.md §5. */

import { blockScale, TILE, unusedScalesAreZero, whyInvalid } from './block-scales.js';
import { F16, finiteF16, viewOf } from './bytes.js';
import { byWindows } from './windows.js';

const VECTOR = 64;
const QUADS = 8;
/** Widths of the planes by bits of a code. */
const PLANES = { 3: [2, 1], 4: [4], 5: [4, 1], 7: [4, 2, 1] };

/** @typedef {{ n: number, m: number, scaleBits: number, factors: boolean, block: number }} Settings */

/** Bytes of the planes of a chunk of `quads` quads. */
const chunkBytes = (planes, quads) => planes.reduce((sum, width) => sum + VECTOR * Math.ceil((quads * width) / 8), 0);

/** Calls `visit(at, width, quads, chunk)` for every plane of a tile, with its first byte and the quads of its chunk. */
function eachPlane({ planes, quads }, visit) {
  let at = 0;
  for (let chunk = 0; chunk * QUADS < quads; chunk++) {
    const here = Math.min(QUADS, quads - QUADS * chunk);
    for (const width of planes) {
      visit(at, width, here, chunk);
      at += VECTOR * Math.ceil((here * width) / 8);
    }
  }
}

/** Checks the unused bits of a tile of codes that begins at `base`: groups and quads that do not exist, rows from `rowsHere` on. */
function checkTile(layout, codes, base, rowsHere) {
  const { groups } = layout;
  let clean = true;
  eachPlane(layout, (at, width, quads, chunk) => {
    const perByte = 8 / width;
    for (let vector = 0; vector * perByte < quads; vector++) {
      for (let lane = 0; lane < 4; lane++) {
        let used = 0;
        for (let t = 0; t < perByte; t++) {
          const quad = vector * perByte + t;
          if (quad < quads && (chunk * QUADS + quad) * 4 + lane < groups) used |= ((1 << width) - 1) << (t * width);
        }
        if (used === 0xff && rowsHere === TILE) continue;
        const from = base + at + vector * VECTOR + lane * TILE;
        for (let i = 0; i < TILE; i++) if (codes[from + i] & ~(i < rowsHere ? used : 0)) clean = false;
      }
    }
  });
  return clean;
}

/** The codes of row `i` of a tile that begins at `base` into `row`, one element per group. */
function unpackRow(layout, codes, base, i, row) {
  row.fill(0);
  let shift = 0;
  let last = -1;
  eachPlane(layout, (at, width, quads, chunk) => {
    shift = chunk === last ? shift : 0;
    last = chunk;
    const perByte = 8 / width;
    const mask = (1 << width) - 1;
    for (let quad = 0; quad < quads; quad++) {
      const from = base + at + Math.floor(quad / perByte) * VECTOR + i;
      const low = (quad % perByte) * width;
      const k = (chunk * QUADS + quad) * 4;
      for (let lane = 0; lane < 4; lane++) row[k + lane] |= ((codes[from + lane * TILE] >> low) & mask) << shift;
    }
    shift += width;
  });
}

/**
 * Writes the weights of a group into a row of `out`.
 * @param {number} x code of the group
 * @param {Settings} settings
 * @param {import('./windows.js').Layout} layout
 * @param {{ scale: number, factors: DataView | null }} magnitude of the group, and column factors
 * @param {number} from first column of the group
 * @param {Float32Array} out
 * @param {number} at first element of the row in `out`
 */
function decodeGroup(x, { n, m }, { cols, beta, positionBits }, { scale, factors }, from, out, at) {
  const i = x & (m - 1);
  const j = (x >> positionBits) & (m - 1);
  const s = x >> (beta - 1);
  const put = (position, negative) => {
    const c = from + position;
    if (c >= cols) return;
    const value = factors ? Math.fround(scale * F16[factors.getUint16(c * 2, true)]) : scale;
    out[at + c] = negative ? -value : value;
  };
  put(i, s === 1);
  if (n === 2 && j !== i) put(j, (s === 1) !== i > j);
}

/** @type {import('./windows.js').WindowEncoding} */
const WINDOWED = {
  name: 'nm',
  matrix: true,
  settings(params, fail) {
    const [n, m, scaleBits, flags] = [0, 1, 2, 3].map((i) => params.getUint8(i));
    const block = params.getUint16(4, true);
    if (n !== 1 && n !== 2) fail(`nm has N ${n}`);
    if (m !== 4 && m !== 8) fail(`nm has M ${m}`);
    if (flags > 1) fail(`nm has the flags ${flags}`);
    const invalid = whyInvalid(scaleBits, block);
    if (invalid) fail(`nm has ${invalid}`);
    if (params.getUint16(6, true) | params.getInt32(8, true) | params.getInt32(12, true)) fail('unused params of nm are not zero');
    return { n, m, scaleBits, factors: flags === 1, block };
  },
  shaped([rows, cols], { n, m, scaleBits, factors, block }) {
    const positionBits = m === 8 ? 3 : 2;
    const beta = n * positionBits + 1;
    const planes = PLANES[beta];
    const groups = Math.ceil(cols / m);
    const quads = Math.ceil(groups / 4);
    const tileBytes = VECTOR * beta * Math.floor(quads / QUADS) + chunkBytes(planes, quads % QUADS);
    const blockBytes = block ? Math.ceil(cols / block) * 2 * scaleBits : 0;
    const factorBytes = factors ? cols * 2 : 0;
    const tiles = Math.ceil(rows / TILE);
    const slices = (first, end) => {
      const from = Math.floor(first / TILE);
      const to = Math.ceil(end / TILE);
      return [
        [0, factorBytes],
        [from * TILE * 2, end * 2],
        [from * blockBytes, to * blockBytes],
        [from * tileBytes, to * tileBytes],
      ];
    };
    const lengths = [factorBytes, rows * 2, tiles * blockBytes, tiles * tileBytes];
    return { rows, cols, step: TILE, lengths, slices, beta, positionBits, planes, groups, quads, tileBytes, blockBytes };
  },
  check(layout, { scaleBits }, [factors, rowScales, blockScales, codes], first, end, findings) {
    if (!finiteF16(factors, 0, factors.length)) findings.numbers ??= 'column factors';
    if (!finiteF16(rowScales, 0, rowScales.length)) findings.numbers ??= 'row scales';
    const { tileBytes, blockBytes } = layout;
    for (let tile = 0; first + tile * TILE < end && !findings.unused; tile++) {
      const rowsHere = Math.min(TILE, end - first - tile * TILE);
      const scales = blockScales.subarray(tile * blockBytes, (tile + 1) * blockBytes);
      if (!unusedScalesAreZero(scales, scaleBits, rowsHere)) {
        findings.unused = 'block scales of rows that do not exist';
      } else if (!checkTile(layout, codes, tile * tileBytes, rowsHere)) {
        findings.unused = `codes of the tile of row ${first + tile * TILE}`;
      }
    }
  },
  decode(layout, settings, [factorBytes, rowScales, blockScales, codes], first, end, out) {
    const { cols, groups, quads, tileBytes, blockBytes } = layout;
    const { m, scaleBits, block } = settings;
    const factors = settings.factors ? viewOf(factorBytes) : null;
    const scales = viewOf(rowScales);
    const row = new Uint8Array(quads * 4);
    const base = Math.floor(first / TILE) * TILE;
    for (let r = first; r < end; r++) {
      const tile = Math.floor((r - base) / TILE);
      const i = (r - base) % TILE;
      const rowScale = F16[scales.getUint16((r - base) * 2, true)];
      unpackRow(layout, codes, tile * tileBytes, i, row);
      for (let k = 0; k < groups; k++) {
        const c = k * m;
        const scale = scaleBits ? rowScale * blockScale(blockScales, tile * blockBytes, Math.floor(c / block), scaleBits, i) : rowScale;
        decodeGroup(row[k], settings, layout, { scale, factors }, c, out, (r - first) * cols);
      }
    }
  },
};

export const NM = byWindows(WINDOWED);
