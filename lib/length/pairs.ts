/**
 * Prompts with their true answers, as ids, from records, JSONL files and token files of pairs, and what one look says of
 * each. The length of an answer is its tokens without end and padding; prompt and answer are tokenised together.
 */
import { checkMask } from '../config.js';
import { TokenDataset } from '../data/dataset.js';
import { check } from '../errors.js';
import { EvaluationContext } from '../eval/context.js';
import type { EvaluationData } from '../eval/options.js';
import { encodePair } from '../eval/sequences.js';
import type { DiffuGPT } from '../model.js';
import type { ParsedPrompt } from '../prompt.js';

/** Pairs: a .jsonl path, records { prompt, answer, kind? }, or a TokenDataset of pairs. */
export type PairData = Exclude<EvaluationData, null>;

/** How pairs are read. */
export interface PairOptions {
	/** Only the first so many pairs. @default all */
	readonly limit?: number;
	/** Names of the fields: { prompt: 'question' }. @default the usual ones */
	readonly columns?: Readonly<Record<string, string>>;
	/** Between prompt and answer. @default ' ' */
	readonly separator?: string;
	/** Aborting rejects with `signal.reason`. @default none */
	readonly signal?: AbortSignal;
}

/** The keys of {@link PairOptions}. */
export const pairOptionNames = [
	'limit',
	'columns',
	'separator',
	'signal',
] as const satisfies readonly (keyof PairOptions)[];

export interface LengthPair {
	readonly prompt: Int32Array;
	readonly answer: Int32Array;
	/** The answer as text when it was read as text. */
	readonly text: string | undefined;
	readonly kind: string;
}

const none = new Int32Array(0);

/** A pair's prompt as generation wants it: every id given, whatever it is. */
export function promptOf({ prompt }: LengthPair): ParsedPrompt {
	return { before: prompt, after: none, open: null, pinned: false };
}

/**
 * Reads pairs whose prompt fits the context with `max` new tokens and whose answer fits them with its end token; counts
 * those that do not. @throws `ERR_DN_ARGUMENT` naming the line of a bad record, or when there is no pair
 */
export async function readPairs(
	model: DiffuGPT,
	data: PairData,
	max: number,
	options: PairOptions,
): Promise<{ pairs: LengthPair[]; tooLong: number }> {
	const { limit, columns, separator, signal } = options;
	const { config } = model;
	check(config.attention === 'bidirectional', 'lengths are predicted by a bidirectional model, and this one is causal');
	checkMask(config, 'predicting lengths');
	check(Number.isSafeInteger(max) && max >= 1, `option max is ${String(max)}, expected a whole number >= 1`);
	check(
		max < config.context,
		`option max is ${max}, which leaves no room for a prompt in the context of ${config.context}`,
	);
	const context = new EvaluationContext(
		'length',
		model,
		{
			...(limit === undefined ? {} : { limit }),
			...(columns === undefined ? {} : { columns }),
			...(signal === undefined ? {} : { signal }),
		},
		separator,
	);
	const pairs: LengthPair[] = [];
	let tooLong = 0;
	const add = (pair: LengthPair): void => {
		if (pair.answer.length + 1 > max || pair.prompt.length + max > config.context) tooLong++;
		else pairs.push(pair);
	};
	if (data instanceof TokenDataset || (typeof data === 'string' && data.endsWith('.bin'))) {
		const set = typeof data === 'string' ? await TokenDataset.open(data) : data;
		try {
			check(set.format === 'pairs', `${set.path} holds ${set.format}, expected pairs of prompt and answer`);
			if (model.tokenizer) set.checkTokenizer(model.tokenizer);
			for (let i = 0; i < Math.min(set.sequences, limit ?? set.sequences); i++) {
				signal?.throwIfAborted();
				const { tokens, promptLength } = set.get(i);
				let end = tokens.length;
				while (end > promptLength && (tokens[end - 1] === config.eosId || tokens[end - 1] === config.padId)) end--;
				const prompt = promptLength === 0 ? Int32Array.of(config.bosId) : tokens.slice(0, promptLength);
				add({ prompt, answer: tokens.slice(promptLength, end), text: undefined, kind: '' });
			}
		} finally {
			if (typeof data === 'string') set.close();
		}
	} else {
		for await (const row of context.rows(data)) {
			const { tokens, promptLength } = encodePair(context, row, context.separator);
			const answer = context.need(row, 'answer');
			const prompt = promptLength === 0 ? Int32Array.of(config.bosId) : tokens.slice(0, promptLength);
			const text = typeof answer === 'string' ? answer : undefined;
			add({ prompt, answer: tokens.slice(promptLength), text, kind: context.kind(row) });
		}
	}
	check(
		pairs.length > 0,
		tooLong === 0
			? 'the data holds no pairs'
			: `none of the ${tooLong} pairs fits: the longest answer may have ${max - 1} tokens, the longest prompt ${config.context - max}`,
	);
	return { pairs, tooLong };
}

/** Applies `work` to every item, at most `width` at once; results in the order of the items. The first failure is thrown. */
export async function inParallel<T, R>(
	items: readonly T[],
	width: number,
	work: (item: T, index: number) => Promise<R>,
): Promise<R[]> {
	const results = new Array<R>(items.length);
	let next = 0;
	let failed = false;
	const worker = async (): Promise<void> => {
		while (next < items.length && !failed) {
			const i = next++;
			try {
				results[i] = await work(items[i] as T, i);
			} catch (error) {
				failed = true;
				throw error;
			}
		}
	};
	const outcomes = await Promise.allSettled(Array.from({ length: Math.min(width, items.length) }, worker));
	for (const outcome of outcomes) if (outcome.status === 'rejected') throw outcome.reason;
	return results;
}
