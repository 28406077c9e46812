/**
 * An evaluator that lets the device take several steps by itself and hands out their looks one by one. The loop
 * (lib/denoise-loop.ts) then decides as it would have: what it says and what the device did are the same decision made
 * twice, and a difference is an error.
 */
import type { Canvas } from './canvas.js';
import type { Loop } from './denoise-loop.js';
import type { Engine } from './engine.js';
import { DiffusionNativeError } from './errors.js';
import { type Evaluator, makeLook } from './evaluator.js';
import type { LengthRule } from './length/method.js';
import type { NativeMask } from './native-types.js';
import type { ResolvedOptions } from './options.js';
import type { StepRecord } from './requests.js';

/** The native bound, kMostLoopSteps. */
const mostSteps = 64;

/** Whether the device can take a request's steps by itself, and several at once are wanted. */
export function goesAhead(engine: Engine, options: ResolvedOptions, rule: LengthRule | null): boolean {
	return (
		engine.deviceLoop &&
		(options.stepsPerCall ?? 1) > 1 &&
		options.deviceSampler !== null &&
		options.guidance === 0 &&
		!options.cache &&
		!rule?.adapt &&
		!rule?.exact
	);
}

/** For requests that `goesAhead` accepts. `loop` is the one that asks. */
export function aheadEvaluator(
	engine: Engine,
	canvas: Canvas,
	options: ResolvedOptions,
	loop: Loop,
	mask: NativeMask,
): Evaluator {
	const { config } = engine;
	const { temperature, topP, topK, seed, signal } = options;
	const sampler = options.deviceSampler as NonNullable<typeof options.deviceSampler>;
	const most = Math.min(mostSteps, options.stepsPerCall ?? 1);
	let records: StepRecord[] = [];
	let length = 0;
	return {
		async look({ positions, step }) {
			// The canvas was cut at an end token: what was computed on the longer one does not count.
			if (canvas.length !== length) records = [];
			if (records.length === 0) {
				const { windows, blockStep, initialOpen, stepsLeft } = loop.state();
				length = canvas.length;
				records = await engine.denoiseSteps(
					{
						tokens: canvas.tokens.slice(),
						open: Uint8Array.from({ length }, (_, i) => Number(canvas.isOpen(i))),
						mask,
						sampler,
						windows,
						step,
						blockStep,
						initialOpen,
						steps: Math.max(1, Math.min(most, stepsLeft)),
						seed,
						temperature,
						topP,
						topK,
						banned: config.maskId,
						bannedEnd: canvas.bannedEnd,
						shift: config.shift ? 1 : 0,
					},
					signal,
				);
			}
			const record = records.shift();
			if (record?.step !== step || !isSame(record.positions, positions)) {
				throw new DiffusionNativeError(
					'ERR_DN_INTERNAL',
					`step ${step} looks at positions ${positions.join(', ')}, but the device's step ${record?.step} looked at ${record?.positions.join(', ')}`,
				);
			}
			return makeLook(positions, record.stats, 0, 0, new Map(), config, 0, canvas.bannedEnd);
		},
		release() {},
	};
}

function isSame(a: Int32Array, b: Int32Array): boolean {
	return a.length === b.length && a.every((value, i) => value === b[i]);
}
