/** Whole generations of a fixed length: every sampler, one request or a batch, and autoregressive decoding beside them. */
import type { GenerateOptions } from 'diffusion-native';

import type { BenchCase } from '../harness.js';
import { load, type ShapeName, someTokens } from '../shapes.js';

function generate(
	shape: ShapeName,
	label: string,
	batch: number,
	options: GenerateOptions,
	repeats: number,
): BenchCase {
	return {
		name: `generate/${shape}/${label}/B${batch}`,
		shape: { model: shape, batch, length: options.length as number },
		dtype: 'fp32',
		repeats,
		async setup() {
			const model = await load(shape);
			const prompts = Array.from({ length: batch }, (_, i) => ({ tokens: someTokens(shape, 16 + i) }));
			return {
				async run() {
					const results = await model.generateBatch(prompts, options);
					return { tokens: results.reduce((sum, { stats }) => sum + stats.generatedTokens, 0) };
				},
				teardown: () => model.dispose(),
			};
		},
	};
}

const samplers: [string, GenerateOptions][] = [
	['ancestral-64', { sampler: 'ancestral', steps: 64 }],
	['ancestral-64-top-p', { sampler: 'ancestral', steps: 64, topP: 0.9 }],
	['confidence-64', { sampler: 'confidence', steps: 64 }],
	['threshold', { sampler: 'threshold', threshold: 0.9 }],
	['entropy-bound', { sampler: 'entropy-bound' }],
	['first-hitting', { sampler: 'first-hitting' }],
	['autoregressive', { sampler: 'autoregressive' }],
];

export const generateCases: BenchCase[] = [
	...samplers.flatMap(([label, options]) =>
		[1, 4, 16].map((batch) => generate('tiny', label, batch, { ...options, length: 256, seed: 1 }, 3)),
	),
	generate('gpt2', 'ancestral-64', 1, { sampler: 'ancestral', steps: 64, length: 240, seed: 1 }, 1),
	generate('gpt2', 'ancestral-64-top-p', 1, { sampler: 'ancestral', steps: 64, topP: 0.9, length: 240, seed: 1 }, 1),
	generate('gpt2', 'autoregressive', 1, { sampler: 'autoregressive', length: 64, seed: 1 }, 1),
];
