import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { test } from 'node:test';
import { open, RULES, StbError } from '../index.js';
import { MANIFEST, vector as bytesOf } from './support.js';

/** A metadata value as the manifest writes it. */
function asInManifest({ type, value }) {
  if (type === 'u64') return { u64: String(value) };
  if (type === 'u64 list') return { u64_list: value.map(String) };
  if (type === 'bool') return { bool: value };
  if (type === 'text') return { text: value };
  const view = new DataView(new ArrayBuffer(8));
  view.setFloat64(0, value);
  return { f64_bits: view.getBigUint64(0).toString(16).padStart(16, '0') };
}

const sha256 = (weights) => createHash('sha256').update(new Uint8Array(weights.buffer, weights.byteOffset, weights.byteLength)).digest('hex');

for (const vector of MANIFEST.valid) {
  test(`${vector.file}: ${vector.about}`, async () => {
    const file = await open(bytesOf(vector.file));
    assert.equal(file.isModel, vector.model);
    assert.equal(file.parameters, BigInt(vector.parameters));
    assert.deepEqual(Object.fromEntries(file.entries.map((entry) => [entry.key, asInManifest(entry)])), vector.metadata);
    const described = (tensors) => tensors.map(({ name, shape, encoding }) => ({ name, shape, encoding }));
    assert.deepEqual(described(file.tensors), described(vector.tensors));
    for (const { name, sha256_f32_le: expected, error } of vector.tensors) {
      if (error) await assert.rejects(file.decode(name), { rule: error });
      else assert.equal(sha256(await file.decode(name)), expected, name);
    }
    await file.verify();
  });
}

for (const { file, rule, about } of MANIFEST.invalid) {
  test(`${file}: ${about}`, async () => {
    const verified = async () => (await open(bytesOf(file))).verify();
    await assert.rejects(verified, (error) => {
      assert.ok(error instanceof StbError, error.stack);
      assert.equal(error.rule, rule, error.message);
      return true;
    });
  });
}

test('rules.js has the rules of the registry', () => {
  const registry = JSON.parse(readFileSync(new URL('../../registry.json', import.meta.url), 'utf8'));
  assert.deepEqual(Object.entries(RULES).map(([id, { kind, title }]) => ({ id, kind, title })), registry.rules);
});
