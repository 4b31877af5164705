/** The TENSORS section: spec/container.md §3.3, step 5 of §4. */

import { alignUp, ascii, isZero, viewOf } from './bytes.js';
import { encodingOf } from './encodings.js';
import { broken, require } from './errors.js';
import { layoutOf } from './layout.js';

const HEADER = 16;
const ENTRY = 96;
const MOST_TENSORS = 1048576;
const MOST_ELEMENTS = 2n ** 48n;

/**
 * @typedef {object} Tensor
 * @property {string} name
 * @property {number[]} shape
 * @property {number} elements
 * @property {number} encoding id of the encoding
 * @property {string | null} encodingName null if this reader does not know the encoding
 * @property {object | null} settings parameters of the encoding
 * @property {number} offset first byte of the payload in the file
 * @property {number} length bytes of the payload
 * @property {bigint} checksum
 */

/**
 * All tensors of a file.
 * @param {Uint8Array} bytes the TENSORS section
 * @param {{ offset: number, length: number }} data the DATA section
 * @returns {Tensor[]}
 */
export function readTable(bytes, data) {
  const view = viewOf(bytes);
  require(bytes.length >= HEADER, 30, `TENSORS has ${bytes.length} bytes`);
  const count = view.getUint32(0, true);
  const namesLength = view.getBigUint64(8, true);
  require(count >= 1 && count <= MOST_TENSORS, 30, `TENSORS states ${count} tensors`);
  require(view.getUint32(4, true) === ENTRY, 30, `entry_size is ${view.getUint32(4, true)}`);
  const stated = BigInt(HEADER + ENTRY * count) + namesLength;
  require(stated === BigInt(bytes.length), 30, `TENSORS has ${bytes.length} bytes, its header states ${stated}`);
  const names = bytes.subarray(HEADER + ENTRY * count);
  const seen = new Set();
  const tensors = [];
  let nameEnd = 0;
  let dataEnd = 0;
  for (let i = 0; i < count; i++) {
    const at = HEADER + ENTRY * i;
    const { shape, elements } = readShape(view, at, i);
    const name = readName(view, at, names, nameEnd, i);
    nameEnd += name.length;
    require(!seen.has(name), 33, () => `two tensors have the name ${name}`);
    seen.add(name);
    require(bytes[at + 7] === 0, 34, () => `the reserved byte of ${name} is not zero`);
    require(isZero(bytes, at + 12, at + 16) && isZero(bytes, at + 88, at + 96), 34, () => `reserved fields of ${name} are not zero`);
    const { offset, length } = readPlace(view, at, dataEnd, data.length, name);
    dataEnd = offset + length;
    const tensor = { name, shape, elements, ...readEncoding(view, at, shape, length, name) };
    tensors.push({ ...tensor, offset: data.offset + offset, length, checksum: view.getBigUint64(at + 80, true) });
  }
  require(nameEnd === names.length, 32, () => `${names.length - nameEnd} bytes of names belong to no tensor`);
  require(dataEnd === data.length, 35, () => `the last payload ends at ${dataEnd}, DATA at ${data.length}`);
  return tensors;
}

function readShape(view, at, index) {
  const ndim = view.getUint8(at + 6);
  require(ndim >= 1 && ndim <= 4, 31, () => `tensor ${index} has ${ndim} dimensions`);
  const shape = [];
  let elements = 1n;
  for (let i = 0; i < 4; i++) {
    const dim = view.getBigUint64(at + 32 + 8 * i, true);
    if (i < ndim) {
      require(dim >= 1n && dim < 2n ** 32n, 31, () => `dimension ${i} of tensor ${index} is ${dim}`);
      shape.push(Number(dim));
      elements *= dim;
    } else {
      require(dim === 0n, 31, () => `dimension ${i} of tensor ${index} is not in use, but ${dim}`);
    }
  }
  require(elements <= MOST_ELEMENTS, 31, () => `tensor ${index} has ${elements} elements`);
  return { shape, elements: Number(elements) };
}

function readName(view, at, names, start, index) {
  const offset = view.getUint32(at, true);
  const length = view.getUint16(at + 4, true);
  require(offset === start, 32, () => `the name of tensor ${index} starts at ${offset}, not at ${start}`);
  require(length >= 1 && length <= 255, 32, () => `the name of tensor ${index} has ${length} bytes`);
  require(offset + length <= names.length, 32, () => `the name of tensor ${index} ends outside the names`);
  const name = names.subarray(offset, offset + length);
  require(name.every((byte) => byte >= 0x21 && byte <= 0x7e), 32, () => `the name of tensor ${index} has other characters`);
  return ascii(name);
}

function readPlace(view, at, before, dataLength, name) {
  const offset = view.getBigUint64(at + 64, true);
  const length = view.getBigUint64(at + 72, true);
  const start = alignUp(before, 64);
  require(offset === BigInt(start), 35, () => `the payload of ${name} starts at ${offset}, not at ${start}`);
  require(offset + length <= BigInt(dataLength), 35, () => `the payload of ${name} ends at ${offset + length}, DATA at ${dataLength}`);
  return { offset: start, length: Number(length) };
}

function readEncoding(view, at, shape, length, name) {
  const id = view.getUint32(at + 8, true);
  const encoding = encodingOf(id);
  if (!encoding) return { encoding: id, encodingName: null, settings: null };
  const params = new DataView(view.buffer, view.byteOffset + at + 16, 16);
  const settings = encoding.settings(params, (detail) => {
    throw broken(36, `${name}: ${detail}`);
  });
  require(!encoding.matrix || shape.length === 2, 37, () => `${name}: ${encoding.name} is for two dimensions, not for ${shape.length}`);
  const expected = layoutOf(encoding, shape, settings).length;
  require(length === expected, 38, () => `the payload of ${name} has ${length} bytes; its shape and encoding need ${expected}`);
  return { encoding: id, encodingName: encoding.name, settings };
}
