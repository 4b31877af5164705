/** The META section: spec/metadata.md §1, step 6 of container §4. */

import { ascii, utf8, viewOf } from './bytes.js';
import { require } from './errors.js';
import { inflate } from './inflate.js';

const HEADER = 8;
const ENTRY = 8;
const MOST_ENTRIES = 4096;
const MOST_KEY_BYTES = 255;
const MOST_BYTES = 2 ** 28;
const TYPES = [null, 'text', 'u64', 'f64', 'bool', 'u64 list', 'deflated text'];
const KEY = /^[a-z0-9._-]+$/;

/** @typedef {'text' | 'u64' | 'f64' | 'bool' | 'u64 list'} ValueType */
/** @typedef {string | bigint | number | boolean | bigint[]} Value text, u64, f64, bool, u64 list */
/**
 * @typedef {{ type: 'text', value: string } | { type: 'u64', value: bigint } | { type: 'f64', value: number }
 *   | { type: 'bool', value: boolean } | { type: 'u64 list', value: bigint[] }} Typed
 */
/**
 * @typedef {object} Stored
 * @property {string} key
 * @property {boolean} deflated whether it is a text that is stored deflated
 * @property {number} bytes length of the stored value
 */
/** @typedef {Stored & Typed} Entry */

/**
 * The entries of the META section in file order.
 * @param {Uint8Array} bytes
 * @param {number} minReader
 * @returns {Entry[]}
 */
export function readMetadata(bytes, minReader) {
  const view = viewOf(bytes);
  require(bytes.length >= HEADER, 20, `META has ${bytes.length} bytes`);
  require(view.getUint32(4, true) === 0, 20, 'the reserved field of META is not zero');
  const count = view.getUint32(0, true);
  require(count <= MOST_ENTRIES, 21, `META has ${count} entries`);
  const entries = [];
  let at = HEADER;
  let previous = '';
  let inflated = 0n;
  for (let i = 0; i < count; i++) {
    const { key, code, reserved, stored } = readEntry(bytes, view, at, `metadata entry ${i}`);
    at += ENTRY + key.length + stored.length;
    require(KEY.test(key), 22, `the key of metadata entry ${i} has other characters`);
    require(previous < key, 23, `the key ${key} comes after ${previous}`);
    previous = key;
    require(code >= 1 && code <= 6, 24, `${key} has type ${code}`);
    const deflated = code === 6;
    require(!deflated || minReader >= 2, 24, `${key} is a deflated text, but min_reader is ${minReader}`);
    let value = deflated ? null : plainValue(code, stored);
    require(deflated ? stored.length >= 8 : value !== null, 25, `${key} is no valid ${TYPES[code]}`);
    require(reserved === 0, 25, `the reserved byte of ${key} is not zero`);
    if (deflated) {
      const length = viewOf(stored).getBigUint64(0, true);
      inflated += length;
      require(inflated <= BigInt(MOST_BYTES), 21, `deflated texts up to ${key} have ${inflated} bytes`);
      value = inflatedText(stored, Number(length), key);
    }
    const typed = /** @type {Typed} */ ({ type: deflated ? 'text' : TYPES[code], value });
    entries.push({ key, deflated, bytes: stored.length, ...typed });
  }
  require(at === bytes.length, 20, `${bytes.length - at} bytes are left over after the last entry of META`);
  return entries;
}

function readEntry(bytes, view, at, where) {
  require(at + ENTRY <= bytes.length, 20, `${where} does not fit`);
  const keyLength = view.getUint16(at, true);
  const valueLength = view.getUint32(at + 4, true);
  require(keyLength >= 1 && keyLength <= MOST_KEY_BYTES, 21, `the key of ${where} has ${keyLength} bytes`);
  require(valueLength <= MOST_BYTES, 21, `the value of ${where} has ${valueLength} bytes`);
  const valueAt = at + ENTRY + keyLength;
  require(valueAt + valueLength <= bytes.length, 20, `${where} does not fit`);
  return {
    key: ascii(bytes.subarray(at + ENTRY, valueAt)),
    code: bytes[at + 2],
    reserved: bytes[at + 3],
    stored: bytes.subarray(valueAt, valueAt + valueLength),
  };
}

/** The value of any type but deflated text, or null if it does not have length and content of its type. */
function plainValue(code, bytes) {
  const view = viewOf(bytes);
  switch (code) {
    case 1:
      return utf8(bytes);
    case 2:
      return bytes.length === 8 ? view.getBigUint64(0, true) : null;
    case 3: {
      const number = bytes.length === 8 ? view.getFloat64(0, true) : NaN;
      return Number.isFinite(number) ? number : null;
    }
    case 4:
      return bytes.length === 1 && bytes[0] <= 1 ? bytes[0] === 1 : null;
    default:
      return bytes.length % 8 === 0 ? Array.from({ length: bytes.length / 8 }, (_, i) => view.getBigUint64(8 * i, true)) : null;
  }
}

function inflatedText(bytes, length, key) {
  const text = utf8(inflate(bytes.subarray(8), length, key));
  require(text !== null, 26, `${key} is no UTF-8`);
  return text;
}

/**
 * An object with the values by key. It has no prototype, so that `__proto__`, a valid key, is one like any other.
 * @param {Entry[]} entries
 * @returns {Record<string, Value>}
 */
export function asObject(entries) {
  const object = Object.create(null);
  for (const { key, value } of entries) object[key] = value;
  return object;
}
