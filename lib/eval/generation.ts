/**
 * Many generations of a stream of records: a bounded number in flight, results in the order of the records. They meet in
 * the engine's ragged batches, where each equals its own solo run, so the number in flight changes no result. The seed of
 * a record is a function of the evaluation's seed and the record's number.
 */
import { check, DiffusionNativeError } from '../errors.js';
import type { GenerateResult } from '../generate.js';
import type { DiffuGPT } from '../model.js';
import type { GenerateOptions } from '../options.js';
import type { Prompt } from '../prompt.js';
import { philox, Stream } from '../random.js';
import { type EvaluationContext, wholeNumber } from './context.js';
import type { GenerationCosts, GenerationOptions } from './options.js';

export interface GenerationJob<K> {
	readonly prompt: Prompt;
	readonly options: Omit<GenerateOptions, 'seed' | 'signal'>;
	readonly index: number;
	readonly where: string;
	readonly key: K;
}

/** Of the requests that an engine lets wait: others may be using the model. */
export const mostTogether = 512;

/** Runs the jobs; yields in their order. When one fails, the others stop. */
export async function* generateAll<K>(
	context: EvaluationContext,
	jobs: AsyncIterable<GenerationJob<K>>,
	options: GenerationOptions,
): AsyncGenerator<{ key: K; index: number; result: GenerateResult }, void> {
	const width = wholeNumber('concurrency', options.concurrency ?? 64, 1, mostTogether);
	const stop = new AbortController();
	const signal = context.signal ? AbortSignal.any([context.signal, stop.signal]) : stop.signal;
	const running: Promise<{ key: K; index: number; result: GenerateResult }>[] = [];
	try {
		for await (const job of jobs) {
			const started = generateOne(context.model, job, context.seed, signal);
			// A failure is seen when its turn comes; until then it is not unhandled.
			started.catch(() => stop.abort());
			running.push(started);
			if (running.length >= width) yield await (running.shift() as (typeof running)[number]);
		}
		while (running.length > 0) yield await (running.shift() as (typeof running)[number]);
	} catch (error) {
		stop.abort();
		const outcomes = await Promise.allSettled(running);
		throw firstCause(error, outcomes, stop.signal);
	} finally {
		stop.abort();
		await Promise.allSettled(running);
	}
}

/** The error that stopped everything, not the abort of another record that it led to. */
function firstCause(error: unknown, outcomes: PromiseSettledResult<unknown>[], stop: AbortSignal): unknown {
	if (error !== stop.reason) return error;
	for (const outcome of outcomes) {
		if (outcome.status === 'rejected' && outcome.reason !== stop.reason) return outcome.reason;
	}
	return error;
}

async function generateOne<K>(
	model: DiffuGPT,
	{ prompt, options, index, where, key }: GenerationJob<K>,
	seed: bigint,
	signal: AbortSignal,
): Promise<{ key: K; index: number; result: GenerateResult }> {
	try {
		const result = await model.generate(prompt, { ...options, seed: seedOf(seed, index), signal });
		return { key, index, result };
	} catch (error) {
		if (!(error instanceof DiffusionNativeError) || error.code !== 'ERR_DN_ARGUMENT') throw error;
		throw new DiffusionNativeError(error.code, `${where}: ${error.message}`, { cause: error });
	}
}

/** The seed of record `index`. */
function seedOf(seed: bigint, index: number): bigint {
	const [high, low] = philox(seed, Stream.draw, 0xffffffff, index);
	return (BigInt(high) << 32n) | BigInt(low);
}

/** Throws when `generate` has options that the metric itself sets. */
export function generateOptions(
	options: GenerationOptions,
	reserved: readonly (keyof GenerateOptions)[],
	metric: string,
): GenerateOptions {
	const given: GenerateOptions = options.generate ?? {};
	check(typeof given === 'object' && given !== null, 'option generate is not an object of generate options');
	for (const key of ['seed', 'signal', ...reserved] as const) {
		check(given[key] === undefined, `option generate.${key}: the metric '${metric}' sets it itself`);
	}
	return given;
}

/** Options for a record with so many open positions: a block is not longer than they are. */
export function blockWithin(given: GenerateOptions, open: number): Pick<GenerateOptions, 'block'> {
	return given.block === undefined ? {} : { block: Math.min(given.block, open) };
}

/** The ids before the first end token. */
export function beforeEnd(tokens: Int32Array, ends: Int32Array): Int32Array {
	const end = tokens.findIndex((id) => ends.includes(id));
	return end < 0 ? tokens : tokens.subarray(0, end);
}

/** Sums what generations cost. */
export class Costs {
	#records = 0;
	#tokens = 0;
	#forwards = 0;
	readonly #begin = performance.now();

	add({ stats }: GenerateResult): void {
		this.#records++;
		this.#tokens += stats.generatedTokens;
		this.#forwards += stats.forwards;
	}

	means(): Pick<GenerationCosts, 'meanTokens' | 'meanForwards'> {
		return { meanTokens: this.#tokens / this.#records, meanForwards: this.#forwards / this.#records };
	}

	result(): GenerationCosts {
		const seconds = (performance.now() - this.#begin) / 1000;
		return { ...this.means(), tokensPerSecond: seconds > 0 ? this.#tokens / seconds : 0 };
	}
}
