/**
 * From end probabilities to a length, as plain functions: the rules of the methods, and their calibrated forms.
 *
 * A calibrated method has a family of bounds b(level), nested: a larger level never gives a smaller bound. Its score of a
 * pair with the true length L is the least level whose bound is at least L, so that split-conformal calibration is one
 * quantile of scores (lib/length/calibrate.ts). Where the method has a knob of its own the level is that knob ('level');
 * else it is an offset added to the prediction or a factor of it.
 *
 * - 'threshold', the token head: the first i with e_i > level; the score is the largest e before the true end.
 * - 'quantile': the first i with e_i above the level-quantile of all e.
 * - 'expected': the first i with H_i > level, H_i = -sum_{j <= i} log(1 - e_j), so that 1 - exp(-H_i) is the probability
 *   of an end at or before i when e_j is read as the probability of ending at j given no end before.
 * - the others: prediction + level, or (prediction + 1) * level - 1.
 */
import type { HeadKind, LengthMethod } from './method.js';

/** What one look at masked positions tells. */
export interface LengthLook {
	/** (n) end probabilities; see `LengthPrediction`. */
	readonly e: Float32Array;
	/** Infilling: (n) log probability of the suffix's first tokens, were it to come after i tokens. */
	readonly logEvidence?: Float64Array;
	/** Mean of e over the last `window` positions whose most probable id is an end, absent ones counted as 0. */
	tail(window: number): number;
	/** Length by the pooled regressor, or by the quantile regressor for a coverage. */
	regressed?(coverage?: number): number;
}

export interface EstimatorSettings {
	readonly method: LengthMethod;
	readonly infilling?: boolean;
	readonly coverage?: number;
	readonly quantile?: number;
	readonly probability?: number;
	readonly head?: HeadKind;
	/** Of methods without a knob. @default 'additive' */
	readonly form?: 'level' | 'additive' | 'multiplicative';
}

export interface Estimator {
	readonly form: 'level' | 'additive' | 'multiplicative';
	/** The lowest level for a look whose probabilities jump from almost 0 to almost 1, an end at even odds; see `boundAt`. */
	readonly floor: number;
	/** Index of the predicted end, -1: none. */
	predict(look: LengthLook): number;
	/** The same at a calibrated level. */
	bound(look: LengthLook, level: number): number;
	/** The least level with bound >= length. */
	score(look: LengthLook, length: number): number;
}

/** The rule of a method that looks before it denoises. */
export function estimatorOf(settings: EstimatorSettings): Estimator {
	const { method, infilling, quantile = 0.5, probability = 0.5, coverage = 0.95, head = 'token' } = settings;
	const form = settings.form === 'multiplicative' ? 'multiplicative' : 'additive';
	switch (method) {
		case 'threshold':
			return {
				form: 'level',
				floor: 0.5,
				predict: ({ e }) => firstAtLeast(e, probability),
				bound: ({ e }, level) => e.findIndex((p) => p > level),
				score: ({ e }, length) => largestBefore(e, length),
			};
		case 'quantile':
			return {
				form: 'level',
				floor: Number.NEGATIVE_INFINITY,
				predict: ({ e }) => firstAtLeast(e, quantileOf(e, quantile)),
				bound: ({ e }, level) => {
					const bound = quantileOf(e, Math.max(0, level));
					return level < 0 ? 0 : e.findIndex((p) => p > bound);
				},
				score: ({ e }, length) => (length === 0 ? -1 : rankOf(e, largestBefore(e, length))),
			};
		case 'expected':
			if (infilling) return offset('additive', (look) => coveringFit(look.logEvidence as Float64Array, coverage));
			return {
				form: 'level',
				floor: Math.LN2,
				predict: ({ e }) => coveringEnd(e, coverage),
				bound: ({ e }, level) => cumulativeHazard(e).findIndex((h) => h > level),
				score: ({ e }, length) => (length === 0 ? -1 : (cumulativeHazard(e)[length - 1] as number)),
			};
		case 'head':
			if (head === 'token') return estimatorOf({ ...settings, method: 'threshold' });
			return offset(form, (look) => {
				const length = Math.max(0, Math.round(look.regressed?.(head === 'quantile' ? coverage : undefined) ?? 0));
				return length >= look.e.length ? -1 : length;
			});
		case 'daedal':
			return offset(form, ({ e }) => e.length - 1);
		case 'constant':
			return offset(form, () => 0);
		default:
			return offset(form, ({ e }) => argMax(e));
	}
}

/** A method that predicts one length; no end counts as the whole canvas. */
function offset(form: 'additive' | 'multiplicative', predict: (look: LengthLook) => number): Estimator {
	const base = (look: LengthLook): number => {
		const end = predict(look);
		return end < 0 ? look.e.length : end;
	};
	const additive = form === 'additive';
	return {
		form,
		floor: Number.NEGATIVE_INFINITY,
		predict,
		bound: (look, level) =>
			Math.max(0, additive ? base(look) + Math.ceil(level) : Math.ceil((base(look) + 1) * level - 1e-9) - 1),
		score: (look, length) => (additive ? length - base(look) : (length + 1) / (base(look) + 1)),
	};
}

/** Positions between "hardly the end" and "surely the end" of a look that fixes the length, at most. */
export const sharpSpread = 2;

/**
 * The bound at a calibrated level, which for a look that fixes the length is never below an end at even odds: where the
 * probabilities jump, every level in between gives the same bound, and a lower one would be met by noise long before the end.
 */
export function boundAt(estimator: Estimator, look: LengthLook, level: number): number {
	const isSharp = spreadOfEnds(look.e) <= sharpSpread;
	return estimator.bound(look, isSharp ? Math.max(level, estimator.floor) : level);
}

/** How many positions lie between "hardly the end" and "surely the end": those with 0.05 < e < 0.95. */
export function spreadOfEnds(e: Float32Array): number {
	let count = 0;
	for (const p of e) if (p > 0.05 && p < 0.95) count++;
	return count;
}

/** The group of a prompt in a calibration. */
export function groupOf({ e }: LengthLook, edges: readonly number[]): number {
	if (edges.length === 0) return 0;
	const spread = spreadOfEnds(e);
	const group = edges.findIndex((edge) => spread <= edge);
	return group < 0 ? edges.length : group;
}

/** The most probable end position: the first of equals. */
export function argMax(e: ArrayLike<number>): number {
	let best = e.length > 0 ? 0 : -1;
	for (let i = 1; i < e.length; i++) if ((e[i] as number) > (e[best] as number)) best = i;
	return best;
}

export function firstAtLeast(e: Float32Array, bound: number): number {
	return e.findIndex((p) => p >= bound);
}

/** Quantile with linear interpolation between order statistics. */
export function quantileOf(e: Float32Array | Float64Array, q: number): number {
	const sorted = e.slice().sort();
	const place = q * (sorted.length - 1);
	const low = Math.floor(place);
	const a = sorted[low] as number;
	return a + (place - low) * ((sorted[Math.min(low + 1, sorted.length - 1)] as number) - a);
}

/** The least q with quantileOf(e, q) >= value, for a value of e. */
function rankOf(e: Float32Array, value: number): number {
	let below = 0;
	for (const p of e) if (p < value) below++;
	// A hair above the order statistic, so that interpolation cannot round below it.
	return e.length > 1 ? Math.min(1, (below + 1e-9) / (e.length - 1)) : 0;
}

/**
 * The smallest i with P(end at or before i) >= coverage, where e_i is read as the probability of ending at i given no end
 * before: P(end at or before i) = 1 - prod_{j <= i} (1 - e_j).
 */
export function coveringEnd(e: Float32Array, coverage: number): number {
	let survival = 1;
	return e.findIndex((p) => {
		survival *= 1 - p;
		return 1 - survival >= coverage;
	});
}

/** H_i of the file's first paragraph; e is kept below 1 by 2^-24, so that H stays finite. */
export function cumulativeHazard(e: Float32Array): Float64Array {
	const hazard = new Float64Array(e.length);
	let sum = 0;
	for (let i = 0; i < e.length; i++) {
		sum -= Math.log1p(-Math.min(e[i] as number, 1 - 2 ** -24));
		hazard[i] = sum;
	}
	return hazard;
}

/**
 * Infilling: the suffix is known to come, after one of 0 .. max tokens, so P(length = i) is its evidence there divided by
 * the sum over all places (a uniform prior). The smallest i with P(length <= i) >= coverage.
 */
export function coveringFit(logEvidence: Float64Array, coverage: number): number {
	const largest = logEvidence.reduce((a, b) => Math.max(a, b), Number.NEGATIVE_INFINITY);
	const weights = logEvidence.map((log) => Math.exp(log - largest));
	const total = weights.reduce((a, b) => a + b, 0);
	let sum = 0;
	// The last comparison must not fail by rounding.
	const found = weights.findIndex((weight) => {
		sum += weight;
		return sum >= coverage * total * (1 - 1e-12);
	});
	return found < 0 ? logEvidence.length - 1 : found;
}

function largestBefore(e: Float32Array, length: number): number {
	let largest = -1;
	for (let i = 0; i < length; i++) largest = Math.max(largest, e[i] as number);
	return largest;
}
