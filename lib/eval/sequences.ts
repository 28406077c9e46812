/**
 * The sequences that 'nelbo' and 'perplexity' score, from token files, texts and pairs, and which of their tokens count.
 * Prompts are never scored and never masked. A text has the beginning-of-text token in front, so that its first token can
 * be predicted, and the end token behind; a pair has the end token behind its answer and, when its prompt is empty, the
 * beginning-of-text token in front. Padding is left out unless it is asked for.
 */
import { TokenDataset } from '../data/dataset.js';
import { encodePadding, type Padding } from '../data/format.js';
import { padSequence } from '../data/pack.js';
import type { Row } from '../data/readers.js';
import { check, checkData } from '../errors.js';
import { type EvaluationContext, isTextOrIds, shorten, wholeNumber } from './context.js';
import type { EvaluationData, SequenceOptions } from './options.js';

export interface EvaluationSequence {
	readonly tokens: Int32Array;
	/** Positions of the tokens that count, ascending; under the shift never position 0, which no row predicts. */
	readonly scorable: readonly number[];
	/** Number of the sequence: the counter of its draws. */
	readonly index: number;
	readonly kind: string;
	readonly where: string;
}

/** One sequence after the other. Throws when there is none. */
export async function* sequences(
	context: EvaluationContext,
	data: EvaluationData,
	options: SequenceOptions,
): AsyncGenerator<EvaluationSequence, void> {
	check(data !== null && data !== undefined, `the metric '${context.metric}' needs data`);
	const padding = checkPadding(options.padding ?? 'none');
	if (typeof data === 'string' && data.endsWith('.bin')) {
		using opened = await TokenDataset.open(data);
		yield* fileSequences(context, opened, padding);
	} else if (data instanceof TokenDataset) {
		yield* fileSequences(context, data, padding);
	} else {
		yield* recordSequences(context, data, options, padding);
	}
}

async function* fileSequences(
	context: EvaluationContext,
	data: TokenDataset,
	padding: Padding,
): AsyncGenerator<EvaluationSequence, void> {
	const { config, model } = context;
	if (model.tokenizer) data.checkTokenizer(model.tokenizer);
	const count = Math.min(data.sequences, context.limit);
	for (let index = 0; index < count; index++) {
		context.signal?.throwIfAborted();
		const { tokens, promptLength } = data.get(index);
		const where = `${data.path}, sequence ${index}`;
		context.checkFit(tokens.length, where, 'the sequence');
		const padded = data.format === 'packed' ? tokens : pad(tokens, promptLength, padding, context, index);
		yield {
			tokens: padded,
			scorable: range(Math.max(promptLength, config.shift ? 1 : 0), padded.length),
			index,
			kind: '',
			where,
		};
		context.progress((index + 1) / count);
	}
}

async function* recordSequences(
	context: EvaluationContext,
	data: Exclude<EvaluationData, TokenDataset | null>,
	options: SequenceOptions,
	padding: Padding,
): AsyncGenerator<EvaluationSequence, void> {
	const { config, separator } = context;
	const { bosId, eosId } = config;
	const stride = wholeNumber(
		'stride',
		options.stride ?? Math.max(1, config.context - 1),
		1,
		Math.max(1, config.context - 1),
	);
	const end = (options.endToken ?? true) ? [eosId] : [];
	let index = 0;
	for await (const row of context.rows(data)) {
		const { where } = row;
		const kind = context.kind(row);
		if (row.fields['tokens'] !== undefined) {
			const { tokens, promptLength } = givenTokens(context, row);
			context.checkFit(tokens.length, where, 'the sequence');
			const padded = pad(tokens, promptLength, padding, context, index);
			const from = Math.max(promptLength, config.shift ? 1 : 0);
			yield { tokens: padded, scorable: range(from, padded.length), index: index++, kind, where };
		} else if (context.find(row, 'prompt')) {
			const pair = encodePair(context, row, separator);
			const front = pair.promptLength === 0 ? [bosId] : [];
			const tokens = Int32Array.from([...front, ...pair.tokens, ...end]);
			context.checkFit(tokens.length, where, 'prompt and answer');
			const promptLength = pair.promptLength + front.length;
			const padded = pad(tokens, promptLength, padding, context, index);
			yield { tokens: padded, scorable: range(promptLength, padded.length), index: index++, kind, where };
		} else {
			const { tokens: body } = context.encode([context.need(row, 'text')], where);
			checkData(body.length + end.length > 0, `${where}: the text is empty`);
			const whole = Int32Array.from([bosId, ...body, ...end]);
			const padded = whole.length < config.context ? pad(whole, 1, padding, context, index) : whole;
			for (const { begin, from, to } of windows(padded.length, config.context, stride)) {
				yield {
					tokens: padded.slice(begin, to),
					scorable: range(from - begin, to - begin),
					index: index++,
					kind,
					where,
				};
			}
		}
	}
}

/** Prompt and answer as one text; the tokens that lie wholly in the prompt are the prompt. */
export function encodePair(
	context: EvaluationContext,
	row: Row,
	separator: string,
): { tokens: Int32Array; promptLength: number } {
	const prompt = context.need(row, 'prompt');
	const answer = context.need(row, 'answer');
	const joined = typeof answer === 'string' && prompt !== '' ? separator + answer : answer;
	const { tokens, ends } = context.encode([prompt, joined], row.where);
	return { tokens, promptLength: ends[0] as number };
}

/** Windows over `length` tokens of which the first is never scored; every other one is scored in the first window it is in. */
export function windows(
	length: number,
	context: number,
	stride: number,
): { begin: number; from: number; to: number }[] {
	const found: { begin: number; from: number; to: number }[] = [];
	for (let begin = 0, from = 1; from < length; begin += stride) {
		const to = Math.min(length, begin + context);
		found.push({ begin, from, to });
		from = to;
	}
	return found;
}

function givenTokens(context: EvaluationContext, row: Row): { tokens: Int32Array; promptLength: number } {
	const { tokens: given, promptLength = 0 } = row.fields;
	checkData(
		isTextOrIds(given) && typeof given !== 'string',
		`${row.where}: the field 'tokens' is ${shorten(given)}, expected ids`,
	);
	const { tokens } = context.encode([given], row.where);
	checkData(tokens.length > 0, `${row.where}: the field 'tokens' is empty`);
	checkData(
		Number.isInteger(promptLength) && (promptLength as number) >= 0 && (promptLength as number) <= tokens.length,
		`${row.where}: the field 'promptLength' is ${shorten(promptLength)}, expected 0 to ${tokens.length}`,
	);
	return { tokens, promptLength: promptLength as number };
}

function pad(
	tokens: Int32Array,
	promptLength: number,
	padding: Padding,
	context: EvaluationContext,
	sequence: number,
): Int32Array {
	const { padId, context: most } = context.config;
	const draw = { seed: context.seed, epoch: 0, sequence };
	return padSequence({ tokens, promptLength }, { padding, padId, context: most }, draw).tokens;
}

function checkPadding(padding: Padding): Padding {
	const known = padding === 'none' || padding === 'context' || (typeof padding === 'object' && padding !== null);
	const amount = known && typeof padding === 'object' ? encodePadding(padding)[1] : 1;
	check(
		known && Number.isInteger(amount) && amount > 0,
		`option padding is ${shorten(padding)}, expected 'none', 'context', { multiple: n }, { random: n } or { logUniform: n }`,
	);
	return padding;
}

function range(from: number, to: number): number[] {
	return Array.from({ length: Math.max(0, to - from) }, (_, i) => from + i);
}
