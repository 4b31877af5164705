/** Reads .stb files. README.md has examples; the specification is in the folder above. */

export { StbError, StbLimitError, StbSourceError } from './lib/errors.js';
export { open, StbFile } from './lib/file.js';
export { VERSION } from './lib/head.js';
export { bitsPerWeight, verdictOf } from './lib/quality.js';
export { RULES } from './lib/rules.js';
export { BlobSource, BytesSource, HttpSource } from './lib/source.js';
export { Xxh3, xxh3 } from './lib/xxh3.js';
