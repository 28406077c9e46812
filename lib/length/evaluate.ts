/**
 * `evaluateLength`: every length method on held-out pairs, against constant bounds at the same coverage and against the
 * whole canvas. First the bounds, from looks that the methods share (one forward per pair); then whole generations, timed
 * in turns: every batch of prompts goes through all methods before the next one, in rotating order, so that a drift of the
 * machine touches all alike.
 *
 * No figure is fitted on the pairs that are scored: margins come from other pairs.
 */
import { check } from '../errors.js';
import { wholeNumber } from '../eval/context.js';
import type { DiffuGPT } from '../model.js';
import { checkOptions, show } from '../option-checks.js';
import { boundOf, type EndSignal, endSignal, fitMargins, lookOf, warningsOf } from './calibrate.js';
import {
	calibrationSettings,
	isCalibrationOf,
	type LengthCalibration,
	type LengthExtras,
	lengthExtras,
	storeCalibration,
} from './extras.js';
import { type CompareOptions, compareGenerations, type GenerationComparison } from './generations.js';
import { type LengthMethod, type LengthOptions, resolveLength } from './method.js';
import {
	type BoundMetrics,
	bestConstant,
	bootstrapDifference,
	boundMetrics,
	type Difference,
	pinballLosses,
} from './metrics.js';
import { inParallel, type LengthPair, type PairData, type PairOptions, pairOptionNames, readPairs } from './pairs.js';
import type { LengthLook } from './rules.js';

/** A method with options of its own; the coverage is the evaluation's. */
export type MethodChoice = LengthMethod | Omit<LengthOptions, 'max' | 'coverage'>;

/** Options of {@link evaluateLength}. */
export interface EvaluateLengthOptions extends PairOptions, CompareOptions {
	/** The whole canvas: most new tokens. */
	readonly max: number;
	/** @default all that the model has what they need for */
	readonly methods?: readonly MethodChoice[];
	/** Target shares of answers that fit; generations are run at the last one. @default [0.8, 0.9, 0.95] */
	readonly coverage?: readonly number[];
	/**
	 * Where the margins come from: pairs that are not scored; 'stored', the model's own calibrations; 'split', every other
	 * pair, the rest being scored. @default 'stored' when the model has one for `max`, else 'split'
	 */
	readonly calibration?: PairData | 'stored' | 'split';
	/** Most calibration pairs. @default all */
	readonly calibrationLimit?: number;
	/**
	 * Store the fitted margins with the model at the coverages asked for, as `calibrateLength` does; not with 'stored'.
	 * @default false
	 */
	readonly keep?: boolean;
	/** Told how far each stage is. @default none */
	readonly onProgress?: (progress: LengthProgress) => void;
}

const evaluateLengthNames = [
	...pairOptionNames,
	...(['generations', 'generate', 'seeds', 'batch', 'judge', 'likelihoods', 'samples', 'onProgress'] as const),
	...(['max', 'methods', 'coverage', 'calibration', 'calibrationLimit', 'keep'] as const),
] satisfies (keyof EvaluateLengthOptions)[];

/** How far {@link evaluateLength} is. */
export interface LengthProgress {
	/** What is going on: looks that give the bounds, whole generations, NELBOs of the references. */
	readonly stage: 'looks' | 'generations' | 'likelihoods';
	/** Share of the stage that is done, 0 to 1. */
	readonly fraction: number;
}

/** Bounds of one method at one setting on one kind of pairs. */
export interface BoundRow extends BoundMetrics {
	/** The method with the values of its options. */
	readonly method: string;
	/** Target share; null: uncalibrated, with the method's own defaults. */
	readonly coverage: number | null;
	/** '' is all kinds together. */
	readonly kind: string;
	/** Mean pinball loss at the target; null when uncalibrated. */
	readonly pinball: number | null;
	/** Pinball loss minus that of the constant that is best on these very pairs; negative is better. */
	readonly versusConstant: Difference | null;
}

/** What {@link evaluateLength} finds. */
export interface LengthEvaluation {
	/** The whole canvas: most new tokens. */
	readonly max: number;
	/** Pairs that were scored. */
	readonly pairs: number;
	/** Scored pairs by kind; '' is all. */
	readonly kinds: Readonly<Record<string, number>>;
	/** Mean tokens of their answers. */
	readonly meanLength: number;
	/** Pairs left out because prompt or answer does not fit. */
	readonly tooLong: number;
	/** Where the margins came from, and the pairs they were fitted on. */
	readonly calibration: { readonly source: 'data' | 'stored' | 'split'; readonly pairs: number };
	/** Target shares of answers that fit. */
	readonly coverage: readonly number[];
	/** Of the first step's end probabilities, by kind; '' is all. */
	readonly signal: Readonly<Record<string, EndSignal>>;
	/** One row per method, setting and kind. */
	readonly bounds: readonly BoundRow[];
	/** Coverage against looseness, all kinds together. */
	readonly frontier: readonly {
		readonly method: string;
		readonly coverage: number;
		readonly correct: number;
		readonly slack: number;
	}[];
	/** Null when none were asked for. */
	readonly generations: GenerationComparison | null;
	/** A weak end signal, and pairs left out. */
	readonly warnings: readonly string[];
	/** Time spent, milliseconds. */
	readonly ms: number;
}

/** One method to be evaluated. */
export interface Candidate {
	readonly name: string;
	readonly method: LengthMethod;
	readonly options: Omit<LengthOptions, 'max' | 'coverage'>;
}

const frontierCoverages = [0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.975, 0.99];

/**
 * Measures how well the length methods bound the true lengths of pairs: what fits, what is wasted, calibrations on fresh pairs
 * and the frontier between the two; with `generations`, whole generations under every method.
 * @throws `ERR_DN_ARGUMENT` naming the option, the line of a bad record, the missing head or calibration;
 * `ERR_DN_CHECKPOINT` when the data cannot be read; `ERR_DN_DIVERGED` where a model gives no finite number;
 * `ERR_DN_OUT_OF_MEMORY`; `signal.reason`
 */
export async function evaluateLength(
	model: DiffuGPT,
	data: PairData,
	options: EvaluateLengthOptions,
): Promise<LengthEvaluation> {
	const begin = performance.now();
	check(options !== undefined, 'evaluateLength needs the option max');
	checkOptions('evaluateLength', options, evaluateLengthNames);
	model.engine.check();
	const { max, signal, onProgress } = options;
	const coverage = options.coverage ?? [0.8, 0.9, 0.95];
	check(
		Array.isArray(coverage) && coverage.length > 0 && coverage.every((c) => c > 0 && c < 1),
		`option coverage is ${show(coverage)}, expected numbers between 0 and 1`,
	);
	for (const name of ['limit', 'calibrationLimit'] as const)
		if (options[name] !== undefined) wholeNumber(name, options[name], 1);
	const own = lengthExtras(model.engine);
	let candidates = candidatesOf(options.methods, own, max);
	const read = await readPairs(model, data, max, options);
	const source = options.calibration ?? (own.calibrations.some((entry) => entry.max === max) ? 'stored' : 'split');
	const fromStored = source === 'stored';
	const fromSplit = source === 'split';
	if (fromStored) candidates = candidates.map((candidate) => withStored(candidate, own, max));
	check(
		!(options.keep && fromStored),
		"option keep stores the margins that are fitted here, and calibration: 'stored' fits none",
	);
	let pairs = read.pairs;
	let fitting: LengthPair[] = [];
	if (fromSplit) {
		check(pairs.length >= 2, "option calibration 'split' needs at least two pairs");
		fitting = pairs.filter((_, i) => i % 2 === 0);
		pairs = pairs.filter((_, i) => i % 2 === 1);
	} else if (!fromStored) {
		const { calibrationLimit: limit, limit: _, ...rest } = options;
		fitting = (await readPairs(model, source as PairData, max, { ...rest, ...(limit ? { limit } : {}) })).pairs;
	}
	const looking = candidates.filter(({ method }) => method !== 'block' && method !== 'rho-eos');
	const total = looking.length * (pairs.length + fitting.length);
	let done = 0;
	const shared = new Map<string, LengthLook[]>();
	const looksOf = async (list: readonly LengthPair[], name: string, candidate: Candidate): Promise<LengthLook[]> => {
		// Methods that read the same probabilities share one look.
		const { method, options: given } = candidate;
		const groups: Partial<Record<LengthMethod, string>> = {
			daedal: settingsKey(candidate),
			head: 'head',
			constant: 'none',
		};
		const group = groups[method] ?? 'end';
		const known = shared.get(`${name} ${group}`);
		done += list.length;
		if (known) return known;
		const rule = resolveLength({ ...given, max }, method, { extras: own, infilling: false });
		const before = done - list.length;
		let seen = 0;
		const looks = await inParallel(list, 64, async (pair) => {
			signal?.throwIfAborted();
			const look = await lookOf(model, pair, rule, signal);
			onProgress?.({ stage: 'looks', fraction: (before + ++seen) / total });
			return look;
		});
		shared.set(`${name} ${group}`, looks);
		return looks;
	};
	const lengths = pairs.map((pair) => pair.answer.length);
	const kinds = [...new Set(pairs.map((pair) => pair.kind))].sort();
	const groups = new Map<string, number[]>([['', pairs.map((_, i) => i)]]);
	if (kinds.some((kind) => kind !== '')) {
		for (const kind of kinds)
			groups.set(
				kind || 'none',
				pairs.flatMap((pair, i) => (pair.kind === kind ? [i] : [])),
			);
	}
	const calibrations: LengthCalibration[] = [];
	const bounds: BoundRow[] = [];
	const frontier: { method: string; coverage: number; correct: number; slack: number }[] = [];
	const row = async (name: string, all: readonly number[], target: number | null): Promise<void> => {
		for (const [kind, list] of groups) {
			const mine = list.map((i) => all[i] as number);
			const truth = list.map((i) => lengths[i] as number);
			let versus: { pinball: number | null; versusConstant: Difference | null } = {
				pinball: null,
				versusConstant: null,
			};
			if (target !== null) {
				const losses = pinballLosses(mine, truth, target);
				const best = bestConstant(truth, target);
				const baseline = pinballLosses(
					truth.map(() => best),
					truth,
					target,
				);
				versus = {
					pinball: losses.reduce((a, b) => a + b, 0) / losses.length,
					versusConstant: await bootstrapDifference(losses, baseline, { signal }),
				};
			}
			bounds.push({ method: name, coverage: target, kind, ...boundMetrics(mine, truth, max), ...versus });
		}
	};
	for (const candidate of looking) {
		const { name, method, options: given } = candidate;
		const looks = await looksOf(pairs, 'scored', candidate);
		const rule = resolveLength({ ...given, max }, method, { extras: own, infilling: false });
		await row(
			name,
			looks.map((look) => boundWithout(rule.predict?.(look, 0) ?? -1, max)),
			null,
		);
		const settings = calibrationSettings(method, given);
		const targets = [...new Set([...coverage, ...frontierCoverages])].sort((a, b) => a - b);
		const fitted = fromStored
			? own.calibrations.find((entry) => isCalibrationOf(entry, method, given, max))
			: fitMargins(
					await looksOf(fitting, 'fitting', candidate),
					fitting.map((pair) => pair.answer.length),
					{ method, max, settings, coverages: targets },
				);
		if (!fitted) continue;
		calibrations.push(fitted);
		if (options.keep) {
			const levels = fitted.levels.filter((level) => coverage.includes(level.coverage));
			storeCalibration(own, { ...fitted, levels });
		}
		for (const { coverage: target } of fitted.levels) {
			const all = looks.map((look) => boundOf(fitted, target, look));
			if (coverage.includes(target)) await row(name, all, target);
			const { correct } = boundMetrics(all, lengths, max);
			const slack = all.reduce((sum, bound, i) => sum + bound - (lengths[i] as number), 0) / all.length;
			frontier.push({ method: name, coverage: target, correct, slack });
		}
	}
	const endLooks =
		shared.get('scored end') ??
		(await looksOf(pairs, 'scored', { name: 'first-step', method: 'first-step', options: {} }));
	const signals: Record<string, EndSignal> = {};
	for (const [kind, list] of groups) {
		signals[kind] = endSignal(
			list.map((i) => endLooks[i] as LengthLook),
			list.map((i) => lengths[i] as number),
		);
	}
	shared.clear();
	const generations =
		options.generations === 0
			? null
			: await compareGenerations(
					model,
					pairs,
					{ head: own.head, calibrations },
					candidates,
					coverage[coverage.length - 1] as number,
					options,
				);
	return {
		max,
		pairs: pairs.length,
		kinds: Object.fromEntries([...groups].map(([kind, list]) => [kind, list.length])),
		meanLength: lengths.reduce((a, b) => a + b, 0) / lengths.length,
		tooLong: read.tooLong,
		calibration: {
			source: fromStored ? 'stored' : fromSplit ? 'split' : 'data',
			pairs: fromStored ? Math.max(0, ...calibrations.map((entry) => entry.pairs)) : fitting.length,
		},
		coverage,
		signal: signals,
		bounds,
		frontier,
		generations,
		warnings: [
			...warningsOf(signals[''] as EndSignal),
			...(read.tooLong > 0 ? [`${read.tooLong} pairs do not fit max ${max} or the context and were left out`] : []),
		],
		ms: performance.now() - begin,
	};
}

/** Room that an uncalibrated prediction leaves. */
function boundWithout(end: number, max: number): number {
	return end < 0 ? max : Math.min(end, max);
}

/** A method of which nothing is said has the options that its stored margins were fitted with, as in a generation. */
function withStored(candidate: Candidate, { calibrations }: LengthExtras, max: number): Candidate {
	const { method, options } = candidate;
	if (method !== 'daedal' || settingsKey(candidate) !== settingsKey({ method, options: {} })) return candidate;
	const stored = calibrations.find((entry) => entry.method === method && entry.max === max);
	const { form: _, ...settings } = stored?.settings ?? {};
	return { ...candidate, options: { ...options, ...settings } };
}

/** Equal for candidates that margins and looks do not tell apart. */
function settingsKey({ method, options }: Pick<Candidate, 'method' | 'options'>): string {
	return JSON.stringify([method, calibrationSettings(method, options)]);
}

/** The methods asked for, checked; by default all but those that need what the model has not. */
function candidatesOf(methods: readonly MethodChoice[] | undefined, extras: LengthExtras, max: number): Candidate[] {
	const plain: MethodChoice[] = [
		'constant',
		'first-step',
		'quantile',
		'threshold',
		'expected',
		'daedal',
		'rho-eos',
		'block',
	];
	const heads = (['token', 'pooled', 'quantile'] as const).map((head) => ({ method: 'head' as const, head }));
	const wanted = methods ?? [...plain, ...(extras.head?.max === max ? heads : [])];
	check(Array.isArray(wanted) && wanted.length > 0, 'option methods is not a list of length methods');
	const named = wanted.map((choice) => {
		const { method = 'constant', ...options } = typeof choice === 'string' ? { method: choice } : choice;
		resolveLength({ ...options, max, method }, method, { extras, infilling: false });
		const facts = Object.entries(options).filter(([, value]) => value !== undefined);
		const short = [method, ...facts.map(([, value]) => value)].join(' ');
		const long = [method, ...facts.map(([key, value]) => `${key} ${value}`)].join(' ');
		return { short, long, method, options: { ...options, method } };
	});
	// Names say which option it is where the value alone would not tell choices apart.
	return named.map(({ short, long, ...rest }) => {
		const isAmbiguous = named.some((other) => other.short === short && other.long !== long);
		return { name: isAmbiguous ? long : short, ...rest };
	});
}
