/** What the page shows of a file. */

import { StbError, StbLimitError, verdictOf } from '../index.js';
import { bytesText, card, countText, element, facts, numberText, visible } from './dom.js';
import { metadataCard } from './metadata.js';
import { tensorsCard } from './tensors.js';

/** @typedef {import('../index.js').StbFile} StbFile */

const VERDICTS = {
  close: 'Its predictions are close to those of the original model.',
  worse: 'It is noticeably worse than the original model.',
  poor: 'It is much worse than the original model.',
  broken: 'Its predictions are far from those of the original model: not usable.',
  unchecked: 'Nobody has compared it with the original model.',
};

/**
 * The card of an error: what is wrong, and the rule.
 * @param {Error} error
 * @param {string} [name] of the file, where nothing else on the page shows it
 */
export function showError(error, name) {
  const shown = name === undefined ? null : element('p', { class: 'name' }, visible(name));
  const bad = (title, ...children) => element('section', { class: 'card bad', role: 'alert' }, element('h2', {}, title), shown, ...children);
  const detail = (text) => element('p', { class: 'detail' }, visible(text));
  if (error instanceof StbLimitError) return bad('The file is too large for this page', detail(error.message));
  if (!(error instanceof StbError)) return bad('The file cannot be read', detail(error.message));
  const unsupported = error.kind === 'unsupported';
  return bad(
    unsupported ? 'The file needs a newer reader' : 'The file is broken',
    detail(`What was found: ${error.detail}.`),
    element('p', {}, 'The first rule that does not hold is ', element('code', {}, error.rule), `: ${error.title}.`),
    element('p', { class: 'quiet' }, unsupported ? 'It may be valid. Look for a newer version of this page.' : 'It was damaged, cut short, or made wrongly. Get it again.'),
  );
}

/**
 * Shows an open file.
 * @param {HTMLElement} target
 * @param {StbFile} file
 * @param {string} name
 * @param {() => boolean} isCurrent whether the file is still the one to show
 */
export function showFile(target, file, name, isCurrent) {
  target.replaceChildren(
    summaryCard(file, name, isCurrent),
    qualityCard(file),
    bytesCard(file),
    tensorsCard(file),
    metadataCard(file),
    structureCard(file),
  );
}

function tile(value, label) {
  return element('div', { class: 'tile' }, element('strong', {}, value), element('span', {}, label));
}

function summaryCard(file, name, isCurrent) {
  const unknown = file.tensors.filter(({ encodingName }) => encodingName === null).length;
  return element(
    'section',
    { class: 'card' },
    element('h2', { class: 'name' }, visible(name)),
    element(
      'div',
      { class: 'tiles' },
      tile(numberText(file.trueBits), 'true bits per parameter'),
      tile(bytesText(file.header.size), 'whole file'),
      tile(countText(file.parameters), 'parameters'),
      tile(countText(file.tensors.length), file.tensors.length === 1 ? 'tensor' : 'tensors'),
    ),
    unknown ? element('p', { class: 'notice' }, `${countText(unknown)} of the tensors have an encoding that this page does not know.`) : null,
    ...checks(file, isCurrent),
  );
}

/** What was checked, and a button to check the rest. */
function checks(file, isCurrent) {
  const list = element('ul', { class: 'checks' });
  const add = (text) => list.append(element('li', { class: 'good' }, text));
  add('The structure is valid: header, sections, tensor table and metadata, with their checksums.');
  const problems = element('div');
  if (file.isModel) {
    try {
      file.checkModel();
      add(`It is a model file of the architecture ${visible(String(file.metadata['model.architecture']))}; its keys and tensors fit together.`);
    } catch (error) {
      problems.append(showError(error));
    }
  } else {
    add('It is a collection of tensors: it does not describe a whole model.');
  }
  const progress = element('progress', { hidden: true, 'aria-label': 'checking the weights' });
  const verify = async () => {
    button.disabled = true;
    progress.hidden = false;
    const note = (done, total) => {
      if (!isCurrent()) throw new DOMException('another file was opened', 'AbortError');
      progress.max = Math.max(total, 1);
      progress.value = done;
    };
    try {
      await file.verify(note);
      add('All weights are as they were written: checksums and content of every tensor are right.');
      button.remove();
    } catch (error) {
      if (error.name === 'AbortError') return;
      problems.replaceChildren(showError(error));
      if (error instanceof StbError) button.remove();
    } finally {
      progress.hidden = true;
      button.disabled = false;
    }
  };
  const button = element('button', { id: 'verify', type: 'button', click: verify }, `Check all weights (${bytesText(file.header.size)})`);
  return [list, problems, element('div', { class: 'line' }, button, progress)];
}

function qualityCard({ quality: { verdict, figures } }) {
  if (!verdict && !figures) {
    return card('Measured quality', element('p', { class: 'quiet' }, 'The file does not say how close it is to the original model.'));
  }
  /** @type {[string, string][]} */
  const rows = [];
  if (figures) {
    const figure = (name, factor = 1) => {
      const error = figures[`${name}_error`];
      return `${numberText(factor * figures[name])}${error === undefined ? '' : ` ± ${numberText(factor * error, 2)}`}`;
    };
    rows.push(
      ['KL divergence from the original', `${figure('kl')} nats per token`],
      ['same most likely token', `${figure('top1', 100)} %`],
      ['perplexity', figure('perplexity')],
      ['perplexity of the original', figure('source_perplexity')],
      ['measured on', `${countText(figures.tokens)} tokens in ${countText(figures.windows)} windows of ${visible(figures.text)}`],
    );
  }
  const follows = figures && verdict && verdictOf(figures.kl) !== verdict;
  return card(
    'Measured quality',
    verdict ? element('p', {}, element('span', { class: `badge ${verdict}` }, verdict), ` ${VERDICTS[verdict]}`) : null,
    follows ? element('p', { class: 'notice' }, `The divergence below would be called ${verdictOf(figures.kl)}.`) : null,
    rows.length ? facts(rows) : null,
  );
}

/** Where the bytes of the file are. */
function bytesCard(file) {
  const parts = new Map();
  const add = (name, count) => parts.set(name, (parts.get(name) ?? 0) + count);
  for (const { encoding, encodingName, length } of file.tensors) add(encodingName ?? `encoding ${encoding}`, length);
  for (const { name, length } of file.sections) {
    if (name === 'TENSORS') add('tensor table', length);
    else if (name === 'META') add('metadata', length);
    else if (name === null) add('other sections', length);
  }
  add('head and padding', file.header.size - [...parts.values()].reduce((sum, count) => sum + count, 0));
  const sorted = [...parts].sort((a, b) => b[1] - a[1]);
  const bar = element('div', { class: 'bar', 'aria-hidden': 'true' });
  const list = element('ul', { class: 'legend' });
  sorted.forEach(([name, count], i) => {
    const share = count / file.header.size;
    const segment = element('span', { class: `series-${Math.min(i, 6)}` });
    segment.style.flexGrow = String(count);
    bar.append(segment);
    const text = `${name}: ${bytesText(count)}, ${(100 * share).toFixed(1)} %, ${numberText((8 * count) / Number(file.parameters))} bits per parameter`;
    list.append(element('li', {}, element('span', { class: `swatch series-${Math.min(i, 6)}`, 'aria-hidden': 'true' }), text));
  });
  return card('Where the bytes are', bar, list);
}

function structureCard({ header, sections }) {
  const rows = sections.map(({ type, name, critical, offset, length }) =>
    element(
      'tr',
      {},
      element('td', { 'data-label': 'section' }, name ?? `type ${type}`),
      element('td', { class: 'number', 'data-label': 'offset' }, countText(offset)),
      element('td', { class: 'number', 'data-label': 'bytes' }, countText(length)),
      element('td', { 'data-label': 'critical' }, critical ? 'yes' : 'no'),
    ),
  );
  const headings = ['section', 'offset', 'bytes', 'critical'].map((text, i) =>
    element('th', { scope: 'col', class: i === 1 || i === 2 ? 'number' : '' }, text),
  );
  return card(
    'Header and sections',
    facts([
      ['written by format version', String(header.written)],
      ['for readers from version', String(header.minReader)],
      ['bytes', countText(header.size)],
      ['checksum of the head', header.checksum.toString(16).padStart(16, '0')],
    ]),
    element('table', {}, element('thead', {}, element('tr', {}, ...headings)), element('tbody', {}, ...rows)),
  );
}
