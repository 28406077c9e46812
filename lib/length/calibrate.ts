/**
 * Safety margins with a promise: split-conformal calibration of a length method on held-out pairs.
 *
 * Each method has nested bounds b(level) and gives every pair the least level that would have been enough (its score,
 * lib/length/rules.ts). With n scores and a target c, the margin is the k-th smallest score, k = ceil((n + 1) c). For a new
 * pair exchangeable with these, P(bound >= length) >= c, and <= c + 1 / (n + 1) without ties (Vovk et al. 2005; Lei et al.
 * 2018). When k > n no finite margin keeps the promise and the canvas stays whole. A prompt that fixes the length is bounded
 * at no less than the method's floor (an end at even odds), which can only make more answers fit.
 *
 * The promise is on average over prompts. So that prompts which fix the length do not pay for those that leave it open, or
 * the reverse, each group of a taxonomy that the look itself shows, how sharply the end probabilities rise, has a margin and
 * a promise of its own (Mondrian conformal prediction: Vovk, Gammerman, Shafer, Algorithmic Learning in a Random World, 4.5).
 */
import { check } from '../errors.js';
import type { DiffuGPT } from '../model.js';
import { checkOptions, show } from '../option-checks.js';
import { type LengthCalibration, lengthExtras, storeCalibration } from './extras.js';
import { firstCanvas } from './look.js';
import { type LengthMethod, type LengthOptions, type LengthRule, resolveLength } from './method.js';
import {
	inParallel,
	type LengthPair,
	type PairData,
	type PairOptions,
	pairOptionNames,
	promptOf,
	readPairs,
} from './pairs.js';
import { boundAt, estimatorOf, groupOf, type LengthLook, sharpSpread } from './rules.js';

/** Options of {@link calibrateLength}. */
export interface CalibrateOptions
	extends PairOptions,
		Pick<LengthOptions, 'max' | 'head' | 'initial' | 'grow' | 'window' | 'low' | 'high'> {
	/** The method to calibrate; not 'block' or 'rho-eos', which decide while they denoise. */
	readonly method: LengthMethod;
	/** Target shares of answers that fit. @default [0.8, 0.9, 0.95, 0.99] */
	readonly coverage?: number | readonly number[];
	/**
	 * Of methods without a knob of their own: add to the prediction or multiply (length + 1).
	 * @default 'additive'
	 */
	readonly form?: 'additive' | 'multiplicative';
	/**
	 * Spreads that part the prompts into groups with margins of their own, ascending; `[]`: one margin for all.
	 * @default [2] when both groups have 100 pairs or more, else []
	 */
	readonly edges?: readonly number[];
	/** Called after every pair; `fraction`: share of the pairs done, 0 to 1. @default none */
	readonly onProgress?: (progress: { readonly pairs: number; readonly fraction: number }) => void;
}

const calibrateNames = [
	...pairOptionNames,
	...(['max', 'head', 'initial', 'grow', 'window', 'low', 'high'] as const),
	...(['method', 'coverage', 'form', 'edges', 'onProgress'] as const),
] satisfies (keyof CalibrateOptions)[];

/** What a calibration found. */
export interface CalibrationReport {
	/** What was stored with the model. */
	readonly calibration: LengthCalibration;
	/** Per target: the share of the calibration pairs that fit, and the mean of bound - length. */
	readonly achieved: readonly {
		readonly coverage: number;
		readonly margins: readonly (number | null)[];
		readonly share: number;
		readonly looseness: number;
	}[];
	/** Pairs left out because prompt or answer does not fit. */
	readonly tooLong: number;
	/** How well e tells positions after the end from those before it, see {@link endSignal}. */
	readonly signal: EndSignal | undefined;
	/** What is wrong with the end signal; empty when it is good or was not measured. */
	readonly warnings: readonly string[];
}

/**
 * Fits the margins of a method and stores them with the model: `length: { max, method, coverage }` uses them, `model.save`
 * writes them. Replaces an earlier calibration of the same method and `max`.
 * @throws `ERR_DN_ARGUMENT` for a method that decides while denoising, a missing head, empty data, a malformed line;
 * `ERR_DN_CHECKPOINT` when the data cannot be read; `ERR_DN_DIVERGED` where the model gives no finite number;
 * `ERR_DN_OUT_OF_MEMORY`; `signal.reason`
 */
export async function calibrateLength(
	model: DiffuGPT,
	data: PairData,
	options: CalibrateOptions,
): Promise<CalibrationReport> {
	check(options !== undefined, 'calibrateLength needs the options method and max');
	checkOptions('calibrateLength', options, calibrateNames);
	const { method, max, head, signal, onProgress } = options;
	const coverages = [...new Set(([] as number[]).concat(options.coverage ?? [0.8, 0.9, 0.95, 0.99]))];
	check(
		coverages.length > 0 && coverages.every((c) => typeof c === 'number' && c > 0 && c < 1),
		`option coverage is ${show(options.coverage)}, expected numbers between 0 and 1`,
	);
	check(
		method !== 'block' && method !== 'rho-eos',
		`option method: '${method}' decides on the length while it denoises; there is no prediction to calibrate`,
	);
	const form = checkForm(options);
	const { edges } = options;
	check(
		edges === undefined ||
			(Array.isArray(edges) &&
				edges.every((edge, i) => Number.isFinite(edge) && (i === 0 || edge > (edges[i - 1] as number)))),
		`option edges is ${show(edges)}, expected ascending numbers`,
	);
	const settings = settingsOf(options, method, form);
	const { form: _, ...asked } = settings;
	const extras = lengthExtras(model.engine);
	const rule = resolveLength({ max, method, ...asked }, method, { extras, infilling: false });
	const { pairs, tooLong } = await readPairs(model, data, max, options);
	let done = 0;
	const looks = await inParallel(pairs, 64, async (pair) => {
		const look = await lookOf(model, pair, rule, signal);
		done++;
		onProgress?.({ pairs: done, fraction: done / pairs.length });
		return look;
	});
	const lengths = pairs.map((pair) => pair.answer.length);
	const fitted = fitMargins(looks, lengths, { method, max, settings, coverages, ...(edges ? { edges } : {}) });
	storeCalibration(extras, fitted);
	const achieved = fitted.levels.map(({ coverage, margins }) => {
		const bounds = looks.map((look) => boundOf(fitted, coverage, look));
		const fits = bounds.filter((bound, i) => bound >= (lengths[i] as number)).length;
		const slack = bounds.reduce((sum, bound, i) => sum + bound - (lengths[i] as number), 0);
		return { coverage, margins, share: fits / pairs.length, looseness: slack / pairs.length };
	});
	const seen =
		method === 'constant' || head === 'pooled' || head === 'quantile' ? undefined : endSignal(looks, lengths);
	return { calibration: fitted, achieved, tooLong, signal: seen, warnings: seen ? warningsOf(seen) : [] };
}

function checkForm({ form, method, head }: CalibrateOptions): 'multiplicative' | undefined {
	check(
		form === undefined || form === 'additive' || form === 'multiplicative',
		`option form is ${show(form)}, expected 'additive' or 'multiplicative'`,
	);
	if (form === undefined) return undefined;
	const own = estimatorOf({ method, ...(head ? { head } : {}) }).form;
	check(own !== 'level', `option form: the method '${method}' is calibrated by its own knob`);
	return form === 'multiplicative' ? form : undefined;
}

function settingsOf(
	options: CalibrateOptions,
	method: LengthMethod,
	form: 'multiplicative' | undefined,
): LengthCalibration['settings'] {
	const settings: Record<string, unknown> = {};
	for (const key of ['initial', 'grow', 'window', 'low', 'high'] as const) {
		if (options[key] !== undefined) settings[key] = options[key];
	}
	if (method === 'head') settings['head'] = options.head ?? 'token';
	else check(options.head === undefined, `option head has no meaning for the method '${method}'`);
	if (form) settings['form'] = form;
	return settings;
}

/** The k-th smallest score, k = ceil((n + 1) c); null when k > n. */
export function conformalQuantile(scores: readonly number[], coverage: number): number | null {
	// (n + 1) c is often a whole number that rounding must not push up.
	const k = Math.ceil((scores.length + 1) * coverage - 1e-9);
	if (k > scores.length) return null;
	return [...scores].sort((a, b) => a - b)[Math.max(0, k - 1)] as number;
}

/** Margins from looks that are at hand. */
export function fitMargins(
	looks: readonly LengthLook[],
	lengths: readonly number[],
	what: {
		method: LengthMethod;
		max: number;
		settings: LengthCalibration['settings'];
		coverages: readonly number[];
		edges?: readonly number[];
	},
): LengthCalibration {
	const { method, max, settings, coverages } = what;
	const edges = what.edges ?? usualEdges(looks);
	const groups = looks.map((look) => groupOf(look, edges));
	const levels = coverages.map((coverage) => {
		const estimator = estimatorOf({ ...settings, method, coverage });
		const scores: number[][] = Array.from({ length: edges.length + 1 }, () => []);
		for (const [i, look] of looks.entries()) {
			scores[groups[i] as number]?.push(estimator.score(look, lengths[i] as number));
		}
		return { coverage, margins: scores.map((list) => conformalQuantile(list, coverage)) };
	});
	const { form } = estimatorOf({ ...settings, method });
	return { method, max, form, settings, pairs: looks.length, edges, levels };
}

/** Sharp and other prompts apart when there are enough of both for the usual coverages. */
function usualEdges(looks: readonly LengthLook[]): readonly number[] {
	const edges = [sharpSpread];
	const others = looks.reduce((sum, look) => sum + groupOf(look, edges), 0);
	return Math.min(others, looks.length - others) >= 100 ? edges : [];
}

/** Tokens that a calibrated method makes room for; `max`: the whole canvas. */
export function boundOf(calibration: LengthCalibration, coverage: number, look: LengthLook): number {
	const { method, max, settings, edges, levels } = calibration;
	const level = levels.find((entry) => entry.coverage === coverage);
	const margin = level?.margins[groupOf(look, edges)] ?? null;
	if (margin === null) return max;
	const end = boundAt(estimatorOf({ ...settings, method, coverage }), look, margin);
	return end < 0 ? max : Math.min(end, max);
}

/** What a method sees of one pair before it denoises. */
export async function lookOf(
	model: DiffuGPT,
	pair: LengthPair,
	rule: LengthRule,
	signal: AbortSignal | undefined,
): Promise<LengthLook> {
	// The rule that asks is told to remember what it was shown.
	let seen: LengthLook = { e: new Float32Array(rule.max), tail: () => 0 };
	if (!rule.looks) return seen;
	const remembering: LengthRule = {
		...rule,
		predict: (look) => {
			seen = look;
			return -1;
		},
	};
	await firstCanvas(model.engine, promptOf(pair), remembering, lengthExtras(model.engine).head, 0n, signal);
	return seen;
}

/** Whether the end can be read from e at all. */
export interface EndSignal {
	/** Mean of e over positions before the true end. */
	readonly before: number;
	/** Mean of e from the true end on. */
	readonly after: number;
	/** P(e after > e before) for one position of each drawn from the same answer's canvas, averaged; 0.5: no signal. */
	readonly auc: number;
}

/** Measures the end probabilities against the true lengths. */
export function endSignal(looks: readonly LengthLook[], lengths: readonly number[]): EndSignal {
	let before = 0;
	let beforeCount = 0;
	let after = 0;
	let afterCount = 0;
	let auc = 0;
	let measured = 0;
	for (const [i, { e }] of looks.entries()) {
		const length = lengths[i] as number;
		for (let j = 0; j < e.length; j++) {
			if (j < length) {
				before += e[j] as number;
				beforeCount++;
			} else {
				after += e[j] as number;
				afterCount++;
			}
		}
		if (length === 0 || length >= e.length) continue;
		measured++;
		// Ranks among all positions, ties shared: the Mann-Whitney form of the area.
		const order = Array.from(e.keys()).sort((a, b) => (e[a] as number) - (e[b] as number));
		let sum = 0;
		for (let from = 0; from < order.length; ) {
			let to = from;
			while (to < order.length && e[order[to] as number] === e[order[from] as number]) to++;
			for (let r = from; r < to; r++) if ((order[r] as number) >= length) sum += (from + to + 1) / 2;
			from = to;
		}
		const late = e.length - length;
		auc += (sum - (late * (late + 1)) / 2) / (late * length);
	}
	return {
		before: beforeCount > 0 ? before / beforeCount : 0,
		after: afterCount > 0 ? after / afterCount : 0,
		auc: measured > 0 ? auc / measured : 0.5,
	};
}

/** What a user should know of a weak end signal. */
export function warningsOf({ before, after, auc }: EndSignal): string[] {
	const numbers = `mean P(end) ${before.toPrecision(2)} before the true end, ${after.toPrecision(2)} from it on, area under the curve ${auc.toFixed(2)}`;
	if (auc < 0.6 || after < 2 * before) {
		return [
			`the end probabilities are flat (${numbers}): the model was hardly trained on where texts end, a calibrated bound is little better than a constant. Train it on pairs with padding`,
		];
	}
	if (after < 0.05) {
		return [
			`the end probabilities are small (${numbers}): methods that use them uncalibrated ('threshold', 'expected', 'daedal', 'rho-eos') will find no end`,
		];
	}
	return [];
}
