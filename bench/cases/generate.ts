/**
 * Whole generations of a fixed length: every sampler at batch 1, 4 and 16 with autoregressive decoding beside them, blocks with
 * and without caches, and concurrent streams against the same ones one after another.
 */
import type { DiffuGPT, GenerateOptions, GenerateResult } from 'diffusion-native';

import type { BenchCase, Work } from '../harness.js';
import { load, type ShapeName, someTokens } from '../shapes.js';

/** Sums over results: tokens as work; forwards and tokens per forward as figures. */
function summary(results: readonly GenerateResult[]): Work {
	const tokens = results.reduce((sum, { stats }) => sum + stats.generatedTokens, 0);
	const forwards = results.reduce((sum, { stats }) => sum + stats.forwards, 0);
	return { tokens, extra: { forwards, tokensPerForward: tokens / forwards } };
}

function prompts(shape: ShapeName, batch: number): { tokens: Int32Array }[] {
	return Array.from({ length: batch }, (_, i) => ({ tokens: someTokens(shape, 16 + i) }));
}

function bench(
	name: string,
	shape: ShapeName,
	batch: number,
	options: GenerateOptions,
	repeats: number,
	run: (model: DiffuGPT) => Promise<GenerateResult[]>,
): BenchCase {
	return {
		name,
		shape: { model: shape, batch, length: options.length as number },
		dtype: 'fp32',
		repeats,
		async setup() {
			const model = await load(shape);
			// What is timed only once is warmed up by a short version of itself.
			if (repeats === 1) await model.generateBatch(prompts(shape, batch), { ...options, length: 32 });
			return {
				run: async () => summary(await run(model)),
				teardown: () => model.dispose(),
			};
		},
	};
}

function generate(
	shape: ShapeName,
	label: string,
	batch: number,
	options: GenerateOptions,
	repeats: number,
): BenchCase {
	const name = `generate/${shape}/${label}/B${batch}`;
	return bench(name, shape, batch, options, repeats, (model) => model.generateBatch(prompts(shape, batch), options));
}

/** `count` streams at once, or the same ones one after another. */
function streams(shape: ShapeName, count: number, options: GenerateOptions, repeats: number): BenchCase[] {
	const each = (model: DiffuGPT) =>
		prompts(shape, count).map((prompt) => async (): Promise<GenerateResult> => {
			const stream = model.stream(prompt, options);
			for (;;) {
				const { done, value } = await stream.next();
				if (done) return value;
			}
		});
	const sampler = String(options.sampler);
	return [
		bench(`streams/${shape}/${sampler}/sequential-${count}`, shape, count, options, repeats, async (model) => {
			const results: GenerateResult[] = [];
			for (const run of each(model)) results.push(await run());
			return results;
		}),
		bench(`streams/${shape}/${sampler}/concurrent-${count}`, shape, count, options, repeats, (model) =>
			Promise.all(each(model).map((run) => run())),
		),
	];
}

/** The adaptive samplers are bounded: random weights are never sure, and would commit one token per forward. */
const samplers = (steps: number): [string, GenerateOptions][] => [
	[`ancestral-${steps}`, { sampler: 'ancestral', steps }],
	[`ancestral-${steps}-top-p`, { sampler: 'ancestral', steps, topP: 0.9 }],
	[`confidence-${steps}`, { sampler: 'confidence', steps }],
	[`confidence-${steps}-blocks`, { sampler: 'confidence', steps, block: 32 }],
	[`threshold-${steps}`, { sampler: 'threshold', steps }],
	[`factor-${steps}`, { sampler: 'factor', steps }],
	[`entropy-bound-${steps}`, { sampler: 'entropy-bound', steps }],
	[`klass-${steps}`, { sampler: 'klass', steps }],
	[`revocable-${steps}`, { sampler: 'revocable', steps }],
	['first-hitting', { sampler: 'first-hitting' }],
	['autoregressive', { sampler: 'autoregressive' }],
];

/** The same decoding of blocks, exact and with each cache. */
const caches: [string, GenerateOptions][] = [
	['blocks', {}],
	['blocks-prefix', { cache: 'prefix' }],
	['blocks-dual', { cache: 'dual' }],
];

export const generateCases: BenchCase[] = [
	...samplers(64).flatMap(([label, options]) =>
		[1, 4, 16].map((batch) =>
			generate('tiny', label, batch, { ...options, length: 256, seed: 1 }, batch === 1 ? 3 : 1),
		),
	),
	...caches.map(([label, cache]) =>
		generate('tiny', label, 1, { sampler: 'confidence', steps: 256, block: 32, ...cache, length: 256, seed: 1 }, 3),
	),
	...streams('tiny', 8, { sampler: 'ancestral', steps: 64, length: 256, seed: 1 }, 3),
	...streams('tiny', 8, { sampler: 'autoregressive', length: 64, seed: 1 }, 3),
	...samplers(64).map(([label, options]) => generate('gpt2', label, 1, { ...options, length: 256, seed: 1 }, 1)),
	...[4, 16].flatMap((batch) =>
		samplers(16).map(
			([label, options]): BenchCase => ({
				...generate('gpt2', label, batch, { ...options, length: 256, seed: 1 }, 1),
				onlyIfNamed: true,
			}),
		),
	),
	...caches.map(([label, cache]) =>
		generate('gpt2', label, 1, { sampler: 'confidence', steps: 64, block: 32, ...cache, length: 256, seed: 1 }, 1),
	),
	...streams('gpt2', 8, { sampler: 'autoregressive', length: 64, seed: 1 }, 1),
	...streams('gpt2', 8, { sampler: 'ancestral', steps: 64, length: 256, seed: 1 }, 1),
];
