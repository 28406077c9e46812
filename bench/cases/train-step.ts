/** One optimiser step: forward, backward and AdamW, half the tokens masked. */
import type { BenchCase } from '../harness.js';
import { type ShapeName, trainingFlops } from '../shapes.js';
import { halfMasked, startTraining } from '../training.js';

function trainStep(shape: ShapeName, B: number, T: number, repeats: number, recompute = false): BenchCase {
	return {
		name: `train-step/${shape}/${B}x${T}${recompute ? '/recompute' : ''}`,
		shape: { model: shape, B, T },
		dtype: 'fp32',
		repeats,
		async setup() {
			const trainer = await startTraining(shape, recompute);
			const batch = halfMasked(shape, B, T);
			return {
				async run() {
					await trainer.step(batch);
					return { tokens: B * T, flops: B * trainingFlops(shape, T, T / 2) };
				},
				teardown: () => trainer.model.dispose(),
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
