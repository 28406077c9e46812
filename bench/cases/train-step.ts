/** One optimiser step: forward, backward and AdamW, half the tokens masked. */
import { Trainer } from 'diffusion-native';

import type { BenchCase } from '../harness.js';
import { forwardFlops, load, type ShapeName, someTokens } from '../shapes.js';

function trainStep(shape: ShapeName, B: number, T: number, repeats: number, recompute = false): BenchCase {
	return {
		name: `train-step/${shape}/${B}x${T}${recompute ? '/recompute' : ''}`,
		shape: { model: shape, B, T },
		dtype: 'fp32',
		repeats,
		async setup() {
			const model = await load(shape);
			const trainer = new Trainer(model, { maxSteps: 1000, learningRate: 1e-5, recompute });
			const tokens = Array.from({ length: B }, () => someTokens(shape, T));
			const mask = tokens.map(() => Uint8Array.from({ length: T }, (_, i) => i % 2));
			return {
				async run() {
					await trainer.step({ tokens, mask, t: tokens.map(() => 0.5) });
					return { tokens: B * T, flops: 3 * B * forwardFlops(shape, T, T / 2) };
				},
				teardown: () => model.dispose(),
			};
		},
	};
}

export const trainStepCases: BenchCase[] = [
	trainStep('tiny', 64, 64, 7),
	trainStep('small', 4, 128, 7),
	trainStep('gpt2', 4, 64, 3),
	trainStep('gpt2', 2, 256, 3),
	trainStep('gpt2', 1, 1024, 2),
	trainStep('gpt2', 4, 256, 2, true),
];
