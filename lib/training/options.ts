/** Options of a training run: the types, the defaults, and the checks. */
import type { Objective, SpindleSchedule, TimeSampler } from '../batch.js';
import { toSeed } from '../batch.js';
import type { ModelConfig } from '../config.js';
import { TokenDataset } from '../data/dataset.js';
import { checkPadding, type Padding } from '../data/format.js';
import { check } from '../errors.js';
import { isFinite32, show, suggest } from '../option-checks.js';
import { type AttentionAnnealing, checkAnnealing, checkSchedule, type Schedule } from './schedules.js';

/** What one optimiser step did. */
export interface TrainMetrics {
	/** Optimiser steps done, this one included. */
	readonly step: number;
	/** Weighted and normalised as the options say; nats. */
	readonly loss: number;
	/** Mean cross-entropy of the masked tokens, nats: what compares between runs. */
	readonly unweighted: number;
	/** Learning rate of the step. */
	readonly learningRate: number;
	/** Global norm of the gradient before clipping. */
	readonly gradNorm: number;
	/** `tokens` by `ms`. */
	readonly tokensPerSecond: number;
	/** Tokens of this step, padding that teaches length included. */
	readonly tokens: number;
	/** Tokens of all steps so far. */
	readonly totalTokens: number;
	/** Passes over the data so far, with the fraction of the current one. */
	readonly epoch: number;
	/** Time of the step, milliseconds. */
	readonly ms: number;
	/** Loss on the validation data (the NELBO per token in nats), when it was evaluated after this step. */
	readonly validation?: number;
	/** Mean cross-entropy of the masked validation tokens. */
	readonly validationUnweighted?: number;
	/** Folder of the checkpoint written after this step. */
	readonly checkpoint?: string;
}

/** Gets the metrics of every step. */
export interface MetricLogger {
	/** Called when a run starts or continues: `step` steps are done of `maxSteps`. */
	start?(run: { readonly step: number; readonly maxSteps: number }): void | Promise<void>;
	/** Called after every step, before `run` yields it. */
	log(metrics: TrainMetrics): void | Promise<void>;
	/** Called when a run ends for whatever reason, also where `start` failed; another run may follow. */
	close?(): void | Promise<void>;
}

/** Where and when a run is saved, and how many of its checkpoints stay. */
export interface CheckpointOptions {
	/** Folder of the run: checkpoints and metrics.jsonl. */
	readonly dir: string;
	/** Steps between checkpoints. @default at the end only */
	readonly every?: number;
	/** Newest checkpoints that stay. @default 2 */
	readonly keep?: number;
	/** Checkpoints with the least validation loss that stay as well. @default 1 with validation data, else 0 */
	readonly keepBest?: number;
}

/** Options of `new Trainer`. */
export interface TrainOptions {
	/** Needed by `run`, not by `step` and `gradients`. @default none */
	readonly data?: TokenDataset;
	/** Evaluated every `evalEvery` steps and at the end. @default no validation */
	readonly validation?: TokenDataset;
	/** @default 'diffusion' */
	readonly objective?: Objective;
	/** Tokens per block; 'block-diffusion' needs it, no other objective reads it. @default none */
	readonly block?: number;
	/** Sequences per micro-batch. @default 8 */
	readonly batchSize?: number;
	/** In place of `batchSize`: at most so many tokens per micro-batch. @default none */
	readonly batchTokens?: number;
	/** Micro-batches per step; the loss is normalised over all of them together. @default 1 */
	readonly accumulate?: number;
	/** Optimiser steps of the whole run. Needed by `run`. @default none */
	readonly maxSteps?: number;
	/** @default 3e-4 */
	readonly learningRate?: number | Schedule;
	/** Applies to tensors of rank 2 and more. @default 0.01 */
	readonly weightDecay?: number;
	/** @default [0.9, 0.95] */
	readonly betas?: readonly [number, number];
	/** @default 1e-8 */
	readonly eps?: number;
	/** Largest global gradient norm; 0: no clipping. @default 1 */
	readonly gradClip?: number;
	/** @default 'tokens' */
	readonly normalise?: 'tokens' | 'masked' | 'answer';
	/** @default '1/t' */
	readonly weight?: '1/t' | 'none';
	/** @default 'uniform' */
	readonly timeSampler?: TimeSampler;
	/** Range that t is drawn from. @default [0.001, 1] */
	readonly timeRange?: readonly [number, number];
	/** DiffusionBERT's schedule; the information of the tokens defaults to that of their frequencies in `data`. @default none */
	readonly spindle?: { readonly lambda: number; readonly information?: SpindleSchedule['information'] };
	/** Of 'diffusion'. @default full attention from the start */
	readonly attentionAnnealing?: AttentionAnnealing;
	/** Padding that teaches length. @default what the data was prepared with */
	readonly padding?: Padding;
	/**
	 * End and padding tokens are masked at every t and weigh 1, so that the model never sees where a text ends before it has
	 * said so (dLLM-Var, arXiv 2510.24605). Not with 'autoregressive' or exact counts. @default false
	 */
	readonly maskEnds?: boolean;
	/** Keep less for the backward pass and compute it again: less memory, about a third slower. @default false */
	readonly recompute?: boolean;
	/** 'bf16': matrix products round their inputs where the hardware is faster that way. @default 'fp32' */
	readonly precision?: 'fp32' | 'bf16';
	/** Steps between evaluations on `validation`. @default at the end only */
	readonly evalEvery?: number;
	/** Validation sequences used, the same ones each time. @default 256 */
	readonly evalSequences?: number;
	/** @default nothing is saved */
	readonly checkpoint?: CheckpointOptions;
	/** Stop after so many evaluations without an improvement of more than `minDelta` nats (default 0). @default none */
	readonly earlyStop?: { readonly patience: number; readonly minDelta?: number };
	/** Masks, times, attention bits and the order of the data follow from it. @default 0 */
	readonly seed?: number | bigint;
	/** Besides `metrics.jsonl`, which a run with `checkpoint` always has. @default none */
	readonly loggers?: readonly MetricLogger[];
}

export const trainOptionNames = [
	'data',
	'validation',
	'objective',
	'block',
	'batchSize',
	'batchTokens',
	'accumulate',
	'maxSteps',
	'learningRate',
	'weightDecay',
	'betas',
	'eps',
	'gradClip',
	'normalise',
	'weight',
	'timeSampler',
	'timeRange',
	'spindle',
	'attentionAnnealing',
	'padding',
	'maskEnds',
	'recompute',
	'precision',
	'evalEvery',
	'evalSequences',
	'checkpoint',
	'earlyStop',
	'seed',
	'loggers',
] as const satisfies readonly (keyof TrainOptions)[];

/** Options with their defaults filled in. */
export type ResolvedTrainOptions = ReturnType<typeof resolveTrainOptions>;

/** Fills defaults and checks everything that can be checked before the first step. @throws `ERR_DN_ARGUMENT` naming the option. */
export function resolveTrainOptions(options: TrainOptions, config: ModelConfig) {
	check(typeof options === 'object' && options !== null, 'Trainer needs an object of options');
	for (const key of Object.keys(options)) {
		check(
			(trainOptionNames as readonly string[]).includes(key),
			() => `${key} is not an option of Trainer${suggest(key, trainOptionNames)}`,
		);
	}
	const { data, validation, checkpoint, earlyStop } = options;
	for (const [name, set] of [
		['data', data],
		['validation', validation],
	] as const) {
		check(set === undefined || set instanceof TokenDataset, `${name} is not a TokenDataset`);
	}
	known('checkpoint', checkpoint, ['dir', 'every', 'keep', 'keepBest']);
	known('earlyStop', earlyStop, ['patience', 'minDelta']);
	known('spindle', options.spindle, ['lambda', 'information']);
	check(
		options.batchSize === undefined || options.batchTokens === undefined,
		'batchSize and batchTokens exclude each other: give one of them',
	);
	positive('batchSize', options.batchSize);
	positive('batchTokens', options.batchTokens);
	positive('accumulate', options.accumulate);
	positive('maxSteps', options.maxSteps);
	positive('evalEvery', options.evalEvery);
	positive('evalSequences', options.evalSequences);
	positive('checkpoint.every', checkpoint?.every);
	positive('checkpoint.keep', checkpoint?.keep);
	positive('earlyStop.patience', earlyStop?.patience);
	notNegative('weightDecay', options.weightDecay);
	check(
		options.weightDecay === undefined || isFinite32(options.weightDecay),
		`weightDecay is ${String(options.weightDecay)}, expected a number >= 0 within the range of fp32`,
	);
	notNegative('gradClip', options.gradClip);
	notNegative('earlyStop.minDelta', earlyStop?.minDelta);
	notNegative('checkpoint.keepBest', checkpoint?.keepBest);
	check(!checkpoint || (typeof checkpoint.dir === 'string' && checkpoint.dir), 'checkpoint.dir is missing');
	check(!earlyStop || earlyStop.patience !== undefined, 'earlyStop.patience is missing');
	check(!earlyStop || validation, 'earlyStop needs validation data');
	const betas = options.betas ?? ([0.9, 0.95] as const);
	check(
		betas.length === 2 && betas.every((beta) => beta >= 0 && Math.fround(beta) < 1),
		`betas is ${show(betas)}, expected two numbers from 0 to below 1, in fp32 too`,
	);
	const eps = options.eps ?? 1e-8;
	// Where gradients and moments are 0, the update is 0 / eps.
	check(Number.isFinite(eps) && Math.fround(eps) > 0, `eps is ${String(eps)}, expected a number > 0, in fp32 too`);
	const precision = options.precision ?? 'fp32';
	check(precision === 'fp32' || precision === 'bf16', `precision is ${show(precision)}, expected 'fp32' or 'bf16'`);
	const annealing = options.attentionAnnealing;
	if (annealing !== undefined) {
		checkAnnealing(annealing);
		check(
			options.objective === undefined || options.objective === 'diffusion',
			() => `attentionAnnealing has no meaning for the objective '${options.objective}', whose attention is its own`,
		);
	}
	const learningRate = options.learningRate ?? 3e-4;
	checkSchedule(learningRate);
	check(
		typeof learningRate !== 'object' ||
			learningRate.kind === 'constant' ||
			(learningRate.steps ?? options.maxSteps) !== undefined,
		'the learning rate schedule needs the length of the run: give maxSteps, or learningRate.steps',
	);
	const padding = options.padding ?? data?.padding ?? 'none';
	checkPadding(padding);
	const { recompute = false, maskEnds = false, loggers = [] } = options;
	check(typeof maskEnds === 'boolean', `maskEnds is ${show(maskEnds)}, expected true or false`);
	check(
		!maskEnds || (options.objective !== 'autoregressive' && options.timeSampler !== 'exact-count'),
		"maskEnds has no meaning for the objective 'autoregressive' or the time sampler 'exact-count'",
	);
	check(typeof recompute === 'boolean', `recompute is ${show(recompute)}, expected true or false`);
	check(
		Array.isArray(loggers) && loggers.every((logger) => typeof logger?.log === 'function'),
		'loggers is not a list of objects with a method log',
	);
	for (const [name, set] of [
		['data', data],
		['validation', validation],
	] as const) {
		if (set) fits(name, set, config);
	}
	return {
		...options,
		objective: options.objective ?? ('diffusion' as const),
		batchSize: options.batchTokens === undefined ? (options.batchSize ?? 8) : undefined,
		batchTokens: options.batchTokens,
		accumulate: options.accumulate ?? 1,
		learningRate,
		weightDecay: options.weightDecay ?? 0.01,
		betas,
		eps,
		gradClip: options.gradClip ?? 1,
		padding,
		maskEnds,
		recompute,
		precision,
		evalSequences: options.evalSequences ?? 256,
		seed: toSeed(options.seed ?? 0),
		loggers: loggers as readonly MetricLogger[],
	};
}

function fits(name: string, data: TokenDataset, config: ModelConfig): void {
	check(
		data.longest <= config.context,
		data.format === 'packed'
			? `${name} has windows of ${data.longest} tokens, the model's context is ${config.context}: ` +
					`open it with { context: ${config.context} }`
			: `${name} has a sequence of ${data.longest} tokens, more than the model's context of ${config.context}`,
	);
	check(
		data.vocab <= config.vocab,
		`${name} was prepared for a vocabulary of ${data.vocab}, the model has ${config.vocab} entries`,
	);
}

/** An option that is an object of its own: an object, and no keys but these. */
function known(name: string, value: object | undefined, keys: readonly string[]): void {
	if (value === undefined) return;
	check(typeof value === 'object' && value !== null, `${name} is ${show(value)}, expected an object`);
	for (const key of Object.keys(value)) {
		check(keys.includes(key), () => `${name}.${key} is not an option of Trainer${suggest(key, keys)}`);
	}
}

function positive(name: string, value: number | undefined): void {
	check(
		value === undefined || (Number.isSafeInteger(value) && value > 0),
		`${name} is ${String(value)}, expected a positive whole number`,
	);
}

function notNegative(name: string, value: number | undefined): void {
	check(
		value === undefined || (Number.isFinite(value) && value >= 0),
		`${name} is ${String(value)}, expected a number >= 0`,
	);
}
