/**
 * How long the answer is. A length method decides how many open positions a canvas begins with, may crop them after one
 * look at the end probabilities, and may let the canvas grow. Whatever the method, once an end token is committed the
 * positions after it leave the canvas (the early cut, in lib/generate.ts).
 *
 * Formulas are algorithms.md 4.1: e_i is the aligned probability of the end token at the i-th open position, after one
 * forward on the prompt and `max` masks. No hit means the whole canvas.
 */
import { check } from '../errors.js';

/** Names of the length methods. */
export type LengthMethod =
	| 'first-step'
	| 'quantile'
	| 'threshold'
	| 'expected'
	| 'head'
	| 'daedal'
	| 'rho-eos'
	| 'block'
	| 'constant';

/** Variable length: at most `max` new tokens, the end token among them. */
export interface LengthOptions {
	/** Most new tokens. */
	readonly max: number;
	/** @default 'constant': a canvas of `max` tokens, cut at the end token */
	readonly method?: LengthMethod;
	/** Of 'quantile': the first position whose e is at least this quantile of all e. @default 0.5 */
	readonly quantile?: number;
	/** Of 'threshold': the first position with e >= this. @default 0.5 */
	readonly probability?: number;
	/** Of 'expected': the share of the implied length distribution that must fit. @default 0.95 */
	readonly coverage?: number;
	/** Of 'block': tokens added at a time. @default 32 */
	readonly block?: number;
}

/** What `predictLength` answers. */
export interface LengthPrediction {
	/** Tokens before the end token; `max` when no end was found. */
	length: number;
	method: LengthMethod;
	/** (max) aligned probability of the end token at each open position. */
	probabilities: Float32Array;
}

export interface LengthRule {
	method: LengthMethod;
	max: number;
	/** Open positions of the first canvas. */
	initial: number;
	/** Index of the predicted end among the open positions, or -1: none. Absent: the method does not look. */
	predict?: (e: Float32Array) => number;
	/** Open positions to add when all are filled and no end token was committed. */
	grow?: (length: number) => number;
}

const uses: Record<LengthMethod, readonly (keyof LengthOptions)[] | undefined> = {
	'first-step': [],
	quantile: ['quantile'],
	threshold: ['probability'],
	expected: ['coverage'],
	block: ['block'],
	constant: [],
	head: undefined,
	daedal: undefined,
	'rho-eos': undefined,
};

/** Checks the options and makes the rule. @throws `ERR_DN_ARGUMENT` */
export function resolveLength(options: LengthOptions, fallback: LengthMethod = 'constant'): LengthRule {
	const { max, method = fallback, quantile = 0.5, probability = 0.5, coverage = 0.95, block = 32 } = options;
	check(
		Object.hasOwn(uses, method),
		`option length.method is ${JSON.stringify(method)}, expected ${Object.keys(uses).join(', ')}`,
	);
	const used = uses[method];
	check(used, `option length.method: '${method}' is not available yet`);
	for (const [key, value] of Object.entries(options)) {
		check(
			value === undefined || key === 'max' || key === 'method' || used.includes(key as keyof LengthOptions),
			`option length.${key} has no meaning for the method '${method}'`,
		);
	}
	check(Number.isSafeInteger(max) && max >= 1, `option length.max is ${String(max)}, expected a whole number >= 1`);
	for (const [key, value] of Object.entries({ quantile, probability, coverage })) {
		check(
			typeof value === 'number' && value >= 0 && value <= 1,
			`option length.${key} is ${String(value)}, expected a number from 0 to 1`,
		);
	}
	check(
		Number.isSafeInteger(block) && block >= 1,
		`option length.block is ${String(block)}, expected a whole number >= 1`,
	);
	const rule = { method, max, initial: max };
	switch (method) {
		case 'first-step':
			return { ...rule, predict: argMax };
		case 'quantile':
			return { ...rule, predict: (e) => firstAtLeast(e, quantileOf(e, quantile)) };
		case 'threshold':
			return { ...rule, predict: (e) => firstAtLeast(e, probability) };
		case 'expected':
			return { ...rule, predict: (e) => coveringEnd(e, coverage) };
		case 'block':
			return { ...rule, initial: Math.min(block, max), grow: (length) => Math.min(block, max - length) };
		default:
			return rule;
	}
}

/** The most probable end position: the first of equals. */
export function argMax(e: Float32Array): number {
	let best = e.length > 0 ? 0 : -1;
	for (let i = 1; i < e.length; i++) if ((e[i] as number) > (e[best] as number)) best = i;
	return best;
}

export function firstAtLeast(e: Float32Array, bound: number): number {
	return e.findIndex((p) => p >= bound);
}

/** Quantile with linear interpolation between order statistics. */
export function quantileOf(e: Float32Array, q: number): number {
	const sorted = e.slice().sort();
	const place = q * (sorted.length - 1);
	const low = Math.floor(place);
	const a = sorted[low] as number;
	return a + (place - low) * ((sorted[Math.min(low + 1, sorted.length - 1)] as number) - a);
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
