/** The tensors of a model, STB-R-063: spec/metadata.md §2.2 and §2.6. */

import { require } from './errors.js';

/** @typedef {Record<string, number[]>} Shapes shapes by name, those of a layer without the prefix */

/** What a model has, from its keys; values are numbers, since STB-R-062 bounds them. */
function dimensions(keys, decoder) {
  const number = (key) => Number(keys.get(key));
  const option = (key, standard) => (decoder && keys.has(key) ? keys.get(key) : standard);
  const dims = {
    vocab: number('model.vocab_size'),
    hidden: number('model.hidden_size'),
    inner: number('model.intermediate_size'),
    layers: number('model.layers'),
    context: number('model.context_length'),
    headDim: number('model.head_dim'),
    queries: number('model.heads') * number('model.head_dim'),
    keys: number('model.kv_heads') * number('model.head_dim'),
    tied: keys.get('model.tied_embeddings'),
    layernorm: keys.get('model.norm') === 'layernorm',
    projected: decoder && keys.has('model.embedding_size'),
    learned: option('model.position', 'rope') === 'learned',
    finalNorm: option('model.final_norm', true),
    sandwich: option('model.norm_placement', 'pre') === 'sandwich',
    qkNorm: option('model.attention.qk_norm', 'none'),
    biasQkv: option('model.bias.qkv', false),
    biasOutput: option('model.bias.attention_output', false),
    biasMlp: option('model.bias.mlp', false),
    gated: option('model.mlp', 'gated') === 'gated',
    experts: Number(option('model.experts.count', 0n)),
  };
  dims.embedding = Number(option('model.embedding_size', BigInt(dims.hidden)));
  dims.expertInner = dims.experts ? number('model.experts.intermediate_size') : 0;
  dims.expertLayers = dims.experts ? new Set(option('model.experts.layers', range(dims.layers)).map(Number)) : new Set();
  return dims;
}

const range = (count) => Array.from({ length: count }, (_, i) => i);

/** Adds `shapes` to `all` if the model has them. */
const add = (all, present, shapes) => (present ? Object.assign(all, shapes) : all);

/** @returns {Shapes} */
function outside(d) {
  const all = { 'model.embed_tokens.weight': [d.vocab, d.embedding] };
  add(all, d.learned, { 'model.embed_positions.weight': [d.context, d.hidden] });
  add(all, d.projected, { 'model.project_in.weight': [d.hidden, d.embedding], 'model.project_out.weight': [d.embedding, d.hidden] });
  add(all, d.finalNorm, { 'model.norm.weight': [d.hidden] });
  add(all, d.finalNorm && d.layernorm, { 'model.norm.bias': [d.hidden] });
  return add(all, !d.tied, { 'lm_head.weight': [d.vocab, d.embedding] });
}

/** @returns {Shapes} */
function attention(d) {
  const h = [d.hidden];
  const all = {
    'input_layernorm.weight': h,
    'post_attention_layernorm.weight': h,
    'self_attn.q_proj.weight': [d.queries, d.hidden],
    'self_attn.k_proj.weight': [d.keys, d.hidden],
    'self_attn.v_proj.weight': [d.keys, d.hidden],
    'self_attn.o_proj.weight': [d.hidden, d.queries],
  };
  add(all, d.layernorm, { 'input_layernorm.bias': h, 'post_attention_layernorm.bias': h });
  add(all, d.biasQkv, { 'self_attn.q_proj.bias': [d.queries], 'self_attn.k_proj.bias': [d.keys], 'self_attn.v_proj.bias': [d.keys] });
  add(all, d.qkNorm === 'head', { 'self_attn.q_norm.weight': [d.headDim], 'self_attn.k_norm.weight': [d.headDim] });
  add(all, d.qkNorm === 'full', { 'self_attn.q_norm.weight': [d.queries], 'self_attn.k_norm.weight': [d.keys] });
  add(all, d.biasOutput, { 'self_attn.o_proj.bias': h });
  return add(all, d.sandwich, { 'self_attn.output_norm.weight': h, 'mlp.output_norm.weight': h });
}

/** @returns {Shapes} */
function plainMlp(d) {
  const all = { 'mlp.up_proj.weight': [d.inner, d.hidden], 'mlp.down_proj.weight': [d.hidden, d.inner] };
  add(all, d.gated, { 'mlp.gate_proj.weight': [d.inner, d.hidden] });
  add(all, d.biasMlp, { 'mlp.up_proj.bias': [d.inner], 'mlp.down_proj.bias': [d.hidden] });
  return add(all, d.biasMlp && d.gated, { 'mlp.gate_proj.bias': [d.inner] });
}

/** @returns {Shapes} */
function expertMlp(d) {
  const all = { 'mlp.router.weight': [d.experts, d.hidden] };
  for (const e of range(d.experts)) {
    all[`mlp.experts.${e}.gate_proj.weight`] = [d.expertInner, d.hidden];
    all[`mlp.experts.${e}.up_proj.weight`] = [d.expertInner, d.hidden];
    all[`mlp.experts.${e}.down_proj.weight`] = [d.hidden, d.expertInner];
  }
  return all;
}

/**
 * Checks STB-R-063. The tensors are counted first, so that a small file cannot ask for millions of names.
 * @param {{ has: (key: string) => boolean, get: (key: string) => any }} keys whose types and values were checked
 * @param {boolean} decoder
 * @param {import('./table.js').Tensor[]} tensors
 */
export function checkTensors(keys, decoder, tensors) {
  const d = dimensions(keys, decoder);
  const shapes = { around: outside(d), attention: attention(d), plain: plainMlp(d), experts: expertMlp(d) };
  const size = (group) => Object.keys(shapes[group]).length;
  const withExperts = d.expertLayers.size;
  const expected =
    size('around') + d.layers * size('attention') + (d.layers - withExperts) * size('plain') + withExperts * size('experts');
  const byName = new Map(tensors.map((tensor) => [tensor.name, tensor]));
  const check = (name, shape) => {
    const tensor = byName.get(name);
    require(tensor !== undefined, 63, `the tensor ${name} is missing`);
    const same = tensor.shape.length === shape.length && shape.every((dim, i) => dim === tensor.shape[i]);
    require(same, 63, `${name} has the shape [${tensor.shape}], not [${shape}]`);
  };
  require(tensors.length === expected, 63, `the file has ${tensors.length} tensors, the model ${expected}`);
  for (const [name, shape] of Object.entries(shapes.around)) check(name, shape);
  for (const layer of range(d.layers)) {
    const all = { ...shapes.attention, ...(d.expertLayers.has(layer) ? shapes.experts : shapes.plain) };
    for (const [name, shape] of Object.entries(all)) check(`model.layers.${layer}.${name}`, shape);
  }
}
