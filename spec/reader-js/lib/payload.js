/** Payloads: content checks and decoding, by windows of rows, so that memory stays small whatever the payload has. */

import { allocate } from './bytes.js';
import { encodingOf, layoutOf } from './encodings.js';
import { broken, require, StbLimitError } from './errors.js';
import { allZero, BytesSource, CHUNK, pieces, readAll } from './source.js';
import { Xxh3 } from './xxh3.js';

/** Payloads up to this length are read once and kept while they are worked on; longer ones are read twice. */
const KEEP = 64 << 20;
/** Bytes that the smallest window of a payload, a row or 16 rows, may have. */
export const WINDOW_LIMIT = 2 ** 30;

/** @typedef {import('./source.js').Source} Source */
/** @typedef {import('./table.js').Tensor} Tensor */

/** The part of a source that a payload is. @implements {Source} */
class Part {
  #source;
  #offset;

  constructor(source, offset, size) {
    this.#source = source;
    this.#offset = offset;
    this.size = size;
  }

  read(offset, length) {
    return this.#source.read(this.#offset + offset, length);
  }
}

/**
 * The windows of rows first..end that a payload is read in.
 * @returns {Generator<[number, number]>}
 */
function* windows(layout, length, first, end) {
  const { rows, step } = layout;
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

/** Checks the content of a payload: STB-R-041 to 044 in the order of its encoding. */
async function checkContent(tensor, encoding, layout, payload) {
  /** @type {import('./encodings.js').Findings} */
  const findings = { states: null, unused: null, numbers: null };
  for (const [first, end] of windows(layout, tensor.length, 0, layout.rows)) {
    const parts = await readParts(layout, payload, first, end);
    encoding.check(layout, tensor.settings, parts, first, end, findings);
    if (findings.states) break;
  }
  const { states, numbers } = findings;
  if (states) throw broken(states.rule, `${tensor.name}: ${states.detail}`);
  let { unused } = findings;
  for (let i = 1; i < layout.starts.length && !unused; i++) {
    const end = layout.starts[i - 1] + layout.lengths[i - 1];
    if (!(await allZero(payload, end, layout.starts[i]))) unused = `bytes before segment ${i}`;
  }
  require(unused === null, 41, `${tensor.name} has unused bits that are not zero (${unused})`);
  require(numbers === null, 42, `${tensor.name} has a number that is not finite (${numbers})`);
}

/**
 * Checks checksum and content of a payload: STB-R-040, and 041 to 044 if the encoding is known.
 * @param {Source} source
 * @param {Tensor} tensor
 * @returns {Promise<Source>} the payload, to decode from
 */
export async function checkPayload(source, tensor) {
  const { name, offset, length, checksum } = tensor;
  const hash = new Xxh3();
  /** @type {Source} */
  let payload = new Part(source, offset, length);
  if (length <= KEEP) payload = new BytesSource(await readAll(payload, 0, length, (piece) => hash.update(piece)));
  else for await (const piece of pieces(payload, 0, length)) hash.update(piece);
  require(hash.digest() === checksum, 40, `bytes of ${name} were changed`);
  const encoding = encodingOf(tensor.encoding);
  if (encoding) await checkContent(tensor, encoding, layoutOf(encoding, tensor.shape, tensor.settings), payload);
  return payload;
}

/**
 * The payload of a tensor that was checked before.
 * @param {Source} source
 * @param {Tensor} tensor
 * @returns {Source}
 */
export const payloadOf = (source, { offset, length }) => new Part(source, offset, length);

/**
 * Rows of a tensor as f32, row after row. A tensor of one dimension has one row; of more than two, the last dimension is a row.
 * @param {Source} payload one that was checked
 * @param {Tensor} tensor
 * @param {{ firstRow?: number, rows?: number }} range all rows by default
 * @returns {Promise<Float32Array>}
 */
export async function decodeRows(payload, tensor, range) {
  const encoding = encodingOf(tensor.encoding);
  const layout = layoutOf(encoding, tensor.shape, tensor.settings);
  const { firstRow = 0, rows = layout.rows - firstRow } = range;
  const end = firstRow + rows;
  if (!Number.isSafeInteger(firstRow) || !Number.isSafeInteger(rows) || firstRow < 0 || rows < 0 || end > layout.rows) {
    throw new RangeError(`${tensor.name} has the rows 0 to ${layout.rows - 1}; asked for ${rows} from ${firstRow}`);
  }
  const weights = allocate(Float32Array, rows * layout.cols);
  for (const [from, to] of windows(layout, tensor.length, firstRow, end)) {
    const parts = await readParts(layout, payload, from, to);
    const out = weights.subarray((from - firstRow) * layout.cols, (to - firstRow) * layout.cols);
    encoding.decode(layout, tensor.settings, parts, from, to, out);
  }
  return weights;
}
