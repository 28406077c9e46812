/**
 * Whole generations under every length method: how fast, how good, how long. The baseline 'fixed' is what a model without
 * variable length does: exactly `max` new tokens, every step pays for all of them, what follows the first end token is
 * thrown away at the end. 'early cut' is the same canvas with no more than the cut at a committed end token.
 */
import { toSeed } from '../batch.js';
import { check } from '../errors.js';
import { EvaluationContext, wholeNumber } from '../eval/context.js';
import { mostTogether } from '../eval/generation.js';
import { autoregressive, bounds } from '../eval/likelihood.js';
import { endIds } from '../evaluator.js';
import { checkSteps, denoise, type GenerateResult, prepareRequest } from '../generate.js';
import type { DiffuGPT } from '../model.js';
import type { GenerateOptions } from '../options.js';
import { philox, Stream } from '../random.js';
import type { Candidate } from './evaluate.js';
import { isCalibrationOf, type LengthExtras } from './extras.js';
import { firstCanvas } from './look.js';
import type { LengthRule } from './method.js';
import { resolveLength } from './method.js';
import { bootstrapDifference, type Difference, type Spread, spreadOf, wasserstein } from './metrics.js';
import { inParallel, type LengthPair, promptOf } from './pairs.js';

/** How generations are compared. */
export interface CompareOptions {
	/** Pairs that are generated for; 0: none. @default 256 */
	readonly generations?: number;
	/** Sampler and its options, the same for all methods. @default the model's defaults */
	readonly generate?: Omit<GenerateOptions, 'length' | 'seed' | 'signal'>;
	/** @default [1, 2, 3] */
	readonly seeds?: readonly (number | bigint)[];
	/** Prompts in one timed batch. @default 32 */
	readonly batch?: number;
	/** An autoregressive twin that scores the generated answers. @default none */
	readonly judge?: DiffuGPT;
	/** Pairs whose reference is scored under the cropped canvas; 0: none. @default 64 */
	readonly likelihoods?: number;
	/** Masks drawn per reference. @default 8 */
	readonly samples?: number;
	/** Aborting rejects with `signal.reason`. @default none */
	readonly signal?: AbortSignal;
	/** Told how far each stage is, 0 to 1. @default none */
	readonly onProgress?: (progress: {
		readonly stage: 'looks' | 'generations' | 'likelihoods';
		readonly fraction: number;
	}) => void;
}

/** Generations of one method for one kind of pairs. Spreads are over seeds. */
export interface GenerationRow {
	/** The method with the values of its options; 'fixed' and 'early cut' are the baselines. */
	readonly method: string;
	/** Target share of its bound; null: it has none. */
	readonly coverage: number | null;
	/** '' is all kinds together. */
	readonly kind: string;
	/** Pairs of that kind. */
	readonly pairs: number;
	/** Answer tokens per second of whole generations, the look included; only for all kinds together. */
	readonly tokensPerSecond: Spread | null;
	/** Rate of the fixed canvas with the same seed, the other way round: how many times as fast. */
	readonly speedup: Spread | null;
	/** Forwards per answer. */
	readonly forwards: number;
	/** Mean positions of the largest canvas, prompt included. */
	readonly canvas: number;
	/** Share of answers equal to the reference, id by id. */
	readonly exactMatch: Spread;
	/** Exact match minus that of the fixed canvas, pair by pair over all seeds; null for the fixed canvas itself. */
	readonly exactMatchVersusFixed: Difference | null;
	/** Share of answers without an end token. */
	readonly truncated: Spread;
	/** Between the lengths of generated and true answers. */
	readonly wasserstein: Spread;
	/** Mean tokens of the generated answers. */
	readonly meanLength: number;
	/** Nats per token of the generated answers and their end under the judge. */
	readonly judged: Spread | null;
	/** Each answer's nats per token under the judge minus those of the fixed canvas, as above. */
	readonly judgedVersusFixed: Difference | null;
	/** NELBO of the reference on its first canvas, end and padding included, nats per answer; null: not measured or nothing fits. */
	readonly nelbo: number | null;
	/** References that fit, of those scored. */
	readonly fits: number | null;
}

/** What whole generations under every method are like. */
export interface GenerationComparison {
	/** Pairs that were generated for. */
	readonly pairs: number;
	/** The seeds, in decimal. */
	readonly seeds: readonly string[];
	/** One row per method and kind. */
	readonly rows: readonly GenerationRow[];
}

interface Contender {
	name: string;
	/** Null: a fixed length. */
	rule: LengthRule | null;
	coverage: number | null;
}

/** Runs all contenders on the same prompts. */
export async function compareGenerations(
	model: DiffuGPT,
	all: readonly LengthPair[],
	extras: LengthExtras,
	candidates: readonly Candidate[],
	coverage: number,
	options: CompareOptions & { readonly max: number },
): Promise<GenerationComparison> {
	const { max, generations = 256, batch = 32, judge, likelihoods = 64, samples = 8, signal, onProgress } = options;
	wholeNumber('generations', generations, 1);
	wholeNumber('samples', samples, 1);
	wholeNumber('batch', batch, 1, mostTogether);
	wholeNumber('likelihoods', likelihoods, 0);
	check(
		options.seeds === undefined || Array.isArray(options.seeds),
		`option seeds is ${String(options.seeds)}, expected a list of seeds`,
	);
	if (judge) checkJudge(model, judge);
	const seeds = (options.seeds ?? [1, 2, 3]).map((seed) => toSeed(seed));
	check(seeds.length > 0, 'option seeds is empty');
	const pairs = all.slice(0, generations);
	const contenders = contendersOf(candidates, extras, coverage, max);
	/** By contender, seed, pair. */
	const results = contenders.map(() => seeds.map(() => [] as GenerateResult[]));
	const seconds = contenders.map(() => seeds.map(() => 0));
	for (const { rule } of contenders) {
		// Untimed: memory and code are warm when the clock runs.
		await generate(model, pairs[0] as LengthPair, rule, extras, options, 0n);
	}
	const rounds = seeds.length * Math.ceil(pairs.length / batch) * contenders.length;
	let round = 0;
	for (const [s, seed] of seeds.entries()) {
		for (let from = 0; from < pairs.length; from += batch) {
			const chunk = pairs.slice(from, from + batch);
			for (let c = 0; c < contenders.length; c++) {
				const at = (c + from / batch) % contenders.length;
				const contender = contenders[at] as Contender;
				const begin = performance.now();
				const found = await inParallel(chunk, batch, (pair, i) =>
					generate(model, pair, contender.rule, extras, options, seedOf(seed, from + i)),
				);
				(seconds[at] as number[])[s] = ((seconds[at] as number[])[s] as number) + (performance.now() - begin) / 1000;
				(results[at] as GenerateResult[][])[s]?.push(...found);
				onProgress?.({ stage: 'generations', fraction: ++round / rounds });
			}
		}
	}
	const kinds = [...new Set(pairs.map((pair) => pair.kind))].sort();
	const groups = new Map<string, number[]>([['', pairs.map((_, i) => i)]]);
	if (kinds.some((kind) => kind !== '')) {
		for (const kind of kinds)
			groups.set(
				kind || 'none',
				pairs.flatMap((pair, i) => (pair.kind === kind ? [i] : [])),
			);
	}
	const rows: GenerationRow[] = [];
	let judgedFixed: Judged[][] | null = null;
	for (const [c, { name, rule, coverage: target }] of contenders.entries()) {
		const mine = results[c] as GenerateResult[][];
		const rates = mine.map((list, s) => tokensOf(list) / ((seconds[c] as number[])[s] as number));
		const fixed = (results[0] as GenerateResult[][]).map(
			(list, s) => tokensOf(list) / ((seconds[0] as number[])[s] as number),
		);
		// A canvas that begins small and grows has no length to be judged by.
		const isPredicted = !rule || rule.looks || rule.method === 'constant';
		const scored =
			likelihoods > 0 && isPredicted
				? await nelbos(model, pairs.slice(0, likelihoods), rule ?? resolveLength({ max }), extras, samples, signal)
				: [];
		onProgress?.({ stage: 'likelihoods', fraction: (c + 1) / contenders.length });
		const judged = judge ? await Promise.all(mine.map((list) => judgedOf(judge, pairs, list, signal))) : null;
		judgedFixed ??= judged;
		/** Difference of a figure of single answers to the fixed canvas; figures are means over the seeds. */
		const versus = async (
			list: readonly number[],
			figure: (c: number, s: number, i: number) => number,
		): Promise<Difference | null> => {
			const over = (of: number) => list.map((i) => mean(seeds.map((_, s) => figure(of, s, i))));
			return c === 0 ? null : bootstrapDifference(over(c), over(0), { signal });
		};
		const perToken = (list: readonly Judged[], i: number): number => {
			const { nats, tokens } = list[i] as Judged;
			return nats / Math.max(1, tokens);
		};
		for (const [kind, list] of groups) {
			const of = (s: number): GenerateResult[] => list.map((i) => (mine[s] as GenerateResult[])[i] as GenerateResult);
			const each = (measure: (found: GenerateResult[], s: number) => number): Spread =>
				spreadOf(seeds.map((_, s) => measure(of(s), s)));
			const references = list.map((i) => pairs[i] as LengthPair);
			const nats = list.flatMap((i) => (scored[i] === undefined ? [] : [scored[i]]));
			const fitting = nats.flatMap((value) => (value === null ? [] : [value]));
			const flat = seeds.flatMap((_, s) => of(s));
			rows.push({
				method: name,
				coverage: target,
				kind,
				pairs: list.length,
				tokensPerSecond: kind === '' ? spreadOf(rates) : null,
				speedup: kind === '' ? spreadOf(rates.map((rate, s) => rate / (fixed[s] as number))) : null,
				forwards: mean(flat.map((result) => result.stats.forwards)),
				canvas: mean(flat.map((result) => result.stats.canvas)),
				exactMatch: each((found) =>
					mean(found.map((result, k) => Number(equal(result.tokens, (references[k] as LengthPair).answer)))),
				),
				exactMatchVersusFixed: await versus(list, (of, s, i) => {
					const found = results[of]?.[s]?.[i];
					return Number(found !== undefined && equal(found.tokens, (pairs[i] as LengthPair).answer));
				}),
				truncated: each((found) => mean(found.map((result) => Number(result.finishReason !== 'end-of-text')))),
				wasserstein: each((found) =>
					wasserstein(
						found.map((result) => result.tokens.length),
						references.map((pair) => pair.answer.length),
					),
				),
				meanLength: mean(flat.map((result) => result.tokens.length)),
				judged: judged
					? each((_, s) => {
							const found = list.map((i) => (judged[s] as Judged[])[i] as Judged);
							const tokens = found.reduce((sum, answer) => sum + answer.tokens, 0);
							return found.reduce((sum, answer) => sum + answer.nats, 0) / Math.max(1, tokens);
						})
					: null,
				judgedVersusFixed:
					judged && (await versus(list, (of, s, i) => perToken((of === 0 ? judgedFixed : judged)?.[s] as Judged[], i))),
				nelbo: fitting.length > 0 ? mean(fitting) : null,
				fits: nats.length > 0 ? fitting.length / nats.length : null,
			});
		}
	}
	return { pairs: pairs.length, seeds: seeds.map(String), rows };
}

/** The fixed canvas and the early cut first, then every method: at the target coverage where it is calibrated, else as it is. */
function contendersOf(
	candidates: readonly Candidate[],
	extras: LengthExtras,
	coverage: number,
	max: number,
): Contender[] {
	const list: Contender[] = [
		{ name: 'fixed', rule: null, coverage: null },
		{ name: 'early cut', rule: resolveLength({ max }, 'constant', { extras, infilling: false }), coverage: null },
	];
	for (const { name, method, options } of candidates) {
		const { quantile: _, probability: __, ...kept } = options;
		const calibrations = extras.calibrations.filter((entry) => isCalibrationOf(entry, method, options, max));
		const calibrated = calibrations.some(({ levels }) => levels.some((level) => level.coverage === coverage));
		if (!calibrated && method === 'constant') continue;
		const asked = calibrated ? { ...kept, max, coverage } : { ...options, max };
		const rule = resolveLength(asked, method, { extras: { ...extras, calibrations }, infilling: false });
		list.push({ name, rule, coverage: calibrated ? coverage : null });
	}
	return list;
}

async function generate(
	model: DiffuGPT,
	pair: LengthPair,
	rule: LengthRule | null,
	extras: LengthExtras,
	{ generate: given = {}, max, signal }: CompareOptions & { max: number },
	seed: bigint,
): Promise<GenerateResult> {
	signal?.throwIfAborted();
	const prompt = { tokens: pair.prompt, open: new Uint8Array(pair.prompt.length) };
	const request = prepareRequest(model.engine, model.tokenizer, prompt, {
		...given,
		seed,
		length: rule ? { max } : max,
		...(signal ? { signal } : {}),
	});
	check(
		!(request.options.isAutoregressive || request.options.cache) || !(rule?.looks || rule?.adapt),
		`option generate: the length method '${rule?.method}' does not go with this sampler`,
	);
	// The rule was made with margins that the model itself need not have.
	const asked = { ...request, rule, head: extras.head };
	checkSteps(asked);
	const stream = denoise(model.engine, model.tokenizer, asked);
	for (;;) {
		const { done, value } = await stream.next();
		if (done) return rule ? value : cut(value, endIds(model.config));
	}
}

/** A fixed length as an answer: up to its first end token. */
function cut(result: GenerateResult, ends: Int32Array): GenerateResult {
	const end = result.tokens.findIndex((id) => ends.includes(id));
	return end < 0 ? result : { ...result, tokens: result.tokens.slice(0, end), finishReason: 'end-of-text' };
}

/** Bounds on -log p of each reference, padded with end tokens to its first canvas; null where it does not fit. */
async function nelbos(
	model: DiffuGPT,
	pairs: readonly LengthPair[],
	rule: LengthRule,
	extras: LengthExtras,
	samples: number,
	signal: AbortSignal | undefined,
): Promise<(number | null)[]> {
	const { padId, eosId } = model.config;
	const canvases = await inParallel(pairs, 64, (pair) =>
		firstCanvas(model.engine, promptOf(pair), rule, extras.head, 0n, signal),
	);
	const found: (number | null)[] = pairs.map(() => null);
	const context = new EvaluationContext('length', model, signal ? { signal } : {});
	async function* references(): AsyncGenerator<{ tokens: Int32Array; scorable: number[]; index: number }, void> {
		for (const [index, { prompt, answer }] of pairs.entries()) {
			const { open } = canvases[index] as { open: number };
			if (answer.length + 1 > open) continue;
			const tokens = new Int32Array(prompt.length + open).fill(padId);
			tokens.set(prompt);
			tokens.set(answer, prompt.length);
			tokens[prompt.length + answer.length] = eosId;
			yield { tokens, scorable: Array.from({ length: open }, (_, i) => prompt.length + i), index };
		}
	}
	for await (const { sequence, nats } of bounds(context, references(), { samples, enumerate: 0 })) {
		found[sequence.index] = nats;
	}
	return found;
}

function checkJudge(model: DiffuGPT, judge: DiffuGPT): void {
	const { attention, shift, vocab } = judge.config;
	check(
		attention === 'causal' && shift,
		"option judge: expected an autoregressive model; load a twin with { config: { attention: 'causal' } }",
	);
	check(
		vocab === model.config.vocab,
		`option judge: it has ${vocab} ids and the model ${model.config.vocab}, and it reads the model's ids`,
	);
}

/** An answer and its end token under the judge. */
interface Judged {
	nats: number;
	tokens: number;
}

/** -log p of each generated answer and its end token under a causal model, and how many tokens that is. */
async function judgedOf(
	judge: DiffuGPT,
	pairs: readonly LengthPair[],
	results: readonly GenerateResult[],
	signal: AbortSignal | undefined,
): Promise<Judged[]> {
	const { config } = judge;
	const found = results.map(() => ({ nats: 0, tokens: 0 }));
	const list = results.map(({ tokens, finishReason }, index) => {
		const { prompt } = pairs[index] as LengthPair;
		const end = finishReason === 'end-of-text' ? [config.eosId] : [];
		const whole = Int32Array.from([...prompt, ...tokens, ...end]);
		const scorable = Array.from({ length: whole.length - prompt.length }, (_, i) => prompt.length + i);
		return { tokens: whole, scorable, index };
	});
	for await (const { sequence, nats } of autoregressive({ model: judge, batchTokens: 4096, signal }, list)) {
		found[sequence.index] = { nats, tokens: sequence.scorable.length };
	}
	return found;
}

function seedOf(seed: bigint, index: number): bigint {
	const [high, low] = philox(seed, Stream.draw, 0xfffffffe, index);
	return (BigInt(high) << 32n) | BigInt(low);
}

function tokensOf(results: readonly GenerateResult[]): number {
	return results.reduce((sum, { stats }) => sum + stats.generatedTokens, 0);
}

function equal(a: Int32Array, b: Int32Array): boolean {
	return a.length === b.length && a.every((id, i) => id === b[i]);
}

function mean(values: readonly number[]): number {
	return values.length === 0 ? 0 : values.reduce((a, b) => a + b, 0) / values.length;
}
