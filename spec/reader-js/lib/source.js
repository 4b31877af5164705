/** Where the bytes of a file come from: memory, a Blob, or a server that understands range requests. */

import { allocate } from './bytes.js';
import { StbLimitError, StbSourceError } from './errors.js';

/**
 * @typedef {object} Source
 * @property {number} size bytes of the file
 * @property {(offset: number, length: number) => Promise<Uint8Array>} read exactly `length` bytes; they may be a view that nobody changes
 */

/** Bytes that are read at once. */
export const CHUNK = 4 << 20;

/** @param {number} size @returns {number} */
function checkedSize(size) {
  if (!Number.isSafeInteger(size) || size < 0) throw new StbLimitError('this reader reads files of less than 2^53 bytes');
  return size;
}

/** Bytes in memory. @implements {Source} */
export class BytesSource {
  #bytes;

  /** @param {Uint8Array} bytes */
  constructor(bytes) {
    this.#bytes = bytes;
    this.size = bytes.byteLength;
  }

  async read(offset, length) {
    return this.#bytes.subarray(offset, offset + length);
  }
}

/** A Blob or File. @implements {Source} */
export class BlobSource {
  #blob;

  /** @param {Blob} blob */
  constructor(blob) {
    this.#blob = blob;
    this.size = checkedSize(blob.size);
  }

  async read(offset, length) {
    let buffer;
    try {
      buffer = await this.#blob.slice(offset, offset + length).arrayBuffer();
    } catch (error) {
      throw new StbSourceError(`the file cannot be read (${error.message}); if it has changed, open it again`, error);
    }
    if (buffer.byteLength !== length) throw new StbSourceError('the file became shorter while it was read');
    return new Uint8Array(buffer);
  }
}

/** A file on a server, read by HTTP range requests. @implements {Source} */
export class HttpSource {
  #url;
  #options;
  /** The first bytes, which came with the size. */
  #first = new Uint8Array(0);

  /**
   * @param {string} url
   * @param {RequestInit} options for every request: headers, signal
   */
  constructor(url, options) {
    this.#url = url;
    this.#options = options;
    this.size = 0;
    /** Bytes received so far. */
    this.received = 0;
    /** Requests made so far. */
    this.requests = 0;
  }

  /**
   * Asks the server for the first 4096 bytes, and with them for the size.
   * @param {string | URL} url
   * @param {RequestInit} [options]
   */
  static async open(url, options = {}) {
    const source = new HttpSource(String(url), options);
    const response = await source.#request(0, 4096);
    const empty = response.status === 416 ? /^bytes \*\/0$/.exec(response.headers.get('content-range') ?? '') : null;
    if (empty) {
      await response.body?.cancel();
      return source;
    }
    const { from, to, size } = source.#range(response);
    source.size = checkedSize(size);
    if (from !== 0 || to !== Math.min(4096, size) - 1) throw new StbSourceError('the server sent another range than the one asked for');
    source.#first = await source.#body(response, to + 1);
    return source;
  }

  async read(offset, length) {
    if (length === 0) return new Uint8Array(0);
    if (offset + length <= this.#first.length) return this.#first.subarray(offset, offset + length);
    const response = await this.#request(offset, length);
    const { from, to, size } = this.#range(response);
    if (size !== this.size) throw new StbSourceError('the file on the server changed while it was read');
    if (from !== offset || to !== offset + length - 1) throw new StbSourceError('the server sent another range than the one asked for');
    return this.#body(response, length);
  }

  async #request(offset, length) {
    const headers = new Headers(this.#options.headers);
    headers.set('Range', `bytes=${offset}-${offset + length - 1}`);
    this.requests += 1;
    try {
      return await fetch(this.#url, { ...this.#options, headers });
    } catch (error) {
      const cause = error.cause instanceof Error ? error.cause.message : error.message;
      throw new StbSourceError(`the server cannot be reached, or does not allow this page to read from it (${cause})`, error);
    }
  }

  /** The range of a response; anything but a partial answer is an error. */
  #range(response) {
    const stop = (message) => {
      response.body?.cancel().catch(() => {});
      throw new StbSourceError(message);
    };
    if (response.status === 200) stop('the server sends only whole files (no range requests): download the file and open it');
    if (response.status !== 206) stop(`the server answered ${response.status} ${response.statusText}`.trimEnd());
    const header = response.headers.get('content-range');
    if (header === null) stop('the server does not show Content-Range: it has to send Access-Control-Expose-Headers: Content-Range');
    const match = /^bytes (\d+)-(\d+)\/(\d+)$/.exec(header);
    if (!match) stop(`the server sent the range "${header}"`);
    const [from, to, size] = match.slice(1).map(Number);
    return { from, to, size };
  }

  /** The body of a response, which must have `length` bytes. Memory grows with what arrives. */
  async #body(response, length) {
    const parts = [];
    let size = 0;
    try {
      for (const reader = response.body.getReader(); ; ) {
        const { done, value } = await reader.read();
        if (done) break;
        parts.push(value);
        size += value.length;
        if (size > length) {
          await reader.cancel();
          break;
        }
      }
    } catch (error) {
      throw new StbSourceError(`the transfer broke off (${error.message})`, error);
    }
    this.received += size;
    if (size !== length) throw new StbSourceError(`the server sent ${size < length ? 'fewer' : 'more'} bytes than it announced`);
    return join(parts, length);
  }
}

/** A part of another source. @implements {Source} */
export class PartSource {
  #source;
  #offset;

  /**
   * @param {Source} source
   * @param {number} offset first byte of the part
   * @param {number} size
   */
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
 * The source for whatever a caller has.
 * @param {Blob | ArrayBuffer | Uint8Array | URL | string | Source} input a string is a URL
 * @param {RequestInit} [request] options of the requests, for a URL
 * @returns {Promise<Source>}
 */
export async function toSource(input, request) {
  if (typeof input === 'string' || input instanceof URL) return HttpSource.open(input, request);
  if (input instanceof Blob) return new BlobSource(input);
  if (input instanceof ArrayBuffer) return new BytesSource(new Uint8Array(input));
  if (ArrayBuffer.isView(input)) return new BytesSource(new Uint8Array(input.buffer, input.byteOffset, input.byteLength));
  if (typeof input?.read === 'function') {
    checkedSize(input.size);
    return input;
  }
  throw new TypeError('open needs a Blob, bytes, a URL, or an object with size and read');
}

/**
 * Bytes `from..to` of a source, piece by piece.
 * @param {Source} source
 * @param {number} from
 * @param {number} to
 * @returns {AsyncGenerator<Uint8Array>}
 */
export async function* pieces(source, from, to) {
  for (let at = from; at < to; at += CHUNK) yield await source.read(at, Math.min(CHUNK, to - at));
}

/**
 * Bytes `from..to` of a source in one array. Memory is reserved for bytes that have arrived.
 * @param {Source} source
 * @param {number} from
 * @param {number} to
 * @param {(piece: Uint8Array) => void} [each] sees every piece
 */
export async function readAll(source, from, to, each) {
  const parts = [];
  for await (const piece of pieces(source, from, to)) {
    each?.(piece);
    parts.push(piece);
  }
  return join(parts, to - from);
}

/** Whether bytes `from..to` of a source are all zero. */
export async function allZero(source, from, to) {
  for await (const piece of pieces(source, from, to)) {
    if (piece.some((byte) => byte !== 0)) return false;
  }
  return true;
}

function join(parts, length) {
  if (parts.length === 1) return parts[0];
  const whole = allocate(Uint8Array, length);
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}
