/**
 * Whole generations of a fixed length: every sampler at batch 1, 4 and 16 with autoregressive decoding and its cache beside
 * them, blocks with and without caches, and eight concurrent streams against the same ones one after another.
 * `tiny` and `gpt2` are shapes with random weights and 256 new tokens. `trained` is the model that ships, spelling
 * words and numbers: there the adaptive samplers need as many forwards as the model's confidence allows, every batch size
 * answers the same questions, and `autoregressive` is the model's autoregressive twin.
 */
import type { DiffuGPT, GenerateOptions, GenerateResult, Prompt } from 'diffusion-native';

import type { BenchCase, Work } from '../harness.js';
import { load, loadShipped, loadTwin, someTokens } from '../shapes.js';

type Subject = 'tiny' | 'gpt2' | 'trained';

/** Their answers have some 10 to 30 tokens. */
const questions = ['spell lighthouse:', '906173582 in words:', 'spell understanding:', '4217 in words:'];

/** Sums over results: tokens as work; forwards and tokens per forward as figures. */
function summary(results: readonly GenerateResult[]): Work {
	const tokens = results.reduce((sum, { stats }) => sum + stats.generatedTokens, 0);
	const forwards = results.reduce((sum, { stats }) => sum + stats.forwards, 0);
	return { tokens, extra: { forwards, tokensPerForward: tokens / forwards } };
}

function prompts(subject: Subject, batch: number): Prompt[] {
	return Array.from({ length: batch }, (_, i) =>
		subject === 'trained' ? (questions[i % questions.length] as string) : { tokens: someTokens(subject, 16 + i) },
	);
}

/** The batches of one repeat: the questions have answers of their own lengths, so that a small batch is run for all of them. */
function batches(subject: Subject, batch: number): Prompt[][] {
	if (subject !== 'trained') return [prompts(subject, batch)];
	const all = prompts(subject, Math.max(batch, questions.length));
	return Array.from({ length: all.length / batch }, (_, i) => all.slice(i * batch, (i + 1) * batch));
}

function loadSubject(subject: Subject, { sampler }: GenerateOptions): Promise<DiffuGPT> {
	if (subject !== 'trained') return load(subject);
	return sampler === 'autoregressive' ? loadTwin() : loadShipped();
}

function bench(
	name: string,
	subject: Subject,
	batch: number,
	options: GenerateOptions,
	repeats: number,
	run: (model: DiffuGPT) => Promise<GenerateResult[]>,
): BenchCase {
	return {
		name,
		shape: { model: subject, batch, length: options.length as number },
		dtype: 'fp32',
		repeats,
		async setup() {
			const model = await loadSubject(subject, options);
			// What is timed only once is warmed up by a short version of itself.
			if (repeats === 1) await model.generateBatch(prompts(subject, batch), { ...options, length: 32 });
			return {
				run: async () => summary(await run(model)),
				teardown: () => model.dispose(),
			};
		},
	};
}

function generate(
	subject: Subject,
	label: string,
	batch: number,
	options: GenerateOptions,
	repeats: number,
): BenchCase {
	const name = `generate/${subject}/${label}/B${batch}`;
	return bench(name, subject, batch, options, repeats, async (model) => {
		const results: GenerateResult[] = [];
		for (const some of batches(subject, batch)) results.push(...(await model.generateBatch(some, options)));
		return results;
	});
}

/** Eight streams at once, and the same ones one after another. */
function streams(subject: Subject, label: string, options: GenerateOptions, repeats: number): BenchCase[] {
	const count = 8;
	const each = (model: DiffuGPT) =>
		prompts(subject, count).map((prompt) => async (): Promise<GenerateResult> => {
			const stream = model.stream(prompt, options);
			for (;;) {
				const { done, value } = await stream.next();
				if (done) return value;
			}
		});
	const name = `streams/${subject}/${label}`;
	return [
		bench(`${name}/sequential-${count}`, subject, count, options, repeats, async (model) => {
			const results: GenerateResult[] = [];
			for (const run of each(model)) results.push(await run());
			return results;
		}),
		bench(`${name}/concurrent-${count}`, subject, count, options, repeats, (model) =>
			Promise.all(each(model).map((run) => run())),
		),
	];
}

/** Those whose forwards are chosen. */
const planned = (steps: number, block = 32): [string, GenerateOptions][] => [
	[`ancestral-${steps}`, { sampler: 'ancestral', steps }],
	[`ancestral-${steps}-top-p`, { sampler: 'ancestral', steps, topP: 0.9 }],
	[`confidence-${steps}`, { sampler: 'confidence', steps }],
	[`confidence-${steps}-blocks`, { sampler: 'confidence', steps, block }],
];

/** Those that the model's confidence leads: bounded under random weights, which are never sure. */
const adaptive = (steps?: number): [string, GenerateOptions][] =>
	(['threshold', 'factor', 'entropy-bound', 'klass', 'revocable'] as const).map((sampler) =>
		steps === undefined ? [sampler, { sampler }] : [`${sampler}-${steps}`, { sampler, steps }],
	);

/** Those that commit one token per forward. */
const single: [string, GenerateOptions][] = [
	['first-hitting', { sampler: 'first-hitting' }],
	['autoregressive', { sampler: 'autoregressive' }],
];

/** The same decoding of blocks, exact and with each cache. */
const caches: [string, GenerateOptions][] = [
	['blocks', {}],
	['blocks-prefix', { cache: 'prefix' }],
	['blocks-dual', { cache: 'dual' }],
];

const fixed = { length: 256, seed: 1 };
/** One stream of it computes nine rows a forward: what merging has most to gain from, autoregressive decoding apart. */
const smallBlocks: GenerateOptions = { sampler: 'confidence', steps: 256, block: 8, cache: 'dual', ...fixed };

export const generateCases: BenchCase[] = [
	...[...planned(64), ...adaptive(64), ...single].flatMap(([label, options]) =>
		[1, 4, 16].map((batch) => generate('tiny', label, batch, { ...options, ...fixed }, batch === 1 ? 3 : 1)),
	),
	...[...planned(16, 8), ...adaptive(), ...single].flatMap(([label, options]) =>
		[1, 4, 16].map((batch) => generate('trained', label, batch, { ...options, length: 32, seed: 1 }, 3)),
	),
	...caches.map(([label, cache]) =>
		generate('tiny', label, 1, { sampler: 'confidence', steps: 256, block: 32, ...cache, ...fixed }, 3),
	),
	...streams('tiny', 'ancestral', { sampler: 'ancestral', steps: 64, ...fixed }, 3),
	...streams('tiny', 'autoregressive', { sampler: 'autoregressive', length: 64, seed: 1 }, 3),
	...streams('tiny', 'blocks-dual-8', smallBlocks, 1),
	...[...planned(64), ...adaptive(64), ...single].map(([label, options]) =>
		generate('gpt2', label, 1, { ...options, ...fixed }, 1),
	),
	...[4, 16].flatMap((batch) =>
		[...planned(16), ...adaptive(16), ...single].map(
			([label, options]): BenchCase => ({
				...generate('gpt2', label, batch, { ...options, ...fixed }, 1),
				onlyIfNamed: true,
			}),
		),
	),
	...caches.map(([label, cache]) =>
		generate('gpt2', label, 1, { sampler: 'confidence', steps: 64, block: 32, ...cache, ...fixed }, 1),
	),
	...streams('gpt2', 'autoregressive', { sampler: 'autoregressive', length: 64, seed: 1 }, 1),
	...streams('gpt2', 'blocks-dual-8', { ...smallBlocks, length: 64, steps: 64 }, 1),
	...streams('gpt2', 'ancestral', { sampler: 'ancestral', steps: 64, ...fixed }, 1),
];
