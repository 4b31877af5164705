import assert from 'node:assert/strict';
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { Browser, findChromium } from './browser.js';
import { build, mixedRows, serve, trellis, vector } from './support.js';

const FOLDER = new URL('../', import.meta.url);
const chromium = findChromium();
const missing = 'there is no Chromium (Debian: apt-get install chromium; the variable CHROMIUM names another executable)';
if (!chromium && process.env.STB_REQUIRE_CHROMIUM) throw new Error(missing);
const skip = chromium ? false : missing;

const HOSTILE = '<img src=x onerror=alert(1)>';
const f16 = (...bits) => new Uint8Array(Uint16Array.from(bits).buffer);
const hostile = build(
  [
    { name: HOSTILE.replaceAll(' ', '/'), shape: [4], encoding: 2, payload: f16(0x3c00, 0xbc00, 0, 0x4000) },
    { name: 'of-an-unknown-encoding', shape: [2, 2], encoding: 0x80000001, payload: Uint8Array.of(1, 2, 3) },
    mixedRows(5, 32, [1, 4]),
    trellis([1, 4], [3, 2], {
      tables: new Uint8Array(64),
      factors: new Uint16Array(4).fill(0x3c00),
      rowScales: Uint16Array.of(0x3c00),
      streams: new Uint8Array(24),
    }),
  ],
  {
    'x.text': `${HOSTILE}\u202e\u0007`,
    'x.long': `${HOSTILE}\n`.repeat(2000),
    'x.list': [1n, 2n ** 64n - 1n],
    'quality.verdict': 'broken',
    'quality.text': HOSTILE,
  },
);
const many = build(Array.from({ length: 250 }, (_, i) => ({ name: `tensor.${i}`, shape: [1], encoding: 2, payload: f16(0x3c00) })));

let browser;
let server;
let folder;

before(async () => {
  if (skip) return;
  folder = mkdtempSync(join(tmpdir(), 'stb-inspect-files-'));
  const damaged = vector('valid/model.stb');
  damaged[4096] ^= 1;
  const files = { 'model.stb': vector('valid/model.stb'), 'hostile.stb': hostile, 'many.stb': many, 'damaged.stb': damaged };
  for (const [name, bytes] of Object.entries(files)) writeFileSync(join(folder, name), bytes);
  server = await serve({ folder: FOLDER, files });
  browser = await Browser.start(chromium);
});

after(async () => {
  // The server first: an open server would keep the process alive if the browser could not be closed.
  server?.close();
  if (folder) rmSync(folder, { recursive: true });
  await browser?.close();
});

const SHOWN = `document.getElementById('result').children.length > 0 && document.getElementById('status').textContent === ''`;
const text = () => browser.evaluate(`document.getElementById('result').innerText`);
const click = (selector) => browser.evaluate(`document.querySelector(${JSON.stringify(selector)}).click()`);

async function openPage(query = '') {
  await browser.open(`${server.url}inspect.html${query}`);
  await browser.wait(`!document.getElementById('needs-server')`);
}

async function choose(path) {
  await openPage();
  await browser.chooseFile('#file', path);
  await browser.wait(SHOWN);
}

test('the page loads nothing from elsewhere and writes no markup', () => {
  const scripts = readdirSync(new URL('inspect/', FOLDER)).map((name) => readFileSync(new URL(`inspect/${name}`, FOLDER), 'utf8'));
  const page = readFileSync(new URL('inspect.html', FOLDER), 'utf8');
  for (const source of [...scripts, page]) assert.doesNotMatch(source, /innerHTML|insertAdjacentHTML|outerHTML|document\.write|eval\(/);
  assert.doesNotMatch(page, /(src|href)="https?:/);
});

test('a model file is shown with its figures, tensors and metadata', { skip }, async () => {
  await choose(join(folder, 'model.stb'));
  const shown = await text();
  const size = vector('valid/model.stb').length;
  for (const part of ['model.stb', String(Number(((8 * size) / 16800).toPrecision(4))), '16,800', 'llama', 'model.embed_tokens.weight', 'tokenizer.eos_ids', 'META']) {
    assert.ok(shown.includes(part), part);
  }
  await click('#verify');
  await browser.wait(`document.querySelectorAll('.checks li').length === 3`);
  assert.ok((await text()).includes('All weights are as they were written'));
});

test('values of a tensor open below its name', { skip }, async () => {
  await choose(join(folder, 'model.stb'));
  await click('.tensors .link');
  await browser.wait(`document.querySelector('.values svg rect')`);
  assert.equal(await browser.evaluate(`document.querySelector('.tensors .link').ariaExpanded`), 'true');
  assert.match(await text(), /mean, standard deviation/);
  await click('.tensors .link');
  assert.equal(await browser.evaluate(`document.querySelector('.values')`), null);
});

test('what a file says is text, and invisible characters are spelled out', { skip }, async () => {
  await choose(join(folder, 'hostile.stb'));
  const shown = await text();
  assert.ok(shown.includes(`${HOSTILE}\\u{202e}\\u{7}`));
  assert.ok(shown.includes('18446744073709551615'));
  assert.ok(shown.includes('unknown (2147483649)'));
  assert.ok(shown.includes('mixed rows: odd group of 32, 1-bit; 2 listed as int group of 32, 8-bit'));
  assert.ok(shown.includes('trellis 3/2, column factors'));
  assert.ok(shown.includes('not usable'));
  await click('summary');
  await browser.wait(`document.querySelector('pre').textContent.length === 20000`);
  await click('details button');
  await browser.wait(`document.querySelector('pre').textContent.length === 40000`);
  assert.equal(await browser.evaluate(`document.querySelectorAll('img').length`), 0);
  await browser.evaluate(`document.querySelectorAll('.tensors .link')[1].click()`);
  await browser.wait(`document.querySelector('.values .bad')`);
  assert.match(await text(), /STB-R-050/);
});

test('a broken file is refused with the rule in plain words', { skip }, async () => {
  await choose(fileURLToPath(new URL('../../vectors/invalid/R-004-bit.stb', import.meta.url)));
  const shown = await text();
  assert.match(shown, /The file is broken/);
  assert.match(shown, /STB-R-004: the head matches its checksum/);
  await choose(fileURLToPath(new URL('../../vectors/invalid/R-003-version-3.stb', import.meta.url)));
  assert.match(await text(), /needs a newer reader/);
});

test('a damaged weight is found on demand', { skip }, async () => {
  await choose(join(folder, 'damaged.stb'));
  await click('#verify');
  await browser.wait(`document.querySelector('.bad')`);
  assert.match(await text(), /STB-R-040/);
});

test('many tensors are shown in pieces, filtered and put in order', { skip }, async () => {
  await choose(join(folder, 'many.stb'));
  const names = `[...document.querySelectorAll('.tensors .link')].map((link) => link.textContent)`;
  assert.equal(await browser.evaluate(`${names}.length`), 100);
  await browser.evaluate(`document.querySelector('.tensors + button').click()`);
  assert.equal(await browser.evaluate(`${names}.length`), 200);
  await click('.sort');
  await click('.sort');
  assert.equal(await browser.evaluate(`${names}[0]`), 'tensor.99');
  await browser.evaluate(`(() => { const f = document.querySelector('[type=search]'); f.value = 'TENSOR.24'; f.dispatchEvent(new Event('input')); })()`);
  assert.equal(await browser.evaluate(`${names}.length`), 11);
});

test('a file on a server is read in parts', { skip }, async () => {
  server.requests.length = 0;
  await openPage('?url=many.stb');
  await browser.wait(SHOWN);
  assert.match(await text(), /250\ntensors/);
  const parts = server.requests.filter((request) => request.startsWith('/many.stb'));
  assert.ok(parts.length > 1 && parts.every((request) => / bytes=\d+-\d+$/.test(request)), parts.join('\n'));
  await openPage('?url=nothing.stb');
  await browser.wait(SHOWN);
  assert.match(await text(), /cannot be read/);
  await openPage('?url=javascript:alert(1)');
  assert.match(await browser.evaluate(`document.getElementById('status').textContent`), /no address/);
});

test('a dropped file is opened', { skip }, async () => {
  await openPage();
  await browser.evaluate(`(() => {
    const data = new DataTransfer();
    data.items.add(new File([new Uint8Array(10)], 'dropped.stb'));
    document.body.dispatchEvent(new DragEvent('drop', { dataTransfer: data, bubbles: true, cancelable: true }));
  })()`);
  await browser.wait(SHOWN);
  assert.match(await text(), /dropped\.stb[^]*STB-R-001/);
});

test('everything is reachable by keyboard', { skip }, async () => {
  await choose(join(folder, 'hostile.stb'));
  await browser.evaluate(`document.activeElement.blur()`);
  const seen = [];
  for (let i = 0; i < 30; i++) {
    await browser.press('Tab');
    seen.push(await browser.evaluate(`((e) => e.id || e.className || e.localName)(document.activeElement)`));
  }
  for (const target of ['file', 'url', 'verify', 'sort', 'link', 'summary']) assert.ok(seen.includes(target), `${target}: ${seen}`);
  await browser.evaluate(`document.querySelector('.tensors .link').focus()`);
  await browser.press('Enter');
  await browser.wait(`document.querySelector('.values svg')`);
});

test('nothing is wider than a phone or a desktop, in light and dark', { skip }, async () => {
  for (const width of [320, 390, 1200]) {
    await browser.resize(width, 800);
    for (const scheme of ['light', 'dark']) {
      await browser.colors(scheme);
      await choose(join(folder, 'hostile.stb'));
      await click('.tensors .link');
      await click('summary');
      await browser.wait(`document.querySelector('.values svg')`);
      assert.equal(await browser.evaluate(`document.documentElement.scrollWidth > innerWidth`), false, `${width} ${scheme}`);
    }
  }
});

test('the console is clean, and nothing was requested from elsewhere', { skip }, () => {
  const expected = /404|answered 404/;
  assert.deepEqual(browser.console.filter((line) => !expected.test(line)), []);
  const outside = browser.requests.filter((url) => !url.startsWith(server.url) && !/^(data:|about:|chrome:)/.test(url));
  assert.deepEqual(outside, []);
});
