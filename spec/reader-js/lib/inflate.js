/** Raw DEFLATE (RFC 1951) with the conditions of STB-R-026: it says whether the stream ends in the last byte. */

import { allocate } from './bytes.js';
import { require } from './errors.js';

/** A byte of DEFLATE stands for at most this many bytes. */
const RATIO = 1032;
const MAX_BITS = 15;
const LENGTH_BASE = [3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 23, 27, 31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258];
const LENGTH_EXTRA = [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0];
const DISTANCE_BASE = [
  1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 33, 49, 65, 97, 129, 193, 257, 385, 513, 769, 1025, 1537, 2049, 3073, 4097, 6145, 8193, 12289, 16385,
  24577,
];
const DISTANCE_EXTRA = [0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13];
const CODE_LENGTH_ORDER = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15];

/** @typedef {{ counts: Uint16Array, symbols: Uint16Array }} Code a canonical Huffman code: codes per length, symbols in code order */

/**
 * The code whose symbol i has `lengths[i]` bits, or null if it is not complete.
 * @param {Uint8Array} lengths
 * @param {boolean} mayBeTiny whether no symbol, or one symbol of one bit, is enough
 * @returns {Code | null}
 */
function makeCode(lengths, mayBeTiny) {
  const counts = new Uint16Array(MAX_BITS + 1);
  for (const length of lengths) counts[length] += 1;
  const used = lengths.length - counts[0];
  counts[0] = 0;
  const starts = new Uint16Array(MAX_BITS + 2);
  let free = 1;
  for (let bits = 1; bits <= MAX_BITS; bits++) {
    free = 2 * free - counts[bits];
    if (free < 0) return null;
    starts[bits + 1] = starts[bits] + counts[bits];
  }
  const tiny = used === 0 || (used === 1 && counts[1] === 1);
  if (free > 0 && !(mayBeTiny && tiny)) return null;
  const symbols = new Uint16Array(used);
  lengths.forEach((length, symbol) => {
    if (length) symbols[starts[length]++] = symbol;
  });
  return { counts, symbols };
}

const FIXED_LITERALS = makeCode(Uint8Array.from({ length: 288 }, (_, i) => (i < 144 ? 8 : i < 256 ? 9 : i < 280 ? 7 : 8)), false);
const FIXED_DISTANCES = makeCode(new Uint8Array(32).fill(5), false);

/** One stream that is being inflated. */
class Inflater {
  #input;
  #at = 0;
  #bits = 0;
  #held = 0;
  #output;
  #size = 0;
  #where;

  constructor(input, length, where) {
    this.#input = input;
    this.#output = allocate(Uint8Array, length);
    this.#where = where;
  }

  #require(condition, what) {
    require(condition, 26, `${this.#where}: ${what}`);
  }

  /** The next `count` bits, at most 16. */
  #take(count) {
    while (this.#held < count) {
      this.#require(this.#at < this.#input.length, 'the DEFLATE stream ends too early');
      this.#bits |= this.#input[this.#at++] << this.#held;
      this.#held += 8;
    }
    const value = this.#bits & ((1 << count) - 1);
    this.#bits >>>= count;
    this.#held -= count;
    return value;
  }

  /** The next symbol of a code. */
  #symbol(code) {
    let value = 0;
    let first = 0;
    let index = 0;
    for (let bits = 1; bits <= MAX_BITS; bits++) {
      value |= this.#take(1);
      const count = code.counts[bits];
      if (value - count < first) return code.symbols[index + (value - first)];
      index += count;
      first = (first + count) << 1;
      value <<= 1;
    }
    return this.#require(false, 'bits that are no code');
  }

  #stored() {
    this.#bits = 0;
    this.#held = 0;
    this.#require(this.#at + 4 <= this.#input.length, 'the DEFLATE stream ends too early');
    const [a, b, c, d] = this.#input.subarray(this.#at, this.#at + 4);
    const length = a | (b << 8);
    this.#require((length ^ 0xffff) === (c | (d << 8)), 'a stored block contradicts its length');
    this.#at += 4;
    this.#require(this.#at + length <= this.#input.length, 'the DEFLATE stream ends too early');
    this.#require(this.#size + length <= this.#output.length, 'the stream gives more than the stated length');
    this.#output.set(this.#input.subarray(this.#at, this.#at + length), this.#size);
    this.#at += length;
    this.#size += length;
  }

  /** The codes of a dynamic block. */
  #codes() {
    const literals = this.#take(5) + 257;
    const distances = this.#take(5) + 1;
    const used = this.#take(4) + 4;
    this.#require(literals <= 286 && distances <= 30, 'too many codes in a block');
    const lengths = new Uint8Array(19);
    for (let i = 0; i < used; i++) lengths[CODE_LENGTH_ORDER[i]] = this.#take(3);
    const code = makeCode(lengths, false);
    this.#require(code !== null, 'an incomplete code of code lengths');
    const all = this.#codeLengths(code, literals + distances);
    const literalCode = makeCode(all.subarray(0, literals), true);
    const distanceCode = makeCode(all.subarray(literals), true);
    this.#require(literalCode !== null, 'an incomplete code of literals and lengths');
    this.#require(distanceCode !== null, 'an incomplete code of distances');
    return [literalCode, distanceCode];
  }

  #codeLengths(code, total) {
    const all = new Uint8Array(total);
    let at = 0;
    while (at < total) {
      const symbol = this.#symbol(code);
      if (symbol < 16) {
        all[at++] = symbol;
        continue;
      }
      this.#require(symbol !== 16 || at > 0, 'a repeated code length without one before it');
      const value = symbol === 16 ? all[at - 1] : 0;
      const count = symbol === 16 ? 3 + this.#take(2) : symbol === 17 ? 3 + this.#take(3) : 11 + this.#take(7);
      this.#require(at + count <= total, 'more code lengths than codes');
      all.fill(value, at, at + count);
      at += count;
    }
    return all;
  }

  /** @param {Code[]} codes of literals and lengths, and of distances */
  #compressed([literals, distances]) {
    const output = this.#output;
    for (;;) {
      const symbol = this.#symbol(literals);
      if (symbol === 256) return;
      if (symbol < 256) {
        this.#require(this.#size < output.length, 'the stream gives more than the stated length');
        output[this.#size++] = symbol;
        continue;
      }
      this.#require(symbol < 286, 'a length that does not exist');
      const length = LENGTH_BASE[symbol - 257] + this.#take(LENGTH_EXTRA[symbol - 257]);
      const code = this.#symbol(distances);
      this.#require(code < 30, 'a distance that does not exist');
      const distance = DISTANCE_BASE[code] + this.#take(DISTANCE_EXTRA[code]);
      this.#require(distance <= this.#size, 'a distance before the start of the text');
      this.#require(this.#size + length <= output.length, 'the stream gives more than the stated length');
      for (const end = this.#size + length; this.#size < end; this.#size++) output[this.#size] = output[this.#size - distance];
    }
  }

  run() {
    let last = 0;
    while (!last) {
      last = this.#take(1);
      const type = this.#take(2);
      this.#require(type !== 3, 'a block of a type that does not exist');
      if (type === 0) this.#stored();
      else this.#compressed(type === 1 ? [FIXED_LITERALS, FIXED_DISTANCES] : this.#codes());
    }
    this.#require(this.#at === this.#input.length, 'bytes after the DEFLATE stream');
    this.#require(this.#size === this.#output.length, `the stream gives ${this.#size} bytes, not ${this.#output.length}`);
    return this.#output;
  }
}

/**
 * Inflates a stream that has to fill `input` and to give exactly `length` bytes; else throws STB-R-026.
 * @param {Uint8Array} input
 * @param {number} length
 * @param {string} where for the message of an error
 * @returns {Uint8Array}
 */
export function inflate(input, length, where) {
  require(length <= RATIO * input.length, 26, `${where}: ${input.length} bytes cannot stand for ${length}`);
  return new Inflater(input, length, where).run();
}
