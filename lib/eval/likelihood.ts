/**
 * 'likelihood': the bound on log p(answer | prompt), nats. By exact counts (LLaDA, arXiv 2502.09992, eq. 14 in our notation):
 * l ~ U{1..L}, exactly l of the L answer tokens masked, estimate (L / l) sum of log p over them. The counts of B draws are
 * stratified as in LLaDA's harness, l_b = ((k - 1 + floor(b L / B)) mod L) + 1 with one k ~ U{1..L}: every l_b is uniform
 * by itself, together they cover 1..L evenly. The error is that of successive differences of the draws sorted by count,
 * v = sum (x_(j+1) - x_j)^2 / (2 (B - 1)) / B (Wolter, Introduction to Variance Estimation, ch. 8), which leaves out what the
 * stratification removes; it errs on the large side. Few tokens are computed exactly: the sum over all non-empty masks S of
 * w(|S|) sum log p with w(k) = (k-1)! (L-k)! / L!, the integral of t^(k-1) (1-t)^(L-k).
 * For a causal model the answer's log-likelihood is exact: sum of log p of each token given those before it.
 */
import { TokenDataset } from '../data/dataset.js';
import { check, checkData } from '../errors.js';
import { Stream, uniform } from '../random.js';
import { type EvaluationContext, wholeNumber } from './context.js';
import type { EvaluationData, LikelihoodOptions, LikelihoodResult } from './options.js';
import { type ScoringJob, score } from './scoring.js';
import { encodePair } from './sequences.js';
import { TokenSums } from './statistics.js';

/** Largest answer that may be enumerated: 65,535 masks. */
export const mostEnumerated = 16;
/** Tokens a sequence may have at most for its draws to be apart from those of the next one. */
const stridePerSequence = 2 ** 20;

/** One mask and what its sum of cross-entropies weighs. */
export interface Draw {
	readonly mask: Uint8Array;
	readonly weight: number;
	/** Masked tokens. */
	readonly count: number;
}

/** How a sequence is to be scored. `draws` may be read once. */
export interface Plan {
	readonly exact: boolean;
	readonly size: number;
	readonly draws: Iterable<Draw>;
}

/** All masks of a short sequence, or `samples` stratified draws. */
export function plan(
	length: number,
	scorable: readonly number[],
	{ samples, enumerate, seed, index }: { samples: number; enumerate: number; seed: bigint; index: number },
): Plan {
	if (scorable.length <= enumerate) {
		return { exact: true, size: 2 ** scorable.length - 1, draws: everyMask(length, scorable) };
	}
	return { exact: false, size: samples, draws: exactCounts(length, scorable, samples, seed, index) };
}

/** Non-empty subsets of `scorable` with the weights that make the sum exact. */
function* everyMask(length: number, scorable: readonly number[]): Generator<Draw, void> {
	const L = scorable.length;
	// w(1) = 1 / L, w(k + 1) = w(k) k / (L - k).
	const weights = [0, 1 / L];
	for (let k = 1; k < L; k++) weights.push(((weights[k] as number) * k) / (L - k));
	for (let bits = 1; bits < 2 ** L; bits++) {
		const mask = new Uint8Array(length);
		let count = 0;
		for (let i = 0; i < L; i++) {
			if (((bits >> i) & 1) === 0) continue;
			mask[scorable[i] as number] = 1;
			count++;
		}
		yield { mask, weight: weights[count] as number, count };
	}
}

function* exactCounts(
	length: number,
	scorable: readonly number[],
	samples: number,
	seed: bigint,
	index: number,
): Generator<Draw, void> {
	const L = scorable.length;
	const first = Math.floor(uniform(seed, Stream.time, 0, index) * L);
	for (let b = 0; b < samples; b++) {
		const count = ((first + Math.floor((b * L) / samples)) % L) + 1;
		// The `count` tokens with the smallest random keys.
		const keys = scorable.map((i) => ({ i, key: uniform(seed, Stream.count, b, index * stridePerSequence + i) }));
		keys.sort((x, y) => x.key - y.key || x.i - y.i);
		const mask = new Uint8Array(length);
		for (let j = 0; j < count; j++) mask[(keys[j] as { i: number }).i] = 1;
		yield { mask, weight: L / count, count };
	}
}

/** Collects the draws of one sequence. */
export class Estimate {
	readonly #exact: boolean;
	readonly #values: { count: number; value: number }[] = [];
	#left: number;

	constructor({ exact, size }: Plan) {
		this.#exact = exact;
		this.#left = size;
	}

	/** Returns true with the last draw. */
	add(draw: Draw, nats: number): boolean {
		this.#values.push({ count: draw.count, value: draw.weight * nats });
		return --this.#left === 0;
	}

	/** Negative bound of the whole sequence, nats, and its variance; null: one draw tells none. */
	result(): { nats: number; variance: number | null } {
		const sum = this.#values.reduce((total, { value }) => total + value, 0);
		if (this.#exact) return { nats: sum, variance: 0 };
		const B = this.#values.length;
		if (B === 1) return { nats: sum, variance: null };
		const sorted = [...this.#values].sort((a, b) => a.count - b.count);
		let squares = 0;
		for (let j = 1; j < B; j++) {
			squares += ((sorted[j] as { value: number }).value - (sorted[j - 1] as { value: number }).value) ** 2;
		}
		return { nats: sum / B, variance: squares / (2 * (B - 1)) / B };
	}
}

/** A sequence with the tokens that count; `index` is the counter of its draws. */
export interface Scorable {
	readonly tokens: Int32Array;
	readonly scorable: readonly number[];
	readonly index: number;
}

/** What was found of one sequence. */
export interface Scored<S> {
	readonly sequence: S;
	/** -log p, or its bound, of all the tokens that count. */
	readonly nats: number;
	/** Monte Carlo variance of `nats`; null: not known. */
	readonly variance: number | null;
	readonly exact: boolean;
	/** Forwarded sequences. */
	readonly draws: number;
}

/** The bound of each sequence that has a token to score, in order. */
export async function* bounds<S extends Scorable>(
	context: EvaluationContext,
	list: AsyncIterable<S>,
	{ samples, enumerate }: { samples: number; enumerate: number },
): AsyncGenerator<Scored<S>, void> {
	interface Key {
		sequence: S;
		plan: Plan;
		estimate: Estimate;
		draw: Draw;
	}
	async function* jobs(): AsyncGenerator<ScoringJob<Key>, void> {
		for await (const sequence of list) {
			if (sequence.scorable.length === 0) continue;
			const chosen = plan(sequence.tokens.length, sequence.scorable, {
				samples,
				enumerate,
				seed: context.seed,
				index: sequence.index,
			});
			const estimate = new Estimate(chosen);
			for (const draw of chosen.draws) {
				yield { tokens: sequence.tokens, scored: draw.mask, key: { sequence, plan: chosen, estimate, draw } };
			}
		}
	}
	for await (const { key, nats } of score(context.model, 'diffusion', jobs(), context)) {
		if (!key.estimate.add(key.draw, nats)) continue;
		yield { sequence: key.sequence, ...key.estimate.result(), exact: key.plan.exact, draws: key.plan.size };
	}
}

/** -log p of each sequence that has a token to score under a causal model, in order. */
export async function* autoregressive<S extends Scorable>(
	context: Pick<EvaluationContext, 'model' | 'batchTokens' | 'signal'>,
	list: Iterable<S> | AsyncIterable<S>,
): AsyncGenerator<Scored<S>, void> {
	async function* jobs(): AsyncGenerator<ScoringJob<S>, void> {
		for await (const sequence of list) {
			if (sequence.scorable.length === 0) continue;
			const scored = new Uint8Array(sequence.tokens.length);
			for (const i of sequence.scorable) scored[i] = 1;
			yield { tokens: sequence.tokens, scored, key: sequence };
		}
	}
	for await (const { key, nats } of score(context.model, 'autoregressive', jobs(), context)) {
		yield { sequence: key, nats, variance: 0, exact: true, draws: 1 };
	}
}

/** Mean log p(answer | prompt) of { prompt, answer } records. */
export async function likelihood(
	context: EvaluationContext,
	data: EvaluationData,
	options: LikelihoodOptions,
): Promise<Omit<LikelihoodResult, 'seed' | 'ms' | 'seesFuture'>> {
	if (context.causal) context.needCausal();
	else context.needDiffusion();
	check(
		data !== null && data !== undefined && !(data instanceof TokenDataset),
		"the metric 'likelihood' needs records { prompt, answer }; for token files use 'nelbo'",
	);
	const samples = wholeNumber('samples', options.samples ?? 128, 1);
	const enumerate = wholeNumber('enumerate', options.enumerate ?? 8, 0, mostEnumerated);
	const end = (options.endToken ?? false) ? [context.config.eosId] : [];
	async function* answers(): AsyncGenerator<Scorable & { kind: string }, void> {
		let index = 0;
		for await (const row of context.rows(data as Exclude<EvaluationData, TokenDataset | null>)) {
			const pair = encodePair(context, row, context.separator);
			const front = pair.promptLength === 0 ? [context.config.bosId] : [];
			const tokens = Int32Array.from([...front, ...pair.tokens, ...end]);
			context.checkFit(tokens.length, row.where, 'prompt and answer');
			const from = front.length + pair.promptLength;
			checkData(from < tokens.length, `${row.where}: the answer is empty`);
			const scorable = Array.from({ length: tokens.length - from }, (_, i) => from + i);
			yield { tokens, scorable, index: index++, kind: context.kind(row) };
		}
	}
	const sums = new TokenSums();
	let exact = 0;
	const found = context.causal
		? autoregressive(context, answers())
		: bounds(context, answers(), { samples, enumerate });
	for await (const { sequence, nats, variance, exact: isExact } of found) {
		sums.add(nats, sequence.scorable.length, variance);
		if (isExact) exact++;
		context.report(() => ({
			index: sequence.index,
			logLikelihood: -nats,
			standardError: variance === null ? null : Math.sqrt(variance),
			tokens: sequence.scorable.length,
			exact: isExact,
		}));
	}
	const { records, tokens, nats, error } = sums;
	return {
		metric: 'likelihood',
		records,
		logLikelihood: -nats / records,
		perToken: -nats / tokens,
		standardError: error === null ? null : error / records,
		tokens,
		exact,
	};
}
