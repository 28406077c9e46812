/**
 * Batches of sequences for the loss and for training: the public types, their checks, and the packed form that the addon
 * takes. Nothing is drawn here; the noise process (native/core/noise.h) draws what a batch does not give.
 */
import { checkMask, type ModelConfig } from './config.js';
import { check } from './errors.js';
import type { NativeMask, NativeNoise, NativeTrainBatch } from './native-types.js';
import { mostInt32, show, suggest } from './option-checks.js';

/** Clean sequences, ragged. With `mask` and `t` given nothing is drawn. */
export interface DiffusionBatch {
	/** One array of token ids per sequence, 1 to `context` long. */
	readonly tokens: readonly Int32Array[];
	/** 1 where a token may be masked, 2 where it always is (and weighs 1), one array per sequence. @default all ones */
	readonly maskable?: readonly Uint8Array[];
	/** 1 where a token is masked. @default drawn: each maskable token with probability t */
	readonly mask?: readonly Uint8Array[];
	/** Diffusion time of each sequence, in (0, 1]. @default drawn */
	readonly t?: readonly number[];
}

const batchNames: readonly string[] = ['tokens', 'maskable', 'mask', 't'] satisfies (keyof DiffusionBatch)[];

/**
 * Who attends to whom inside one sequence. `blockCausal`: each block of so many positions sees itself and what lies before
 * it. `matrix`: (T, T) of 0/1, row = query.
 */
export type AttentionOption = 'full' | 'causal' | { readonly blockCausal: number } | { readonly matrix: Uint8Array };

/** How the cross-entropies of one batch become a loss, and what is drawn. */
export interface LossOptions {
	/**
	 * What the sum is divided by: 'tokens', predictable maskable tokens (the NELBO per token); 'masked', masked tokens
	 * (DiffuGPT); 'answer', per sequence its maskable length, then the number of sequences (LLaDA's fine-tuning).
	 * @default 'tokens'
	 */
	readonly normalise?: 'tokens' | 'masked' | 'answer';
	/** '1/t' makes the loss the NELBO; 'none' is MaskGIT's objective. @default '1/t' */
	readonly weight?: '1/t' | 'none';
	/** Row i predicts token i + 1. @default model.config.shift */
	readonly shift?: boolean;
	/**
	 * Of 'diffusion'; the other objectives have an attention of their own. A matrix takes one sequence.
	 * @default 'full', or 'causal' for the autoregressive objective
	 */
	readonly attention?: AttentionOption;
	/** @default 0 */
	readonly seed?: number | bigint;
	/** Step counter of the random numbers. @default 0 */
	readonly step?: number;
	/** @default 'diffusion' */
	readonly objective?: Objective;
	/** Not of 'autoregressive'. @default 'uniform' */
	readonly timeSampler?: TimeSampler;
	/** Range of t; not of 'autoregressive' or of exact counts. @default [0.001, 1] */
	readonly timeRange?: readonly [number, number];
	/** Tokens per block; 'block-diffusion' needs it, no other objective reads it. @default none */
	readonly block?: number;
	/** DiffusionBERT's per-token schedule: informative tokens are masked earlier. Not of 'autoregressive'. @default none */
	readonly spindle?: SpindleSchedule;
	/** Aborting rejects with `signal.reason`. @default none */
	readonly signal?: AbortSignal;
}

/** The keys of {@link LossOptions}. */
export const lossOptionNames = [
	'normalise',
	'weight',
	'shift',
	'attention',
	'seed',
	'step',
	'objective',
	'timeSampler',
	'timeRange',
	'block',
	'spindle',
	'signal',
] as const satisfies readonly (keyof LossOptions)[];

/** What is trained: tokens masked at a diffusion time t, the next token, or masked blocks given the clean ones before them. */
export type Objective = 'diffusion' | 'autoregressive' | 'block-diffusion';
/**
 * How t is drawn: 'uniform', one by one; 'stratified', spread evenly over the sequences of a step; 'exact-count', a number of
 * masked tokens in place of a time.
 */
export type TimeSampler = 'uniform' | 'stratified' | 'exact-count';

/** Keep probability 1 - t - lambda sin(pi t) (1 - mean(H) / H_i), clamped to [0, 1]. */
export interface SpindleSchedule {
	/** (V) information of each token id, -log p, in nats. */
	readonly information: Float32Array;
	/** Strength, >= 0; 0: every token is masked at t. */
	readonly lambda: number;
}

/** A seed as the addon wants it: 0 .. 2^64 - 1. */
export function toSeed(seed: number | bigint, name = 'seed'): bigint {
	check(
		typeof seed === 'bigint' || Number.isSafeInteger(seed),
		`${name} is ${String(seed)}, expected a whole number or a bigint`,
	);
	const value = BigInt(seed);
	check(value >= 0n && value < 1n << 64n, `${name} is ${String(seed)}, expected a number from 0 to 2^64 - 1`);
	return value;
}

/** Checks an attention option and turns it into the addon's mask. */
export function toNativeMask(attention: AttentionOption): NativeMask {
	if (attention === 'full' || attention === 'causal') return { kind: attention };
	if (typeof attention === 'object' && attention !== null) {
		if ('blockCausal' in attention) {
			const block = attention.blockCausal;
			check(
				Number.isInteger(block) && block > 0 && block <= mostInt32,
				`attention.blockCausal is ${String(block)}, expected a whole number from 1 to ${mostInt32}`,
			);
			return { kind: 'block-causal', block };
		}
		if ('matrix' in attention && attention.matrix instanceof Uint8Array) {
			const width = Math.sqrt(attention.matrix.length);
			check(
				Number.isInteger(width) && width > 0,
				`attention.matrix has ${attention.matrix.length} entries, expected T * T for one sequence of T tokens`,
			);
			return { kind: 'matrix', matrix: attention.matrix, width };
		}
	}
	check(false, `attention is ${show(attention)}, expected 'full', 'causal', { blockCausal } or { matrix }`);
}

/** A matrix says who attends to whom in one sequence. @throws `ERR_DN_ARGUMENT` for several, or of another length */
export function checkMatrix(mask: NativeMask, sequences: readonly Int32Array[]): void {
	if (mask.kind !== 'matrix') return;
	check(sequences.length === 1, `attention { matrix } takes one sequence, ${sequences.length} were given`);
	const T = (sequences[0] as Int32Array).length;
	check(mask.width === T, `attention.matrix is ${mask.width} x ${mask.width}, the sequence has ${T} tokens`);
}

/** What an objective does not read. */
const unread: Record<Objective, readonly (keyof LossOptions)[]> = {
	diffusion: ['block'],
	autoregressive: ['timeSampler', 'timeRange', 'block', 'spindle'],
	'block-diffusion': [],
};

/** The one attention of an objective. */
const fixedAttention: Partial<Record<Objective, AttentionOption>> = {
	autoregressive: 'causal',
	'block-diffusion': 'full',
};

/** Refuses options that would be ignored, once `toNativeNoise` has accepted them. @throws `ERR_DN_ARGUMENT` */
export function checkUnread(options: LossOptions): void {
	const { objective = 'diffusion', attention, timeSampler, timeRange } = options;
	for (const key of unread[objective]) {
		check(options[key] === undefined, `option ${key} has no meaning for the objective '${objective}'`);
	}
	const fixed = fixedAttention[objective];
	check(
		attention === undefined || fixed === undefined || attention === fixed,
		`option attention: the objective '${objective}' has its own, which is '${fixed}'`,
	);
	check(
		timeSampler !== 'exact-count' || timeRange === undefined,
		"option timeRange has no meaning for the time sampler 'exact-count', which draws no time",
	);
}

/** Fills the defaults of {@link LossOptions} and checks them against the model. */
export function toNativeNoise(config: ModelConfig, options: LossOptions = {}): NativeNoise {
	const objective = options.objective ?? 'diffusion';
	oneOf('objective', objective, ['diffusion', 'autoregressive', 'block-diffusion']);
	const timeSampler = options.timeSampler ?? 'uniform';
	oneOf('timeSampler', timeSampler, ['uniform', 'stratified', 'exact-count']);
	const normalise = options.normalise ?? 'tokens';
	oneOf('normalise', normalise, ['tokens', 'masked', 'answer']);
	const weight = options.weight ?? '1/t';
	oneOf('weight', weight, ['1/t', 'none']);
	if (objective !== 'autoregressive') checkMask(config, `the objective '${objective}'`);
	const range: readonly number[] = options.timeRange ?? [1e-3, 1];
	const [tMin, tMax] = (Array.isArray(range) ? range : [Number.NaN, Number.NaN]) as [number, number];
	check(
		tMin > 0 && tMin <= tMax && tMax <= 1,
		`timeRange is ${show(range)}, expected [from, to] with 0 < from <= to <= 1`,
	);
	const block = objective === 'block-diffusion' ? (options.block ?? 0) : 0;
	check(
		objective !== 'block-diffusion' || (Number.isInteger(block) && block > 0 && block <= mostInt32),
		`the objective 'block-diffusion' needs the option block, tokens per block: it is ${String(block)}, expected 1 to ${mostInt32}`,
	);
	const shift = options.shift ?? config.shift;
	check(typeof shift === 'boolean', `shift is ${show(shift)}, expected true or false`);
	const step = options.step ?? 0;
	check(Number.isInteger(step) && step >= 0 && step < 2 ** 32, `step is ${String(step)}, expected 0 to 2^32 - 1`);
	check(
		objective !== 'autoregressive' || shift,
		"the objective 'autoregressive' predicts the next token: it needs shift true (config.shift)",
	);
	const { spindle } = options;
	if (spindle) {
		check(
			spindle.information instanceof Float32Array,
			'spindle.information is not a Float32Array of one entry per token of the vocabulary',
		);
		check(
			timeSampler !== 'exact-count',
			"timeSampler 'exact-count' cannot be combined with spindle, which gives every token a probability of its own",
		);
		check(
			spindle.information.length === config.vocab,
			`spindle.information has ${spindle.information.length} entries, expected one per token of the vocabulary, ${config.vocab}`,
		);
		check(Number.isFinite(spindle.lambda) && spindle.lambda >= 0, `spindle.lambda is ${spindle.lambda}, expected >= 0`);
	}
	const attention = options.attention ?? (objective === 'autoregressive' ? 'causal' : 'full');
	return {
		objective,
		timeSampler,
		normalise,
		weighted: weight === '1/t',
		shift,
		maskId: config.maskId,
		tMin,
		tMax,
		block,
		seed: toSeed(options.seed ?? 0),
		step,
		attention: toNativeMask(attention),
		spindleInformation: spindle ? spindle.information : null,
		spindleLambda: spindle ? spindle.lambda : 0,
	};
}

/**
 * Checks a batch against the model and packs it.
 * @param place where these sequences stand in the whole step, so that micro-batching changes no draw.
 * @throws `ERR_DN_ARGUMENT` naming the sequence, the position and what was expected.
 */
export function toNativeTrainBatch(
	batch: DiffusionBatch,
	config: Pick<ModelConfig, 'context' | 'vocab'>,
	place?: { firstSequence: number; stepSequences: number },
): NativeTrainBatch {
	check(
		typeof batch === 'object' && batch !== null,
		`the batch is ${String(batch)}, expected an object with tokens, and perhaps maskable, mask and t`,
	);
	for (const key of Object.keys(batch)) {
		check(
			batchNames.includes(key),
			() => `batch.${key} is not known${suggest(key, batchNames) || `, expected ${batchNames.join(', ')}`}`,
		);
	}
	const { tokens, t } = batch;
	check(
		Array.isArray(tokens) && tokens.length > 0,
		'the batch has no sequences: tokens must hold at least one Int32Array',
	);
	const count = tokens.length;
	const offsets = new Int32Array(count + 1);
	for (let s = 0; s < count; s++) {
		const ids = tokens[s];
		check(ids instanceof Int32Array, `batch.tokens[${s}] is not an Int32Array`);
		check(ids.length > 0, `sequence ${s} of the batch is empty`);
		check(
			ids.length <= config.context,
			`sequence ${s} of the batch has ${ids.length} tokens, more than the model's context of ${config.context}`,
		);
		offsets[s + 1] = (offsets[s] as number) + ids.length;
	}
	const total = offsets[count] as number;
	const ids = new Int32Array(total);
	for (let s = 0; s < count; s++) {
		const sequence = tokens[s] as Int32Array;
		for (let i = 0; i < sequence.length; i++) {
			const id = sequence[i] as number;
			check(
				id >= 0 && id < config.vocab,
				`token ${i} of sequence ${s} is ${id}, outside the vocabulary of ${config.vocab} ids`,
			);
		}
		ids.set(sequence, offsets[s]);
	}
	if (t !== undefined) {
		check(Array.isArray(t), `batch.t is ${typeof t}, expected a list of one number per sequence`);
		check(t.length === count, `batch.t has ${t.length} entries for ${count} sequences`);
		for (const [s, time] of t.entries()) {
			check(time > 0 && time <= 1, `batch.t[${s}] is ${String(time)}, expected a number in (0, 1]`);
		}
	}
	const maskable = flags('maskable', batch.maskable, offsets, 2);
	const mask = flags('mask', batch.mask, offsets, 1);
	if (mask && maskable) {
		const wrong = mask.findIndex((masked, i) => masked === 1 && maskable[i] === 0);
		const s = offsets.findIndex((end) => end > wrong) - 1;
		check(wrong < 0, `batch.mask[${s}][${wrong - (offsets[s] ?? 0)}] is 1 where batch.maskable is 0`);
	}
	return {
		ids,
		offsets,
		maskable,
		mask,
		t: t === undefined ? null : Float64Array.from(t),
		...(place ?? { firstSequence: 0, stepSequences: count }),
	};
}

function flags(
	name: string,
	rows: readonly Uint8Array[] | undefined,
	offsets: Int32Array,
	most: number,
): Uint8Array | null {
	if (rows === undefined) return null;
	const count = offsets.length - 1;
	check(Array.isArray(rows), `batch.${name} is ${typeof rows}, expected a list of one Uint8Array per sequence`);
	check(rows.length === count, `batch.${name} has ${rows.length} entries for ${count} sequences`);
	const packed = new Uint8Array(offsets[count] as number);
	for (let s = 0; s < count; s++) {
		const row = rows[s];
		check(row instanceof Uint8Array, `batch.${name}[${s}] is not a Uint8Array`);
		const length = (offsets[s + 1] as number) - (offsets[s] as number);
		check(row.length === length, `batch.${name}[${s}] has ${row.length} entries, its sequence has ${length} tokens`);
		for (let i = 0; i < length; i++) {
			check(
				(row[i] as number) <= most,
				`batch.${name}[${s}][${i}] is ${row[i]}, expected ${most === 1 ? '0 or 1' : `0 to ${most}`}`,
			);
		}
		packed.set(row, offsets[s]);
	}
	return packed;
}

function oneOf(name: string, value: string, allowed: readonly string[]): void {
	check(
		allowed.includes(value),
		`${name} is ${show(value)}, expected ${allowed.map((word) => `'${word}'`).join(', ')}`,
	);
}
