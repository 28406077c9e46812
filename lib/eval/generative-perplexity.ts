/**
 * 'generative-perplexity': exp of the mean negative log-likelihood per token that a causal judge gives to generated texts,
 * with their entropy and distinct-2, because a judge likes repetition: the figure alone means nothing.
 * The texts end before their first end token; the judge reads them in its own tokens behind its beginning-of-text token
 * (and the prompt, which is not scored), a text longer than its context in windows that advance by half of it, each token
 * scored once. An id that the generating model's tokenizer does not know is U+FFFD to the judge, as to every reader, and costs
 * what that costs. Where neither model has a tokenizer, the judge reads the ids as they are.
 * Texts are drawn by the ancestral sampler (a causal model's by its own) unless `generate` says otherwise.
 * Entropy: -sum p log p of a text's own token counts, nats, mean over texts (BD3-LM, arXiv 2503.09573). distinct-2: different
 * pairs of neighbouring tokens by all such pairs, over all texts (Li et al., arXiv 1510.03055).
 */
import { TokenDataset } from '../data/dataset.js';
import { seams } from '../data/pack.js';
import { check, checkData } from '../errors.js';
import { endIds } from '../evaluator.js';
import type { DiffuGPT } from '../model.js';
import type { GenerateOptions } from '../options.js';
import { decodeDrawn } from '../prompt.js';
import { type EvaluationContext, wholeNumber } from './context.js';
import { beforeEnd, Costs, type GenerationJob, generateAll, generateOptions } from './generation.js';
import { autoregressive } from './likelihood.js';
import type { EvaluationData, GenerativePerplexityOptions, GenerativePerplexityResult, TextOrIds } from './options.js';
import { windows } from './sequences.js';
import { TokenSums } from './statistics.js';

interface Text {
	prompt: TextOrIds | undefined;
}

export async function generativePerplexity(
	context: EvaluationContext,
	data: EvaluationData,
	options: GenerativePerplexityOptions,
): Promise<Omit<GenerativePerplexityResult, 'seed' | 'ms' | 'seesFuture'>> {
	const { judge } = options;
	check(
		typeof judge === 'object' && judge !== null && 'engine' in judge,
		"the metric 'generative-perplexity' needs the option judge, a causal model that scores the texts",
	);
	check(
		!(data instanceof TokenDataset),
		"the metric 'generative-perplexity' needs records { prompt }, or null for no prompts",
	);
	context.needCausal(judge, 'the judge');
	// The default sampler of 'generate' draws nothing: every text without a prompt would be the same.
	const given: GenerateOptions = {
		...(context.causal ? {} : { sampler: 'ancestral' }),
		...generateOptions(options, [], 'generative-perplexity'),
	};
	const samples = wholeNumber('samples', options.samples ?? (data === null ? 64 : 1), 1);
	const stride = wholeNumber(
		'stride',
		options.stride ?? Math.max(1, judge.config.context >> 1),
		1,
		judge.config.context - 1,
	);
	const ends = endIds(context.config);
	const costs = new Costs();
	const sums = new TokenSums();
	const pairs = new Set<number>();
	let allPairs = 0;
	let entropies = 0;
	let empty = 0;
	let records = 0;
	for await (const { key, index, result } of generateAll(context, jobs(context, data, given, samples), options)) {
		costs.add(result);
		records++;
		const tokens = beforeEnd(result.tokens, ends);
		const entropy = entropyOf(tokens);
		entropies += entropy;
		for (let i = 1; i < tokens.length; i++) {
			const [a, b] = [tokens[i - 1] as number, tokens[i] as number];
			pairs.add(a * context.config.vocab + b);
			allPairs++;
		}
		const judged = await judgeText(context, judge, key.prompt, tokens, stride);
		if (judged.tokens === 0) empty++;
		else sums.add(judged.nats, judged.tokens, 0);
		context.report(() => ({
			index,
			text: context.model.tokenizer ? result.text : Array.from(tokens),
			nll: judged.tokens === 0 ? null : judged.nats / judged.tokens,
			tokens: judged.tokens,
			entropy,
		}));
	}
	check(sums.tokens > 0, 'every generated text ended at its first token: there is nothing to judge');
	const { mean, populationError, tokens } = sums.mean();
	return {
		metric: 'generative-perplexity',
		records,
		perplexity: Math.exp(mean),
		nll: mean,
		populationError,
		entropy: entropies / records,
		distinct2: allPairs === 0 ? 0 : pairs.size / allPairs,
		tokens,
		empty,
		...costs.result(),
	};
}

async function* jobs(
	context: EvaluationContext,
	data: EvaluationData,
	given: GenerateOptions,
	samples: number,
): AsyncGenerator<GenerationJob<Text>, void> {
	const { config } = context;
	let index = 0;
	if (data === null || data === undefined) {
		// Position 0 is never predicted under the shift: a text begins behind the beginning-of-text token.
		const tokens = Int32Array.of(config.bosId);
		const length = given.length ?? Math.min(64, config.context - 1);
		const count = Math.min(samples, context.limit);
		for (; index < count; index++) {
			const prompt = { tokens, open: new Uint8Array(1) };
			yield { prompt, options: { ...given, length }, index, where: `text ${index}`, key: { prompt: undefined } };
			context.progress((index + 1) / count);
		}
		return;
	}
	for await (const row of context.rows(data as Exclude<EvaluationData, TokenDataset | null>)) {
		const prompt = context.need(row, context.find(row, 'prompt') ? 'prompt' : 'text');
		const { tokens } = context.encode([prompt], row.where);
		checkData(tokens.length > 0, `${row.where}: the prompt is empty`);
		context.checkFit(tokens.length + 1, row.where, 'the prompt with one new token');
		const length = given.length ?? Math.min(64, config.context - tokens.length);
		for (let i = 0; i < samples; i++) {
			const canvas = { tokens, open: new Uint8Array(tokens.length) };
			yield { prompt: canvas, options: { ...given, length }, index: index++, where: row.where, key: { prompt } };
		}
	}
}

/** -log p of the text under the judge, given the prompt, and how many of the judge's tokens that is. */
async function judgeText(
	context: EvaluationContext,
	judge: DiffuGPT,
	prompt: TextOrIds | undefined,
	generated: Int32Array,
	stride: number,
): Promise<{ nats: number; tokens: number }> {
	if (generated.length === 0) return { nats: 0, tokens: 0 };
	const { tokens, from } = judgeTokens(context, judge, prompt, generated);
	const list = windows(tokens.length, judge.config.context, stride).map(({ begin, from: first, to }, index) => {
		const scorable: number[] = [];
		for (let i = Math.max(first, from); i < to; i++) scorable.push(i - begin);
		return { tokens: tokens.slice(begin, to), scorable, index };
	});
	let nats = 0;
	let count = 0;
	const { batchTokens, signal } = context;
	for await (const found of autoregressive({ model: judge, batchTokens, signal }, list)) {
		nats += found.nats;
		count += found.sequence.scorable.length;
	}
	return { nats, tokens: count };
}

/** Prompt and text in the judge's ids, its beginning-of-text token in front; `from` is the first of the text. */
function judgeTokens(
	context: EvaluationContext,
	judge: DiffuGPT,
	prompt: TextOrIds | undefined,
	generated: Int32Array,
): { tokens: Int32Array; from: number } {
	const own = context.model.tokenizer;
	const { bosId } = judge.config;
	if (own && judge.tokenizer) {
		const before =
			prompt === undefined ? '' : typeof prompt === 'string' ? prompt : decodeDrawn(own, Int32Array.from(prompt));
		const after = decodeDrawn(own, generated);
		const tokens = judge.tokenizer.encode(before + after);
		const from = seams([before, after], tokens, judge.tokenizer)[0] as number;
		return { tokens: Int32Array.from([bosId, ...tokens]), from: from + 1 };
	}
	check(
		!own && !judge.tokenizer && judge.config.vocab === context.config.vocab,
		`the judge cannot read the texts: one of the two models has no tokenizer, and their ids differ (vocabularies of ${context.config.vocab} and ${judge.config.vocab})`,
	);
	const before = prompt === undefined ? [] : Array.from(prompt as readonly number[]);
	return { tokens: Int32Array.from([bosId, ...before, ...generated]), from: before.length + 1 };
}

/** Entropy of the counts of a text's tokens, nats. */
function entropyOf(tokens: Int32Array): number {
	const counts = new Map<number, number>();
	for (const id of tokens) counts.set(id, (counts.get(id) ?? 0) + 1);
	let sum = 0;
	for (const count of counts.values()) sum -= (count / tokens.length) * Math.log(count / tokens.length);
	return sum;
}
