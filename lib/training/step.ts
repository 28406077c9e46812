/**
 * One optimiser step on the native model: gradients of all micro-batches, their global norm, AdamW. Numerators and
 * denominators of the loss add over the micro-batches, so how a step is cut up changes nothing but rounding.
 */
import { type DiffusionBatch, toNativeTrainBatch } from '../batch.js';
import type { NativeLoss, NativeNoise, NativeTrainBatch, NativeTrainOptions } from '../binding.js';
import type { ModelConfig } from '../config.js';
import type { Engine } from '../engine.js';

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
	engine: Engine,
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

/** Sequences of a batch; 0 for what is none, which toNativeTrainBatch then refuses. */
function sequencesIn(batch: DiffusionBatch | null | undefined): number {
	return batch?.tokens?.length ?? 0;
}
