/** Small helpers for bytes. */

import { StbLimitError } from './errors.js';

/** @param {Uint8Array} bytes @returns {DataView} */
export const viewOf = (bytes) => new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);

/** The smallest multiple of `alignment` that is not below `x`. For numbers below 2^53. */
export const alignUp = (x, alignment) => Math.ceil(x / alignment) * alignment;

/** @param {Uint8Array} bytes @param {number} from @param {number} to */
export function isZero(bytes, from, to) {
  for (let i = from; i < to; i++) if (bytes[i] !== 0) return false;
  return true;
}

const STRICT = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true });

/**
 * The text of UTF-8 bytes (RFC 3629), or null if they are not valid.
 * @param {Uint8Array} bytes
 * @returns {string | null}
 */
export function utf8(bytes) {
  try {
    return STRICT.decode(bytes);
  } catch {
    return null;
  }
}

/** @param {Uint8Array} bytes @returns {string} */
export function ascii(bytes) {
  let text = '';
  for (const byte of bytes) text += String.fromCharCode(byte);
  return text;
}

/** Binary16 numbers as numbers: element i is the value of the bits i. */
export const F16 = Float32Array.from({ length: 65536 }, (_, bits) => {
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  const sign = bits & 0x8000 ? -1 : 1;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return exponent ? sign * 2 ** (exponent - 25) * (1024 + fraction) : sign * 2 ** -24 * fraction;
});

/** Whether all f16 numbers of bytes `from..to` are finite. */
export function finiteF16(bytes, from, to) {
  for (let i = from + 1; i < to; i += 2) if ((bytes[i] & 0x7c) === 0x7c) return false;
  return true;
}

/**
 * An array of `length` elements, or an error that says that memory is short.
 * @template {Uint8Array | Float32Array} T
 * @param {new (length: number) => T} type
 * @param {number} length
 * @returns {T}
 */
export function allocate(type, length) {
  try {
    return new type(length);
  } catch (error) {
    throw new StbLimitError(`no memory for an array of ${length} elements (${error.message}); read fewer rows at once`);
  }
}
