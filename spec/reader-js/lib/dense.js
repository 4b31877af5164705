/** Dense tensors, ids 1 to 3: spec/encodings.md §2. */

import { F16, viewOf } from './bytes.js';
import { byWindows } from './windows.js';

/**
 * A dense encoding.
 * @param {string} name
 * @param {number} width bytes of an element
 * @param {(view: DataView, at: number) => number} read
 * @returns {import('./windows.js').WindowEncoding}
 */
function dense(name, width, read) {
  return {
    name,
    matrix: false,
    settings(params, fail) {
      if (params.getBigUint64(0, true) | params.getBigUint64(8, true)) fail('params of a dense tensor are not zero');
      return {};
    },
    shaped(shape) {
      const cols = shape.at(-1);
      const rows = shape.slice(0, -1).reduce((product, dim) => product * dim, 1);
      const slices = (first, end) => [[first * cols * width, end * cols * width]];
      return { rows, cols, step: 1, lengths: [rows * cols * width], slices };
    },
    check({ cols }, _settings, [elements], first, end, findings) {
      const view = viewOf(elements);
      for (let i = 0; i < (end - first) * cols; i++) {
        if (!Number.isFinite(read(view, i * width))) {
          findings.numbers ??= `element ${first * cols + i}`;
          return;
        }
      }
    },
    decode(_layout, _settings, [elements], _first, _end, out) {
      const view = viewOf(elements);
      for (let i = 0; i < out.length; i++) out[i] = read(view, i * width);
    },
  };
}

const BITS = new DataView(new ArrayBuffer(4));

function readBf16(view, at) {
  BITS.setUint32(0, view.getUint16(at, true) << 16);
  return BITS.getFloat32(0);
}

export const F32 = byWindows(dense('f32', 4, (view, at) => view.getFloat32(at, true)));
export const F16_DENSE = byWindows(dense('f16', 2, (view, at) => F16[view.getUint16(at, true)]));
export const BF16 = byWindows(dense('bf16', 2, readBf16));
