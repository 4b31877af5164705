/** Head and sections of a file: spec/container.md §3.1, §3.2, steps 1 to 4 of §4. */

import { alignUp, isZero, viewOf } from './bytes.js';
import { broken, require, StbLimitError } from './errors.js';
import { allZero, pieces, readAll } from './source.js';
import { Xxh3, xxh3 } from './xxh3.js';

/** The format version that this reader implements. */
export const VERSION = 2;
/** Bytes of a TENSORS or META section that this reader keeps in memory. */
export const SECTION_LIMIT = 2 ** 30;

const HEAD = 4096;
const CHECKSUM_AT = 4088;
const ENTRY = 48;
const MAGIC = [0x8f, 0x53, 0x54, 0x42, 0x0d, 0x0a, 0x1a, 0x0a];
export const DATA = 1;
export const TENSORS = 2;
export const META = 3;
const KNOWN = new Map([
  [DATA, 'DATA'],
  [TENSORS, 'TENSORS'],
  [META, 'META'],
]);

/**
 * @typedef {object} Header
 * @property {number} minReader oldest format version whose readers can read the file
 * @property {number} written format version of the writer
 * @property {number} size bytes of the file
 * @property {number} sectionCount
 * @property {bigint} checksum
 */

/**
 * @typedef {object} Section
 * @property {number} type
 * @property {string | null} name null for a type that this reader does not know
 * @property {boolean} critical
 * @property {number} offset
 * @property {number} length
 * @property {bigint} checksum
 */

/**
 * The header of a file: step 1.
 * @param {import('./source.js').Source} source
 * @returns {Promise<{ header: Header, directory: DataView }>}
 */
export async function readHeader(source) {
  require(source.size >= HEAD, 1, `the file has ${source.size} bytes`);
  const bytes = await source.read(0, HEAD);
  const view = viewOf(bytes);
  require(MAGIC.every((byte, i) => bytes[i] === byte), 2, 'the file starts with other bytes');
  const minReader = view.getUint16(8, true);
  const written = view.getUint16(10, true);
  require(minReader <= VERSION, 3, `the file needs a reader of version ${minReader}; this one has version ${VERSION}`);
  const checksum = view.getBigUint64(CHECKSUM_AT, true);
  require(checksum === xxh3(bytes.subarray(0, CHECKSUM_AT)), 4, 'bytes of the head were changed');
  require(view.getUint32(12, true) === 64, 5, `header_size is ${view.getUint32(12, true)}`);
  require(view.getUint32(28, true) === ENTRY, 5, `section_entry_size is ${view.getUint32(28, true)}`);
  require(minReader >= 1 && written >= minReader, 5, `min_reader is ${minReader}, written ${written}`);
  const sectionCount = view.getUint32(24, true);
  const directoryEnd = 64 + ENTRY * sectionCount;
  require(isZero(bytes, 32, 64), 6, 'flags or reserved bytes of the header are not zero');
  require(isZero(bytes, directoryEnd, CHECKSUM_AT), 6, 'bytes between the directory and the checksum are not zero');
  require(sectionCount >= 1 && sectionCount <= 64, 7, `section_count is ${sectionCount}`);
  const size = view.getBigUint64(16, true);
  require(size === BigInt(source.size), 8, `the header says ${size} bytes, the file has ${source.size}`);
  const header = { minReader, written, size: source.size, sectionCount, checksum };
  return { header, directory: viewOf(bytes.subarray(64, directoryEnd)) };
}

/**
 * The sections of a file: steps 2 and 3.
 * @param {DataView} directory
 * @param {number} size bytes of the file
 * @returns {Section[]}
 */
export function readDirectory(directory, size) {
  const sections = [];
  let end = HEAD;
  for (let at = 0; at < directory.byteLength; at += ENTRY) {
    const section = readSection(directory, at, end, size, `section ${sections.length}`);
    const { type, name, critical } = section;
    if (name !== null) require(!sections.some((other) => other.type === type), 13, `there are two sections ${name}`);
    else require(!critical, 14, `section ${sections.length} is critical and of the unknown type ${type}`);
    sections.push(section);
    end = section.offset + section.length;
  }
  require(end === size, 12, `the last section ends at ${end}, the file at ${size}`);
  for (const [type, name] of KNOWN) require(sections.some((section) => section.type === type), 13, `there is no section ${name}`);
  return sections;
}

/**
 * An entry of the directory, with its checks.
 * @param {DataView} directory
 * @param {number} at
 * @param {number} before end of the section before it
 * @param {number} size bytes of the file
 * @param {string} where
 * @returns {Section}
 */
function readSection(directory, at, before, size, where) {
  const type = directory.getUint32(at, true);
  const flags = directory.getUint32(at + 4, true);
  const offset = directory.getBigUint64(at + 8, true);
  const length = directory.getBigUint64(at + 16, true);
  require(type !== 0, 10, `${where} has type 0`);
  require((flags & ~1) === 0, 10, `${where} has the flags ${flags}`);
  const reserved = directory.getBigUint64(at + 32, true) | directory.getBigUint64(at + 40, true);
  require(reserved === 0n, 10, `reserved bytes of ${where} are not zero`);
  const start = alignUp(before, HEAD);
  require(offset === BigInt(start), 11, `${where} starts at ${offset}, not at ${start}`);
  require(offset + length <= BigInt(size), 12, `${where} ends at ${offset + length}, the file at ${size}`);
  const checksum = directory.getBigUint64(at + 24, true);
  return { type, name: KNOWN.get(type) ?? null, critical: flags === 1, offset: start, length: Number(length), checksum };
}

/**
 * Gaps and checksums of sections: step 4.
 * @param {import('./source.js').Source} source
 * @param {Section[]} sections
 * @returns {Promise<{ tensors: Uint8Array, meta: Uint8Array }>} the bytes of TENSORS and META
 */
export async function readSections(source, sections) {
  let end = HEAD;
  for (const { offset, length } of sections) {
    require(await allZero(source, end, offset), 15, `bytes between ${end} and ${offset} are not zero`);
    end = offset + length;
  }
  const kept = new Map();
  for (const [i, section] of sections.entries()) kept.set(section.type, await checkedSection(source, section, i));
  return { tensors: kept.get(TENSORS), meta: kept.get(META) };
}

/**
 * Checks the checksum of a section; its bytes if it is TENSORS or META.
 * @param {import('./source.js').Source} source
 * @param {Section} section
 * @param {number} index
 */
async function checkedSection(source, section, index) {
  const { type, name, offset, length, checksum } = section;
  if (type === DATA) {
    require(checksum === 0n, 16, 'the checksum of DATA is not 0');
    return null;
  }
  const keep = name !== null;
  if (keep && length > SECTION_LIMIT) {
    throw new StbLimitError(`${name} has ${length} bytes; this reader takes ${SECTION_LIMIT}`);
  }
  const hash = new Xxh3();
  let bytes = null;
  if (keep) bytes = await readAll(source, offset, offset + length, (piece) => hash.update(piece));
  else for await (const piece of pieces(source, offset, offset + length)) hash.update(piece);
  if (hash.digest() !== checksum) throw broken(16, `bytes of section ${index} (${name ?? `type ${type}`}) were changed`);
  return bytes;
}
