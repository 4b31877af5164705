/** Drives Chromium through its debugging pipe. Needs nothing but Node and a Chromium (or Chrome) executable. */

import { spawn } from 'node:child_process';
import { accessSync, constants, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { delimiter, join } from 'node:path';

const NAMES = ['chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable'];
const FLAGS = [
  '--headless', '--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking', '--disable-component-update',
  '--disable-sync', '--disable-dev-shm-usage', '--remote-debugging-pipe', 'about:blank',
];
/** Milliseconds without any message after which the browser counts as hung. */
const PATIENCE = 120_000;
/** Attempts to remove the profile, a tenth of a second apart. */
const REMOVALS = 100;

const isExecutable = (path) => {
  try {
    accessSync(path, constants.X_OK);
    return true;
  } catch {
    return false;
  }
};

/** Path of a browser, or undefined. The variable CHROMIUM overrides the search. */
export function findChromium() {
  if (process.env.CHROMIUM) return process.env.CHROMIUM;
  const folders = (process.env.PATH ?? '').split(delimiter);
  return NAMES.flatMap((name) => folders.map((folder) => join(folder, name))).find(isExecutable);
}

/** A headless browser with one page. Collects what the page writes to the console, and what it requests. */
export class Browser {
  console = [];
  requests = [];
  #waiting = new Map();
  #number = 0;
  #session;
  #process;
  #profile;
  #ended;

  /** @param {string} executable */
  static async start(executable) {
    const browser = new Browser();
    browser.#profile = mkdtempSync(join(tmpdir(), 'stb-inspect-'));
    browser.#process = spawn(executable, [...FLAGS.slice(0, -1), `--user-data-dir=${browser.#profile}`, FLAGS.at(-1)], {
      stdio: ['ignore', 'ignore', 'ignore', 'pipe', 'pipe'],
      // A process group of its own, so that `close` reaches Chromium's children, too.
      detached: true,
    });
    browser.#ended = new Promise((resolve) => browser.#process.once('exit', resolve));
    browser.#ended.then(() => browser.#waiting.forEach(({ reject }) => reject(new Error('the browser has ended'))));
    browser.#listen(browser.#process.stdio[4]);
    const { targetInfos } = await browser.send('Target.getTargets');
    const { targetId } = targetInfos.find(({ type }) => type === 'page');
    browser.#session = (await browser.send('Target.attachToTarget', { targetId, flatten: true })).sessionId;
    for (const domain of ['Page', 'Runtime', 'Log', 'Network', 'DOM']) await browser.send(`${domain}.enable`);
    await browser.resize(1200, 900);
    return browser;
  }

  #listen(stream) {
    let pending = Buffer.alloc(0);
    stream.on('data', (data) => {
      pending = Buffer.concat([pending, data]);
      for (let end = pending.indexOf(0); end >= 0; end = pending.indexOf(0)) {
        this.#receive(JSON.parse(pending.subarray(0, end).toString()));
        pending = pending.subarray(end + 1);
      }
    });
  }

  #receive({ id, result, error, method, params }) {
    if (id) {
      const { resolve, reject } = this.#waiting.get(id);
      this.#waiting.delete(id);
      if (error) reject(new Error(error.message));
      else resolve(result);
    } else if (method === 'Runtime.consoleAPICalled') {
      this.console.push(params.args.map(({ value, description }) => value ?? description).join(' '));
    } else if (method === 'Runtime.exceptionThrown') {
      this.console.push(`exception: ${params.exceptionDetails.exception?.description ?? params.exceptionDetails.text}`);
    } else if (method === 'Log.entryAdded') {
      this.console.push(`${params.entry.source}: ${params.entry.text}`);
    } else if (method === 'Network.requestWillBeSent') {
      this.requests.push(params.request.url);
    }
  }

  /** Sends a command and waits for its reply. */
  send(method, params = {}) {
    this.#number += 1;
    const id = this.#number;
    return new Promise((resolve, reject) => {
      const timer = setTimeout(() => reject(new Error(`no reply to ${method} within ${PATIENCE} ms`)), PATIENCE);
      const settle = (how) => (value) => {
        clearTimeout(timer);
        how(value);
      };
      this.#waiting.set(id, { resolve: settle(resolve), reject: settle(reject) });
      this.#process.stdio[3].write(`${JSON.stringify({ id, method, params, sessionId: this.#session })}\0`);
    });
  }

  /** Ends the browser and removes its profile. A profile that cannot be removed is reported, not an error: it is a temporary folder. */
  async close() {
    try {
      process.kill(-this.#process.pid, 'SIGKILL');
    } catch (error) {
      // All processes of the group have ended.
      if (error.code !== 'ESRCH') throw error;
    }
    await this.#ended;
    // A process that is being killed may still finish a write. `maxRetries` would not help: it retries the removal of a
    // folder, but not of the files that appeared in it since.
    for (let attempt = 1; ; attempt++) {
      try {
        rmSync(this.#profile, { recursive: true, force: true });
        return;
      } catch (error) {
        if (attempt === REMOVALS) {
          console.error(`${this.#profile} is left behind: ${error.message}`);
          return;
        }
      }
      await new Promise((resolve) => setTimeout(resolve, 100));
    }
  }

  async resize(width, height) {
    await this.send('Emulation.setDeviceMetricsOverride', { width, height, deviceScaleFactor: 1, mobile: width < 600 });
  }

  /** Pretends that the person prefers `scheme`, "light" or "dark". */
  async colors(scheme) {
    await this.send('Emulation.setEmulatedMedia', { features: [{ name: 'prefers-color-scheme', value: scheme }] });
  }

  async open(url) {
    await this.send('Page.navigate', { url });
    await this.wait(`document.readyState === 'complete' && location.href !== 'about:blank'`);
  }

  /** Value of a JavaScript expression in the page; a promise is awaited. */
  async evaluate(expression) {
    const { result, exceptionDetails } = await this.send('Runtime.evaluate', { expression, returnByValue: true, awaitPromise: true });
    if (exceptionDetails) throw new Error(exceptionDetails.exception?.description ?? exceptionDetails.text);
    return result.value;
  }

  /** Waits until an expression is true. */
  async wait(expression, seconds = 60) {
    for (const end = Date.now() + 1000 * seconds; ; ) {
      // The page may be between two documents.
      const value = await this.evaluate(expression).catch(() => false);
      if (value) return;
      if (Date.now() > end) throw new Error(`not within ${seconds} s: ${expression}`);
      await new Promise((resolve) => setTimeout(resolve, 50));
    }
  }

  /** Presses a key, such as Tab or Enter. */
  async press(key) {
    const [code, text] = { Tab: [9, undefined], Enter: [13, '\r'], ' ': [32, ' '] }[key];
    const common = { key, code: key === ' ' ? 'Space' : key, windowsVirtualKeyCode: code };
    await this.send('Input.dispatchKeyEvent', { type: 'keyDown', ...common, text });
    await this.send('Input.dispatchKeyEvent', { type: 'keyUp', ...common });
  }

  /** Puts a file into an input of type file. */
  async chooseFile(selector, path) {
    const { root } = await this.send('DOM.getDocument');
    const { nodeId } = await this.send('DOM.querySelector', { nodeId: root.nodeId, selector });
    await this.send('DOM.setFileInputFiles', { nodeId, files: [path] });
  }

  /** The whole page as PNG. */
  async screenshot() {
    const { data } = await this.send('Page.captureScreenshot', { format: 'png', captureBeyondViewport: true });
    return Buffer.from(data, 'base64');
  }
}
