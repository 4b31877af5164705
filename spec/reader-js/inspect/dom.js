/** Elements, and texts for people. Whatever comes from a file becomes text nodes. */

/**
 * An element. Strings among the children become text nodes.
 * @template {keyof HTMLElementTagNameMap} T
 * @param {T} tag
 * @param {Record<string, string | boolean | ((event: Event) => void)>} [attributes] functions become listeners
 * @param {...(Node | string | null)} children
 * @returns {HTMLElementTagNameMap[T]}
 */
export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === 'function') node.addEventListener(name, value);
    else if (value !== false) node.setAttribute(name, value === true ? '' : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

/** An SVG element. */
export function shape(tag, attributes, ...children) {
  const node = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, String(value));
  node.append(...children);
  return node;
}

// Control characters but tab and line feed, and those that change the direction of text.
const INVISIBLE = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/g;

/** Text of a file with invisible characters spelled out. */
export const visible = (text) => text.replace(INVISIBLE, (c) => `\\u{${c.codePointAt(0).toString(16)}}`);

const UNITS = ['bytes', 'kB', 'MB', 'GB', 'TB', 'PB'];

/** A number of bytes, in decimal units. */
export function bytesText(count) {
  const power = count < 1000 ? 0 : Math.min(Math.floor(Math.log10(count) / 3), UNITS.length - 1);
  const value = count / 1000 ** power;
  return `${power ? value.toPrecision(value < 999.5 ? 3 : 4) : value} ${power || count !== 1 ? UNITS[power] : 'byte'}`;
}

/** An integer with separators. @param {number | bigint} count */
export const countText = (count) => count.toLocaleString('en-US');

/**
 * A number, without an exponent where that is readable.
 * @param {number} value
 * @param {number} [digits] significant digits
 */
export function numberText(value, digits = 4) {
  const size = Math.abs(value);
  if (value === 0) return '0';
  return size >= 1e-4 && size < 1e6 ? String(Number(value.toPrecision(digits))) : value.toExponential(digits - 1);
}

/** Rows of a table of two columns. @param {[string, Node | string][]} rows */
export function facts(rows) {
  return element('dl', { class: 'facts' }, ...rows.flatMap(([name, value]) => [element('dt', {}, name), element('dd', {}, value)]));
}

/** A section of the page with a heading. */
export function card(title, ...children) {
  return element('section', { class: 'card' }, element('h2', {}, title), ...children);
}
