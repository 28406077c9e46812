/** From what a caller gives (text, a gap in a text, token ids) to the tokens and open positions of a canvas. */
import { Canvas } from './canvas.js';
import type { ModelConfig } from './config.js';
import { check } from './errors.js';
import type { DecodeOptions } from './tokenizer.js';

/**
 * What to generate from. A string, or `prefix` alone, is continued; `prefix` and `suffix` (default '') have a gap between
 * them filled; `tokens` (T) are ids, of which those with (T) `open` 1 (default: those equal to the mask id) are filled.
 */
export type Prompt =
	| string
	| { readonly prefix?: string; readonly suffix?: string }
	| { readonly tokens: Int32Array; readonly open?: Uint8Array };

/** What generation needs of a tokenizer. */
export interface TextCodec {
	encode(text: string): Int32Array;
	decode(ids: Int32Array, options: DecodeOptions): string;
}

/**
 * Text of ids that a model has drawn. It may have more embedding rows than its tokenizer has ids (50304 for GPT-2's 50257,
 * say): an id that the tokenizer does not know becomes U+FFFD.
 */
export function decodeDrawn(tokenizer: TextCodec, ids: Int32Array, options: DecodeOptions = {}): string {
	return tokenizer.decode(ids, { ...options, unknown: 'replace' });
}

/** A prompt as ids. */
export interface ParsedPrompt {
	/** Ids before the gap, or all ids when `open` is given. */
	readonly before: Int32Array;
	readonly after: Int32Array;
	/** (before.length) scattered open positions; null: one gap between `before` and `after`. */
	readonly open: Uint8Array | null;
	/** Position 0 is a beginning-of-text token that the caller did not write. */
	readonly pinned: boolean;
}

const none = new Int32Array(0);

/**
 * Checks and encodes a prompt. Under the shift nothing predicts position 0: an empty prefix before a suffix, or one of which
 * the tokenizer's normaliser leaves nothing, gets the beginning-of-text token there.
 * @throws `ERR_DN_ARGUMENT`
 */
export function parsePrompt(prompt: Prompt, config: ModelConfig, tokenizer: TextCodec | null): ParsedPrompt {
	const encode = (text: string, name: string): Int32Array => {
		if (text === '') return none;
		check(
			tokenizer,
			`the model has no tokenizer, so ${name} cannot be text: pass { tokens: Int32Array } or load a model with one`,
		);
		const ids = tokenizer.encode(text);
		checkIds(ids, config, name);
		return ids;
	};
	if (typeof prompt === 'string') {
		const before = encode(prompt, 'the prompt');
		check(
			before.length > 0,
			() =>
				`the prompt is ${prompt === '' ? 'an empty string' : `${JSON.stringify(prompt)}, of which the tokenizer makes no token`}; ` +
				`for unconditional text pass { tokens: Int32Array.of(${config.bosId}) }, the beginning-of-text token`,
		);
		return { before, after: none, open: null, pinned: false };
	}
	check(
		typeof prompt === 'object' && prompt !== null,
		`the prompt is ${prompt === null ? 'null' : typeof prompt}, expected a string, { prefix, suffix } or { tokens, open }`,
	);
	const keys = Object.keys(prompt);
	if ('tokens' in prompt) {
		for (const key of keys)
			check(key === 'tokens' || key === 'open', `prompt.${key} cannot be combined with prompt.tokens`);
		const { tokens, open } = prompt;
		check(tokens instanceof Int32Array, 'prompt.tokens is not an Int32Array');
		check(tokens.length > 0, 'prompt.tokens is empty; begin with the beginning-of-text token, model.config.bosId');
		check(
			open === undefined || (open instanceof Uint8Array && open.length === tokens.length),
			`prompt.open is not a Uint8Array of ${tokens.length} entries, one per token`,
		);
		const isOpen = Uint8Array.from(tokens, (id, i) =>
			Number(open ? open[i] !== 0 : config.maskId >= 0 && id === config.maskId),
		);
		// An open position's id is never read.
		checkIds(
			tokens.map((id, i) => (isOpen[i] ? 0 : id)),
			config,
			'prompt.tokens',
		);
		check(
			!config.shift || !isOpen[0],
			'prompt.tokens: position 0 is open, but no network row predicts it; begin with the beginning-of-text token',
		);
		return isOpen.includes(1)
			? { before: tokens.slice(), after: none, open: isOpen, pinned: false }
			: { before: tokens.slice(), after: none, open: null, pinned: false };
	}
	for (const key of keys) {
		check(
			key === 'prefix' || key === 'suffix',
			`prompt.${key} is not known, expected prefix, suffix, or tokens and open`,
		);
	}
	const { prefix = '', suffix = '' } = prompt;
	check(typeof prefix === 'string' && typeof suffix === 'string', 'prompt.prefix and prompt.suffix must be strings');
	check(prefix !== '' || suffix !== '', 'prompt.prefix and prompt.suffix are both empty');
	const front = encode(prefix, 'prompt.prefix');
	const after = encode(suffix, 'prompt.suffix');
	check(front.length + after.length > 0, 'the tokenizer makes no token of prompt.prefix and prompt.suffix');
	const pinned = front.length === 0 && config.shift;
	return { before: pinned ? Int32Array.of(config.bosId) : front, after, open: null, pinned };
}

/** The canvas of a prompt with `length` open positions in its gap (0 where the open positions are scattered). */
export function makeCanvas(prompt: ParsedPrompt, length: number, config: ModelConfig): Canvas {
	const { before, after, open } = prompt;
	if (open) {
		const begin = open.indexOf(1);
		const end = open.lastIndexOf(1) + 1;
		const isOneRun = !open.subarray(begin, end).includes(0);
		return new Canvas(before, open, isOneRun ? { begin, end } : null, config.maskId);
	}
	const T = before.length + length + after.length;
	const tokens = new Int32Array(T);
	const isOpen = new Uint8Array(T);
	tokens.set(before);
	tokens.set(after, before.length + length);
	isOpen.fill(1, before.length, before.length + length);
	return new Canvas(tokens, isOpen, { begin: before.length, end: before.length + length }, config.maskId);
}

function checkIds(ids: Int32Array, config: ModelConfig, name: string): void {
	for (const [i, id] of ids.entries()) {
		check(id >= 0 && id < config.vocab, `${name}: token ${i} is ${id}, outside the vocabulary of ${config.vocab}`);
	}
}

/**
 * Text of the positions that are committed, runs joined, open ones left out. A character whose bytes are not all there
 * yet is left out too: a run's broken first or last character is dropped where the run borders on an open position, and at
 * the end when the text goes on there (`growing`).
 */
export function decodeCommitted(
	canvas: Canvas,
	positions: Int32Array,
	tokenizer: TextCodec | null,
	growing = false,
): string {
	if (!tokenizer) return '';
	let text = '';
	let run: number[] = [];
	let afterOpen = false;
	const flush = (beforeOpen: boolean): void => {
		if (run.length > 0) {
			let part = decodeDrawn(tokenizer, Int32Array.from(run));
			if (afterOpen) part = part.replace(/^\uFFFD+/, '');
			if (beforeOpen) part = part.replace(/\uFFFD+$/, '');
			text += part;
		}
		run = [];
	};
	for (const position of positions) {
		if (canvas.isOpen(position)) {
			flush(true);
			afterOpen = true;
		} else {
			run.push(canvas.tokens[position] as number);
		}
	}
	flush(growing);
	return text;
}
