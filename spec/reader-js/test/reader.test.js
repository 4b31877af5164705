import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { test } from 'node:test';
import { open, StbError, verdictOf, Xxh3, xxh3 } from '../index.js';
import { build, MANIFEST, mixedRows, random, trellis, vector } from './support.js';

test('checksums are those of checksum.md, in one piece and in many', () => {
  const page = readFileSync(new URL('../../checksum.md', import.meta.url), 'utf8');
  const rows = [...page.matchAll(/^\| (\d+) \| `([0-9a-f]{16})` \|$/gm)];
  assert.ok(rows.length > 20);
  const next = random(4);
  for (const [, count, expected] of rows) {
    const data = Uint8Array.from({ length: Number(count) }, (_, i) => i * 37 + 11);
    assert.equal(xxh3(data), BigInt(`0x${expected}`), count);
    const hash = new Xxh3();
    for (let at = 0; at < data.length; ) {
      const end = at + 1 + next(2500);
      hash.update(data.subarray(at, end));
      at = end;
    }
    assert.equal(hash.digest(), BigInt(`0x${expected}`), `${count} in pieces`);
  }
});

test('rows of a tensor are those of the whole', async () => {
  const next = random(5);
  for (const { file, tensors } of MANIFEST.valid) {
    const opened = await open(vector(file));
    for (const { name, shape, error } of tensors) {
      if (error) continue;
      const cols = shape.at(-1);
      const rows = shape.reduce((a, b) => a * b) / cols;
      const firstRow = next(rows);
      const count = next(rows - firstRow + 1);
      const part = await opened.decode(name, { firstRow, rows: count });
      assert.equal(part.length, count * cols);
      const whole = await (await open(vector(file))).decode(name);
      assert.deepEqual(part, whole.subarray(firstRow * cols, (firstRow + count) * cols), `${file} ${name} ${firstRow} ${count}`);
    }
  }
});

test('tensors that are read in several pieces decode as in one', async () => {
  const next = random(6);
  const [rows, cols] = [6000, 1056];
  const codes = Uint8Array.from({ length: rows * cols }, () => next(256));
  const scales = new Uint16Array(rows * (cols / 32)).fill(0x3c00);
  const payload = new Uint8Array(Math.ceil(codes.length / 64) * 64 + scales.byteLength);
  payload.set(codes);
  payload.set(new Uint8Array(scales.buffer), Math.ceil(codes.length / 64) * 64);
  const params = [8, 0, 32, 0];
  const file = await open(new Blob([build([{ name: 'w', shape: [rows, cols], encoding: 16, params, payload }])]));
  const weights = await file.decode('w');
  const expected = new Float32Array(new Int8Array(codes.buffer));
  assert.equal(Buffer.compare(Buffer.from(weights.buffer), Buffer.from(expected.buffer)), 0);
  const part = await file.decode('w', { firstRow: 3999, rows: 1500 });
  assert.deepEqual(part, expected.subarray(3999 * cols, 5499 * cols));
});

test('listed rows that are read in several pieces decode as in one', async () => {
  const next = random(7);
  const [rows, cols] = [40000, 256];
  const list = Array.from({ length: rows }, (_, i) => i).filter(() => next(10) > 2);
  const file = await open(new Blob([build([mixedRows(rows, cols, list)])]));
  const expected = new Float32Array(rows * cols).fill(1);
  list.forEach((row, i) => expected.fill((i % 256) - 128, row * cols, (row + 1) * cols));
  const weights = await file.decode('mixed');
  assert.equal(Buffer.compare(Buffer.from(weights.buffer), Buffer.from(expected.buffer)), 0);
  const part = await file.decode('mixed', { firstRow: 17000, rows: 20000 });
  assert.equal(Buffer.compare(Buffer.from(part.buffer), Buffer.from(expected.slice(17000 * cols, 37000 * cols).buffer)), 0);
});

test('the example of trellis codes, without column factors and with them', async () => {
  const streams = new Uint8Array(16);
  streams.set([0x1b, 0xe4]);
  const tables = Uint8Array.from({ length: 32 }, (_, i) => (i < 16 ? i : 40 + i));
  for (const [factors, length, weights] of [
    [[], 144, [26, 8, -4, 2]],
    [[0x3c00, 0x3800, 0x3c00, 0x4000], 208, [26, 4, -4, 4]],
  ]) {
    const given = trellis([1, 4], [2, 1], { tables, factors: Uint16Array.from(factors), rowScales: Uint16Array.of(0x4000), streams });
    assert.equal(given.payload.length, length);
    const file = await open(build([given]));
    assert.deepEqual([...(await file.decode('trellis'))], weights);
    await file.verify();
  }
});

test('trellis codes that are read in several pieces decode as the pseudo-code says', async () => {
  const next = random(8);
  const [rows, cols, k, v] = [7001, 2045, 5, 2];
  const units = Math.ceil(cols / (4 * v));
  const streams = Uint8Array.from({ length: Math.ceil(rows / 16) * units * 8 * k }, () => next(256));
  const tables = Uint8Array.from({ length: v * 32 }, () => next(64));
  const rowScales = Uint16Array.from({ length: rows }, (_, r) => (r % 2 ? 0x3c00 : 0xc000));
  const factors = Uint16Array.from({ length: cols }, (_, c) => (c % 3 ? 0x3c00 : 0xb800));
  const file = await open(new Blob([build([trellis([rows, cols], [k, v], { tables, factors, rowScales, streams })])]));
  const weight = (r, c) => {
    const [unit, column] = [Math.floor(c / (4 * v)), c % (4 * v)];
    const from = (Math.floor(r / 16) * units + unit) * 8 * k;
    let w = 0;
    for (let bit = 0; bit < 8; bit++) {
      const n = (k * ((r % 16) * 4 + (column % 4)) + bit) % (64 * k);
      w |= ((streams[from + (n >> 3)] >> (n & 7)) & 1) << bit;
    }
    const pair = 32 * Math.floor(column / 4);
    return (tables[pair + (w & 15)] + tables[pair + 16 + ((w ^ (w >> 4)) & 15)] - 64) * (r % 2 ? 1 : -2) * (c % 3 ? 1 : -0.5);
  };
  const [firstRow, count] = [5003, 1998];
  const weights = await file.decode('trellis', { firstRow, rows: count });
  for (let i = 0; i < 20000; i++) {
    const [r, c] = [next(count), next(cols)];
    assert.equal(weights[r * cols + c], weight(firstRow + r, c), `row ${firstRow + r}, column ${c}`);
  }
  const whole = await file.decode('trellis');
  assert.equal(Buffer.compare(Buffer.from(weights.buffer), Buffer.from(whole.buffer, firstRow * cols * 4, count * cols * 4)), 0);
});

test('bytes, buffers and blobs are opened', async () => {
  const bytes = vector('valid/smallest.stb');
  for (const input of [bytes, bytes.buffer, new Blob([bytes]), new DataView(bytes.buffer)]) {
    assert.deepEqual([...(await (await open(input)).decode('w'))], [1]);
  }
  await assert.rejects(open(null), TypeError);
  await assert.rejects(open({ size: 1.5, read: async () => bytes }), { name: 'StbLimitError' });
});

test('what a caller gets wrong is a RangeError', async () => {
  const file = await open(vector('valid/dense.stb'));
  await assert.rejects(file.decode('no such tensor'), RangeError);
  for (const range of [{ firstRow: -1 }, { firstRow: 0.5 }, { rows: 1e9 }, { firstRow: 1e9 }]) {
    await assert.rejects(file.decode(file.tensors[0].name, range), RangeError);
  }
  const other = await open(vector('valid/dense.stb'));
  await assert.rejects(file.decode(other.tensors[0]), RangeError);
});

test('weights of a damaged tensor are not handed out, those of the others are', async () => {
  const bytes = vector('valid/model.stb');
  const { offset } = (await open(bytes)).tensors[3];
  bytes[offset] ^= 1;
  const file = await open(bytes);
  await assert.rejects(file.decode(file.tensors[3]), (error) => error instanceof StbError && error.rule === 'STB-R-040');
  await assert.rejects(file.decode(file.tensors[3], { rows: 0 }), { rule: 'STB-R-040' });
  await file.decode(file.tensors[2]);
});

test('a valid key can be __proto__', async () => {
  const file = await open(build([{ name: 'w', shape: [1], encoding: 2, payload: Uint8Array.of(0, 60) }], { __proto__: null, ['__proto__']: 'text', constructor: 7n }));
  assert.equal(file.metadata.__proto__, 'text');
  assert.equal(file.metadata.constructor, 7n);
  assert.equal(file.metadata.toString, undefined);
});

const MEASURED = {
  'quality.verdict': 'worse',
  'quality.kl': 0.25,
  'quality.top1': 0.75,
  'quality.perplexity': 12,
  'quality.source_perplexity': 10,
  'quality.tokens': 4088n,
  'quality.windows': 8n,
  'quality.text': 'name sha256:0',
};
const qualityOf = async (metadata) =>
  (await open(build([{ name: 'w', shape: [1], encoding: 2, payload: Uint8Array.of(0, 60) }], metadata))).quality;

test('measured quality is there as a whole, or its figures are absent', async () => {
  const { verdict, figures } = await qualityOf({ ...MEASURED, 'quality.kl_error': 0.01, 'quality.top1_error': 'small' });
  assert.equal(verdict, 'worse');
  assert.deepEqual(figures, { kl: 0.25, top1: 0.75, perplexity: 12, source_perplexity: 10, tokens: 4088n, windows: 8n, text: 'name sha256:0', kl_error: 0.01 });
  for (const key of Object.keys(MEASURED).slice(1)) {
    const { [key]: _, ...others } = MEASURED;
    assert.deepEqual(await qualityOf(others), { verdict: 'worse', figures: null }, key);
    assert.equal((await qualityOf({ ...others, [key]: true })).figures, null, key);
  }
  assert.equal((await qualityOf({ ...MEASURED, 'quality.verdict': 'splendid' })).verdict, null);
  assert.deepEqual(await qualityOf({}), { verdict: null, figures: null });
});

test('a verdict follows from the divergence', () => {
  assert.deepEqual([0, 0.1, 0.5, 1].map(verdictOf), ['close', 'worse', 'poor', 'broken']);
});

test('true bits count the whole file', async () => {
  const file = await open(vector('valid/smallest.stb'));
  assert.equal(file.trueBits, 8 * 12296);
  assert.equal(file.parameters, 1n);
});
