import assert from 'node:assert/strict';
import { after, test } from 'node:test';
import { HttpSource, open, StbSourceError } from '../index.js';
import { build, layOut, mixedRows, serve, vector } from './support.js';

const servers = [];
after(() => servers.forEach((server) => server.close()));

async function started(options) {
  const server = await serve(options);
  servers.push(server);
  return server;
}

const payload = new Uint8Array(20 << 20);
const large = build([{ name: 'a', shape: [payload.length / 4], encoding: 1, payload }, { name: 'b', shape: [2], encoding: 2, payload: Uint8Array.of(0, 60, 0, 184) }], { key: 'a text' });

test('the structure of a large file is read without its weights', async () => {
  const { url, requests } = await started({ files: { 'large.stb': large } });
  const source = await HttpSource.open(`${url}large.stb`);
  const file = await open(source);
  assert.equal(file.metadata.key, 'a text');
  assert.equal(file.tensors.length, 2);
  assert.ok(source.received < 4 * 4096, `${source.received} bytes`);
  assert.ok(requests.length <= 6, requests.join('\n'));
  const before = source.received;
  assert.deepEqual([...(await file.decode('b'))], [1, -0.5]);
  assert.equal(source.received - before, 4);
});

test('a file on a server is the file in memory', async () => {
  const bytes = vector('valid/model.stb');
  const { url } = await started({ files: { 'model.stb': bytes } });
  const [remote, local] = [await open(new URL('model.stb', url)), await open(bytes)];
  assert.deepEqual(remote.entries, local.entries);
  assert.deepEqual(remote.tensors, local.tensors);
  for (const { name } of local.tensors) assert.deepEqual(await remote.decode(name), await local.decode(name));
  await remote.verify();
});

test('a few rows of a mixed table need a few parts of it', async () => {
  const [rows, cols] = [100000, 64];
  const list = Array.from({ length: 40000 }, (_, i) => 2 * i + (i > 20000 ? 1 : 0));
  const table = build([mixedRows(rows, cols, list)]);
  const { url } = await started({ files: { 'table.stb': table } });
  const source = await HttpSource.open(`${url}table.stb`);
  const file = await open(source);
  await file.decode('mixed', { rows: 0 });
  const places = new Map(list.map((row, i) => [row, i]));
  for (const firstRow of [0, 39990, 79990, 99990]) {
    const [received, requests] = [source.received, source.requests];
    const weights = await file.decode('mixed', { firstRow, rows: 10 });
    const expected = Array.from({ length: 10 }, (_, i) => (places.has(firstRow + i) ? (places.get(firstRow + i) % 256) - 128 : 1));
    assert.deepEqual([...weights], expected.flatMap((value) => Array(cols).fill(value)), `rows from ${firstRow}`);
    assert.ok(source.received - received < 150000, `${source.received - received} of ${table.length} bytes`);
    assert.ok(source.requests - requests <= 8, `${source.requests - requests} requests`);
  }
});

test('an empty and a short file on a server break STB-R-001', async () => {
  const { url } = await started({ files: { 'empty.stb': new Uint8Array(0), 'short.stb': new Uint8Array(4095) } });
  for (const name of ['empty.stb', 'short.stb']) await assert.rejects(open(url + name), { rule: 'STB-R-001' });
});

const bytes = vector('valid/smallest.stb');
const FAULTS = [
  ['whole files only', (reply) => ({ ...reply, status: 200 }), /no range requests/],
  ['no such file', () => ({ status: 404, headers: {}, body: '' }), /404/],
  ['no size', (reply) => ({ ...reply, headers: {} }), /Content-Range/],
  ['an unknown size', (reply) => ({ ...reply, headers: { 'Content-Range': 'bytes 0-4095/*' } }), /sent the range/],
  ['another range', (reply) => ({ ...reply, headers: { 'Content-Range': 'bytes 1-4096/12296' } }), /another range/],
  ['fewer bytes', (reply) => ({ ...reply, body: reply.body.subarray(1) }), /fewer bytes/],
  ['more bytes', (reply) => ({ ...reply, body: Buffer.concat([reply.body, reply.body]) }), /more bytes/],
];
for (const [what, answer, message] of FAULTS) {
  test(`a server that sends ${what} gives an error without a rule`, async () => {
    const { url } = await started({ files: { 'a.stb': bytes }, answer });
    await assert.rejects(open(`${url}a.stb`), (error) => error instanceof StbSourceError && message.test(error.message));
  });
}

test('a file that changes while it is read is noticed', async () => {
  const answer = (reply, request) => {
    if (!/=0-/.test(request.headers.range)) reply.headers['Content-Range'] = reply.headers['Content-Range'].replace('12296', '12297');
    return reply;
  };
  const { url } = await started({ files: { 'a.stb': bytes }, answer });
  await assert.rejects(open(`${url}a.stb`), /changed while it was read/);
});

test('a server that is not there gives an error without a rule', async () => {
  const { url, close } = await serve({});
  close();
  await assert.rejects(open(`${url}a.stb`), StbSourceError);
});

test('sizes above 2^32 are not rounded', async () => {
  const gigabytes = 9 * 2 ** 30;
  const tensors = [
    { name: 'large', shape: [gigabytes / 4], encoding: 1, payload: { length: gigabytes } },
    { name: 'odd', shape: [1], encoding: 2, payload: Uint8Array.of(0, 60) },
  ];
  const { size, parts } = layOut(tensors);
  const stored = [...parts, [4096 + gigabytes, tensors[1].payload]];
  const read = async (offset, length) => {
    assert.ok(length <= 2 ** 26);
    const piece = new Uint8Array(length);
    for (const [at, part] of stored) {
      const from = Math.max(at, offset);
      const to = Math.min(at + part.length, offset + length);
      if (from < to) piece.set(part.subarray(from - at, to - at), from - offset);
    }
    return piece;
  };
  const file = await open({ size, read });
  assert.equal(file.tensor('odd').offset, 4096 + gigabytes);
  assert.equal(file.header.size, size);
  assert.equal(file.parameters, BigInt(gigabytes / 4) + 1n);
  assert.deepEqual([...(await file.decode('odd'))], [1]);
  await assert.rejects(open({ size: size - 1, read }), { rule: 'STB-R-008' });
});
