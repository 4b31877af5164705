/** Errors of the reader. A file that breaks a rule, a limit of this reader, and a failed read are three classes. */

import { RULES } from './rules.js';

/** A file breaks a rule of the specification, or needs a newer reader (`kind` is `unsupported`). */
export class StbError extends Error {
  /**
   * @param {string} rule id of the rule, such as `STB-R-004`
   * @param {string} detail what is wrong in this file, and where
   */
  constructor(rule, detail) {
    super(`${rule}: ${detail}`);
    this.name = 'StbError';
    this.rule = rule;
    this.detail = detail;
    /** What the rule asks for, in the words of the registry. */
    this.title = RULES[rule].title;
    /** @type {'invalid' | 'unsupported'} */
    this.kind = RULES[rule].kind;
  }
}

/** The file may be valid, but it exceeds a limit of this reader or of the machine. Names no rule. */
export class StbLimitError extends Error {
  /** @param {string} message */
  constructor(message) {
    super(message);
    this.name = 'StbLimitError';
  }
}

/** The bytes of a file could not be read: network, server, disk. Names no rule. */
export class StbSourceError extends Error {
  /**
   * @param {string} message
   * @param {unknown} [cause]
   */
  constructor(message, cause) {
    super(message, { cause });
    this.name = 'StbSourceError';
  }
}

/**
 * The error of a broken rule.
 * @param {number} number number of the rule: 4 is STB-R-004
 * @param {string} detail
 */
export function broken(number, detail) {
  return new StbError(`STB-R-${String(number).padStart(3, '0')}`, detail);
}

/**
 * Throws the error of rule `number` unless `condition` is true.
 * @param {boolean} condition
 * @param {number} number
 * @param {string | (() => string)} detail a function where there are many tensors, so that only a broken one costs a text
 */
export function require(condition, number, detail) {
  if (!condition) throw broken(number, typeof detail === 'string' ? detail : detail());
}
