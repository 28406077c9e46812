/** The options of a generation: their types, defaults and checks. Every contradiction is an error, none is ignored. */
import { randomBytes } from 'node:crypto';

import { toSeed } from './batch.js';
import type { CacheKind } from './block-cache.js';
import { mostReopened } from './canvas.js';
import { checkMask, type ModelConfig } from './config.js';
import { check } from './errors.js';
import { type LengthOptions, resolveLength } from './length/method.js';
import type { NativeSampler } from './native-types.js';
import { isFinite32, mostInt32, show, suggest } from './option-checks.js';
import { checkPolicy } from './policy-gate.js';
import { ancestral } from './samplers/ancestral.js';
import { autoregressive } from './samplers/autoregressive.js';
import { confidence, type Plan, type Score } from './samplers/confidence.js';
import { entropyBound } from './samplers/entropy-bound.js';
import { firstHitting } from './samplers/first-hitting.js';
import { klass } from './samplers/klass.js';
import type { SamplerPolicy } from './samplers/policy.js';
import { revocable } from './samplers/revocable.js';
import { factor, threshold } from './samplers/threshold.js';

/** Names of the samplers in this package. */
export type SamplerName =
	| 'ancestral'
	| 'confidence'
	| 'threshold'
	| 'factor'
	| 'entropy-bound'
	| 'klass'
	| 'revocable'
	| 'first-hitting'
	| 'autoregressive';

/** Options of `generate`, `stream` and `generateBatch`. An option that the sampler does not use is an error. */
export interface GenerateOptions {
	/**
	 * New tokens: a number, exactly that many; an object, a length found by `method` and cut at the end token.
	 * @default 64, or what fits the context; with `{ tokens }`, the open positions (none, when none is open)
	 */
	readonly length?: number | LengthOptions;
	/**
	 * @default 'confidence'; 'autoregressive' for a causal model, which has no other. 'autoregressive' uses causal attention
	 * whatever the model; to fill left to right with full attention use `block: 1`.
	 */
	readonly sampler?: SamplerName | SamplerPolicy;
	/** Of 'confidence': what is ranked. @default 'probability' */
	readonly score?: Score;
	/**
	 * Forwards over all blocks together, divided evenly among them, the remainder first; at least one per block. For
	 * 'ancestral' and 'confidence' the plan, whose steps that commit nothing cost no forward; for the adaptive samplers a
	 * bound, whose last step commits whatever is open. The length method 'block' divides them among the blocks of `max`
	 * tokens; with 'daedal' and 'rho-eos' the canvas grows only while steps are left for what is added. Not counted: the
	 * looks that choose a length, and what a drawn length (`coverage: 'draw'`) takes where the mask was drawn. At most 65536.
	 * @default min(length, 64), at least one per block; with the length method 'block', for each block that is added; no
	 * bound for the adaptive samplers
	 */
	readonly steps?: number;
	/** Of 'confidence': how many tokens to commit per step. @default 'even' */
	readonly plan?: Plan;
	/** Tokens per semi-autoregressive block, filled left to right; the last may be shorter. @default one block */
	readonly block?: number;
	/**
	 * Who sees whom: everybody, or, for a model trained block by block, each block of so many positions only itself and what
	 * lies before it. Blocks are counted from position 0, and windows follow them in place of `block`. @default 'full'
	 */
	readonly attention?: 'full' | { readonly blockCausal: number };
	/**
	 * Computes only the rows near the current block and reads the others' keys and values from a cache. With full attention
	 * an approximation, rebuilt at every block: 'prefix' keeps what lies before the block, 'dual' also what lies after it.
	 * With block-causal attention both are exact and the same. Needs `block` or `attention: { blockCausal }`.
	 * @default none: every forward computes the whole canvas
	 */
	readonly cache?: CacheKind;
	/**
	 * With `cache`: compares every cached forward with an exact one and reports the divergence in `DenoiseStep.drift` and
	 * `GenerateStats.drift`. Costs a forward of the whole canvas and 2 R * V floats per step. @default false
	 */
	readonly measureDrift?: boolean;
	/**
	 * Of 'threshold' and 'klass': commit at this probability or above. Of 'revocable': draft at this probability or above.
	 * @default 0.9; of 'revocable' 0.6
	 */
	readonly threshold?: number;
	/** Of 'factor'. @default 1 */
	readonly factor?: number;
	/** Of 'entropy-bound': nats. @default 0.1 */
	readonly entropyBound?: number;
	/** Of 'klass': largest divergence from the previous step, nats. @default 0.01 */
	readonly divergence?: number;
	/** Of 'klass': how many steps in a row must be that stable. @default 2 */
	readonly stableSteps?: number;
	/** Of 'revocable': a draft is kept at this probability or above. @default 0.9 */
	readonly verify?: number;
	/** Of 'revocable': how often one position may be opened again, at most 255. @default 2 */
	readonly attempts?: number;
	/**
	 * 0: always the most probable token.
	 * @default 1 for 'ancestral', 'first-hitting' and 'autoregressive', 0 for the others
	 */
	readonly temperature?: number;
	/** Draw among the k most probable tokens (ties kept); 0: all. At temperature 0 it changes nothing. @default 0 */
	readonly topK?: number;
	/**
	 * Nucleus: draw among the most probable tokens up to this mass, in (0, 1]; applied before top-k. At temperature 0 it
	 * changes nothing. @default 1
	 */
	readonly topP?: number;
	/**
	 * Classifier-free guidance w: logits become u + (w + 1)(l - u), u from the canvas with the whole prompt masked. Doubles
	 * the work of a forward. @default 0, none
	 */
	readonly guidance?: number;
	/**
	 * Most denoising steps of one native call. Where the device can take steps by itself (CUDA), a call carries so many and
	 * the results are those of single steps; a stream's events then come in groups, and aborting takes effect between
	 * calls. It takes single steps all the same on the CPU, with `cache`, `guidance`, a `length` that the canvas follows or
	 * that is drawn, and the samplers 'klass', 'revocable', 'first-hitting' and one's own. Above 64 means 64.
	 * 'autoregressive' does so on every device, for 25 ms at most and while no other request waits.
	 * @default 8 for `generate` and `generateBatch`, 1 for `stream`
	 */
	readonly stepsPerCall?: number;
	/** 0 .. 2^64 - 1. The same seed and options give the same tokens. @default random */
	readonly seed?: number | bigint;
	/** Aborting rejects with `signal.reason`, within one native call (`stepsPerCall`). @default none */
	readonly signal?: AbortSignal;
}

/** Options after checks and defaults. */
export interface ResolvedOptions {
	length: number | LengthOptions | undefined;
	samplerName: string;
	policy: SamplerPolicy;
	/** Whether the policy is the user's. */
	isCustom: boolean;
	/** The planned samplers commit everything by themselves in their last step. */
	isPlanned: boolean;
	isAutoregressive: boolean;
	steps: number | undefined;
	block: number | undefined;
	/** Positions per block of block-causal attention; null: full attention. */
	blockCausal: number | null;
	cache: CacheKind | null;
	measureDrift: boolean;
	temperature: number;
	topK: number;
	topP: number;
	guidance: number;
	/** undefined: the caller decides. */
	stepsPerCall: number | undefined;
	/** The policy as a device knows it; null: it does not. */
	deviceSampler: NativeSampler | null;
	seed: bigint;
	signal: AbortSignal | undefined;
}

interface SamplerEntry {
	/** Options beyond the common ones. */
	uses: readonly (keyof GenerateOptions)[];
	temperature: number;
	planned: boolean;
	make(options: GenerateOptions): SamplerPolicy;
	/** The same for a device that takes steps by itself. */
	device?(options: GenerateOptions): Partial<NativeSampler>;
}

const common: readonly (keyof GenerateOptions)[] = [
	'length',
	'sampler',
	'temperature',
	'topK',
	'topP',
	'guidance',
	'stepsPerCall',
	'seed',
	'signal',
];

/** Options of every sampler that fills blocks. */
const blockwise: readonly (keyof GenerateOptions)[] = ['block', 'attention', 'cache', 'measureDrift'];

const samplers: Record<SamplerName, SamplerEntry> = {
	ancestral: {
		uses: ['steps', ...blockwise],
		temperature: 1,
		planned: true,
		make: ancestral,
		device: () => ({ sampler: 'ancestral' }),
	},
	confidence: {
		uses: ['steps', ...blockwise, 'score', 'plan'],
		temperature: 0,
		planned: true,
		make: (o) => confidence(o.score ?? 'probability', o.plan ?? 'even'),
		device: (o) => ({ sampler: 'confidence', score: o.score ?? 'probability', plan: o.plan ?? 'even' }),
	},
	threshold: {
		uses: ['steps', ...blockwise, 'threshold'],
		temperature: 0,
		planned: false,
		make: (o) => threshold(o.threshold ?? 0.9),
		device: (o) => ({ sampler: 'threshold', parameter: o.threshold ?? 0.9 }),
	},
	factor: {
		uses: ['steps', ...blockwise, 'factor'],
		temperature: 0,
		planned: false,
		make: (o) => factor(o.factor ?? 1),
		device: (o) => ({ sampler: 'factor', parameter: o.factor ?? 1 }),
	},
	'entropy-bound': {
		uses: ['steps', ...blockwise, 'entropyBound'],
		temperature: 0,
		planned: false,
		make: (o) => entropyBound(o.entropyBound ?? 0.1),
		device: (o) => ({ sampler: 'entropy-bound', parameter: o.entropyBound ?? 0.1 }),
	},
	klass: {
		uses: ['steps', ...blockwise, 'threshold', 'divergence', 'stableSteps'],
		temperature: 0,
		planned: false,
		make: (o) => klass(o.threshold ?? 0.9, o.divergence ?? 0.01, o.stableSteps ?? 2),
	},
	revocable: {
		uses: ['steps', ...blockwise, 'threshold', 'verify', 'attempts'],
		temperature: 0,
		planned: false,
		make: (o) => revocable(o.threshold ?? 0.6, o.verify ?? 0.9, o.attempts ?? 2),
	},
	'first-hitting': { uses: blockwise, temperature: 1, planned: false, make: firstHitting },
	autoregressive: { uses: [], temperature: 1, planned: false, make: autoregressive },
};

/** More steps than any canvas has positions; each is looked at, also those of a plan that commit nothing. */
const mostSteps = 2 ** 16;

/** Names accepted as `sampler`. */
export const samplerNames = Object.keys(samplers) as SamplerName[];

const known: ReadonlySet<string> = new Set([...common, ...Object.values(samplers).flatMap((entry) => entry.uses)]);

/**
 * Checks options against each other and the model and fills defaults. Options whose value is undefined count as absent.
 * @throws `ERR_DN_ARGUMENT` naming the option and what was expected.
 */
export function resolveOptions(options: GenerateOptions, config: ModelConfig): ResolvedOptions {
	check(typeof options === 'object' && options !== null, `options is ${String(options)}, expected an object`);
	const given = Object.entries(options).filter(([, value]) => value !== undefined);
	for (const [key] of given) check(known.has(key), () => `option ${key} is not known${suggest(key, [...known])}`);
	checkValues(options);

	const causal = config.attention === 'causal';
	const { sampler = causal ? 'autoregressive' : 'confidence' } = options;
	const isCustom = typeof sampler === 'object' && sampler !== null;
	let policy: SamplerPolicy;
	let uses: readonly (keyof GenerateOptions)[] = ['steps', ...blockwise];
	let entry: SamplerEntry | undefined;
	if (isCustom) {
		checkPolicy(sampler);
		policy = sampler;
	} else {
		entry = typeof sampler === 'string' && Object.hasOwn(samplers, sampler) ? samplers[sampler] : undefined;
		check(entry, `sampler is ${show(sampler)}, expected ${samplerNames.join(', ')} or a policy object`);
		uses = entry.uses;
		policy = entry.make(options);
	}
	const samplerName = isCustom ? (sampler.name ?? 'custom') : sampler;
	for (const [key] of given) {
		check(
			common.includes(key as keyof GenerateOptions) || uses.includes(key as keyof GenerateOptions),
			`option ${key} has no meaning for the sampler '${samplerName}'`,
		);
	}
	const isAutoregressive = sampler === 'autoregressive';
	check(
		!causal || isAutoregressive,
		`the sampler '${samplerName}' fills a canvas in any order, but this model is causal: it sees nothing to the right. Use 'autoregressive'`,
	);
	check(
		!isAutoregressive || config.shift,
		"the sampler 'autoregressive' needs a model whose row i predicts token i + 1 (config.shift)",
	);
	if (!isAutoregressive) checkMask(config, `the sampler '${samplerName}'`);
	const { attention, cache, block } = options;
	const blockCausal = typeof attention === 'object' ? attention.blockCausal : null;
	check(
		blockCausal === null || block === undefined || block === blockCausal,
		`option block is ${block}, but attention.blockCausal fixes the blocks at ${blockCausal}`,
	);
	check(
		cache === undefined || block !== undefined || blockCausal !== null,
		'option cache needs option block: the cache is built anew at every block',
	);
	check(
		cache === undefined || policy.verify === undefined,
		`option cache cannot be combined with the sampler '${samplerName}', which verifies on copies of the canvas`,
	);
	check(!options.measureDrift || cache !== undefined, 'option measureDrift needs option cache');
	const device = entry?.device?.(options);
	const guidance = options.guidance ?? 0;
	if (guidance !== 0) checkMask(config, 'option guidance');
	return {
		length: options.length,
		samplerName,
		policy,
		isCustom,
		isPlanned: entry?.planned ?? false,
		isAutoregressive,
		steps: options.steps,
		block,
		blockCausal,
		cache: cache ?? null,
		measureDrift: options.measureDrift ?? false,
		temperature: options.temperature ?? entry?.temperature ?? 0,
		topK: options.topK ?? 0,
		topP: options.topP ?? 1,
		guidance,
		stepsPerCall: options.stepsPerCall,
		deviceSampler: device
			? { sampler: 'confidence', score: 'probability', plan: 'even', parameter: 0, ...device }
			: null,
		seed: options.seed === undefined ? randomBytes(8).readBigUInt64LE() : toSeed(options.seed),
		signal: options.signal,
	};
}

function checkValues(options: GenerateOptions): void {
	const whole = (key: keyof GenerateOptions, least: number, most = Number.MAX_SAFE_INTEGER): void => {
		const value = options[key];
		check(
			value === undefined || (Number.isSafeInteger(value) && (value as number) >= least && (value as number) <= most),
			`option ${key} is ${String(value)}, expected a whole number >= ${least}${most < Number.MAX_SAFE_INTEGER ? ` and <= ${most}` : ''}`,
		);
	};
	const real = (key: keyof GenerateOptions): void => {
		const value = options[key];
		check(
			value === undefined || (typeof value === 'number' && Number.isFinite(value) && value >= 0),
			`option ${key} is ${String(value)}, expected a number >= 0`,
		);
	};
	const real32 = (key: 'temperature' | 'guidance'): void => {
		real(key);
		const value = options[key];
		check(
			value === undefined || isFinite32(value),
			`option ${key} is ${String(value)}, expected a number >= 0 within the range of fp32`,
		);
	};
	const oneOf = (key: keyof GenerateOptions, values: readonly string[]): void => {
		const value = options[key];
		check(
			value === undefined || values.includes(value as string),
			() => `option ${key} is ${show(value)}, expected ${values.join(', ')}`,
		);
	};
	const { length, topP, signal, attention, measureDrift } = options;
	if (typeof length === 'object' && length !== null) resolveLength(length);
	else whole('length', 0);
	oneOf('score', ['probability', 'margin', 'entropy', 'random']);
	oneOf('plan', ['even', 'linear']);
	oneOf('cache', ['prefix', 'dual']);
	if (typeof attention === 'object' && attention !== null) {
		const { blockCausal, ...rest } = attention;
		check(
			Number.isInteger(blockCausal) && blockCausal >= 1 && blockCausal <= mostInt32 && Object.keys(rest).length === 0,
			`option attention is ${show(attention)}, expected 'full' or { blockCausal: 1 to ${mostInt32} }`,
		);
	} else oneOf('attention', ['full']);
	check(
		measureDrift === undefined || typeof measureDrift === 'boolean',
		`option measureDrift is ${String(measureDrift)}, expected true or false`,
	);
	whole('steps', 1, mostSteps);
	whole('stepsPerCall', 1);
	whole('block', 1, mostInt32);
	whole('topK', 0, mostInt32);
	whole('stableSteps', 1);
	whole('attempts', 0, mostReopened);
	for (const key of ['threshold', 'factor', 'entropyBound', 'divergence', 'verify'] as const) real(key);
	real32('temperature');
	real32('guidance');
	check(
		topP === undefined || (typeof topP === 'number' && Math.fround(topP) > 0 && topP <= 1),
		`option topP is ${String(topP)}, expected a number in (0, 1], in fp32 too`,
	);
	check(signal === undefined || signal instanceof AbortSignal, 'option signal is not an AbortSignal');
}
