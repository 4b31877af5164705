/** What several tests need: vectors, a writer of small files, a server that understands ranges, random numbers. */

import { readFileSync } from 'node:fs';
import { readFile } from 'node:fs/promises';
import { createServer } from 'node:http';
import { xxh3 } from '../index.js';

const VECTORS = new URL('../../vectors/', import.meta.url);
export const MANIFEST = JSON.parse(readFileSync(new URL('manifest.json', VECTORS), 'utf8'));

/** The bytes of a vector. @param {string} file path in the manifest */
export const vector = (file) => new Uint8Array(readFileSync(new URL(file, VECTORS)));

/** Numbers from 0 up to `below`, the same in every run. */
export function random(seed) {
  let state = seed >>> 0;
  return (below) => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return Math.floor((state / 2 ** 32) * below);
  };
}

const up = (x, to) => Math.ceil(x / to) * to;
const encoder = new TextEncoder();

/** The META section for values: strings, bigints, numbers, booleans, arrays of bigints. @param {Record<string, any>} values */
function metaBytes(values) {
  const keys = Object.keys(values).sort();
  const parts = [Uint8Array.of(...new Uint8Array(Uint32Array.of(keys.length, 0).buffer))];
  for (const key of keys) {
    const value = values[key];
    const [type, bytes] =
      typeof value === 'string'
        ? [1, encoder.encode(value)]
        : typeof value === 'bigint'
          ? [2, new Uint8Array(BigUint64Array.of(value).buffer)]
          : typeof value === 'number'
            ? [3, new Uint8Array(Float64Array.of(value).buffer)]
            : typeof value === 'boolean'
              ? [4, Uint8Array.of(Number(value))]
              : [5, new Uint8Array(BigUint64Array.from(value).buffer)];
    const head = new Uint8Array(8);
    const view = new DataView(head.buffer);
    view.setUint16(0, key.length, true);
    head[2] = type;
    view.setUint32(4, bytes.length, true);
    parts.push(head, encoder.encode(key), bytes);
  }
  return new Uint8Array(Buffer.concat(parts));
}

/** @typedef {{ name: string, shape: number[], encoding: number, params?: number[], payload: Uint8Array | { length: number } }} Given */

/** The TENSORS section, and the length of DATA. @param {Given[]} tensors */
function tableBytes(tensors) {
  const names = encoder.encode(tensors.map(({ name }) => name).join(''));
  const bytes = new Uint8Array(16 + 96 * tensors.length + names.length);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, tensors.length, true);
  view.setUint32(4, 96, true);
  view.setBigUint64(8, BigInt(names.length), true);
  bytes.set(names, 16 + 96 * tensors.length);
  let [nameAt, end] = [0, 0];
  tensors.forEach(({ name, shape, encoding, params = [], payload }, i) => {
    const at = 16 + 96 * i;
    view.setUint32(at, nameAt, true);
    view.setUint16(at + 4, name.length, true);
    bytes[at + 6] = shape.length;
    view.setUint32(at + 8, encoding, true);
    bytes.set(params, at + 16);
    shape.forEach((dim, k) => view.setBigUint64(at + 32 + 8 * k, BigInt(dim), true));
    const start = up(end, 64);
    view.setBigUint64(at + 64, BigInt(start), true);
    view.setBigUint64(at + 72, BigInt(payload.length), true);
    if (payload instanceof Uint8Array) view.setBigUint64(at + 80, xxh3(payload), true);
    nameAt += name.length;
    end = start + payload.length;
  });
  return { bytes, dataLength: end };
}

/**
 * The parts of a valid file: head, TENSORS and META, with their offsets. Payloads without bytes are not part of it.
 * @param {Given[]} tensors
 * @param {Record<string, any>} [metadata]
 */
export function layOut(tensors, metadata = {}) {
  const { bytes: table, dataLength } = tableBytes(tensors);
  const meta = metaBytes(metadata);
  const tableAt = up(4096 + dataLength, 4096);
  const metaAt = up(tableAt + table.length, 4096);
  const size = metaAt + meta.length;
  const head = new Uint8Array(4096);
  const view = new DataView(head.buffer);
  head.set([0x8f, 0x53, 0x54, 0x42, 0x0d, 0x0a, 0x1a, 0x0a, 1, 0, 2, 0, 64]);
  view.setBigUint64(16, BigInt(size), true);
  view.setUint32(24, 3, true);
  view.setUint32(28, 48, true);
  const sections = [[1, 4096, dataLength, 0n], [2, tableAt, table.length, xxh3(table)], [3, metaAt, meta.length, xxh3(meta)]];
  sections.forEach(([type, offset, length, checksum], i) => {
    const at = 64 + 48 * i;
    view.setUint32(at, type, true);
    view.setUint32(at + 4, 1, true);
    view.setBigUint64(at + 8, BigInt(offset), true);
    view.setBigUint64(at + 16, BigInt(length), true);
    view.setBigUint64(at + 24, checksum, true);
  });
  view.setBigUint64(4088, xxh3(head.subarray(0, 4088)), true);
  return { size, parts: [[0, head], [tableAt, table], [metaAt, meta]] };
}

/** A valid file. @param {Given[]} tensors @param {Record<string, any>} [metadata] */
export function build(tensors, metadata) {
  const { size, parts } = layOut(tensors, metadata);
  const bytes = new Uint8Array(size);
  for (const [at, part] of parts) bytes.set(part, at);
  let end = 0;
  for (const { payload } of tensors) {
    bytes.set(payload, 4096 + up(end, 64));
    end = up(end, 64) + payload.length;
  }
  return bytes;
}

/**
 * Makes the checksums of head, sections and payloads right again where the structure can still be followed.
 * @param {Uint8Array} bytes
 */
export function repair(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const sections = [0, 1, 2].map((i) => {
    const at = 64 + 48 * i;
    const [offset, length] = [8, 16].map((field) => Number(view.getBigUint64(at + field, true)));
    return { at, type: view.getUint32(at, true), offset, bytes: bytes.subarray(offset, offset + length) };
  });
  const data = sections.find(({ type }) => type === 1);
  const table = sections.find(({ type }) => type === 2);
  const count = table && table.bytes.length >= 16 ? new DataView(table.bytes.buffer, table.bytes.byteOffset).getUint32(0, true) : 0;
  for (let i = 0; data && i < Math.min(count, 100); i++) {
    const at = table.offset + 16 + 96 * i;
    if (at + 96 > bytes.length) break;
    const [offset, length] = [64, 72].map((field) => Number(view.getBigUint64(at + field, true)));
    view.setBigUint64(at + 80, xxh3(data.bytes.subarray(offset, offset + length)), true);
  }
  for (const { at, type, bytes: section } of sections) if (type !== 1) view.setBigUint64(at + 24, xxh3(section), true);
  view.setBigUint64(4088, xxh3(bytes.subarray(0, 4088)), true);
}

/** A payload: segments, each from a multiple of 64 on. @param {...(Uint8Array | Uint16Array | Uint32Array)} segments */
function payloadOf(...segments) {
  const starts = [];
  let end = 0;
  for (const { byteLength } of segments) {
    starts.push(up(end, 64));
    end = starts.at(-1) + byteLength;
  }
  const bytes = new Uint8Array(end);
  segments.forEach(({ buffer }, i) => bytes.set(new Uint8Array(buffer), starts[i]));
  return bytes;
}

/**
 * A table of mixed rows: all rows have the weight 1, the listed ones their place in the list, from −128 to 127 again and again.
 * @param {number} rows
 * @param {number} cols a multiple of 32
 * @param {number[]} list the listed rows
 * @returns {Given}
 */
export function mixedRows(rows, cols, list) {
  const ones = (count) => new Uint16Array(count * (cols / 32)).fill(0x3c00);
  const codes = new Uint8Array(list.length * cols);
  for (let i = 0; i < list.length; i++) codes.fill(i - 128, i * cols, (i + 1) * cols);
  const listed = payloadOf(codes, ones(list.length));
  const all = payloadOf(new Uint8Array((rows * cols) / 8).fill(255), ones(rows));
  const params = [...new Uint8Array(Uint32Array.of(list.length).buffer), 16, 17, 8, 0, 32, 0, 1, 0, 32, 0, 0, 0];
  return { name: 'mixed', shape: [rows, cols], encoding: 64, params, payload: payloadOf(Uint32Array.from(list), listed, all) };
}

/**
 * A matrix of trellis codes without block scales.
 * @param {[number, number]} shape
 * @param {[number, number]} step its bits and its weights
 * @param {{ tables: Uint8Array, factors?: Uint16Array, rowScales: Uint16Array, streams: Uint8Array }} segments
 * @returns {Given}
 */
export function trellis(shape, step, { tables, factors = new Uint16Array(0), rowScales, streams }) {
  const payload = payloadOf(tables, factors, rowScales, new Uint8Array(0), streams);
  return { name: 'trellis', shape, encoding: 80, params: [...step, 0, factors.length ? 1 : 0], payload };
}

const TYPES = { '.html': 'text/html', '.js': 'text/javascript', '.css': 'text/css' };

/**
 * Serves `files` by path, and the files of a folder, on a free port of this machine. An answer may be changed: `answer` gets what
 * would be sent and returns what is sent.
 * @param {{ files?: Record<string, Uint8Array>, folder?: URL, answer?: (reply: any, request: any) => any }} options
 * @returns {Promise<{ url: string, close: () => void, requests: string[] }>}
 */
export async function serve({ files = {}, folder, answer = (reply) => reply }) {
  const requests = [];
  const server = createServer(async (request, response) => {
    const path = new URL(request.url, 'http://localhost').pathname;
    requests.push(`${path} ${request.headers.range ?? ''}`.trim());
    let bytes = files[path.slice(1)];
    if (!bytes && folder && !path.includes('..')) bytes = await readFile(new URL(`.${path}`, folder)).catch(() => undefined);
    const reply = answer(bytes ? rangeOf(bytes, request.headers.range) : { status: 404, headers: {}, body: 'not found' }, request);
    const type = TYPES[/\.\w+$/.exec(path)?.[0]] ?? 'application/octet-stream';
    response.writeHead(reply.status, { 'Content-Type': type, ...reply.headers });
    response.end(reply.body);
  });
  // On a busy machine an idle connection would be closed just when it is used again.
  server.keepAliveTimeout = 0;
  await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve));
  const close = () => {
    server.close();
    server.closeAllConnections();
  };
  return { url: `http://127.0.0.1:${server.address().port}/`, close, requests };
}

function rangeOf(bytes, range) {
  const match = /^bytes=(\d+)-(\d+)$/.exec(range ?? '');
  if (!match) return { status: 200, headers: {}, body: bytes };
  const from = Number(match[1]);
  const to = Math.min(Number(match[2]), bytes.length - 1);
  if (from > to) return { status: 416, headers: { 'Content-Range': `bytes */${bytes.length}` }, body: '' };
  return { status: 206, headers: { 'Content-Range': `bytes ${from}-${to}/${bytes.length}` }, body: bytes.subarray(from, to + 1) };
}
