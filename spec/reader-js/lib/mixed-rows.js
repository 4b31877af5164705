/** Mixed rows, id 64: spec/encodings.md §6. Two payloads of other encodings, and the list of rows for which the first one counts. */

import { allocate, viewOf } from './bytes.js';
import { require } from './errors.js';
import { INT_GROUP, ODD_GROUP } from './int-group.js';
import { findGap, layoutOf } from './layout.js';
import { NM } from './nm.js';
import { CHUNK, PartSource } from './source.js';
import { TRELLIS } from './trellis.js';

/** Encodings of the listed rows, by id. */
const LISTED = new Map([
  [16, INT_GROUP],
  [17, ODD_GROUP],
]);
/** Encodings of all rows, by id. */
const ALL = new Map([...LISTED, [48, NM], [80, TRELLIS]]);

/** Entries of the list that are read at once to check it, and to find those of a range of rows. */
const CHECK_BLOCK = CHUNK / 4;
const SEARCH_BLOCK = 1 << 14;
/** Weights of listed rows that are decoded at once, if a row has no more. */
const LISTED_WEIGHTS = CHUNK / 4;

/** @typedef {import('./encodings.js').Content} Content */

/**
 * @typedef {object} Stored one of the two encodings, described like that of a tensor
 * @property {number} encoding id
 * @property {string} encodingName
 * @property {object} settings
 */

/**
 * One of the two encodings.
 * @param {string} what the rows that it is for
 * @param {Map<number, import('./encodings.js').Encoding>} allowed
 * @param {number} id
 * @param {DataView} bytes the first bytes of its params; the others are zero
 * @param {(detail: string) => never} fail
 * @returns {Stored}
 */
function storedAs(what, allowed, id, bytes, fail) {
  const encoding = allowed.get(id) ?? fail(`mixed rows have the encoding ${id} for ${what} rows`);
  const params = new DataView(new ArrayBuffer(16));
  for (let i = 0; i < bytes.byteLength; i++) params.setUint8(i, bytes.getUint8(i));
  const settings = encoding.settings(params, (detail) => fail(`${what} rows: ${detail}`));
  return { encoding: id, encodingName: encoding.name, settings };
}

/** The payload of segment 1, the listed rows. @param {Content} content @returns {Content} */
const listedOf = ({ name, layout, settings, payload }) => ({
  name: `the payload of the listed rows of ${name}`,
  layout: layout.listed,
  settings: settings.listed.settings,
  payload: new PartSource(payload, layout.starts[1], layout.lengths[1]),
});

/** The payload of segment 2, all rows. @param {Content} content @returns {Content} */
const allOf = ({ name, layout, settings, payload }) => ({
  name: `the payload of all rows of ${name}`,
  layout: layout.all,
  settings: settings.all.settings,
  payload: new PartSource(payload, layout.starts[2], layout.lengths[2]),
});

/**
 * Entries from..to of the list, which have to obey STB-R-045.
 * @param {Content} content
 * @param {number} from
 * @param {number} to
 * @param {number} before a number that the first of them has to be above
 * @returns {Promise<Uint32Array>}
 */
async function readList({ name, layout, payload }, from, to, before) {
  const view = viewOf(await payload.read(layout.starts[0] + 4 * from, 4 * (to - from)));
  const numbers = new Uint32Array(to - from);
  let last = before;
  for (let i = 0; i < numbers.length; i++) {
    const number = view.getUint32(4 * i, true);
    require(number > last, 45, () => `entry ${from + i} of the list of ${name} is ${number}, which is not above ${last}`);
    require(number < layout.rows, 45, () => `entry ${from + i} of the list of ${name} is ${number}; it has ${layout.rows} rows`);
    numbers[i] = last = number;
  }
  return numbers;
}

/**
 * An index of the list, at most SEARCH_BLOCK before the first entry that is not below `row`, and never after it. So a few rows need
 * a small part of a long list.
 * @param {Content} content
 * @param {number} row
 */
async function searchList({ layout, settings, payload }, row) {
  let [from, to] = [0, settings.count];
  while (to - from > SEARCH_BLOCK) {
    const middle = Math.floor((from + to) / 2);
    const entry = viewOf(await payload.read(layout.starts[0] + 4 * middle, 4)).getUint32(0, true);
    if (entry < row) from = middle;
    else to = middle;
  }
  return from;
}

/**
 * Writes the listed ones of the rows first..end over what `out` has for them.
 * @param {Content} content
 * @param {number} first
 * @param {number} end
 * @param {Float32Array} out
 */
async function decodeListed(content, first, end, out) {
  const { layout, settings } = content;
  const { cols } = layout;
  const encoding = LISTED.get(settings.listed.encoding);
  const listed = listedOf(content);
  const atOnce = Math.max(1, Math.floor(LISTED_WEIGHTS / cols));
  let before = -1;
  for (let at = await searchList(content, first); at < settings.count && before < end; at += SEARCH_BLOCK) {
    const numbers = await readList(content, at, Math.min(at + SEARCH_BLOCK, settings.count), before);
    before = numbers.at(-1);
    const inRange = numbers.filter((row) => row >= first && row < end);
    const start = at + numbers.indexOf(inRange[0]);
    for (let i = 0; i < inRange.length; i += atOnce) {
      const rows = inRange.subarray(i, i + atOnce);
      const weights = allocate(Float32Array, rows.length * cols);
      await encoding.decode(listed, start + i, start + i + rows.length, weights);
      rows.forEach((row, k) => out.set(weights.subarray(k * cols, (k + 1) * cols), (row - first) * cols));
    }
  }
}

/** @type {import('./encodings.js').Encoding} */
export const MIXED_ROWS = {
  name: 'mixed rows',
  matrix: true,
  settings(params, fail) {
    const count = params.getUint32(0, true);
    if (count === 0) fail('mixed rows have no listed row');
    const part = (at, length) => new DataView(params.buffer, params.byteOffset + at, length);
    const listed = storedAs('listed', LISTED, params.getUint8(4), part(6, 4), fail);
    const all = storedAs('all', ALL, params.getUint8(5), part(10, 6), fail);
    if (all.encoding === 48 && all.settings.factors) fail('all rows: nm has column factors');
    return { count, listed, all };
  },
  shaped([rows, cols], { count, listed, all }) {
    require(count <= rows, 37, () => `mixed rows list ${count} of ${rows} rows`);
    const listedLayout = layoutOf(LISTED.get(listed.encoding), [count, cols], listed.settings);
    const allLayout = layoutOf(ALL.get(all.encoding), [rows, cols], all.settings);
    return { rows, cols, lengths: [count * 4, listedLayout.length, allLayout.length], listed: listedLayout, all: allLayout };
  },
  async check(content) {
    const { name, layout, settings, payload } = content;
    const gap = await findGap(layout, payload);
    require(gap === null, 41, `${name} has unused bits that are not zero (${gap})`);
    let before = -1;
    for (let at = 0; at < settings.count; at += CHECK_BLOCK) {
      before = (await readList(content, at, Math.min(at + CHECK_BLOCK, settings.count), before)).at(-1);
    }
    await LISTED.get(settings.listed.encoding).check(listedOf(content));
    await ALL.get(settings.all.encoding).check(allOf(content));
  },
  async decode(content, first, end, out) {
    await ALL.get(content.settings.all.encoding).decode(allOf(content), first, end, out);
    await decodeListed(content, first, end, out);
  },
};
