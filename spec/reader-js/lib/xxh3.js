/** XXH3-64 with seed 0 and the default secret: spec/checksum.md. */

const SECRET = Uint8Array.from(
  (
    'b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221' +
    'b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8' +
    'a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb' +
    '170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e'
  )
    .match(/../g)
    .map((byte) => Number.parseInt(byte, 16)),
);
const SECRET_VIEW = new DataView(SECRET.buffer);
const P32_1 = 0x9e3779b1;
const P64_1 = 0x9e3779b185ebca87n;
const P64_2 = 0xc2b2ae3d27d4eb4fn;
const P64_3 = 0x165667b19e3779f9n;
const M1 = 0x165667919e3779f9n;
const M2 = 0x9fb21c651e98df25n;
const WORD = 0xffffffffffffffffn;
/** The accumulators at the start, as halves of 32 bits. */
const START = [0xc2b2ae3dn, P64_1, P64_2, P64_3, 0x85ebca77c2b2ae63n, 0x85ebca77n, 0x27d4eb2f165667c5n, BigInt(P32_1)];
const START_LOW = Int32Array.from(START, (value) => Number(value & 0xffffffffn));
const START_HIGH = Int32Array.from(START, (value) => Number(value >> 32n));

const BLOCK = 1024;
const STRIPE = 64;

/** Words of the secret as two halves of 32 bits, from byte `from` on, every 8 bytes. */
function halves(from, count) {
  const low = new Int32Array(count);
  const high = new Int32Array(count);
  for (let i = 0; i < count; i++) {
    low[i] = SECRET_VIEW.getInt32(from + 8 * i, true);
    high[i] = SECRET_VIEW.getInt32(from + 8 * i + 4, true);
  }
  return { low, high };
}

const STRIPES = halves(0, 23);
const LAST = halves(121, 8);
const SCRAMBLE = halves(128, 8);

/** @returns {bigint} */
const word = (view, at) => view.getBigUint64(at, true);
/** @returns {bigint} */
const secret = (at) => SECRET_VIEW.getBigUint64(at, true);

/** @param {bigint} a @param {bigint} b */
function fold(a, b) {
  const product = a * b;
  return (product & WORD) ^ (product >> 64n);
}

/** @param {bigint} h */
function avalanche(h) {
  h ^= h >> 37n;
  h = (h * M1) & WORD;
  return h ^ (h >> 32n);
}

/** @param {bigint} h */
function avalanche64(h) {
  h ^= h >> 33n;
  h = (h * P64_2) & WORD;
  h ^= h >> 29n;
  h = (h * P64_3) & WORD;
  return h ^ (h >> 32n);
}

/** @param {bigint} x @param {bigint} n */
const rotl = (x, n) => ((x << n) | (x >> (64n - n))) & WORD;
const mix16 = (view, at, k) => fold(word(view, at) ^ secret(k), word(view, at + 8) ^ secret(k + 8));

/** The checksum of at most 16 bytes. */
function tiny(view, n) {
  if (n === 0) return avalanche64(secret(56) ^ secret(64));
  if (n <= 3) {
    const c = (view.getUint8(0) << 16) | (view.getUint8(n >> 1) << 24) | view.getUint8(n - 1) | (n << 8);
    return avalanche64(BigInt((c ^ SECRET_VIEW.getInt32(0, true) ^ SECRET_VIEW.getInt32(4, true)) >>> 0));
  }
  if (n <= 8) {
    const ends = BigInt(view.getUint32(n - 4, true)) + (BigInt(view.getUint32(0, true)) << 32n);
    let h = ends ^ secret(8) ^ secret(16);
    h ^= rotl(h, 49n) ^ rotl(h, 24n);
    h = (h * M2) & WORD;
    h ^= ((h >> 35n) + BigInt(n)) & WORD;
    h = (h * M2) & WORD;
    return h ^ (h >> 28n);
  }
  const a = word(view, 0) ^ secret(24) ^ secret(32);
  const b = word(view, n - 8) ^ secret(40) ^ secret(48);
  const swapped = new DataView(new ArrayBuffer(8));
  swapped.setBigUint64(0, a, true);
  return avalanche((BigInt(n) + swapped.getBigUint64(0, false) + b + fold(a, b)) & WORD);
}

/** The checksum of 17 to 240 bytes. */
function short(view, n) {
  let h = BigInt(n) * P64_1;
  if (n <= 128) {
    for (let pair = (n - 1) >> 5; pair >= 0; pair--) {
      h += mix16(view, 16 * pair, 32 * pair) + mix16(view, n - 16 * (pair + 1), 32 * pair + 16);
    }
    return avalanche(h & WORD);
  }
  for (let i = 0; i < 8; i++) h += mix16(view, 16 * i, 16 * i);
  h = avalanche(h & WORD);
  for (let i = 8; i < n >> 4; i++) h += mix16(view, 16 * i, 16 * (i - 8) + 3);
  return avalanche((h + mix16(view, n - 16, 119)) & WORD);
}

/** Upper 32 bits of the product of two numbers of 32 bits, whose signs are not looked at. */
function upper(a, b) {
  const a0 = a & 0xffff;
  const a1 = a >>> 16;
  const b0 = b & 0xffff;
  const b1 = b >>> 16;
  const middle = (Math.imul(a1, b0) >>> 0) + (Math.imul(a0, b0) >>> 16);
  const other = (Math.imul(a0, b1) >>> 0) + (middle & 0xffff);
  return (Math.imul(a1, b1) + (middle >>> 16) + (other >>> 16)) | 0;
}

/** A checksum that is computed piece by piece. */
export class Xxh3 {
  #low = START_LOW.slice();
  #high = START_HIGH.slice();
  /** The 64 bytes before those that wait, then up to 1024 bytes that wait. */
  #buffer = new Uint8Array(STRIPE + BLOCK);
  #view = new DataView(this.#buffer.buffer);
  #waiting = 0;
  #total = 0n;

  /**
   * Appends bytes.
   * @param {Uint8Array} data
   * @returns {this}
   */
  update(data) {
    const view = new DataView(data.buffer, data.byteOffset, data.byteLength);
    const end = data.byteLength;
    this.#total += BigInt(end);
    let at = 0;
    // The last block is never complete here: its last stripe is treated differently.
    while (this.#waiting + (end - at) > BLOCK) {
      if (this.#waiting === 0) {
        do {
          this.#block(view, at);
          at += BLOCK;
        } while (end - at > BLOCK);
        this.#buffer.set(data.subarray(at - STRIPE, at));
      } else {
        const more = BLOCK - this.#waiting;
        this.#buffer.set(data.subarray(at, at + more), STRIPE + this.#waiting);
        at += more;
        this.#block(this.#view, STRIPE);
        this.#buffer.copyWithin(0, BLOCK, BLOCK + STRIPE);
        this.#waiting = 0;
      }
    }
    this.#buffer.set(data.subarray(at), STRIPE + this.#waiting);
    this.#waiting += end - at;
    return this;
  }

  /**
   * The checksum of all bytes; nothing can be appended afterwards.
   * @returns {bigint}
   */
  digest() {
    const n = this.#waiting;
    if (this.#total <= 240n) {
      const view = new DataView(this.#buffer.buffer, STRIPE, n);
      return n <= 16 ? tiny(view, n) : short(view, n);
    }
    const whole = Math.floor((n - 1) / STRIPE);
    for (let s = 0; s < whole; s++) this.#stripe(this.#view, STRIPE + STRIPE * s, STRIPES, s);
    this.#stripe(this.#view, n, LAST, 0);
    const a = Array.from(this.#low, (low, i) => (BigInt(this.#high[i] >>> 0) << 32n) | BigInt(low >>> 0));
    let h = this.#total * P64_1;
    for (let i = 0; i < 4; i++) h += fold(a[2 * i] ^ secret(11 + 16 * i), a[2 * i + 1] ^ secret(19 + 16 * i));
    return avalanche(h & WORD);
  }

  #block(view, at) {
    for (let s = 0; s < BLOCK / STRIPE; s++) this.#stripe(view, at + STRIPE * s, STRIPES, s);
    const low = this.#low;
    const high = this.#high;
    for (let i = 0; i < 8; i++) {
      const l = low[i] ^ (high[i] >>> 15) ^ SCRAMBLE.low[i];
      const h = high[i] ^ SCRAMBLE.high[i];
      low[i] = Math.imul(l, P32_1);
      high[i] = (Math.imul(h, P32_1) + upper(l, P32_1)) | 0;
    }
  }

  #stripe(view, at, key, k) {
    const low = this.#low;
    const high = this.#high;
    for (let i = 0; i < 8; i++) {
      const l = view.getInt32(at + 8 * i, true);
      const h = view.getInt32(at + 8 * i + 4, true);
      const j = i ^ 1;
      let sum = (low[j] + l) | 0;
      high[j] = (high[j] + h + (sum >>> 0 < l >>> 0 ? 1 : 0)) | 0;
      low[j] = sum;
      const ml = l ^ key.low[k + i];
      const mh = h ^ key.high[k + i];
      const product = Math.imul(ml, mh);
      sum = (low[i] + product) | 0;
      high[i] = (high[i] + upper(ml, mh) + (sum >>> 0 < product >>> 0 ? 1 : 0)) | 0;
      low[i] = sum;
    }
  }
}

/**
 * XXH3-64 of bytes.
 * @param {Uint8Array} data
 * @returns {bigint}
 */
export const xxh3 = (data) => new Xxh3().update(data).digest();
