/** What the training cases share: a trainer on random weights, and a batch with every second token masked. */
import { type DiffusionBatch, Trainer } from 'diffusion-native';

import { load, type ShapeName, someTokens } from './shapes.js';

export async function startTraining(shape: ShapeName, recompute: boolean): Promise<Trainer> {
	return new Trainer(await load(shape), { maxSteps: 1000, learningRate: 1e-5, recompute });
}

/** B sequences of T tokens at time 0.5. */
export function halfMasked(shape: ShapeName, B: number, T: number): DiffusionBatch {
	const tokens = Array.from({ length: B }, () => someTokens(shape, T));
	const mask = tokens.map(() => Uint8Array.from({ length: T }, (_, i) => i % 2));
	return { tokens, mask, t: tokens.map(() => 0.5) };
}
