/** The rules for model files, STB-R-060 to 064: spec/metadata.md §3. */

import { require } from './errors.js';
import { CHOICES, DECODER_CHOICES, DECODER_KEYS, EXPERT_KEYS, REQUIRED, SCALING_KEYS } from './model-keys.js';
import { checkTensors } from './model-tensors.js';

/** @typedef {import('./metadata.js').Entry} Entry */

const ARCHITECTURE = 'model.architecture';
const NUMBER = /^[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?$/;

/** @param {Entry[]} entries */
export const isModel = (entries) => entries.some(({ key }) => key === ARCHITECTURE);

/** The values of a model's keys, with the checks of their types. */
class Keys {
  #entries;

  /** @param {Entry[]} entries */
  constructor(entries) {
    this.#entries = new Map(entries.map((entry) => [entry.key, entry]));
  }

  has(key) {
    return this.#entries.has(key);
  }

  /**
   * The value of a key; undefined if it is not there.
   * @param {string} key
   * @returns {any}
   */
  get(key) {
    return this.#entries.get(key)?.value;
  }

  /** STB-R-060 for a key that has to be there. */
  required(key, type) {
    require(this.has(key), 60, `${key} is missing`);
    this.optional(key, type);
  }

  /** STB-R-060 for a key that may be there. */
  optional(key, type) {
    const entry = this.#entries.get(key);
    require(!entry || entry.type === type, 60, `${key} is of the type ${entry?.type}, not ${type}`);
  }

  /** STB-R-060, then 061, for a text that is one of several. */
  choice(key, known) {
    this.required(key, 'text');
    require(known.includes(this.get(key)), 61, `${key} is ${JSON.stringify(this.get(key).slice(0, 80))}`);
  }

  /**
   * STB-R-062 for a key, if it is there.
   * @param {string} key
   * @param {(value: any) => boolean} condition
   * @param {string} demand end of the sentence that begins with key and value
   */
  value(key, condition, demand) {
    if (this.has(key)) require(condition(this.get(key)), 62, `${key} is ${this.get(key)}, ${demand}`);
  }
}

/**
 * Types of keys, and choices: STB-R-060 and 061.
 * @param {Keys} keys
 */
function checkTypes(keys) {
  keys.choice(ARCHITECTURE, ['llama', 'decoder']);
  const architecture = keys.get(ARCHITECTURE);
  for (const choice of CHOICES) keys.choice(choice.key, choice[architecture]);
  for (const [key, type] of Object.entries(SCALING_KEYS[keys.get('model.rope.scaling')])) keys.required(key, type);
  if (keys.get('model.rope.scaling') === 'longrope') {
    for (const key of ['model.rope.short_factors', 'model.rope.long_factors']) {
      require(keys.get(key).split(' ').every((number) => NUMBER.test(number)), 60, `${key} is no list of numbers`);
    }
  }
  for (const [key, type] of Object.entries(REQUIRED)) keys.required(key, type);
  if (architecture !== 'decoder') return;
  for (const [key, known] of Object.entries(DECODER_CHOICES)) if (keys.has(key)) keys.choice(key, known);
  for (const [key, type] of Object.entries(DECODER_KEYS)) keys.optional(key, type);
  if (keys.has('model.attention.window')) keys.optional('model.attention.window_layers', 'u64 list');
  if (!keys.has('model.experts.count')) return;
  for (const [key, type] of Object.entries(EXPERT_KEYS)) keys.required(key, type);
  keys.optional('model.experts.layers', 'u64 list');
}

const positive = (value) => value > 0;
const within = (low, high) => (value) => value >= low && value <= high;

/** Values of §2.1: STB-R-062. */
function checkValues(keys) {
  for (const name of ['vocab_size', 'hidden_size', 'intermediate_size']) keys.value(`model.${name}`, within(1n, 1n << 24n), 'not 1 to 2^24');
  keys.value('model.layers', within(1n, 4096n), 'not 1 to 4096');
  for (const name of ['heads', 'kv_heads', 'head_dim']) keys.value(`model.${name}`, within(1n, 65536n), 'not 1 to 65536');
  keys.value('model.context_length', within(1n, 1n << 32n), 'not 1 to 2^32');
  keys.value('model.kv_heads', (count) => keys.get('model.heads') % count === 0n, 'which does not divide model.heads');
  keys.value('model.head_dim', (dim) => dim % 2n === 0n, 'which is odd');
  keys.value('model.norm_eps', positive, 'not above 0');
  keys.value('model.rope.theta', positive, 'not above 0');
}

/** Values of the keys that the rotary scaling asks for: STB-R-062. */
function checkScaling(keys, pairs) {
  const scaling = keys.get('model.rope.scaling');
  const check = (name, condition, demand) => {
    const key = `model.rope.${name}`;
    if (key in SCALING_KEYS[scaling]) keys.value(key, condition, demand);
  };
  check('factor', scaling === 'dynamic' ? (factor) => factor >= 1 : positive, 'too small');
  check('low_freq_factor', positive, 'not above 0');
  check('high_freq_factor', (high) => high > keys.get('model.rope.low_freq_factor'), 'not above model.rope.low_freq_factor');
  check('original_context', positive, 'not above 0');
  check('beta_slow', positive, 'not above 0');
  check('beta_fast', (fast) => fast > keys.get('model.rope.beta_slow'), 'not above model.rope.beta_slow');
  check('attention_factor', positive, 'not above 0');
  if (scaling === 'yarn') keys.value('model.rope.theta', (theta) => theta > 1, 'not above 1, as yarn needs');
  for (const name of ['short_factors', 'long_factors']) {
    const usable = (text) => text.split(' ').length === pairs && text.split(' ').every((number) => Number(number) > 0 && Number(number) < Infinity);
    check(name, usable, `not ${pairs} finite numbers above 0`);
  }
}

/** Values of §2.5: STB-R-062. */
function checkDecoderValues(keys) {
  keys.value('model.embedding_size', within(1n, 1n << 24n), 'not 1 to 2^24');
  for (const name of ['embedding_scale', 'attention.scale', 'attention.soft_cap', 'rope.local_theta', 'logit_soft_cap']) {
    keys.value(`model.${name}`, positive, 'not above 0');
  }
  keys.value('model.attention.window', within(1n, 1n << 32n), 'not 1 to 2^32');
  const dim = keys.get('model.head_dim');
  keys.value('model.rope.dim', (rotated) => rotated > 0n && rotated % 2n === 0n && rotated <= dim, `not even and 2 to ${dim}`);
  const layers = (key) => {
    const ascending = (list) => list.every((layer, i) => layer < keys.get('model.layers') && (i === 0 || layer > list[i - 1]));
    keys.value(key, ascending, 'no ascending list of layers');
  };
  layers('model.rope.layers');
  if (keys.has('model.attention.window')) layers('model.attention.window_layers');
  if (!keys.has('model.experts.count')) return;
  keys.value('model.experts.count', within(1n, 4096n), 'not 1 to 4096');
  keys.value('model.experts.active', within(1n, keys.get('model.experts.count')), 'not 1 to model.experts.count');
  keys.value('model.experts.intermediate_size', within(1n, 1n << 24n), 'not 1 to 2^24');
  layers('model.experts.layers');
  keys.value('model.mlp', (mlp) => mlp !== 'plain', 'which cannot have experts');
}

function checkTokenizer(keys) {
  keys.required('tokenizer.json', 'text');
  keys.required('tokenizer.add_bos', 'bool');
  keys.required('tokenizer.eos_ids', 'u64 list');
  if (keys.get('tokenizer.add_bos')) keys.required('tokenizer.bos_id', 'u64');
  else keys.optional('tokenizer.bos_id', 'u64');
  const known = (id) => id < keys.get('model.vocab_size');
  keys.value('tokenizer.bos_id', known, 'not below model.vocab_size');
  keys.value('tokenizer.eos_ids', (ids) => ids.every(known), 'not all below model.vocab_size');
}

/**
 * Checks a model file; throws the error of the first broken rule.
 * @param {Entry[]} entries
 * @param {import('./table.js').Tensor[]} tensors
 * @param {bigint} parameters elements of all tensors
 */
export function checkModel(entries, tensors, parameters) {
  const keys = new Keys(entries);
  checkTypes(keys);
  const decoder = keys.get(ARCHITECTURE) === 'decoder';
  checkValues(keys);
  if (decoder) checkDecoderValues(keys);
  const rotated = (decoder && keys.get('model.rope.dim')) || keys.get('model.head_dim');
  checkScaling(keys, Number(rotated / 2n));
  checkTensors(keys, decoder, tensors);
  keys.required('model.parameters', 'u64');
  require(keys.get('model.parameters') === parameters, 64, `model.parameters is ${keys.get('model.parameters')}, the tensors have ${parameters}`);
  checkTokenizer(keys);
}
