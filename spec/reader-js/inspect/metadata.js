/** The metadata of a file, in groups by the first word of the key. */

import { bytesText, card, countText, element, visible } from './dom.js';

/** Characters of a text that are shown beside its key; longer ones open on demand. */
const INLINE = 120;
/** Characters of a text that are shown at all at first. */
const SHOWN = 20_000;
/** Elements of a list that are shown. */
const ELEMENTS = 64;

const plain = (text) => element('bdi', {}, visible(text));

/** A long text: its start, and the rest in pieces on demand. */
function longText(text, stored) {
  const box = element('pre', { tabindex: '0' });
  let shown = 0;
  const more = element('button', { type: 'button', click: () => extend() });
  const extend = () => {
    const piece = text.slice(shown, shown + SHOWN);
    shown += piece.length;
    box.append(visible(piece));
    const rest = text.length - shown;
    more.textContent = `Show more (${countText(rest)} characters are left)`;
    more.hidden = rest === 0;
  };
  const first = visible(text.slice(0, 80).replace(/\s+/g, ' '));
  const summary = element('summary', {}, element('bdi', {}, first), element('span', { class: 'quiet' }, ` … ${countText(text.length)} characters, ${stored}`));
  const details = element('details', {}, summary, box, more);
  details.addEventListener('toggle', () => shown === 0 && extend());
  return details;
}

/** @param {import('../lib/metadata.js').Entry} entry */
function valueNode({ type, value, deflated, bytes }) {
  if (type === 'text') {
    const stored = `${bytesText(bytes)}${deflated ? ' deflated' : ''}`;
    if (value === '') return element('span', { class: 'quiet' }, 'empty text');
    return value.length > INLINE || value.includes('\n') ? longText(value, stored) : plain(value);
  }
  if (type !== 'u64 list') return String(value);
  if (value.length === 0) return element('span', { class: 'quiet' }, 'empty list');
  const rest = value.length - ELEMENTS;
  return `${value.slice(0, ELEMENTS).join(', ')}${rest > 0 ? `, and ${countText(rest)} more` : ''}`;
}

/** @param {import('../index.js').StbFile} file */
export function metadataCard({ entries }) {
  if (entries.length === 0) return card('Metadata', element('p', { class: 'quiet' }, 'There is none.'));
  const groups = new Map();
  for (const entry of entries) {
    const group = entry.key.split('.')[0];
    if (!groups.has(group)) groups.set(group, []);
    groups.get(group).push(entry);
  }
  const lists = [...groups.values()].map((group) => {
    const rows = group.flatMap((entry) => [element('dt', {}, entry.key), element('dd', {}, valueNode(entry))]);
    return element('dl', { class: 'facts keys' }, ...rows);
  });
  return card('Metadata', ...lists);
}
