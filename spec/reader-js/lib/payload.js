/** Payloads: checksum, content checks and decoding. */

import { allocate } from './bytes.js';
import { encodingOf } from './encodings.js';
import { require } from './errors.js';
import { layoutOf } from './layout.js';
import { BytesSource, PartSource, pieces, readAll } from './source.js';
import { Xxh3 } from './xxh3.js';

/** Payloads up to this length are read once and kept while they are worked on; longer ones are read twice. */
const KEEP = 64 << 20;

/** @typedef {import('./source.js').Source} Source */
/** @typedef {import('./table.js').Tensor} Tensor */

/**
 * What an encoding needs to work on the payload of a tensor.
 * @param {import('./encodings.js').Encoding} encoding
 * @param {Tensor} tensor
 * @param {Source} payload
 * @returns {import('./encodings.js').Content}
 */
function contentOf(encoding, { name, shape, settings }, payload) {
  return { name, layout: layoutOf(encoding, shape, settings), settings, payload };
}

/**
 * Checks checksum and content of a payload: STB-R-040, and 041 to 046 if the encoding is known.
 * @param {Source} source
 * @param {Tensor} tensor
 * @returns {Promise<Source>} the payload, to decode from
 */
export async function checkPayload(source, tensor) {
  const { name, length, checksum } = tensor;
  const hash = new Xxh3();
  let payload = payloadOf(source, tensor);
  if (length <= KEEP) payload = new BytesSource(await readAll(payload, 0, length, (piece) => hash.update(piece)));
  else for await (const piece of pieces(payload, 0, length)) hash.update(piece);
  require(hash.digest() === checksum, 40, `bytes of ${name} were changed`);
  const encoding = encodingOf(tensor.encoding);
  if (encoding) await encoding.check(contentOf(encoding, tensor, payload));
  return payload;
}

/**
 * The payload of a tensor.
 * @param {Source} source
 * @param {Tensor} tensor
 * @returns {Source}
 */
export const payloadOf = (source, { offset, length }) => new PartSource(source, offset, length);

/**
 * Rows of a tensor as f32, row after row. A tensor of one dimension has one row; of more than two, the last dimension is a row.
 * @param {Source} payload one that was checked
 * @param {Tensor} tensor
 * @param {{ firstRow?: number, rows?: number }} range all rows by default
 * @returns {Promise<Float32Array>}
 */
export async function decodeRows(payload, tensor, range) {
  const encoding = encodingOf(tensor.encoding);
  const content = contentOf(encoding, tensor, payload);
  const { layout } = content;
  const { firstRow = 0, rows = layout.rows - firstRow } = range;
  const end = firstRow + rows;
  if (!Number.isSafeInteger(firstRow) || !Number.isSafeInteger(rows) || firstRow < 0 || rows < 0 || end > layout.rows) {
    throw new RangeError(`${tensor.name} has the rows 0 to ${layout.rows - 1}; asked for ${rows} from ${firstRow}`);
  }
  const weights = allocate(Float32Array, rows * layout.cols);
  await encoding.decode(content, firstRow, end, weights);
  return weights;
}
