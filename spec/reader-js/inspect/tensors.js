/** The tensors of a file: a table with a filter and an order, and the values of one tensor on demand. */

import { bitsPerWeight } from '../index.js';
import { bytesText, card, countText, element, numberText } from './dom.js';
import { showValues } from './histogram.js';

/** Rows that are shown at first, and with each "Show more". */
const ROWS = 100;

const bitsOf = ({ length, elements }) => bitsPerWeight(length, elements);
const encodingOf = ({ encoding, encodingName, settings }) => {
  if (encodingName === null) return `unknown (${encoding})`;
  if (encodingName.endsWith('group')) return `${encodingName} of ${settings.group}, ${settings.bits}-bit`;
  if (encodingName === 'stbllm') return `stbllm ${settings.n}:8, blocks of ${settings.block}`;
  if (encodingName === 'mixed rows') return `mixed rows: ${encodingOf(settings.all)}; ${countText(settings.count)} listed as ${encodingOf(settings.listed)}`;
  const scales = settings.scaleBits ? `, ${settings.scaleBits}-bit scales of ${settings.block}` : '';
  const factors = settings.factors ? ', column factors' : '';
  if (encodingName === 'trellis') return `trellis ${settings.stepBits}/${settings.stepWeights}${scales}${factors}`;
  if (encodingName !== 'nm') return encodingName;
  return `nm ${settings.n}:${settings.m}${scales}${factors}`;
};

/** @type {{ title: string, number?: boolean, text: (tensor: any) => string, order: (tensor: any) => string | number }[]} */
const COLUMNS = [
  { title: 'name', text: ({ name }) => name, order: ({ name }) => name },
  { title: 'shape', number: true, text: ({ shape }) => shape.join(' × '), order: ({ elements }) => elements },
  { title: 'encoding', text: encodingOf, order: encodingOf },
  { title: 'stored', number: true, text: ({ length }) => bytesText(length), order: ({ length }) => length },
  { title: 'bits per weight', number: true, text: (tensor) => numberText(bitsOf(tensor)), order: bitsOf },
];

/** A row of the table; its name opens the values below it. */
function row(file, tensor) {
  let panel = null;
  const toggle = () => {
    if (panel) {
      panel.remove();
      panel = null;
    } else {
      const cell = element('td', { colspan: String(COLUMNS.length), class: 'panel' });
      panel = element('tr', { class: 'values' }, cell);
      line.after(panel);
      showValues(cell, file, tensor);
    }
    button.setAttribute('aria-expanded', String(panel !== null));
  };
  const button = element('button', { type: 'button', class: 'link', 'aria-expanded': 'false', title: 'Show the values', click: toggle }, tensor.name);
  const cells = COLUMNS.map(({ title, number, text }, i) =>
    element('td', { class: number ? 'number' : '', 'data-label': title }, i === 0 ? button : text(tensor)),
  );
  const line = element('tr', {}, ...cells);
  return line;
}

/** @param {import('../index.js').StbFile} file */
export function tensorsCard(file) {
  const body = element('tbody');
  const count = element('p', { class: 'quiet', role: 'status' });
  let order = null;
  let descending = false;
  let chosen = file.tensors;
  let shown = 0;
  const extend = () => {
    body.append(...chosen.slice(shown, shown + ROWS).map((tensor) => row(file, tensor)));
    shown = Math.min(chosen.length, shown + ROWS);
    more.hidden = shown === chosen.length;
    more.textContent = `Show ${countText(Math.min(ROWS, chosen.length - shown))} more of ${countText(chosen.length)}`;
  };
  const more = element('button', { type: 'button', click: extend });
  const refresh = () => {
    const wanted = filter.value.trim().toLowerCase();
    chosen = file.tensors.filter((tensor) => `${tensor.name} ${encodingOf(tensor)}`.toLowerCase().includes(wanted));
    if (order) chosen.sort((a, b) => (order(a) < order(b) ? -1 : order(a) > order(b) ? 1 : 0) * (descending ? -1 : 1));
    count.textContent = wanted ? `${countText(chosen.length)} of ${countText(file.tensors.length)} tensors` : '';
    shown = 0;
    body.replaceChildren();
    extend();
  };
  const filter = element('input', { type: 'search', 'aria-label': 'Filter tensors by name or encoding', placeholder: 'Filter by name or encoding', input: refresh });
  const headings = COLUMNS.map(({ title, number, order: columnOrder }) => {
    const sort = () => {
      descending = order === columnOrder && !descending;
      order = columnOrder;
      for (const other of headings) other.removeAttribute('aria-sort');
      heading.setAttribute('aria-sort', descending ? 'descending' : 'ascending');
      refresh();
    };
    const heading = element('th', { scope: 'col', class: number ? 'number' : '' }, element('button', { type: 'button', class: 'sort', click: sort }, title));
    return heading;
  });
  refresh();
  const table = element('table', { class: 'tensors' }, element('thead', {}, element('tr', {}, ...headings)), body);
  const hint = element('p', { class: 'quiet' }, 'Choose a name to see the values of the tensor.');
  return card('Tensors', hint, file.tensors.length > 1 ? filter : null, count, table, more);
}
