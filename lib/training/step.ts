/**
 * One optimiser step on the native model: gradients of all micro-batches, their global norm, AdamW. Numerators and
 * denominators of the loss add over the micro-batches, so how a step is cut up changes nothing but rounding.
 */
import { type DiffusionBatch, toNativeTrainBatch } from '../batch.js';
import type { ModelConfig } from '../config.js';
import type { Engine } from '../engine.js';
import type { NativeLoss, NativeNoise, NativeTrainBatch, NativeTrainOptions } from '../native-types.js';

/** What runs native calls in their turn: an engine, or a trainer's hold on one, which refuses once it is released. */
export type Runner = Pick<Engine, 'run'>;

/** Sums over the micro-batches of a step. */
export interface LossSums {
	weighted: number;
	unweighted: number;
	masked: number;
	denominator: number;
	tokens: number;
}

/** Packs micro-batches; sequences are numbered through the whole step. */
export function packStep(batches: readonly DiffusionBatch[], config: ModelConfig): NativeTrainBatch[] {
	const stepSequences = batches.reduce((sum, batch) => sum + sequencesIn(batch), 0);
	let firstSequence = 0;
	return batches.map((batch) => {
		const packed = toNativeTrainBatch(batch, config, { firstSequence, stepSequences });
		firstSequence += sequencesIn(batch);
		return packed;
	});
}

/** Runs micro-batches one native call each, so that others who use the model get their turn in between. */
export async function accumulate(
	engine: Runner,
	batches: readonly NativeTrainBatch[],
	noise: NativeNoise,
	options: NativeTrainOptions,
	signal: AbortSignal | undefined,
): Promise<LossSums> {
	const sums: LossSums = { weighted: 0, unweighted: 0, masked: 0, denominator: 0, tokens: 0 };
	if (options.backward) await engine.run((native) => native.zeroGradients(), signal);
	for (const batch of batches) {
		const loss: NativeLoss = await engine.run((native) => native.trainBatch(batch, noise, options), signal);
		sums.weighted += loss.weighted;
		sums.unweighted += loss.unweighted;
		sums.masked += loss.masked;
		sums.denominator += loss.denominator;
		sums.tokens += batch.ids.length;
	}
	return sums;
}

/** The loss that the sums stand for; 0 when nothing was masked. */
export function lossOf(sums: LossSums): { loss: number; unweighted: number } {
	return {
		loss: sums.denominator > 0 ? sums.weighted / sums.denominator : 0,
		unweighted: sums.masked > 0 ? sums.unweighted / sums.masked : 0,
	};
}

/** Factor from summed gradients to those of the normalised loss; 0 when nothing was masked. */
export function scaleOf({ denominator }: LossSums): number {
	return denominator > 0 ? 1 / denominator : 0;
}

/** Global norm of the gradient of the normalised loss. */
export async function gradientNorm(engine: Runner, sums: LossSums, signal: AbortSignal | undefined): Promise<number> {
	const sumOfSquares = await engine.run((native) => native.gradientSumOfSquares(), signal);
	return Math.sqrt(sumOfSquares) * scaleOf(sums);
}

/** One AdamW step down the normalised gradient, clipped to a global norm of `gradClip` (0: not clipped). */
export async function update(
	engine: Runner,
	sums: LossSums,
	gradNorm: number,
	options: {
		readonly learningRate: number;
		readonly betas: readonly [number, number];
		readonly eps: number;
		readonly weightDecay: number;
		readonly gradClip: number;
		/** Updates with this one, from 1, for the correction of the moments' bias. */
		readonly step: number;
	},
): Promise<void> {
	const { betas, gradClip, ...rest } = options;
	const clip = gradClip > 0 && gradNorm > gradClip ? gradClip / gradNorm : 1;
	await engine.run((native) =>
		native.adamw({ ...rest, beta1: betas[0], beta2: betas[1], gradientScale: scaleOf(sums) * clip }),
	);
}

/** Sequences of a batch; 0 for what is none, which toNativeTrainBatch then refuses. */
function sequencesIn(batch: DiffusionBatch | null | undefined): number {
	return batch?.tokens?.length ?? 0;
}
