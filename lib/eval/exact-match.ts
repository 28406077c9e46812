/**
 * 'exact-match': the share of { prompt, answer, kind? } records whose generated answer equals the reference. The generated
 * text ends before its first end token; both are compared without white space at their ends (or, for GSM8K, after '####'
 * and without commas). The prompt's ids are those of prompt and answer tokenised together, the length
 * is never taken from the answer. Default length: up to 64 tokens, cut at the end token; default temperature: 0.
 */
import { TokenDataset } from '../data/dataset.js';
import { check, checkData } from '../errors.js';
import { endIds } from '../evaluator.js';
import type { LengthOptions } from '../length/method.js';
import { show } from '../option-checks.js';
import type { EvaluationContext } from './context.js';
import { beforeEnd, Costs, type GenerationJob, generateAll, generateOptions } from './generation.js';
import type { EvaluationData, ExactMatchOptions, ExactMatchResult } from './options.js';
import { encodePair } from './sequences.js';
import { Kinds, rateOf } from './statistics.js';

interface Reference {
	kind: string;
	prompt: unknown;
	/** Text, or the ids joined by spaces for a model without a tokenizer. */
	answer: string;
	reachable: boolean;
}

class Tally {
	correct = 0;
	count = 0;
	readonly costs = new Costs();
}

export async function exactMatch(
	context: EvaluationContext,
	data: EvaluationData,
	options: ExactMatchOptions,
): Promise<Omit<ExactMatchResult, 'seed' | 'ms' | 'seesFuture'>> {
	check(
		data !== null && data !== undefined && !(data instanceof TokenDataset),
		"the metric 'exact-match' needs records { prompt, answer }",
	);
	const given = generateOptions(options, [], 'exact-match');
	const { extract = 'all' } = options;
	check(
		extract === 'all' || extract === 'after-hashes',
		`option extract is ${show(extract)}, expected 'all' or 'after-hashes'`,
	);
	const ends = endIds(context.config);
	const all = new Tally();
	const kinds = new Kinds(() => new Tally());
	let unreachable = 0;
	for await (const { key, index, result } of generateAll(context, jobs(context, data, given), options)) {
		const text = context.model.tokenizer ? result.text : beforeEnd(result.tokens, ends).join(' ');
		const correct = isMatch(text, key.answer, extract);
		if (!key.reachable) unreachable++;
		for (const tally of key.kind === '' ? [all] : [all, kinds.of(key.kind)]) {
			tally.count++;
			tally.costs.add(result);
			if (correct) tally.correct++;
		}
		context.report(() => ({
			index,
			...(key.kind === '' ? {} : { kind: key.kind }),
			prompt: key.prompt,
			answer: key.answer,
			generated: text,
			correct,
			forwards: result.stats.forwards,
			finishReason: result.finishReason,
		}));
	}
	return {
		metric: 'exact-match',
		records: all.count,
		...rateOf(all.correct, all.count),
		unreachable,
		...all.costs.result(),
		kinds: kinds.results((tally) => ({ ...rateOf(tally.correct, tally.count), ...tally.costs.means() })),
	};
}

async function* jobs(
	context: EvaluationContext,
	data: Exclude<EvaluationData, TokenDataset | null>,
	given: NonNullable<ExactMatchOptions['generate']>,
): AsyncGenerator<GenerationJob<Reference>, void> {
	const { config } = context;
	let index = 0;
	for await (const row of context.rows(data)) {
		const pair = encodePair(context, row, context.separator);
		const answer = context.need(row, 'answer');
		const answerTokens = pair.tokens.length - pair.promptLength;
		checkData(answerTokens > 0, `${row.where}: the answer is empty`);
		const front = pair.promptLength === 0 ? [config.bosId] : [];
		const tokens = Int32Array.from([...front, ...pair.tokens.subarray(0, pair.promptLength)]);
		context.checkFit(tokens.length + answerTokens + 1, row.where, 'prompt, answer and end token');
		const length = given.length ?? ({ max: Math.min(64, config.context - tokens.length) } satisfies LengthOptions);
		const room = typeof length === 'number' ? length : length.max;
		const needed = typeof length === 'number' ? answerTokens : answerTokens + 1;
		yield {
			// Every id of the prompt is given, whatever it is.
			prompt: { tokens, open: new Uint8Array(tokens.length) },
			options: { ...(context.causal ? { temperature: 0 } : {}), ...given, length },
			index: index++,
			where: row.where,
			key: {
				kind: context.kind(row),
				prompt: context.find(row, 'prompt')?.value,
				answer: typeof answer === 'string' ? answer : Array.from(answer).join(' '),
				reachable: needed <= room,
			},
		};
	}
}

function isMatch(generated: string, answer: string, extract: NonNullable<ExactMatchOptions['extract']>): boolean {
	if (extract === 'all') return generated.trim() === answer.trim();
	const wanted = afterHashes(answer) ?? answer.replaceAll(',', '').trim();
	return afterHashes(generated) === wanted;
}

/** What follows the last '####', without commas; undefined when there is none. */
function afterHashes(text: string): string | undefined {
	const at = text.lastIndexOf('####');
	return at < 0
		? undefined
		: text
				.slice(at + 4)
				.replaceAll(',', '')
				.trim();
}
