import assert from 'node:assert/strict';
import { test } from 'node:test';
import { deflateRawSync } from 'node:zlib';
import { open, StbError } from '../index.js';
import { inflate } from '../lib/inflate.js';
import { random, repair, vector } from './support.js';

const verified = async (bytes) => (await open(bytes)).verify();

/** The rule by which bytes are refused, null if they are valid; any other error fails the test. */
async function refusal(bytes, what) {
  try {
    await verified(bytes);
    return null;
  } catch (error) {
    assert.ok(error instanceof StbError, `${what}: ${error.stack}`);
    return error.rule;
  }
}

for (const name of ['smallest', 'metadata', 'stbllm', 'model']) {
  test(`${name}.stb cut at every 7th byte is refused with a rule`, async () => {
    const bytes = vector(`valid/${name}.stb`);
    for (let length = 0; length < bytes.length; length += 7) {
      const rule = await refusal(bytes.slice(0, length), `${length} bytes`);
      assert.equal(rule, length < 4096 ? 'STB-R-001' : 'STB-R-008');
    }
  });
}

test('a changed bit is refused with a rule wherever it is', async () => {
  const next = random(1);
  for (const name of ['nm', 'stbllm', 'odd-group', 'deflated-model', 'decoder', 'unknown-section', 'mixed-rows', 'trellis']) {
    const bytes = vector(`valid/${name}.stb`);
    for (let i = 0; i < 60; i++) {
      const at = next(i % 2 ? bytes.length : 400);
      bytes[at] ^= 1 << next(8);
      const changed = bytes[at];
      assert.notEqual(await refusal(bytes, `${name} byte ${at}`), null, `${name} byte ${at}`);
      bytes.set(vector(`valid/${name}.stb`).subarray(at, at + 1), at);
      assert.notEqual(bytes[at], changed);
    }
  }
});

test('changed bytes behind right checksums give a rule or a valid file, never another error', async () => {
  const next = random(2);
  const seen = new Set();
  for (const name of ['nm', 'stbllm', 'odd-group', 'int-group', 'dense', 'metadata', 'deflated', 'deflated-model', 'model', 'decoder', 'mixed-rows', 'trellis']) {
    const original = vector(`valid/${name}.stb`);
    const view = new DataView(original.buffer);
    const sections = [0, 1, 2].map((i) => [8, 16].map((field) => Number(view.getBigUint64(64 + 48 * i + field, true))));
    for (let i = 0; i < 150; i++) {
      const bytes = original.slice();
      for (let count = 1 + next(3); count > 0; count--) {
        const [offset, length] = i % 8 ? sections[next(3)] : [0, 256];
        const value = [next(256), 0, 255][next(3)];
        bytes[offset + next(length)] = value;
      }
      repair(bytes);
      seen.add(await refusal(bytes, `${name}, change ${i}`));
    }
  }
  assert.ok(seen.size > 15, [...seen].join());
});

test('a huge section count, tensor count and metadata count reserve nothing', async () => {
  for (const name of ['R-007-huge', 'R-030-too-many', 'R-021-huge-count', 'R-021-deflated-long', 'R-063-decoder-more-experts']) {
    const before = process.memoryUsage().arrayBuffers;
    assert.equal(await refusal(vector(`invalid/${name}.stb`), name), `STB-${name.slice(0, 5)}`);
    assert.ok(process.memoryUsage().arrayBuffers - before < 4 << 20);
  }
});

test('streams of another DEFLATE are inflated, and any prefix of them is refused', () => {
  const next = random(3);
  for (const level of [0, 1, 6, 9]) {
    for (const symbols of [1, 2, 30, 256]) {
      const text = Uint8Array.from({ length: next(3000) }, () => next(symbols));
      const stream = new Uint8Array(deflateRawSync(text, { level }));
      assert.deepEqual(inflate(stream, text.length, 'text'), text);
      for (let cut = 0; cut < stream.length; cut += 1 + next(20)) {
        assert.throws(() => inflate(stream.subarray(0, cut), text.length, 'text'), { rule: 'STB-R-026' });
      }
      assert.throws(() => inflate(stream, text.length + 1, 'text'), { rule: 'STB-R-026' });
    }
  }
});
