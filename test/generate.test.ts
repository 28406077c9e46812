/** generate, stream, generateBatch: results, events, edges, seeds, aborts. */
import { getEventListeners } from 'node:events';
import test from 'ava';
import {
	type DenoiseStep,
	DiffuGPT,
	type GenerateOptions,
	type GenerateResult,
	type Prompt,
	type SamplerPolicy,
} from 'diffusion-native';

import { uniform } from '../lib/random.js';
import { collect, combinations, everySampler, facts, maskId, prompt } from './helpers/generate.js';
import { sharpModel } from './helpers/models.js';

test('every sampler and length method: replaying the events gives the result', async (t) => {
	// An end token that is likely, so that cuts happen.
	const model = await sharpModel({ eosId: 43 });
	let cuts = 0;
	let growths = 0;
	let reopenings = 0;
	for (const [i, options] of combinations.entries()) {
		for (let seed = 0; seed < 4; seed++) {
			const { events, result } = await collect(model, prompt, { ...options, seed: 100 * i + seed });
			const first = events[0] as DenoiseStep;
			let canvas = Array.from(first.tokens, (id, j) => (first.committed.includes(j) ? maskId : id));
			for (const [e, event] of events.entries()) {
				t.is(event.step, e + 1);
				for (const { at, removed, inserted } of e === 0 ? [] : (event.resized ?? [])) {
					canvas = [...canvas.slice(0, at), ...new Array<number>(inserted).fill(maskId), ...canvas.slice(at + removed)];
					if (removed > 0) cuts++;
					if (inserted > 0) growths++;
				}
				for (const position of event.reopened) {
					t.not(canvas[position], maskId);
					canvas[position] = maskId;
					reopenings++;
				}
				for (const position of event.committed) {
					t.is(canvas[position], maskId);
					canvas[position] = event.tokens[position] as number;
				}
				t.deepEqual(canvas, Array.from(event.tokens));
				t.is(event.confidence.length, event.committed.length);
				if (event.provisional) {
					t.is(event.provisional.length, canvas.length);
					for (const [j, id] of canvas.entries()) if (id !== maskId) t.is(event.provisional[j], id);
				}
				t.true(event.steps >= event.step);
			}
			t.deepEqual(canvas, Array.from(result.sequence));
			t.is(events.at(-1)?.text, result.text);
			t.is(events.at(-1)?.steps, events.length);
			t.false(result.tokens.includes(maskId));
			const { length } = options;
			const new_ = Array.from(result.sequence.subarray(prompt.tokens.length));
			if (typeof length === 'number') {
				t.deepEqual(Array.from(result.tokens), new_);
				t.is(result.tokens.length, length);
				t.is(result.finishReason, 'length');
			} else {
				const end = new_.indexOf(43);
				t.is(result.finishReason, end < 0 ? 'length' : 'end-of-text');
				t.deepEqual(Array.from(result.tokens), end < 0 ? new_ : new_.slice(0, end));
				if (end >= 0) t.is(end, new_.length - 1, 'nothing is left after the end token');
			}
		}
	}
	t.true(cuts > 10 && growths > 10 && reopenings > 10, `${cuts} cuts, ${growths} growths, ${reopenings} reopenings`);
	await model.dispose();
});

test('a batch of different prompts, lengths and samplers gives what each call gives alone, bit for bit', async (t) => {
	const model = await sharpModel({ eosId: 43 });
	const prompts = combinations.map((_, i) => ({
		tokens: Int32Array.from({ length: 1 + (i % 7) }, (__, j) => (7 * i + 3 * j) % 60),
	}));
	const options = combinations.map((each, i) => ({ ...each, seed: i }));
	const { batches } = model.engine.counters;
	const together = await model.generateBatch(prompts, options);
	const merged = model.engine.counters.batches - batches;
	let forwards = 0;
	for (const [i, result] of together.entries()) {
		const alone = await model.generate(prompts[i] as Prompt, options[i] as GenerateOptions);
		t.deepEqual(facts(result), facts(alone));
		forwards += alone.stats.forwards;
	}
	t.true(merged < forwards / 10, `${forwards} forwards in ${merged} batches`);
	await model.dispose();
});

test('concurrent clients with random samplers and aborts: every result equals its solo run', async (t) => {
	const model = await sharpModel({ eosId: 43 });
	const jobs = Array.from({ length: 200 }, (_, i) => ({
		prompt: { tokens: Int32Array.of(1 + (i % 50), 7) },
		options: { ...combinations[Math.floor(uniform(1n, 50, 0, i) * combinations.length)], seed: i } as GenerateOptions,
		abortAfter: uniform(1n, 51, 0, i) < 0.3 ? Math.floor(uniform(1n, 52, 0, i) * 4) : -1,
	}));
	const shared = new AbortController();
	let next = 0;
	let aborted = 0;
	const results: (GenerateResult | undefined)[] = [];
	const client = async (): Promise<void> => {
		while (next < jobs.length) {
			const i = next++;
			const { prompt: given, options, abortAfter } = jobs[i] as (typeof jobs)[number];
			const controller = new AbortController();
			const signal = abortAfter < 0 ? shared.signal : controller.signal;
			const stream = model.stream(given, { ...options, signal });
			try {
				for (let step = 0; ; step++) {
					if (step === abortAfter) controller.abort(new Error(`job ${i}`));
					const { done, value } = await stream.next();
					if (!done) continue;
					results[i] = value;
					break;
				}
			} catch (error) {
				t.is((error as Error).message, `job ${i}`);
				aborted++;
			}
			t.is(getEventListeners(controller.signal, 'abort').length, 0);
		}
	};
	await Promise.all(Array.from({ length: 64 }, client));
	t.true(aborted > 20);
	t.is(getEventListeners(shared.signal, 'abort').length, 0);
	for (const [i, { prompt: given, options }] of jobs.entries()) {
		const result = results[i];
		if (result) t.deepEqual(facts(result), facts(await model.generate(given, options)));
	}
	await model.dispose();
});

test('edges: one token, nothing to fill, everything given, one step', async (t) => {
	const model = await sharpModel();
	for (const sampler of everySampler.filter(({ block }) => block === undefined)) {
		const { steps: _, ...rest } = sampler;
		const one = await model.generate(prompt, { ...rest, length: 1, seed: 1 });
		t.is(one.tokens.length, 1);
		const zero = await model.generate(prompt, { ...rest, length: 0, seed: 1 });
		t.deepEqual(facts(zero), {
			text: '',
			tokens: new Int32Array(0),
			sequence: prompt.tokens,
			finishReason: 'length',
			seed: 1n,
			forwards: 0,
			real: 0,
			canvas: 4,
		});
		t.is(zero.stats.tokensPerForward, 0);
	}
	const given = await model.generate(prompt, {});
	t.is(given.stats.forwards, 0);
	const full = await model.generate({ tokens: new Int32Array(64).fill(3) }, {});
	t.is(full.tokens.length, 0);
	const whole = await model.generate(prompt, { length: 60, steps: 1 });
	t.is(whole.stats.forwards, 1);
	t.is(whole.tokens.length, 60);
	await model.dispose();
});

test('edges of blocks and of variable length: one token, an end at once, nothing open', async (t) => {
	const model = await sharpModel({ eosId: 43 });
	for (const sampler of everySampler.filter(({ sampler }) => sampler !== 'autoregressive')) {
		const { steps: _, ...rest } = sampler;
		const single = await model.generate(prompt, { ...rest, block: 1, length: 1, seed: 1 });
		t.is(single.tokens.length, 1);
		t.is((await model.generate(prompt, { ...rest, block: 3, length: 0, seed: 1 })).stats.forwards, 0);
		const scattered = { tokens: Int32Array.of(4, 7, 9), open: new Uint8Array(3) };
		t.is((await model.generate(scattered, { ...rest, seed: 1 })).tokens.length, 0);
	}
	for (const length of [{ max: 1 }, { max: 1, method: 'block', block: 1 }, { max: 1, method: 'first-step' }] as const) {
		for (const [id, reason] of [
			[43, 'end-of-text'],
			[7, 'length'],
		] as const) {
			const fixed: SamplerPolicy = { decide: ({ positions }) => ({ commit: [...positions], tokens: [id] }) };
			const { tokens, finishReason, stats } = await model.generate(prompt, { sampler: fixed, length });
			t.deepEqual([...tokens], id === 43 ? [] : [7]);
			t.is(finishReason, reason);
			t.is(stats.generatedTokens, tokens.length);
		}
	}
	// Threshold 0 fills each block in one forward, above 1 it commits one token per forward.
	t.is((await model.generate(prompt, { sampler: 'threshold', threshold: 0, block: 4, length: 10 })).stats.forwards, 3);
	t.is(
		(await model.generate(prompt, { sampler: 'threshold', threshold: 1.1, block: 4, length: 10 })).stats.forwards,
		10,
	);
	await model.dispose();
});

test('figures count real tokens only: none after an end token, no padding, no consumer', async (t) => {
	const model = await sharpModel({ eosId: 43 });
	const ids = [7, 8, 43, 9, 43, 10];
	const writes: SamplerPolicy = {
		decide: ({ positions }) => ({
			commit: [...positions.subarray(0, 2)],
			tokens: [...positions.subarray(0, 2)].map((p) => ids[p - 4] as number),
		}),
	};
	const masks = new Array<number>(6).fill(maskId);
	for (const [given, options] of [
		[prompt, { length: 6 }],
		[{ tokens: Int32Array.from([...prompt.tokens, ...masks]) }, {}],
		[{ tokens: Int32Array.from([...prompt.tokens, ...masks, 5, 6]) }, {}],
	] as [Prompt, GenerateOptions][]) {
		const { tokens, stats, finishReason } = await model.generate(given, { ...options, sampler: writes });
		t.deepEqual([...tokens], ids);
		t.is(finishReason, 'length');
		t.deepEqual([stats.forwards, stats.generatedTokens], [3, 2]);
		t.is(stats.tokensPerForward, 2 / 3);
		t.true(stats.ms > 0);
		t.is(stats.tokensPerSecond, 2000 / stats.ms);
	}
	// Long beside short: a merged batch has no padding that anybody would count.
	const [short, long] = await model.generateBatch(
		[prompt, prompt],
		[
			{ length: 2, sampler: 'first-hitting' },
			{ length: 50, steps: 25 },
		],
	);
	t.deepEqual([short?.stats.canvas, long?.stats.canvas], [6, 54]);
	t.is(short?.stats.forwards, 2);
	await model.dispose();
});

test('a step bound makes the adaptive samplers finish in time', async (t) => {
	const model = await sharpModel();
	for (const options of [
		{ sampler: 'threshold', threshold: 2 },
		{ sampler: 'factor', factor: 0 },
		{ sampler: 'entropy-bound', entropyBound: 0 },
		{ sampler: 'klass', threshold: 2 },
		{ sampler: 'revocable', threshold: 2, verify: 2 },
	] as const) {
		for (const steps of [1, 3, 7]) {
			const { stats, tokens } = await model.generate(prompt, { ...options, steps, length: 20 });
			t.is(stats.forwards, steps, options.sampler);
			t.is(tokens.length, 20);
		}
		const { stats } = await model.generate(prompt, { ...options, steps: 6, block: 7, length: 20 });
		t.is(stats.forwards, 6);
	}
	await model.dispose();
});

test('scattered open positions are filled and the rest stays, also where it holds the mask id', async (t) => {
	const model = await sharpModel();
	const tokens = Int32Array.of(4, maskId, 8, 9, maskId, 3, maskId);
	const byId = await model.generate({ tokens }, { steps: 2 });
	t.is(byId.tokens.length, 3);
	t.deepEqual(
		[0, 2, 3, 5].map((i) => byId.sequence[i]),
		[4, 8, 9, 3],
	);
	t.deepEqual(
		byId.tokens,
		Int32Array.from([1, 4, 6], (i) => byId.sequence[i] as number),
	);
	const explicit = await model.generate({ tokens, open: Uint8Array.of(0, 0, 1, 0, 0, 0, 1) }, {});
	t.deepEqual(
		[0, 1, 3, 4, 5].map((i) => explicit.sequence[i]),
		[4, maskId, 9, maskId, 3],
	);
	t.is(explicit.tokens.length, 2);
	t.is(explicit.stats.forwards, 2);
	await model.dispose();
});

test('the mask id is never drawn, however probable it is', async (t) => {
	// Without a final bias to tell ids apart, the mask's logit is made large through its embedding.
	const model = await sharpModel();
	const wte = model.getParameter('wte.weight');
	const bias = model.getParameter('ln_f.bias').map(() => 1);
	model.setParameter('ln_f.bias', bias);
	wte.fill(5, maskId * 32, (maskId + 1) * 32);
	model.setParameter('wte.weight', wte);
	const [logits] = (await model.forward(prompt.tokens)) as [Float32Array];
	const row = logits.subarray(3 * 61, 4 * 61);
	t.is(row.indexOf(Math.max(...row)), maskId, 'the model wants the mask id');
	const results = await model.generateBatch(
		Array.from({ length: 100 }, () => prompt),
		Array.from({ length: 100 }, (_, i) => ({
			...(everySampler[i % everySampler.length] as GenerateOptions),
			length: 20,
			seed: i,
		})),
	);
	t.true(results.every(({ tokens }) => !tokens.includes(maskId)));
	await model.dispose();
});

test('the same seed gives the same text, another seed another, and the seed comes back', async (t) => {
	const model = await sharpModel();
	const options: GenerateOptions = { sampler: 'ancestral', steps: 6, length: 30 };
	const a = await model.generate(prompt, { ...options, seed: 11 });
	const b = await model.generate(prompt, { ...options, seed: 11n });
	const c = await model.generate(prompt, { ...options, seed: 12 });
	const random = await model.generate(prompt, options);
	const again = await model.generate(prompt, { ...options, seed: random.seed });
	t.is(a.seed, 11n);
	t.deepEqual(facts(a), facts(b));
	t.notDeepEqual(a.tokens, c.tokens);
	t.deepEqual(facts(random), facts(again));
	await model.dispose();
});

test('threads do not change the text', async (t) => {
	const texts = [];
	for (const threads of [1, 2, 8]) {
		const model = await DiffuGPT.fromConfig(
			{ layers: 2, heads: 2, channels: 64, vocab: 300, context: 64, maskId: 299, eosId: 0 },
			{ seed: 2, threads, device: 'cpu' },
		);
		const result = await model.generate(prompt, { sampler: 'ancestral', steps: 8, length: 40, seed: 5 });
		texts.push(Array.from(result.tokens));
		await model.dispose();
	}
	t.deepEqual(texts[0], texts[1]);
	t.deepEqual(texts[0], texts[2]);
});

test('leaving the loop leaves the model usable', async (t) => {
	const model = await sharpModel();
	for (const sampler of ['confidence', 'autoregressive'] as const) {
		let steps = 0;
		for await (const event of model.stream(prompt, { sampler, length: 20 })) {
			steps = event.step;
			if (steps === 3) break;
		}
		t.is(steps, 3);
	}
	t.is((await model.generate(prompt, { length: 5 })).tokens.length, 5);
	await model.dispose();
});

test('an abort rejects with its reason: before, between and during steps', async (t) => {
	const model = await sharpModel();
	const reason = new Error('enough');
	await t.throwsAsync(model.generate(prompt, { length: 5, signal: AbortSignal.abort(reason) }), { is: reason });
	await t.throwsAsync(model.generateBatch([prompt, prompt], { length: 5, signal: AbortSignal.abort(reason) }), {
		is: reason,
	});
	await t.throwsAsync(model.predictLength(prompt, { max: 5, signal: AbortSignal.abort(reason) }), { is: reason });
	const between = new AbortController();
	const stream = model.stream(prompt, { length: 20, signal: between.signal });
	await stream.next();
	between.abort(reason);
	await t.throwsAsync(stream.next(), { is: reason });
	t.deepEqual(await stream.next(), { done: true, value: undefined as never });
	const during = new AbortController();
	const running = model.generateBatch([prompt, prompt, prompt], { length: 50, signal: during.signal });
	setImmediate(() => setImmediate(() => during.abort(reason)));
	await t.throwsAsync(running, { is: reason });
	t.is(getEventListeners(during.signal, 'abort').length, 0);
	t.is(model.engine.queued, 0);
	await model.dispose();
});

test('dispose during a stream ends it with ERR_DN_DISPOSED', async (t) => {
	for (const sampler of ['confidence', 'autoregressive'] as const) {
		const model = await sharpModel();
		const stream = model.stream(prompt, { sampler, length: 20 });
		await stream.next();
		const pending = stream.next();
		await model.dispose();
		await t.throwsAsync(
			pending.then(() => stream.next()),
			{ code: 'ERR_DN_DISPOSED' },
		);
	}
});
