/**
 * From text to the ids of one sequence, and from a stored sequence to the one that is trained on (padding).
 */
import type { ModelConfig } from '../config.js';
import { Stream, uniform } from '../random.js';
import type { DataSequence, TokenDataset } from './dataset.js';
import type { Padding } from './format.js';
import type { DataTokenizer } from './prepare-options.js';

export function encodeDocument(text: string, tokenizer: DataTokenizer): Int32Array {
	return tokenizer.encode(text);
}

/**
 * Where the parts of a text end among its tokens: a token belongs to the part that its last byte lies in. The bytes are those
 * of the tokens, which differ from the text's where a tokenizer normalises it or puts a space in front.
 */
export function seams(
	parts: readonly string[],
	tokens: Int32Array,
	tokenizer: { encode(text: string): Int32Array; decodeBytes(ids: Int32Array): Uint8Array },
): number[] {
	const isPlain = Buffer.from(parts.join('')).equals(tokenizer.decodeBytes(tokens));
	const ends: number[] = [];
	let before = '';
	let bytes = 0;
	let end = 0;
	for (const part of parts) {
		before += part;
		const size = isPlain ? Buffer.byteLength(before) : tokenizer.decodeBytes(tokenizer.encode(before)).length;
		for (; end < tokens.length; end++) {
			const own = tokenizer.decodeBytes(tokens.subarray(end, end + 1)).length;
			if (bytes + own > size) break;
			bytes += own;
		}
		ends.push(end);
	}
	ends[ends.length - 1] = tokens.length;
	return ends;
}

/**
 * Ids of prompt and answer, tokenised together as a reader of the whole text would (separate tokenisation gives other ids
 * where a token spans the seam). The prompt is the tokens that lie wholly inside it; a token across the seam is answer.
 */
export function encodePair(
	prompt: string,
	answer: string,
	tokenizer: DataTokenizer,
): { tokens: Int32Array; promptLength: number } {
	const tokens = tokenizer.encode(prompt + answer);
	if (tokenizer.decodeBytes) {
		const { decodeBytes } = tokenizer;
		const own = { encode: (text: string) => tokenizer.encode(text), decodeBytes: decodeBytes.bind(tokenizer) };
		return { tokens, promptLength: seams([prompt, answer], tokens, own)[0] as number };
	}
	const alone = tokenizer.encode(prompt);
	let promptLength = 0;
	while (promptLength < alone.length && alone[promptLength] === tokens[promptLength]) promptLength++;
	return { tokens, promptLength };
}

/** Ids one after the other. */
export function concatenate(parts: readonly ArrayLike<number>[]): Int32Array {
	const ids = new Int32Array(parts.reduce((sum, part) => sum + part.length, 0));
	let at = 0;
	for (const part of parts) {
		ids.set(part, at);
		at += part.length;
	}
	return ids;
}

/** A sequence as it is trained on. */
export interface TrainingSequence {
	readonly tokens: Int32Array;
	/** 1 where a token may be masked; undefined: everywhere. */
	readonly maskable: Uint8Array | undefined;
}

/** Id that pads sequences of `data`: the model's own where the file does not say. */
export function padIdOf(data: TokenDataset, config: ModelConfig): number {
	return data.padId >= 0 ? data.padId : config.padId;
}

/**
 * Adds the padding that teaches length: end tokens that are maskable and enter the loss (docs/training.md, Data).
 * @param draw what 'random' padding is a function of: seed, epoch and number of the sequence in its file.
 */
export function padSequence(
	sequence: DataSequence,
	options: { padding: Padding; padId: number; context: number },
	draw: { seed: bigint; epoch: number; sequence: number },
): TrainingSequence {
	const { tokens, promptLength } = sequence;
	const length = paddedLength(tokens.length, options, draw);
	const padded = extended(tokens, length, options.padId);
	if (promptLength === 0) return { tokens: padded, maskable: undefined };
	return { tokens: padded, maskable: new Uint8Array(length).fill(1, promptLength) };
}

/** The same sequence with `ids` always masked where they may be masked. */
export function hide({ tokens, maskable }: TrainingSequence, ids: readonly number[]): TrainingSequence {
	const flags = maskable?.slice() ?? new Uint8Array(tokens.length).fill(1);
	for (const [i, id] of tokens.entries()) if (flags[i] === 1 && ids.includes(id)) flags[i] = 2;
	return { tokens, maskable: flags };
}

/** With the padding 'batch': the sequences of a batch, each as long as the longest. Otherwise as they are. */
export function padTogether(
	sequences: readonly TrainingSequence[],
	{ padding, padId }: { padding: Padding; padId: number },
): readonly TrainingSequence[] {
	if (padding !== 'batch') return sequences;
	const longest = sequences.reduce((most, { tokens }) => Math.max(most, tokens.length), 0);
	return sequences.map(({ tokens, maskable }) => ({
		tokens: extended(tokens, longest, padId),
		maskable: maskable && extended(maskable, longest, 1),
	}));
}

/** Tokens that the first `count` sequences of a batch take, the longest of them `longest` and all together `total`. */
export function tokensTogether(padding: Padding, count: number, longest: number, total: number): number {
	return padding === 'batch' ? count * longest : total;
}

function extended<T extends Int32Array | Uint8Array>(values: T, length: number, fill: number): T {
	if (values.length === length) return values;
	const longer = new (values.constructor as new (length: number) => T)(length).fill(fill) as T;
	longer.set(values);
	return longer;
}

function paddedLength(
	length: number,
	{ padding, context }: { padding: Padding; context: number },
	{ seed, epoch, sequence }: { seed: bigint; epoch: number; sequence: number },
): number {
	if (padding === 'none' || padding === 'batch') return length;
	if (padding === 'context') return Math.max(length, context);
	if ('multiple' in padding) {
		const { multiple } = padding;
		return Math.max(length, Math.min(context, Math.ceil(length / multiple) * multiple));
	}
	// The upper half of the step counter keeps these draws apart from the permutations of the epochs.
	const u = uniform(seed, Stream.data, (epoch | 0x80000000) >>> 0, sequence);
	const amount =
		'random' in padding ? Math.floor(u * (padding.random + 1)) : Math.floor((padding.logUniform + 1) ** u) - 1;
	return Math.max(length, Math.min(context, length + amount));
}
