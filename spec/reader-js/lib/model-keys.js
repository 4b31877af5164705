/** The keys of model files: spec/metadata.md §2.1, §2.3, §2.5. */

/** @typedef {import('./metadata.js').ValueType} ValueType */

/** A key with the values that every model may have, and those for `decoder` models only. */
const choice = (key, llama, decoder = '') => ({ key, llama: llama.split(' '), decoder: [...llama.split(' '), ...decoder.split(' ').filter(Boolean)] });

/** Choices after model.architecture, in the order of their checks. */
export const CHOICES = [
  choice('model.norm', 'rmsnorm', 'rmsnorm_plus_one layernorm'),
  choice('model.activation', 'silu', 'relu gelu gelu_tanh'),
  choice('model.rope.pairing', 'half interleaved'),
  choice('model.rope.scaling', 'none linear llama3', 'dynamic yarn longrope'),
];

/** Choices of `decoder` models, all optional. */
export const DECODER_CHOICES = {
  'model.norm_placement': ['pre', 'post', 'sandwich'],
  'model.mlp': ['gated', 'plain'],
  'model.attention.qk_norm': ['none', 'head', 'full'],
  'model.position': ['rope', 'learned'],
};

/** Keys that a rotary scaling asks for. @type {Record<string, Record<string, ValueType>>} */
export const SCALING_KEYS = {
  none: {},
  linear: { 'model.rope.factor': 'f64' },
  llama3: {
    'model.rope.factor': 'f64',
    'model.rope.low_freq_factor': 'f64',
    'model.rope.high_freq_factor': 'f64',
    'model.rope.original_context': 'u64',
  },
  dynamic: { 'model.rope.factor': 'f64', 'model.rope.original_context': 'u64' },
  yarn: {
    'model.rope.factor': 'f64',
    'model.rope.original_context': 'u64',
    'model.rope.beta_slow': 'f64',
    'model.rope.beta_fast': 'f64',
    'model.rope.truncate': 'bool',
    'model.rope.attention_factor': 'f64',
  },
  longrope: {
    'model.rope.original_context': 'u64',
    'model.rope.attention_factor': 'f64',
    'model.rope.short_factors': 'text',
    'model.rope.long_factors': 'text',
  },
};

/** The other keys of every model but model.parameters. @type {Record<string, ValueType>} */
export const REQUIRED = {
  'model.vocab_size': 'u64',
  'model.hidden_size': 'u64',
  'model.intermediate_size': 'u64',
  'model.layers': 'u64',
  'model.heads': 'u64',
  'model.kv_heads': 'u64',
  'model.head_dim': 'u64',
  'model.context_length': 'u64',
  'model.norm_eps': 'f64',
  'model.tied_embeddings': 'bool',
  'model.rope.theta': 'f64',
};

/** Keys of `decoder` models that are optional and always in use. @type {Record<string, ValueType>} */
export const DECODER_KEYS = {
  'model.embedding_size': 'u64',
  'model.embedding_scale': 'f64',
  'model.final_norm': 'bool',
  'model.bias.qkv': 'bool',
  'model.bias.attention_output': 'bool',
  'model.bias.mlp': 'bool',
  'model.attention.scale': 'f64',
  'model.attention.soft_cap': 'f64',
  'model.attention.window': 'u64',
  'model.rope.dim': 'u64',
  'model.rope.layers': 'u64 list',
  'model.rope.local_theta': 'f64',
  'model.experts.count': 'u64',
  'model.logit_soft_cap': 'f64',
};

/** Keys that model.experts.count asks for. @type {Record<string, ValueType>} */
export const EXPERT_KEYS = {
  'model.experts.active': 'u64',
  'model.experts.intermediate_size': 'u64',
  'model.experts.normalize': 'bool',
};
