/** Policies of a user's own, and the predicted length. */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';

import test from 'ava';
import type { SamplerPolicy } from 'diffusion-native';

import { root } from './helpers/fixtures.js';
import { collect, maskId, prompt } from './helpers/generate.js';
import { sharpModel } from './helpers/models.js';

test("a user's policy is a plain object with one method", async (t) => {
	const model = await sharpModel();
	const leftToRight: SamplerPolicy = { decide: ({ positions }) => ({ commit: [positions[0] as number] }) };
	const { events, result } = await collect(model, prompt, { sampler: leftToRight, length: 6 });
	t.deepEqual(
		events.map(({ committed }) => committed),
		[[4], [5], [6], [7], [8], [9]],
	);
	const builtIn = await model.generate(prompt, { block: 1, length: 6 });
	t.deepEqual(result.tokens, builtIn.tokens);
	const early: SamplerPolicy = {
		decide: ({ positions }) => ({ commit: Array.from(positions.subarray(0, 2)), stop: true }),
	};
	const stopped = await model.generate(prompt, { sampler: early, length: 6 });
	t.is(stopped.tokens.length, 2);
	t.is(stopped.stats.forwards, 1);
	await model.dispose();
});

test('the policy in docs/sampling.md does what it says', async (t) => {
	const page = readFileSync(join(root, 'docs', 'sampling.md'), 'utf8');
	const source = /```js\n([\s\S]*?)```/.exec(page)?.[1] ?? '';
	const spreading = new Function(`${source}; return spreading;`)() as SamplerPolicy;
	const model = await sharpModel();
	let together = 0;
	const watched: SamplerPolicy = {
		decide(view) {
			const decision = spreading.decide(view);
			const best = view.positions[view.probability.indexOf(Math.max(...view.probability))] as number;
			t.true(decision.commit.includes(best));
			for (const position of decision.commit) {
				t.true(Math.abs(position - best) <= 1);
				if (position === best) continue;
				t.true((view.probability[view.positions.indexOf(position)] as number) > 0.5);
				together++;
			}
			return decision;
		},
	};
	const options = { length: 40, block: 16, seed: 1 };
	const result = await model.generate(prompt, { ...options, sampler: watched });
	t.deepEqual(result.tokens, (await model.generate(prompt, { ...options, sampler: spreading })).tokens);
	t.is(result.stats.forwards, 40 - together);
	t.true(together > 0);
	await model.dispose();
});

test('a policy that breaks the rules is an error, never a hang', async (t) => {
	const model = await sharpModel();
	const fails = (policy: SamplerPolicy, message: RegExp) =>
		t.throwsAsync(model.generate(prompt, { sampler: { name: 'mine', ...policy }, length: 4 }), {
			code: 'ERR_DN_ARGUMENT',
			message,
		});
	await fails({ decide: () => ({ commit: [] }) }, /'mine' made no progress/);
	await fails({ choose: () => [], decide: () => ({ commit: [] }) }, /no progress/);
	await fails(
		{
			verify: () => [],
			decide: ({ tentative, positions }) =>
				tentative.length > 0
					? { commit: [], reopen: Array.from(tentative) }
					: { commit: [positions[0] as number], tentative: true },
		},
		/no progress/,
	);
	await fails({ decide: () => ({ commit: [0] }) }, /committed position 0/);
	await fails({ decide: ({ positions }) => ({ commit: [positions[0] as number, positions[0] as number] }) }, /twice/);
	await fails({ decide: () => undefined as never }, /commit/);
	await fails({ choose: () => [2], decide: () => ({ commit: [] }) }, /chose position 2/);
	await fails({ decide: ({ positions }) => ({ commit: [positions[0] as number], tokens: [maskId] }) }, /no text token/);
	await fails({ decide: ({ positions }) => ({ commit: [positions[0] as number], tokens: [] }) }, /0 tokens/);
	await fails({ decide: () => ({ commit: [], reopen: [4] }) }, /reopened position 4, which is not tentative/);
	await fails({ decide: () => ({ commit: [], settle: [0] }) }, /settled position 0, which is not tentative/);
	await fails({ decide: () => ({ commit: [], settle: 4 as never }) }, /settle: number, expected a list/);
	await fails(
		{ verify: () => [], decide: ({ positions }) => ({ commit: [...positions], tentative: true }) },
		/0 positions are still open, 4 tentative/,
	);
	await fails({ decide: async () => ({ commit: [] }) } as never, /returned no/);
	await fails(
		{ choose: () => null as never, decide: () => ({ commit: [] }) },
		/choose returned object, expected a list/,
	);
	await fails({ choose: () => [Number.NaN], decide: () => ({ commit: [] }) }, /chose position NaN/);
	await fails({ verify: () => 5 as never, decide: () => ({ commit: [] }) }, /verify returned no list of lists/);
	await fails({ verify: () => [[4]], decide: () => ({ commit: [] }) }, /verify position 4, which is not tentative/);
	await fails(
		{ verify: true as never, decide: () => ({ commit: [] }) },
		/sampler.verify is boolean, expected a method/,
	);
	await fails({ choose: [4] as never, decide: () => ({ commit: [] }) }, /sampler.choose is object, expected a method/);
	await fails({ needsLogits: 1 as never, decide: () => ({ commit: [] }) }, /needsLogits is 1/);
	await fails({ needsDivergence: null as never, decide: () => ({ commit: [] }) }, /needsDivergence is null/);
	await fails({ name: 7 as never, decide: () => ({ commit: [] }) }, /sampler.name is 7/);
	await fails({ decide: (view) => ({ commit: [view.logProbs(0).length] }) }, /needsLogits: true/);
	await fails({ needsLogits: true, decide: (view) => ({ commit: [view.logProbs(4).length] }) }, /logProbs\(4\)/);
	const thrown = new RangeError('mine');
	await t.throwsAsync(
		model.generate(prompt, {
			length: 4,
			sampler: {
				decide() {
					throw thrown;
				},
			},
		}),
		{ is: thrown },
	);
	t.is((await model.generate(prompt, { length: 3 })).tokens.length, 3);
	await model.dispose();
});

test('what is tentative is final when nothing can look at it again', async (t) => {
	const model = await sharpModel({ eosId: 43 }, 3, 14);
	// No `verify`: as soon as the block is full.
	const drafting: SamplerPolicy = {
		decide: ({ positions }) => ({ commit: [positions[0] as number], tentative: true }),
	};
	const plain: SamplerPolicy = { decide: ({ positions }) => ({ commit: [positions[0] as number] }) };
	for (const block of [2, 6]) {
		const options = { length: 6, block, seed: 1 };
		const { tokens, stats } = await model.generate(prompt, { ...options, sampler: drafting });
		t.deepEqual(tokens, (await model.generate(prompt, { ...options, sampler: plain })).tokens);
		t.is(stats.forwards, 6);
	}
	// The end of the budget: the canvas is cut at an end token then, in an event like any other.
	let cut = 0;
	for (let seed = 0; seed < 60; seed++) {
		const options = { length: { max: 40 }, sampler: 'revocable', threshold: 0, verify: 1, temperature: 1 } as const;
		const { events, result } = await collect(model, prompt, { ...options, steps: 1 + (seed % 4), seed });
		t.deepEqual(events.at(-1)?.tokens, result.sequence);
		const end = result.sequence.indexOf(43, 4);
		t.is(result.finishReason, end < 0 ? 'length' : 'end-of-text');
		t.is(result.sequence.length, end < 0 ? 44 : end + 1);
		if (end >= 0) cut++;
	}
	t.true(cut > 5, `${cut} of 60 ended`);
	await model.dispose();
});

test('steps of a stream never run out before it ends', async (t) => {
	const model = await sharpModel({ eosId: 43 }, 3, 14);
	for (const options of [{}, { block: 3 }, { steps: 5 }] as const) {
		const revocable = { sampler: 'revocable', threshold: 0.1, length: 8, seed: 1, ...options } as const;
		const { events } = await collect(model, prompt, revocable);
		t.true(events.length > 2);
		for (const { step, steps } of events) t.is(steps > step, step < events.length, `${step} of ${steps}`);
	}
	await model.dispose();
});

test('a policy may sort and overwrite what it is shown', async (t) => {
	const model = await sharpModel();
	const careless: SamplerPolicy = {
		choose({ open }) {
			const last = open.sort((a, b) => b - a).slice(0, 4);
			open.fill(1);
			return last;
		},
		decide({ positions, open, best, drawn, probability }) {
			const commit = Array.from(positions.sort((a, b) => a - b).subarray(0, 2));
			for (const list of [positions, open, best, drawn, probability]) list.fill(1);
			return { commit };
		},
	};
	const careful: SamplerPolicy = {
		choose: ({ open }) => open.slice(-4),
		decide: ({ positions }) => ({ commit: Array.from(positions.subarray(0, 2)) }),
	};
	const options = { length: 10, seed: 1, temperature: 1 };
	const expected = await collect(model, prompt, { ...options, sampler: careful });
	const found = await collect(model, prompt, { ...options, sampler: careless });
	t.deepEqual(found.events, expected.events);
	t.deepEqual(found.result.tokens, expected.result.tokens);
	await model.dispose();
});

test('a policy sees its steps counted, those that look at nothing too, and a canvas that it cannot change', async (t) => {
	const model = await sharpModel();
	const seen: { step: number; blockStep: number; initialOpen: number; open: number[]; tokens: number[] }[] = [];
	const sampler: SamplerPolicy = {
		choose({ step, blockStep, initialOpen, open, tokens, reopened }) {
			seen.push({ step, blockStep, initialOpen, open: Array.from(open), tokens: Array.from(tokens) });
			t.true(
				reopened.every((times) => times === 0),
				`step ${step}`,
			);
			if (step % 2 === 0) return [];
			tokens.fill(1);
			reopened.fill(200);
			return open.subarray(0, 1);
		},
		decide({ step, positions, reopened }) {
			t.true(step % 2 === 1 && reopened.every((times) => times === 200), 'the view of choose');
			return { commit: Array.from(positions) };
		},
	};
	const { events, result } = await collect(model, prompt, { sampler, length: 4 });
	const plain = await model.generate(prompt, { block: 1, length: 4 });
	t.deepEqual(result.sequence, plain.sequence);
	t.is(result.stats.forwards, 4);
	t.deepEqual(
		seen.map(({ step, blockStep, initialOpen }) => [step, blockStep, initialOpen]),
		Array.from({ length: 8 }, (_, step) => [step, step, 4]),
	);
	for (const [step, { open, tokens }] of seen.entries()) {
		const done = Math.floor(step / 2);
		t.deepEqual(open, [4, 5, 6, 7].slice(done));
		const canvas = [...plain.sequence.subarray(0, 4 + done), ...new Array<number>(4 - done).fill(maskId)];
		t.deepEqual(tokens, canvas, `before step ${step}`);
	}
	t.deepEqual(
		events.map(({ committed }) => committed),
		[[4], [5], [6], [7]],
	);
	await model.dispose();
});

test('view.divergence compares with the forward before, by position', async (t) => {
	const model = await sharpModel();
	const steps: { divergence: Map<number, number>; logProbs: Map<number, Float64Array> }[] = [];
	// Position 5 is left out of the second forward.
	const sampler: SamplerPolicy = {
		needsLogits: true,
		needsDivergence: true,
		choose: ({ open, step }) => open.filter((position) => step !== 1 || position !== 5),
		decide(view) {
			const { positions, divergence, logProbs } = view;
			t.is(divergence.length, positions.length);
			steps.push({
				divergence: new Map(Array.from(positions, (position, k) => [position, divergence[k] as number])),
				logProbs: new Map(Array.from(positions, (position, k) => [position, logProbs(k)])),
			});
			return { commit: [positions[positions.length - 1] as number] };
		},
	};
	const options = { sampler, length: 5, seed: 3, guidance: 0.7 } as const;
	// Merged with requests that keep none, and others that do.
	await Promise.all([
		model.generate(prompt, options),
		model.generate(prompt, { length: 6, seed: 1 }),
		model.generate(prompt, { length: 6, seed: 2, sampler: 'klass' }),
	]);
	t.is(steps.length, 5);
	let compared = 0;
	for (const [step, { divergence, logProbs }] of steps.entries()) {
		for (const [position, value] of divergence) {
			const before = steps[step - 1]?.logProbs.get(position);
			if (!before) {
				t.is(value, Number.POSITIVE_INFINITY, `step ${step}, position ${position}`);
				continue;
			}
			const now = logProbs.get(position) as Float64Array;
			const expected = now.reduce(
				(sum, l, v) => (l > -1e300 ? sum + Math.exp(l) * (l - (before[v] as number)) : sum),
				0,
			);
			t.true(expected > 1e-4, 'distributions differ');
			t.true(
				Math.abs(value - expected) < 1e-5 * (1 + expected),
				`step ${step}, position ${position}: ${value}, ${expected}`,
			);
			compared++;
		}
	}
	t.is(compared, 3 + 2 + 2 + 1);
	let seen = -1;
	await model.generate(prompt, {
		length: 2,
		sampler: {
			decide({ divergence, positions }) {
				seen = divergence.length;
				return { commit: [...positions] };
			},
		},
	});
	t.is(seen, 0, 'nobody asked for it');
	await model.dispose();
});

test('the predicted length follows the formulas', async (t) => {
	const model = await sharpModel({ eosId: 43 });
	const max = 20;
	const tokens = Int32Array.from([...prompt.tokens, ...new Array<number>(max).fill(maskId)]);
	const [aligned] = (await model.forward(tokens, { output: 'aligned-logits' })) as [Float32Array];
	const e = Array.from({ length: max }, (_, i) => {
		const row = Array.from(aligned.subarray((4 + i) * 61, (5 + i) * 61)).filter((__, id) => id !== maskId);
		const largest = Math.max(...row);
		return Math.exp((row[43] as number) - largest) / row.reduce((sum, l) => sum + Math.exp(l - largest), 0);
	});
	const ask = (options: object) => model.predictLength(prompt, { max, ...options });
	const first = await ask({});
	t.is(first.method, 'first-step');
	t.is(first.probabilities.length, max);
	for (const [i, p] of e.entries()) t.true(Math.abs((first.probabilities[i] as number) - p) < 1e-5);
	t.is(first.length, e.indexOf(Math.max(...e)));
	const bound = e.slice().sort((a, b) => a - b)[10] as number;
	const at = (hit: number): number => (hit < 0 ? max : hit);
	t.is(
		(await ask({ method: 'threshold', probability: bound * 0.999 })).length,
		at(e.findIndex((p) => p >= bound * 0.999)),
	);
	t.is((await ask({ method: 'threshold', probability: 1 })).length, max);
	const sorted = e.slice().sort((a, b) => a - b) as number[];
	const median = ((sorted[9] as number) + (sorted[10] as number)) / 2;
	t.is((await ask({ method: 'quantile' })).length, at(e.findIndex((p) => p >= median)));
	const survives = e.map((_, i) => e.slice(0, i + 1).reduce((s, p) => s * (1 - p), 1));
	t.is((await ask({ method: 'expected', coverage: 0.4 })).length, at(survives.findIndex((s) => 1 - s >= 0.4)));
	t.is((await ask({ method: 'constant' })).length, max);
	const cropped = await model.generate(prompt, { length: { max, method: 'first-step' } });
	t.is(cropped.stats.canvas, 4 + first.length + 1);
	await model.dispose();
});
