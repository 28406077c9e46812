/**
 * How long the answer is: the names and options of the length methods, their checks, and the rule a checked request
 * carries. A method decides how many open positions a canvas begins with and may change that number while denoising.
 * Whatever the method, once an end token is committed the positions after it leave the canvas (the early cut, in
 * lib/length/gap.ts).
 *
 * Continuation: e_i is the aligned probability of an end token at the i-th open position, after one forward on the prompt
 * and `max` masks; the length is the number of tokens before the end token. Infilling (a suffix is given): the length is
 * the number of tokens between prefix and suffix, the suffix moves with the canvas, and e_i tells how well the suffix
 * fits after i tokens (lib/length/look.ts). No hit means the whole canvas.
 */
import { check } from '../errors.js';
import { show } from '../option-checks.js';
import type { LengthCalibration, LengthExtras } from './extras.js';
import { type Adapter, daedalAdapter, rhoAdapter } from './resize.js';
import { boundAt, type EstimatorSettings, estimatorOf, groupOf, type LengthLook } from './rules.js';

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

/** Which of the trained heads 'head' asks; see `trainLengthHead`. */
export type HeadKind = 'token' | 'pooled' | 'quantile';

/** Variable length: at most `max` new tokens, the end token among them. */
export interface LengthOptions {
	/** Most new tokens. */
	readonly max: number;
	/** @default 'constant' for generation: a canvas of `max` tokens, cut at the end token; 'first-step' for `predictLength` */
	readonly method?: LengthMethod;
	/**
	 * The share of answers that must fit, 0 to 1. With a calibration of the method for this coverage and `max`
	 * (`calibrateLength`) the share is the one measured; 'expected' without one takes the model's probabilities at their
	 * word, and the quantile head what it was trained for. @default of 'expected' and of the quantile head 0.95
	 *
	 * 'draw': the length is drawn, as a function of the seed, and the answer has exactly that length: its end token is put
	 * there and none comes before it; where no end within `max` is drawn, all `max` tokens are text. The share is drawn among those of the method's calibration, which should be many and
	 * evenly spread (0.01, 0.02, .. 0.99), so that lengths come out as varied as those of the calibration pairs. 'threshold'
	 * without a calibration takes e for a distribution function and draws from it. Continuation only.
	 */
	readonly coverage?: number | 'draw';
	/** Of 'quantile': the first position whose e is at least this quantile of all e. @default 0.5 */
	readonly quantile?: number;
	/** Of 'threshold' and of the token head: the first position with e >= this. @default 0.5 */
	readonly probability?: number;
	/** Of 'head'. @default 'token' */
	readonly head?: HeadKind;
	/** Of 'daedal' and 'rho-eos': open positions of the first canvas. @default the smaller of 64 and a quarter of `max` */
	readonly initial?: number;
	/** Of 'daedal' and 'rho-eos': positions added (or dropped) at a time. @default 8 */
	readonly grow?: number;
	/**
	 * Of 'daedal': how many of the last positions that predict an end are averaged. Of 'block' with stop 'entropy': how many
	 * tokens are looked at. @default 32; of 'block' 256
	 */
	readonly window?: number;
	/** Of 'daedal': the first canvas grows while the average is below this. Of 'rho-eos': grow below this share. @default 0.5; of 'rho-eos' 0.4 */
	readonly low?: number;
	/** Of 'daedal': insert masks while the average is below this. Of 'rho-eos': shrink above this share. @default 0.9; of 'rho-eos' 0.6 */
	readonly high?: number;
	/** Of 'block': tokens added at a time. @default 32 */
	readonly block?: number;
	/**
	 * Of 'block': when to stop. 'end': at the first end token; 'second-end': at the second one, for texts that begin with
	 * it; 'entropy': at the first end token, or when the unigram entropy of the last `window` tokens falls below `entropy`
	 * nats, which are then dropped. @default 'end'
	 */
	readonly stop?: 'end' | 'second-end' | 'entropy';
	/** Of 'block' with stop 'entropy': nats. @default 4 */
	readonly entropy?: number;
}

/** What `predictLength` answers. */
export interface LengthPrediction {
	/** Tokens before the end token (of infilling: between prefix and suffix); `max` when no end was found. */
	length: number;
	/** The method that answered. */
	method: LengthMethod;
	/**
	 * (max) aligned probability of an end token at each open position; of 'head', the token head's. 'daedal': of the
	 * canvas it grew to. Infilling: (max + 1) the geometric mean of the probabilities of the suffix's first tokens, were it to
	 * come after 0, 1, .. `max` tokens.
	 */
	probabilities: Float32Array;
}

/** A checked length method. */
export interface LengthRule {
	readonly method: LengthMethod;
	readonly max: number;
	readonly infilling: boolean;
	/** Open positions of the first canvas, when the method does not look. */
	readonly initial: number;
	/** How many end tokens close a text. */
	readonly ends: number;
	/** The first canvas comes from a look at masked positions. */
	readonly looks: boolean;
	/** Index of the predicted end among the open positions, or -1: none. `u`: in [0, 1), of a length that is drawn. */
	readonly predict?: (look: LengthLook, u: number) => number;
	/** The predicted end is the end: its token is given, and no other is sampled. */
	readonly exact?: boolean;
	/** The look needs hidden states. */
	readonly head?: HeadKind;
	/** 'daedal', first stage: how many positions to add to a canvas of `look.e.length`; 0: enough. */
	readonly extend?: (look: LengthLook) => number;
	/** Changes the canvas while denoising. */
	readonly adapt?: Adapter;
	/** Open positions to add when all are filled and no end token was committed. */
	readonly grow?: (length: number) => number;
	/** How many of the last tokens are to be dropped, and the text ended there; 0: go on. (n) filled tokens. */
	readonly drop?: (tokens: Int32Array) => number;
}

const uses: Record<LengthMethod, readonly (keyof LengthOptions)[]> = {
	'first-step': ['coverage'],
	quantile: ['quantile', 'coverage'],
	threshold: ['probability', 'coverage'],
	expected: ['coverage'],
	head: ['head', 'probability', 'coverage'],
	daedal: ['initial', 'grow', 'window', 'low', 'high', 'coverage'],
	'rho-eos': ['initial', 'grow', 'low', 'high'],
	block: ['block', 'stop', 'window', 'entropy'],
	constant: ['coverage'],
};

/** Names of the length methods. */
export const lengthMethods = Object.keys(uses) as LengthMethod[];

/** Why a method has no meaning when a suffix is given; absent: it has one. */
const noInfilling: Partial<Record<LengthMethod, string>> = {
	quantile: 'the quantile of the suffix probabilities says nothing about their place',
	head: 'the heads are trained on where a text ends',
	'rho-eos': 'it counts end tokens, and none comes before a suffix',
	block: 'it stops at an end token, and none comes before a suffix',
};

/** Shares that a length can be drawn from at least. */
const fewestToDraw = 19;

/** The model and prompt a rule is for; without it only the options themselves are checked. */
export interface LengthScene {
	readonly extras: LengthExtras;
	/** A suffix follows the open positions. */
	readonly infilling: boolean;
}

/** Checks the options and makes the rule. @throws `ERR_DN_ARGUMENT` */
export function resolveLength(
	options: LengthOptions,
	fallback: LengthMethod = 'constant',
	scene?: LengthScene,
): LengthRule {
	const { max, method = fallback } = options;
	check(Object.hasOwn(uses, method), `option length.method is ${show(method)}, expected ${lengthMethods.join(', ')}`);
	for (const [key, value] of Object.entries(options)) {
		check(
			value === undefined || key === 'max' || key === 'method' || uses[method].includes(key as keyof LengthOptions),
			`option length.${key} has no meaning for the method '${method}'`,
		);
	}
	checkValues(options, method);
	const infilling = scene?.infilling ?? false;
	if (infilling) {
		const why = noInfilling[method];
		check(!why, `option length.method: '${method}' has no meaning before a suffix: ${why}`);
	}
	const calibration = options.coverage === undefined ? undefined : calibrationOf(options, method, scene);
	const { coverage, ...knobs } = options;
	const draws = coverage === 'draw';
	const settings: EstimatorSettings = {
		...knobs,
		...(coverage === undefined || draws ? {} : { coverage }),
		...calibration?.settings,
		method,
		infilling,
	};
	const head = method === 'head' ? (settings.head ?? 'token') : undefined;
	if (head && scene) {
		check(
			scene.extras.head,
			"option length.method: 'head' is not available: the model has no length head; trainLengthHead makes one",
		);
		check(
			scene.extras.head.max === max,
			`option length.max is ${max}, but the length heads were trained for max ${scene.extras.head.max}`,
		);
	}
	/** The end by a rule: at the margin of the prompt's group when there is a calibration. */
	const endBy = (look: LengthLook, u: number): number => {
		const level = calibration?.levels[Math.floor(u * calibration.levels.length)];
		const estimator = estimatorOf(draws && level ? { ...settings, coverage: level.coverage } : settings);
		if (!calibration) return draws ? boundAt(estimator, look, u) : estimator.predict(look);
		const margin = level?.margins[groupOf(look, calibration.edges)] ?? null;
		const end = margin === null ? -1 : boundAt(estimator, look, margin);
		return end < 0 || end >= max ? -1 : end;
	};
	const looks = method !== 'constant' && method !== 'block' && method !== 'rho-eos';
	const base = {
		...{ method, max, infilling, initial: max, ends: 1, looks },
		...(head ? { head } : {}),
		...(draws ? { exact: true } : {}),
	};
	const grow = options.grow ?? 8;
	const initial = options.initial ?? Math.max(1, Math.min(64, Math.ceil(max / 4)));
	switch (method) {
		case 'block': {
			const { block = 32, stop = 'end', window = 256, entropy = 4 } = options;
			return {
				...base,
				initial: Math.min(block, max),
				ends: stop === 'second-end' ? 2 : 1,
				grow: (length) => Math.min(block, max - length),
				...(stop === 'entropy' ? { drop: (tokens) => repetitiveTail(tokens, window, entropy) } : {}),
			};
		}
		case 'rho-eos': {
			const adapt = rhoAdapter({ ...boundsOf(method, options), grow, max });
			return { ...base, initial: Math.min(initial, max), adapt };
		}
		case 'daedal': {
			const own = { ...options, ...calibration?.settings };
			const { window = 32 } = own;
			const { low, high } = boundsOf(method, own);
			const first = Math.min(calibration?.settings.initial ?? initial, max);
			const step = calibration?.settings.grow ?? grow;
			const adapt = daedalAdapter({ window, high, grow: step, max, infilling });
			// Before a suffix there is no end token to measure the first stage by.
			if (infilling) return { ...base, looks: false, initial: first, adapt };
			return {
				...base,
				initial: first,
				adapt,
				extend: (look) => (look.tail(window) < low ? Math.min(step, max - look.e.length) : 0),
				predict: endBy,
			};
		}
		case 'constant': {
			const margin = calibration?.levels[0]?.margins[0];
			if (margin === undefined || margin === null) return base;
			return { ...base, initial: Math.max(1, Math.min(max, Math.ceil(margin) + 1)) };
		}
		default:
			return { ...base, predict: endBy };
	}
}

/**
 * The stored calibration with the level for `coverage` alone, or, to draw from, all its levels in ascending order; undefined
 * where the method has a meaning of its own for it.
 */
function calibrationOf(
	options: LengthOptions,
	method: LengthMethod,
	scene: LengthScene | undefined,
): LengthCalibration | undefined {
	const { coverage, max, head = 'token' } = options;
	const draws = coverage === 'draw';
	check(
		!draws || (method !== 'constant' && method !== 'daedal'),
		`option length.coverage: 'draw' needs a method that decides by one look, and '${method}' does not`,
	);
	if (!scene) return undefined;
	check(!draws || !scene.infilling, "option length.coverage: 'draw' draws where a text ends, and a suffix is given");
	const own = draws ? method === 'threshold' : method === 'expected' || (method === 'head' && head === 'quantile');
	if (scene.infilling) {
		check(own, `option length.coverage: calibrations of '${method}' are of continuations, and a suffix is given`);
		return undefined;
	}
	const name = method === 'head' ? `the ${head} head` : `'${method}'`;
	const fitting = scene.extras.calibrations.filter(
		(entry) => entry.method === method && (method !== 'head' || entry.settings.head === head),
	);
	if (fitting.length === 0 && own) return undefined;
	check(
		fitting.length > 0,
		`option length.coverage: the model has no calibration of ${name}; calibrateLength(model, pairs, { method, coverage, max }) makes one`,
	);
	const found = fitting.find((entry) => entry.max === max);
	check(
		found,
		`option length.coverage: ${name} is calibrated for max ${fitting.map((entry) => entry.max).join(', ')}, not ${max}`,
	);
	const levels = draws
		? [...found.levels].sort((a, b) => a.coverage - b.coverage)
		: found.levels.filter((entry) => entry.coverage === coverage);
	check(
		levels.length > 0,
		`option length.coverage is ${coverage}: ${name} is calibrated for ${found.levels.map((entry) => entry.coverage).join(', ')}`,
	);
	check(
		!draws || levels.length >= fewestToDraw,
		`option length.coverage is 'draw', which needs ${name} calibrated for ${fewestToDraw} evenly spread shares or more; it is for ${levels.length}`,
	);
	for (const [key, value] of Object.entries(options)) {
		if (value === undefined || ['max', 'method', 'coverage'].includes(key)) continue;
		const stored = found.settings[key as keyof typeof found.settings];
		check(
			stored === value,
			`option length.${key} is ${value}, but ${name} was calibrated with ${stored === undefined ? 'its default' : stored}`,
		);
	}
	return { ...found, levels };
}

/** `low` and `high` of 'daedal' or 'rho-eos', defaults filled in. */
function boundsOf(
	method: LengthMethod,
	{ low, high }: Pick<LengthOptions, 'low' | 'high'>,
): { low: number; high: number } {
	return method === 'daedal' ? { low: low ?? 0.5, high: high ?? 0.9 } : { low: low ?? 0.4, high: high ?? 0.6 };
}

function checkValues(options: LengthOptions, method: LengthMethod): void {
	const { max, head, stop } = options;
	check(Number.isSafeInteger(max) && max >= 1, `option length.max is ${String(max)}, expected a whole number >= 1`);
	for (const key of ['quantile', 'probability', 'coverage', 'low', 'high'] as const) {
		const value = options[key];
		const isCoverage = key === 'coverage';
		check(
			value === undefined ||
				(typeof value === 'number' && value >= 0 && value <= 1) ||
				(isCoverage && value === 'draw'),
			`option length.${key} is ${String(value)}, expected a number from 0 to 1${isCoverage ? " or 'draw'" : ''}`,
		);
	}
	for (const key of ['block', 'initial', 'grow', 'window'] as const) {
		const value = options[key];
		check(
			value === undefined || (Number.isSafeInteger(value) && value >= 1),
			`option length.${key} is ${String(value)}, expected a whole number >= 1`,
		);
	}
	const { entropy } = options;
	check(
		entropy === undefined || (Number.isFinite(entropy) && entropy >= 0),
		`option length.entropy is ${String(entropy)}, expected nats >= 0`,
	);
	const { low, high } = boundsOf(method, options);
	check(low <= high, `option length.low is ${low}, above length.high, ${high}`);
	check(
		head === undefined || ['token', 'pooled', 'quantile'].includes(head),
		`option length.head is ${show(head)}, expected 'token', 'pooled' or 'quantile'`,
	);
	check(
		head === undefined || head === 'token' || options.probability === undefined,
		`option length.probability has no meaning for the ${head} head`,
	);
	check(
		stop === undefined || ['end', 'second-end', 'entropy'].includes(stop),
		`option length.stop is ${show(stop)}, expected 'end', 'second-end' or 'entropy'`,
	);
	check(
		stop === 'entropy' ||
			(options.entropy === undefined && (options.window === undefined || options.method !== 'block')),
		"options length.entropy and length.window of the method 'block' belong to stop 'entropy'",
	);
}

/** BD3-LM's stop rule: `window` when the last so many tokens have a unigram entropy below `bound` nats, else 0. */
export function repetitiveTail(tokens: Int32Array, window: number, bound: number): number {
	if (tokens.length <= window) return 0;
	const counts = new Map<number, number>();
	for (const id of tokens.subarray(tokens.length - window)) counts.set(id, (counts.get(id) ?? 0) + 1);
	let entropy = 0;
	for (const count of counts.values()) entropy -= (count / window) * Math.log(count / window);
	return entropy < bound ? window : 0;
}
