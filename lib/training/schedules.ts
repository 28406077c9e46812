/**
 * What changes with the step: learning rate, Adam's beta1, and the share of the future that attention may see. Pure
 * functions of the step, counted from 0. Attention annealing: docs/numerics.md, Objective.
 */
import { check } from '../errors.js';
import type { NativeMask } from '../native-types.js';
import { isFinite32, show, suggest } from '../option-checks.js';

/**
 * Learning rate over the steps of a run. 'constant': `peak` after a rise over `warmupSteps` (default 0). A function gets the
 * step, from 0.
 */
export type Schedule =
	| { readonly kind: 'constant'; readonly peak: number; readonly warmupSteps?: number }
	| {
			/** Straight, or along half a cosine, from `peak` after the warm-up to `final` at the last step. */
			readonly kind: 'linear' | 'cosine';
			/** Largest learning rate. */
			readonly peak: number;
			/** Steps that rise in equal parts to `peak`. @default 0 */
			readonly warmupSteps?: number;
			/** Last learning rate. @default 0 */
			readonly final?: number;
			/** Steps of the schedule. @default the run's `maxSteps` */
			readonly steps?: number;
	  }
	| {
			/** PyTorch's OneCycleLR with cosine annealing. */
			readonly kind: 'one-cycle';
			/** Largest learning rate. */
			readonly peak: number;
			/** Steps of the schedule. @default the run's `maxSteps` */
			readonly steps?: number;
			/** Share of the steps that rises. @default 0.1 */
			readonly warmup?: number;
			/** peak / first learning rate. @default 25 */
			readonly div?: number;
			/** First learning rate / last. @default 10000 */
			readonly finalDiv?: number;
			/** Also move Adam's beta1 against the learning rate, from `max` down to `base` and back, as PyTorch does. @default none */
			readonly cycleBeta1?: { readonly base: number; readonly max: number };
	  }
	| ((step: number) => number);

/** Values of one step. */
export interface ScheduledStep {
	/** Learning rate. */
	readonly learningRate: number;
	/** Undefined: the configured beta1. */
	readonly beta1: number | undefined;
}

/** Checks a schedule. @throws `ERR_DN_ARGUMENT` naming the field. */
export function checkSchedule(schedule: number | Schedule): void {
	if (typeof schedule === 'function') return;
	if (typeof schedule === 'number') {
		check(Number.isFinite(schedule) && schedule >= 0, `learningRate is ${schedule}, expected a number >= 0`);
		checkRange('learningRate', schedule);
		return;
	}
	check(
		typeof schedule === 'object' && schedule !== null,
		`learningRate is ${String(schedule)}, expected a number, a schedule or a function of the step`,
	);
	const { kind } = schedule;
	check(
		kind === 'constant' || kind === 'linear' || kind === 'cosine' || kind === 'one-cycle',
		`learningRate.kind is ${show(kind)}, expected 'constant', 'linear', 'cosine' or 'one-cycle'`,
	);
	const fields: Record<typeof kind, readonly string[]> = {
		constant: ['kind', 'peak', 'warmupSteps'],
		linear: ['kind', 'peak', 'warmupSteps', 'final', 'steps'],
		cosine: ['kind', 'peak', 'warmupSteps', 'final', 'steps'],
		'one-cycle': ['kind', 'peak', 'steps', 'warmup', 'div', 'finalDiv', 'cycleBeta1'],
	};
	for (const [key, value] of Object.entries(schedule)) {
		check(
			fields[kind].includes(key),
			`learningRate.${key} is not a field of the '${kind}' schedule; it has ${fields[kind].join(', ')}`,
		);
		if (key === 'kind' || key === 'cycleBeta1' || value === undefined) continue;
		check(
			Number.isFinite(value) && (value as number) >= 0,
			`learningRate.${key} is ${String(value)}, expected a number >= 0`,
		);
		check(
			(key !== 'warmupSteps' && key !== 'steps') || (Number.isSafeInteger(value) && (key !== 'steps' || value > 0)),
			`learningRate.${key} is ${String(value)}, expected a whole number of steps`,
		);
	}
	check(schedule.peak !== undefined, 'learningRate.peak is missing');
	checkRange('learningRate.peak', schedule.peak);
	if (kind !== 'one-cycle' && kind !== 'constant') checkRange('learningRate.final', schedule.final ?? 0);
	if (kind === 'one-cycle') {
		const { div = 25, finalDiv = 1e4, warmup = 0.1 } = schedule;
		check(div > 0 && finalDiv > 0, 'learningRate.div and learningRate.finalDiv must be above 0');
		checkRange('the first learning rate, learningRate.peak / div,', schedule.peak / div);
		checkRange('the last learning rate, learningRate.peak / div / finalDiv,', schedule.peak / div / finalDiv);
		check(warmup <= 1, `learningRate.warmup is ${warmup}, expected a share from 0 to 1`);
		const { cycleBeta1 } = schedule;
		check(
			cycleBeta1 === undefined ||
				[cycleBeta1?.base, cycleBeta1?.max].every(
					(beta) => typeof beta === 'number' && beta >= 0 && Math.fround(beta) < 1,
				),
			`learningRate.cycleBeta1 is ${show(cycleBeta1)}, expected { base, max }, two numbers from 0 to below 1, in fp32 too`,
		);
	}
}

/**
 * Learning rate and beta1 of a step, from 0. `maxSteps` is the length of the run, for a schedule without `steps`.
 * @throws `ERR_DN_ARGUMENT` naming what is wrong
 */
export function scheduleAt(schedule: number | Schedule, step: number, maxSteps: number): ScheduledStep {
	checkSchedule(schedule);
	checkStep('scheduleAt', step);
	if (typeof schedule === 'number') return { learningRate: schedule, beta1: undefined };
	if (typeof schedule === 'function') {
		const learningRate = schedule(step);
		check(
			typeof learningRate === 'number' && isFinite32(learningRate),
			`the learning rate function returned ${String(learningRate)} at step ${step}, expected a number within the range of fp32`,
		);
		return { learningRate, beta1: undefined };
	}
	if (schedule.kind !== 'constant') {
		check(
			schedule.steps !== undefined || (Number.isSafeInteger(maxSteps) && maxSteps > 0),
			`scheduleAt: maxSteps is ${String(maxSteps)}, expected the steps of the run: a '${schedule.kind}' schedule ends with it`,
		);
	}
	if (schedule.kind === 'one-cycle') return oneCycle(schedule, step, schedule.steps ?? maxSteps);
	const { peak, warmupSteps = 0 } = schedule;
	if (step < warmupSteps) return { learningRate: (peak * (step + 1)) / warmupSteps, beta1: undefined };
	if (schedule.kind === 'constant') return { learningRate: peak, beta1: undefined };
	const { final = 0, steps = maxSteps } = schedule;
	// Progress is 0 at the first step after the warm-up and 1 at the last step of the run.
	const progress = Math.min(1, (step - warmupSteps) / Math.max(1, steps - 1 - warmupSteps));
	const share = schedule.kind === 'linear' ? 1 - progress : (1 + Math.cos(Math.PI * progress)) / 2;
	return { learningRate: final + (peak - final) * share, beta1: undefined };
}

function oneCycle(schedule: Extract<Schedule, { kind: 'one-cycle' }>, step: number, steps: number): ScheduledStep {
	const { peak, warmup = 0.1, div = 25, finalDiv = 1e4, cycleBeta1 } = schedule;
	const first = peak / div;
	const last = first / finalDiv;
	// PyTorch's phases end at these steps, which need not be whole numbers.
	const top = warmup * steps - 1;
	const end = steps - 1;
	const rising = step <= top;
	const share = rising ? (top > 0 ? step / top : 1) : Math.min(1, (step - top) / (end - top));
	const between = (from: number, to: number): number => to + ((from - to) / 2) * (1 + Math.cos(Math.PI * share));
	return {
		learningRate: rising ? between(first, peak) : between(peak, last),
		beta1: cycleBeta1 && (rising ? between(cycleBeta1.max, cycleBeta1.base) : between(cycleBeta1.base, cycleBeta1.max)),
	};
}

/**
 * From causal to full attention. 'diffullama': a pair (query, later key) is visible with probability
 * min(1, (step + 1) / steps); 'seed': with probability linspace(0, 1, steps)[step], exactly causal at step 0.
 */
export interface AttentionAnnealing {
	/** 0: full attention from the start. */
	readonly steps: number;
	/** @default 'diffullama' */
	readonly kind?: 'diffullama' | 'seed';
}

/** Checks an annealing. @throws `ERR_DN_ARGUMENT` naming the field. */
export function checkAnnealing(annealing: AttentionAnnealing): void {
	check(
		typeof annealing === 'object' && annealing !== null,
		`attentionAnnealing is ${show(annealing)}, expected an object { steps, kind }`,
	);
	for (const key of Object.keys(annealing)) {
		check(
			key === 'steps' || key === 'kind',
			() => `attentionAnnealing.${key} is not known${suggest(key, ['steps', 'kind']) || ', expected steps, kind'}`,
		);
	}
	const { steps, kind = 'diffullama' } = annealing;
	check(
		Number.isSafeInteger(steps) && steps >= 0,
		`attentionAnnealing.steps is ${String(steps)}, expected a whole number >= 0`,
	);
	check(
		kind === 'diffullama' || kind === 'seed',
		`attentionAnnealing.kind is ${show(kind)}, expected 'diffullama' or 'seed'`,
	);
}

/** Share of later keys that are visible at a step, from 0. @throws `ERR_DN_ARGUMENT` naming what is wrong */
export function annealingRatio(annealing: AttentionAnnealing, step: number): number {
	checkAnnealing(annealing);
	checkStep('annealingRatio', step);
	const { steps, kind = 'diffullama' } = annealing;
	if (steps === 0) return 1;
	if (kind === 'diffullama') return Math.min(1, (step + 1) / steps);
	return step >= steps ? 1 : step / Math.max(1, steps - 1);
}

/** The attention mask of a step; one draw for the whole batch, redrawn each step. */
export function annealedMask(annealing: AttentionAnnealing, step: number, seed: bigint): NativeMask {
	const ratio = annealingRatio(annealing, step);
	return ratio >= 1 ? { kind: 'full' } : { kind: 'annealed', ratio, seed, step };
}

/** AdamW multiplies by the learning rate in fp32. */
function checkRange(name: string, learningRate: number): void {
	check(isFinite32(learningRate), `${name} is ${learningRate}, expected a number >= 0 within the range of fp32`);
}

function checkStep(what: string, step: number): void {
	check(
		Number.isSafeInteger(step) && step >= 0,
		`${what}: step is ${String(step)}, expected a whole number, counted from 0`,
	);
}
