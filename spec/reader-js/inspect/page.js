/** The page: opens what a person chooses, drops or names, and shows it. */

import { open, StbError, StbLimitError } from '../index.js';
import { visible } from './dom.js';
import { showError, showFile } from './view.js';

const byId = (id) => document.getElementById(id);
const address = /** @type {HTMLInputElement} */ (byId('url'));
const chooser = /** @type {HTMLInputElement} */ (byId('file'));
const result = byId('result');
const status = byId('status');

/** Counts what was opened, so that a slow file does not replace the one that was opened after it. */
let opened = 0;

/** Opens a file or an address, and shows it under `name`. */
async function inspect(input, name) {
  opened += 1;
  const mine = opened;
  const isCurrent = () => mine === opened;
  result.replaceChildren();
  document.title = `${visible(name)} – .stb file`;
  status.textContent = `Reading ${visible(name)} …`;
  try {
    const file = await open(input, { request: { credentials: 'omit' } });
    if (!isCurrent()) return;
    showFile(result, file, name, isCurrent);
  } catch (error) {
    if (!isCurrent()) return;
    if (!(error instanceof StbError || error instanceof StbLimitError)) console.warn(error.message);
    result.replaceChildren(showError(error, name));
  }
  status.textContent = '';
}

/** Opens an address; only http and https are asked. */
function inspectUrl(text) {
  let url;
  try {
    url = new URL(text, location.href);
  } catch {
    url = null;
  }
  if (url?.protocol !== 'http:' && url?.protocol !== 'https:') {
    status.textContent = `${visible(text)} is no address that starts with http:// or https://`;
    return;
  }
  address.value = text;
  let name = url.pathname.split('/').at(-1) || url.host;
  try {
    name = decodeURIComponent(name);
  } catch {
    // A name that is not encoded properly is shown as it is.
  }
  inspect(url, name);
}

byId('needs-server').remove();
byId('pick').hidden = false;
chooser.addEventListener('change', () => {
  const [file] = chooser.files;
  if (file) inspect(file, file.name);
  // So that choosing the same file again, which may have changed, is noticed.
  chooser.value = '';
});
byId('pick').addEventListener('submit', (event) => {
  event.preventDefault();
  const text = address.value.trim();
  if (text) inspectUrl(text);
});

const dragging = (on) => document.body.classList.toggle('dragging', on);
addEventListener('dragover', (event) => {
  event.preventDefault();
  dragging(true);
});
addEventListener('dragleave', (event) => {
  if (event.relatedTarget === null) dragging(false);
});
addEventListener('drop', (event) => {
  event.preventDefault();
  dragging(false);
  const [file] = event.dataTransfer.files;
  if (file) inspect(file, file.name);
  else status.textContent = 'That was no file.';
});

const asked = new URLSearchParams(location.search).get('url');
if (asked) inspectUrl(asked);
