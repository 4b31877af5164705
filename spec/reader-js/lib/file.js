/** An open file. */

import { broken } from './errors.js';
import { DATA, readDirectory, readHeader, readSections } from './head.js';
import { asObject, readMetadata } from './metadata.js';
import { checkModel, isModel } from './model.js';
import { checkPayload, decodeRows, payloadOf } from './payload.js';
import { bitsPerWeight, readQuality } from './quality.js';
import { allZero, toSource } from './source.js';
import { readTable } from './table.js';

/** @typedef {import('./table.js').Tensor} Tensor */

/** A file whose structure is valid (STB-R-001 to 038). Made by `open`. */
export class StbFile {
  #source;
  #byName;
  /** Tensors whose payloads were checked. @type {Set<Tensor>} */
  #checked = new Set();

  constructor(source, { header, sections, tensors, entries }) {
    this.#source = source;
    this.#byName = new Map(tensors.map((tensor) => [tensor.name, tensor]));
    /** @type {import('./head.js').Header} */
    this.header = header;
    /** @type {import('./head.js').Section[]} in file order */
    this.sections = sections;
    /** @type {Tensor[]} in file order */
    this.tensors = tensors;
    /** @type {import('./metadata.js').Entry[]} metadata with types, in file order */
    this.entries = entries;
    /** @type {Record<string, import('./metadata.js').Value>} metadata: text, u64, f64, bool and u64 list as string, bigint, number, boolean, bigint[] */
    this.metadata = asObject(entries);
    /** Elements of all tensors. @type {bigint} */
    this.parameters = tensors.reduce((sum, { elements }) => sum + BigInt(elements), 0n);
    /** Bits of the whole file per parameter. @type {number} */
    this.trueBits = bitsPerWeight(header.size, this.parameters);
    this.quality = readQuality(entries);
    /** Whether the file describes a whole model (metadata §2). @type {boolean} */
    this.isModel = isModel(entries);
  }

  /**
   * The tensor with a name.
   * @param {string} name
   * @returns {Tensor | undefined}
   */
  tensor(name) {
    return this.#byName.get(name);
  }

  /**
   * The weights of a tensor, or some of its rows, in row-major order. The whole payload is checked before the first weights of a
   * tensor are handed out (STB-R-050, then 040 to 045), so the first call for a tensor reads all of it.
   * @param {string | Tensor} which
   * @param {{ firstRow?: number, rows?: number }} [range] all rows by default; the last dimension is a row
   * @returns {Promise<Float32Array>}
   */
  async decode(which, range = {}) {
    const tensor = typeof which === 'string' ? this.tensor(which) : which;
    if (!tensor || this.tensor(tensor.name) !== tensor) throw new RangeError(`the file has no tensor ${tensor?.name ?? which}`);
    if (tensor.encodingName === null) throw broken(50, `${tensor.name} has the encoding ${tensor.encoding}`);
    if (this.#checked.has(tensor)) return decodeRows(payloadOf(this.#source, tensor), tensor, range);
    const payload = await checkPayload(this.#source, tensor);
    this.#checked.add(tensor);
    return decodeRows(payload, tensor, range);
  }

  /**
   * Checks everything that `open` did not: STB-R-039 to 045 for all tensors and, of a model file, STB-R-060 to 064.
   * @param {(done: number, total: number) => void} [progress] bytes of DATA
   * @returns {Promise<void>} throws the error of the first broken rule
   */
  async verify(progress) {
    const data = this.sections.find(({ type }) => type === DATA);
    let end = data.offset;
    for (const { name, offset, length } of this.tensors) {
      if (!(await allZero(this.#source, end, offset))) throw broken(39, `bytes before the payload of ${name} are not zero`);
      end = offset + length;
    }
    for (const tensor of this.tensors) {
      await checkPayload(this.#source, tensor);
      this.#checked.add(tensor);
      progress?.(tensor.offset + tensor.length - data.offset, data.length);
    }
    if (this.isModel) this.checkModel();
  }

  /** Checks the rules for model files, STB-R-060 to 064; STB-R-060 if it is none. */
  checkModel() {
    checkModel(this.entries, this.tensors, this.parameters);
  }
}

/**
 * Opens a file and checks its structure (level *inspect*): reads everything but DATA.
 * @param {Blob | ArrayBuffer | Uint8Array | URL | string | import('./source.js').Source} input a string is a URL
 * @param {{ request?: RequestInit }} [options] `request`: options of the requests for a URL, such as headers and a signal
 * @returns {Promise<StbFile>} throws StbError, StbLimitError or StbSourceError
 */
export async function open(input, { request } = {}) {
  const source = await toSource(input, request);
  const { header, directory } = await readHeader(source);
  const sections = readDirectory(directory, header.size);
  const bytes = await readSections(source, sections);
  const tensors = readTable(bytes.tensors, sections.find(({ type }) => type === DATA));
  const entries = readMetadata(bytes.meta, header.minReader);
  return new StbFile(source, { header, sections, tensors, entries });
}
