/** The values of one tensor: a histogram and a few figures. */

import { countText, element, facts, numberText, shape } from './dom.js';
import { showError } from './view.js';

/** Weights that are decoded for a histogram at most. */
const MOST = 2 ** 26;
const BINS = 64;
const WIDTH = 640;
const HEIGHT = 160;

/** Figures of weights, and how many of them are in each bin; zeros are counted by themselves. */
function statistics(weights) {
  let [min, max, sum, squares, zeros] = [Infinity, -Infinity, 0, 0, 0];
  for (const weight of weights) {
    if (weight < min) min = weight;
    if (weight > max) max = weight;
    sum += weight;
    squares += weight * weight;
    if (weight === 0) zeros += 1;
  }
  const mean = sum / weights.length;
  const deviation = Math.sqrt(Math.max(0, squares / weights.length - mean * mean));
  const bins = new Float64Array(BINS);
  const scale = BINS / (max - min || 1);
  for (const weight of weights) if (weight !== 0) bins[Math.min(BINS - 1, Math.floor((weight - min) * scale))] += 1;
  return { min, max, mean, deviation, zeros, bins };
}

function chart({ min, max, bins }) {
  const highest = Math.max(...bins, 1);
  const step = WIDTH / BINS;
  const bars = Array.from(bins, (count, i) => {
    const height = count ? Math.max(1, (count / highest) * HEIGHT) : 0;
    const from = min + ((max - min) * i) / BINS;
    const label = shape('title', {}, `${numberText(from)} to ${numberText(min + ((max - min) * (i + 1)) / BINS)}: ${countText(count)} weights`);
    return shape('rect', { x: i * step + 0.5, y: HEIGHT - height, width: step - 1, height }, label);
  });
  const axis = shape('line', { x1: 0, x2: WIDTH, y1: HEIGHT, y2: HEIGHT });
  if (min < 0 && max > 0) {
    const x = (-min / (max - min)) * WIDTH;
    bars.push(shape('line', { x1: x, x2: x, y1: 0, y2: HEIGHT, class: 'zero' }));
  }
  const description = `histogram of values from ${numberText(min)} to ${numberText(max)}`;
  const image = shape('svg', { viewBox: `0 0 ${WIDTH} ${HEIGHT + 1}`, preserveAspectRatio: 'none', role: 'img', 'aria-label': description }, ...bars, axis);
  const scale = element('div', { class: 'scale', 'aria-hidden': 'true' }, element('span', {}, numberText(min)), element('span', {}, numberText(max)));
  return [image, scale];
}

/**
 * Decodes a tensor, or its first rows if it is large, and shows its values in `target`.
 * @param {HTMLElement} target
 * @param {import('../index.js').StbFile} file
 * @param {import('../lib/table.js').Tensor} tensor
 */
export async function showValues(target, file, tensor) {
  target.replaceChildren(element('p', { role: 'status' }, 'Checking and decoding …'));
  const cols = tensor.shape.at(-1);
  const rows = tensor.elements / cols;
  const shown = Math.min(rows, Math.max(1, Math.floor(MOST / cols)));
  let weights;
  try {
    weights = await file.decode(tensor, { rows: shown });
  } catch (error) {
    target.replaceChildren(showError(error));
    return;
  }
  const found = statistics(weights);
  const zeros = `${countText(found.zeros)}, ${Number(((100 * found.zeros) / weights.length).toPrecision(3))} %${found.zeros ? ' (not in the bars)' : ''}`;
  target.replaceChildren(
    element('div', { class: 'histogram' }, ...chart(found)),
    facts([
      ['smallest, largest', `${numberText(found.min)}, ${numberText(found.max)}`],
      ['mean, standard deviation', `${numberText(found.mean)}, ${numberText(found.deviation)}`],
      ['zeros', zeros],
    ]),
    shown < rows ? element('p', { class: 'quiet' }, `The first ${countText(shown)} of ${countText(rows)} rows.`) : '',
  );
}
