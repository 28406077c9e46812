/**
 * Trained length heads on the frozen backbone's hidden states: states after the final layer norm at the masked positions
 * behind a prompt, those that speak of the position (under the shift, one row earlier), on a canvas of `max` masks. The
 * prompt is never counted: position 0 of a head is the first token of the answer.
 *
 * - token: P(the text has ended at or before position i), label 1 for i >= length, padding included; cross-entropy.
 * - pooled: log(1 + length) from the mean of the states; squared error.
 * - quantile: quantiles of log(1 + length) from the same mean; pinball loss.
 */
import { toSeed } from '../batch.js';
import type { ModelConfig } from '../config.js';
import { check } from '../errors.js';
import type { DiffuGPT } from '../model.js';
import { checkOptions, show } from '../option-checks.js';
import { makeCanvas } from '../prompt.js';
import { permutation, Stream, uniform } from '../random.js';
import { Turns } from '../turns.js';
import { Dense } from './dense.js';
import { lengthExtras } from './extras.js';
import { hiddenAt } from './look.js';
import { type PairData, type PairOptions, pairOptionNames, promptOf, readPairs } from './pairs.js';

/** The three heads of a model. */
export class LengthHead {
	readonly token: Dense;
	readonly pooled: Dense;
	readonly quantile: Dense;
	/** Levels of the quantile head, ascending. */
	readonly levels: readonly number[];
	/** Canvas it was trained on. */
	readonly max: number;
	/** Pairs it was trained on. */
	readonly pairs: number;

	constructor(
		parts: { token: Dense; pooled: Dense; quantile: Dense },
		facts: { levels: readonly number[]; max: number; pairs: number },
	) {
		this.token = parts.token;
		this.pooled = parts.pooled;
		this.quantile = parts.quantile;
		this.levels = facts.levels;
		this.max = facts.max;
		this.pairs = facts.pairs;
	}

	/** hidden: (n, C). (n) probability that the text has ended at or before each position. */
	endProbabilities(hidden: Float32Array): Float32Array {
		return this.token.forward(hidden).map(sigmoid);
	}

	/**
	 * hidden: (n, C). The length by the pooled regressor, and, for a coverage, the quantile, interpolated between trained
	 * levels; beyond them the nearest.
	 */
	regress(hidden: Float32Array): (coverage?: number) => number {
		const mean = meanRow(hidden, this.pooled.inputs);
		const pooled = this.pooled.forward(mean)[0] as number;
		// Quantiles must not cross: sorting them never raises the pinball loss (Chernozhukov et al. 2010).
		const quantiles = this.quantile.forward(mean).sort();
		return (coverage) => Math.expm1(coverage === undefined ? pooled : this.#interpolate(quantiles, coverage));
	}

	#interpolate(values: Float32Array, coverage: number): number {
		const { levels } = this;
		let k = 0;
		while (k < levels.length - 2 && (levels[k + 1] as number) < coverage) k++;
		const low = levels[k] as number;
		const high = levels[k + 1] ?? low;
		const share = high > low ? Math.min(1, Math.max(0, (coverage - low) / (high - low))) : 0;
		const a = values[k] as number;
		return a + share * ((values[k + 1] ?? a) - a);
	}
}

/** Options of {@link trainLengthHead}. */
export interface LengthHeadOptions extends PairOptions {
	/** Most new tokens: the canvas that the heads are trained on and asked on. */
	readonly max: number;
	/** Width of the hidden layer. @default 64 */
	readonly units?: number;
	/** Passes over the pairs. @default 3 */
	readonly epochs?: number;
	/** Of Adam; falls to zero along a cosine. @default 2e-3 */
	readonly learningRate?: number;
	/** Positions per pair that the token head is trained on, half of them near the end. @default 24 */
	readonly positions?: number;
	/** Levels of the quantile head. @default [0.5, 0.8, 0.9, 0.95, 0.99] */
	readonly levels?: readonly number[];
	/** @default 0 */
	readonly seed?: number | bigint;
	/** Told how far each stage is, 0 to 1: reading hidden states, then training. @default none */
	readonly onProgress?: (progress: { readonly stage: 'states' | 'training'; readonly fraction: number }) => void;
}

const headOptionNames = [
	...pairOptionNames,
	...(['max', 'units', 'epochs', 'learningRate', 'positions', 'levels', 'seed', 'onProgress'] as const),
] satisfies (keyof LengthHeadOptions)[];

/** What {@link trainLengthHead} reports: mean losses of the last pass. */
export interface LengthHeadReport {
	/** Pairs that the heads were trained on. */
	readonly pairs: number;
	/** Pairs left out because prompt or answer does not fit. */
	readonly tooLong: number;
	/** Cross-entropy of the token head, nats. */
	readonly token: number;
	/** Squared error of log(1 + length). */
	readonly pooled: number;
	/** Pinball loss of log(1 + length), mean over the levels. */
	readonly quantile: number;
}

/**
 * Trains the heads and gives them to the model: `length: { method: 'head' }` uses them, `model.save` writes them.
 * Calibrations of earlier heads are dropped.
 * @throws `ERR_DN_ARGUMENT` naming the option, the line of a bad record or the kind of model that does not fit;
 * `ERR_DN_CHECKPOINT` when the data cannot be read; `ERR_DN_OUT_OF_MEMORY`; `signal.reason`
 */
export async function trainLengthHead(
	model: DiffuGPT,
	data: PairData,
	options: LengthHeadOptions,
): Promise<LengthHeadReport> {
	check(options !== undefined, 'trainLengthHead needs the option max');
	checkOptions('trainLengthHead', options, headOptionNames);
	const { max, units = 64, epochs = 3, learningRate = 2e-3, positions = 24, signal, onProgress } = options;
	const levels = [...(options.levels ?? [0.5, 0.8, 0.9, 0.95, 0.99])].sort((a, b) => a - b);
	for (const [name, value] of Object.entries({ units, epochs, positions })) {
		check(
			Number.isSafeInteger(value) && value >= 1,
			`option ${name} is ${String(value)}, expected a whole number >= 1`,
		);
	}
	check(learningRate > 0 && learningRate < 1, `option learningRate is ${learningRate}, expected a number from 0 to 1`);
	check(
		levels.length > 0 && levels.every((level) => level > 0 && level < 1),
		`option levels is ${show(options.levels)}, expected numbers between 0 and 1`,
	);
	const seed = toSeed(options.seed ?? 0);
	const { pairs, tooLong } = await readPairs(model, data, max, options);
	const { engine, config } = model;
	const C = config.channels;
	const K = Math.min(positions, max);
	const n = pairs.length;
	const states = new Float32Array(n * K * C);
	const labels = new Uint8Array(n * K);
	const weights = new Float32Array(n * K);
	const means = new Float32Array(n * C);
	const targets = new Float32Array(n);
	const width = Math.max(1, Math.floor(4096 / max));
	for (let from = 0; from < n; from += width) {
		const chunk = pairs.slice(from, from + width);
		const hidden = await hiddenOf(model, chunk.map(promptOf), max, config, signal);
		for (const [j, pair] of chunk.entries()) {
			const rows = hidden[j] as Float32Array;
			const i = from + j;
			const L = pair.answer.length;
			targets[i] = Math.log1p(L);
			means.set(meanRow(rows, C), i * C);
			for (let k = 0; k < K; k++) {
				// Half the positions near the end, half anywhere; weights make the loss that of all positions alike.
				const u = uniform(seed, Stream.data, i, k);
				const near = Math.min(max, 17);
				const begin = Math.min(Math.max(0, L - 8), max - near);
				const at = k % 2 === 0 ? begin + Math.floor(u * near) : Math.floor(u * max);
				const density = 0.5 / max + (at >= begin && at < begin + near ? 0.5 / near : 0);
				weights[i * K + k] = 1 / (max * density);
				labels[i * K + k] = Number(at >= L);
				states.set(rows.subarray(at * C, (at + 1) * C), (i * K + k) * C);
			}
		}
		onProgress?.({ stage: 'states', fraction: Math.min(1, (from + width) / n) });
	}
	const token = new Dense(C, units, 1).initialise(seed, 1);
	const pooled = new Dense(C, units, 1).initialise(seed, 2);
	const quantile = new Dense(C, units, levels.length).initialise(seed, 3);
	const losses = { token: 0, pooled: 0, quantile: 0 };
	const schedule = (share: number): number => 0.5 * learningRate * (1 + Math.cos(Math.PI * share));
	const batch = 16;
	// The regressors see one row per pair where the token head sees K: they get more passes.
	const passes = { token: epochs, regressors: epochs * 8 };
	const turns = new Turns();
	for (let epoch = 0; epoch < passes.regressors; epoch++) {
		const order = permutation(n, seed, Stream.order, epoch);
		losses.pooled = 0;
		losses.quantile = 0;
		if (epoch < passes.token) losses.token = 0;
		for (let from = 0; from < n; from += batch) {
			await turns.next();
			signal?.throwIfAborted();
			const list = Array.from(order.subarray(from, from + batch));
			const mean = gather(means, C, list);
			const wanted = list.map((i) => targets[i] as number);
			const rate = schedule((epoch + from / n) / passes.regressors);
			pooled.step(mean, (y) => y.map((v, r) => squared(v - (wanted[r] as number), list.length, losses)), rate);
			quantile.step(mean, (y) => pinballGradient(y, wanted, levels, losses), rate);
			if (epoch < passes.token) {
				const rows = list.flatMap((i) => Array.from({ length: K }, (_, k) => i * K + k));
				const slope = (y: Float32Array): Float32Array => logistic(y, rows, labels, weights, losses);
				token.step(gather(states, C, rows), slope, schedule((epoch + from / n) / passes.token));
			}
		}
		onProgress?.({ stage: 'training', fraction: (epoch + 1) / passes.regressors });
	}
	const extras = lengthExtras(engine);
	extras.head = new LengthHead({ token, pooled, quantile }, { levels, max, pairs: n });
	extras.calibrations = extras.calibrations.filter(({ method }) => method !== 'head');
	return {
		pairs: n,
		tooLong,
		token: losses.token / (n * K),
		pooled: losses.pooled / n,
		quantile: losses.quantile / (n * levels.length),
	};
}

/** Hidden states of `max` masked positions behind each prompt, (max, C) each. */
function hiddenOf(
	model: DiffuGPT,
	prompts: readonly ReturnType<typeof promptOf>[],
	max: number,
	config: ModelConfig,
	signal: AbortSignal | undefined,
): Promise<Float32Array[]> {
	const sequences = prompts.map((prompt) => makeCanvas(prompt, max, config).tokens);
	const begins = prompts.map(({ before }) => before.length);
	return hiddenAt(model.engine, sequences, begins, max, signal);
}

/** Mean over the rows of (n, C), as (1, C). */
function meanRow(hidden: Float32Array, C: number): Float32Array {
	const n = hidden.length / C;
	const sum = new Float64Array(C);
	for (let r = 0; r < n; r++) for (let c = 0; c < C; c++) sum[c] = (sum[c] as number) + (hidden[r * C + c] as number);
	return Float32Array.from(sum, (value) => value / n);
}

function gather(from: Float32Array, C: number, rows: readonly number[]): Float32Array {
	const out = new Float32Array(rows.length * C);
	for (const [r, row] of rows.entries()) out.set(from.subarray(row * C, (row + 1) * C), r * C);
	return out;
}

function sigmoid(x: number): number {
	return 1 / (1 + Math.exp(-x));
}

function squared(difference: number, n: number, losses: { pooled: number }): number {
	losses.pooled += difference * difference;
	return (2 * difference) / n;
}

function logistic(
	y: Float32Array,
	rows: readonly number[],
	labels: Uint8Array,
	weights: Float32Array,
	losses: { token: number },
): Float32Array {
	return y.map((logit, r) => {
		const row = rows[r] as number;
		const label = labels[row] as number;
		const weight = weights[row] as number;
		losses.token += weight * (Math.max(logit, 0) - logit * label + Math.log1p(Math.exp(-Math.abs(logit))));
		return (weight * (sigmoid(logit) - label)) / rows.length;
	});
}

function pinballGradient(
	y: Float32Array,
	wanted: readonly number[],
	levels: readonly number[],
	losses: { quantile: number },
): Float32Array {
	const O = levels.length;
	return y.map((value, i) => {
		const difference = (wanted[Math.floor(i / O)] as number) - value;
		const level = levels[i % O] as number;
		losses.quantile += difference > 0 ? level * difference : (level - 1) * difference;
		return (difference > 0 ? -level : 1 - level) / wanted.length;
	});
}
