/** True bits, and the measured quality of a file: spec/container.md §7, spec/metadata.md §2.8. */

/** @typedef {import('./metadata.js').Entry} Entry */

const VERDICTS = ['close', 'worse', 'poor', 'broken', 'unchecked'];
/** Keys of the figures with their types; without any of them there are no figures. */
const FIGURES = {
  kl: 'f64',
  top1: 'f64',
  perplexity: 'f64',
  source_perplexity: 'f64',
  tokens: 'u64',
  windows: 'u64',
  text: 'text',
};
const ERRORS = ['kl_error', 'top1_error', 'perplexity_error', 'source_perplexity_error'];

/**
 * @typedef {object} Figures means over windows of a text
 * @property {number} kl KL divergence from the original model, nats per token
 * @property {number} top1 share of tokens with the same most likely prediction
 * @property {number} perplexity
 * @property {number} source_perplexity that of the original model
 * @property {bigint} tokens
 * @property {bigint} windows
 * @property {string} text name and digest of the text
 * @property {number} [kl_error] one standard error; so are the next three
 * @property {number} [top1_error]
 * @property {number} [perplexity_error]
 * @property {number} [source_perplexity_error]
 */

/**
 * What the writer of a file found when it compared the file with the original model.
 * @param {Entry[]} entries
 * @returns {{ verdict: 'close' | 'worse' | 'poor' | 'broken' | 'unchecked' | null, figures: Figures | null }}
 */
export function readQuality(entries) {
  const byKey = new Map(entries.map((entry) => [entry.key, entry]));
  /** @returns {any} */
  const value = (name, type) => {
    const entry = byKey.get(`quality.${name}`);
    return entry?.type === type ? entry.value : null;
  };
  const stated = value('verdict', 'text');
  const verdict = VERDICTS.includes(stated) ? stated : null;
  const figures = /** @type {Figures} */ ({});
  for (const [name, type] of Object.entries(FIGURES)) {
    figures[name] = value(name, type);
    if (figures[name] === null) return { verdict, figures: null };
  }
  for (const name of ERRORS) {
    const error = value(name, 'f64');
    if (error !== null) figures[name] = error;
  }
  return { verdict, figures };
}

/**
 * The verdict that follows from a KL divergence.
 * @param {number} kl nats per token
 */
export const verdictOf = (kl) => (kl < 0.1 ? 'close' : kl < 0.5 ? 'worse' : kl < 1 ? 'poor' : 'broken');

/**
 * 8 × bytes ÷ weights: the true bits per parameter of a file, or the stored bits per weight of a tensor.
 * @param {number} bytes
 * @param {bigint | number} weights
 */
export const bitsPerWeight = (bytes, weights) => (8 * bytes) / Number(weights);
