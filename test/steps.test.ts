/** `steps` is a total: over blocks, over what a length method adds, over canvases that follow the text. */
import test from 'ava';
import type { DiffuGPT, GenerateOptions, Prompt } from 'diffusion-native';

import { collect, prompt } from './helpers/generate.js';
import { sharpModel } from './helpers/models.js';

/** A model that never ends a text by itself. */
const endless = (): Promise<DiffuGPT> => sharpModel({ eosId: 7 });

test("the length method 'block' divides the steps among all its blocks", async (t) => {
	const model = await endless();
	const cases: [blocks: number, GenerateOptions & { steps: number; length: { max: number } }][] = [
		[5, { length: { max: 40, method: 'block', block: 8 }, steps: 8 }],
		[5, { length: { max: 40, method: 'block', block: 8 }, steps: 5, sampler: 'threshold', threshold: 2 }],
		[3, { length: { max: 20, method: 'block', block: 8 }, steps: 13 }],
		// Two windows in each of the first three parts, one in the last.
		[7, { length: { max: 20, method: 'block', block: 6 }, block: 4, steps: 7 }],
		[7, { length: { max: 20, method: 'block', block: 6 }, attention: { blockCausal: 5 }, steps: 7 }],
	];
	for (const [blocks, options] of cases) {
		const { events, result } = await collect(model, prompt, { ...options, seed: 1 });
		t.is(result.tokens.length, options.length.max, JSON.stringify(options));
		t.is(result.stats.forwards, options.steps, JSON.stringify(options));
		t.is(events.length, options.steps);
		await t.throwsAsync(model.generate(prompt, { ...options, steps: blocks - 1 }), {
			code: 'ERR_DN_ARGUMENT',
			message: `option steps is ${blocks - 1}, fewer than the ${blocks} blocks that length.max ${options.length.max} allows`,
		});
	}
	// Without steps each block has as many as a canvas of its size.
	const free = await model.generate(prompt, { length: { max: 40, method: 'block', block: 8 }, seed: 1 });
	t.is(free.stats.forwards, 40);
	await model.dispose();
});

test('a canvas that follows the text takes no more than the steps, and is filled', async (t) => {
	let bound = 0;
	for (const seed of [1, 2, 3]) {
		const model = await sharpModel({ eosId: 43 }, seed, 14);
		for (const length of [
			{ max: 30, method: 'rho-eos', initial: 6, grow: 4 },
			{ max: 30, method: 'daedal', initial: 6, grow: 4, window: 2, low: 0 },
		] as const) {
			for (const options of [
				{ steps: 3 },
				{ steps: 9, plan: 'linear' },
				{ steps: 10, block: 3 },
				{ steps: 5, sampler: 'ancestral' },
				{ steps: 4, sampler: 'threshold', threshold: 2 },
				{ steps: 8, sampler: 'threshold', threshold: 2, block: 4 },
				{ steps: 6, sampler: 'revocable', threshold: 0.2, verify: 0.9 },
				{ steps: 1, sampler: 'klass' },
			] as const satisfies GenerateOptions[]) {
				const { events, result } = await collect(model, prompt, { ...options, length, seed: BigInt(seed) });
				t.true(events.length <= options.steps, `${events.length} of ${JSON.stringify({ ...options, length })}`);
				t.false(result.sequence.includes(model.config.maskId));
				if (events.length === options.steps) bound++;
			}
		}
		await model.dispose();
	}
	t.true(bound > 10, `${bound} runs used all their steps`);
});

test('fewer steps than blocks are refused for scattered positions and lengths found by a look, too', async (t) => {
	const model = await endless();
	const open = new Uint8Array(12).fill(1, 4);
	const scattered: Prompt = { tokens: new Int32Array(12).fill(5), open };
	const refuse = (given: Prompt, options: GenerateOptions, message: RegExp) =>
		t.throwsAsync(model.generate(given, { seed: 1, ...options }), { code: 'ERR_DN_ARGUMENT', message });
	await refuse(scattered, { steps: 2, block: 2 }, /steps is 2, fewer than the 4 blocks$/);
	await refuse(scattered, { steps: 2, attention: { blockCausal: 3 } }, /fewer than the 3 blocks$/);
	await refuse(scattered, { block: 9 }, /block is 9, longer than the 8 tokens/);
	t.is((await model.generate(scattered, { steps: 4, block: 2, seed: 1 })).stats.forwards, 4);
	const three = { steps: 3, block: 4 };
	await refuse(prompt, { ...three, length: { max: 16 } }, /fewer than the 4 blocks$/);
	const looked = { max: 16, method: 'threshold' } as const;
	await refuse(prompt, { ...three, length: looked }, /fewer than the 4 blocks that length.max 16 allows$/);
	const followed = { max: 16, method: 'rho-eos', initial: 14 } as const;
	await refuse(prompt, { ...three, length: followed }, /fewer than the 4 blocks$/);
	await model.dispose();
});
