/** generate, stream, generateBatch, predictLength: results, events, edges, aborts, bad input. */
import { getEventListeners } from 'node:events';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';

import test from 'ava';
import {
	type DenoiseStep,
	DiffuGPT,
	type GenerateOptions,
	type GenerateResult,
	type Prompt,
	type SamplerPolicy,
	Tokenizer,
} from 'diffusion-native';

import { uniform } from '../lib/random.js';
import { root } from './helpers/fixtures.js';
import { sharpModel } from './helpers/models.js';

const maskId = 60;
const prompt = { tokens: Int32Array.of(5, 17, 33, 2) };

async function collect(
	model: DiffuGPT,
	given: Prompt,
	options: GenerateOptions,
): Promise<{ events: DenoiseStep[]; result: GenerateResult }> {
	const stream = model.stream(given, options);
	const events: DenoiseStep[] = [];
	for (;;) {
		const { done, value } = await stream.next();
		if (done) return { events, result: value };
		events.push(value);
	}
}

/** Everything that does not depend on the clock. */
function facts(result: GenerateResult): object {
	const { text, tokens, sequence, finishReason, seed, stats } = result;
	return {
		text,
		tokens,
		sequence,
		finishReason,
		seed,
		forwards: stats.forwards,
		real: stats.generatedTokens,
		canvas: stats.canvas,
	};
}

const everySampler: GenerateOptions[] = [
	{ sampler: 'ancestral', steps: 5 },
	{ sampler: 'ancestral', steps: 6, block: 4, topP: 0.8 },
	{ sampler: 'confidence', steps: 5 },
	{ sampler: 'confidence', plan: 'linear', score: 'margin', temperature: 0.8, topK: 5 },
	{ sampler: 'confidence', score: 'random', steps: 4, temperature: 1 },
	{ sampler: 'threshold', threshold: 0.5, block: 5 },
	{ sampler: 'factor', factor: 1.5 },
	{ sampler: 'entropy-bound', entropyBound: 1, temperature: 0.7 },
	{ sampler: 'klass', threshold: 0.3, divergence: 0.5, stableSteps: 1 },
	{ sampler: 'revocable', threshold: 0.2, verify: 0.4 },
	{ sampler: 'revocable', threshold: 0.2, verify: 0.4, temperature: 1, guidance: 0.5 },
	{ sampler: 'first-hitting', guidance: 1 },
	{ sampler: 'autoregressive' },
	{ sampler: 'autoregressive', guidance: 1, temperature: 0.5 },
];

const everyLength: GenerateOptions['length'][] = [
	14,
	{ max: 14 },
	{ max: 14, method: 'block', block: 4 },
	{ max: 14, method: 'first-step' },
	{ max: 14, method: 'quantile', quantile: 0.5 },
	{ max: 14, method: 'threshold', probability: 0.2 },
	{ max: 14, method: 'expected', coverage: 0.3 },
	{ max: 14, method: 'daedal', initial: 4, grow: 3, window: 2 },
	{ max: 14, method: 'rho-eos', initial: 4, grow: 3, low: 0.1, high: 0.2 },
];

/** All combinations that make sense. */
const combinations = everySampler.flatMap((sampler) =>
	everyLength
		.filter(
			(length) =>
				sampler.sampler !== 'autoregressive' ||
				typeof length === 'number' ||
				['constant', 'block', undefined].includes(length?.method),
		)
		.map((length): GenerateOptions => ({ ...sampler, ...(length === undefined ? {} : { length }) })),
);

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
	await fails({ decide: () => ({ commit: [], reopen: [4] }) }, /not tentative/);
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

/** A model on GPT-2's vocabulary, for prompts that are text. */
function textModel(config: object = {}): Promise<DiffuGPT> {
	return DiffuGPT.fromConfig(
		{ layers: 1, heads: 2, channels: 16, vocab: 50257, context: 64, ...config },
		{ seed: 1, tokenizer: Tokenizer.gpt2(), device: 'cpu' },
	);
}

test('text is continued and filled in, and characters are never split', async (t) => {
	const model = await textModel();
	const { tokenizer } = model as { tokenizer: Tokenizer };
	const prefix = 'The quick brown';
	const { result } = await collect(model, prefix, { length: 12, sampler: 'ancestral', seed: 5 });
	t.deepEqual(result.sequence.slice(0, 3), tokenizer.encode(prefix));
	t.is(result.text, tokenizer.decode(result.tokens));
	const filled = await model.generate({ prefix, suffix: ' dog.' }, { length: 4, seed: 5 });
	t.deepEqual(filled.sequence.slice(7), tokenizer.encode(' dog.'));
	t.is(filled.text, tokenizer.decode(filled.tokens));
	const headless = await model.generate({ suffix: ' dog.' }, { length: 4, seed: 5, guidance: 1 });
	t.is(headless.sequence[0], model.config.bosId, 'the beginning-of-text token is pinned');
	t.is(headless.sequence.length, 1 + 4 + 2);
	// Tokens of the four bytes of an emoji, committed one by one: the text shows it only when it is whole.
	const bytes = tokenizer.encode('a😀b');
	t.true(bytes.length > 3);
	for (let length = 1; length <= bytes.length; length++) {
		const policy: SamplerPolicy = {
			decide: ({ positions, step }) => ({
				commit: [positions[step % 2 === 0 ? 0 : positions.length - 1] as number],
				tokens: [bytes[(positions[step % 2 === 0 ? 0 : positions.length - 1] as number) - 1] as number],
			}),
		};
		const { events } = await collect(
			model,
			{ tokens: Int32Array.of(50256) },
			{ sampler: policy, length: bytes.length },
		);
		t.is(events.at(-1)?.text, 'a😀b');
		for (const { text } of events.slice(0, -1)) t.false(text.includes('\uFFFD'), text);
	}
	await model.dispose();
});

test('streams of text in many bytes never show a broken character, whatever the order, growth and revisions', async (t) => {
	const model = await textModel();
	const { tokenizer } = model as { tokenizer: Tokenizer };
	const alphabet = ['a', ' b', 'é', 'ß', '漢字', '😀', '👩‍👩‍👧', 'नमस्ते', '\u{1F1EB}\u{1F1F7}', '\n', 'ﬁ', '\u0000'];
	let hidden = 0;
	for (let seed = 0; seed < 60; seed++) {
		const draw = (n: number, i: number): number => uniform(BigInt(seed), 60, n, i);
		let text = '';
		for (let i = 0; i < 8; i++) {
			const next = text + alphabet[Math.floor(draw(0, i) * alphabet.length)];
			if (tokenizer.encode(next).length <= 40) text = next;
		}
		const ids = Array.from(tokenizer.encode(text));
		const policy: SamplerPolicy = {
			verify: ({ tentative }) => (tentative.length > 0 ? [Array.from(tentative)] : []),
			decide({ step, positions, tentative }) {
				const chosen = Array.from(positions).filter((_, k) => k === 0 || draw(2 + step, k) < 0.3);
				const commit = draw(1, step) < 0.5 ? chosen : chosen.slice(-1);
				const reopen = step > 30 ? [] : Array.from(tentative).filter((p) => draw(100 + step, p) < 0.2);
				const settle = Array.from(tentative).filter((p) => !reopen.includes(p) && draw(200 + step, p) < 0.6);
				return { commit, tokens: commit.map((p) => ids[p - 1] as number), reopen, settle, tentative: true };
			},
		};
		for (const length of [ids.length, { max: ids.length, method: 'block', block: 5 }] as const) {
			const { events, result } = await collect(model, { tokens: Int32Array.of(50256) }, { sampler: policy, length });
			t.is(result.text, text);
			t.is(events.at(-1)?.text, text);
			for (const event of events.slice(0, -1)) {
				t.false(event.text.includes('\uFFFD'), JSON.stringify(event.text));
				const committed = Array.from(event.tokens.subarray(1)).filter((id) => id !== model.config.maskId);
				if (tokenizer.decode(Int32Array.from(committed)) !== event.text) hidden++;
			}
		}
	}
	t.true(hidden > 50, `${hidden} events kept a part of a character back`);
	await model.dispose();
});

test("a prompt that spells the mask token's text is plain text", async (t) => {
	const model = await textModel();
	const { tokenizer, config } = model as { tokenizer: Tokenizer; config: { maskId: number } };
	const spelled = tokenizer.decode(Int32Array.of(config.maskId));
	const result = await model.generate(`say ${spelled} twice: ${spelled}${spelled}`, { length: 3, steps: 3 });
	t.is(result.tokens.length, 3);
	t.is(result.stats.forwards, 3);
	const special = await model.generate('<|endoftext|>', { length: 2 });
	t.true(special.sequence.length > 3, 'the special token was not recognised');
	await model.dispose();
});

test('bad options and prompts are named', async (t) => {
	const model = await sharpModel();
	const bad = async (given: unknown, options: unknown, message: RegExp): Promise<void> => {
		await t.throwsAsync(
			model.generate(given as Prompt, options as GenerateOptions),
			{ code: 'ERR_DN_ARGUMENT', message },
			String(message),
		);
		await t.throwsAsync(model.generateBatch([given as Prompt], options as GenerateOptions), {
			code: 'ERR_DN_ARGUMENT',
			message,
		});
	};
	for (const [options, message] of [
		[{ temperature: Number.NaN }, /temperature is NaN/],
		[{ temperature: -1 }, /temperature is -1/],
		[{ temperature: '1' }, /temperature/],
		[{ length: -1 }, /length is -1/],
		[{ length: 1.5 }, /length is 1.5/],
		[{ length: 61 }, /64/],
		[{ length: { max: 61 } }, /64/],
		[{ length: { max: 0 } }, /length.max/],
		[{ length: { max: 5, method: 'guess' } }, /length.method/],
		[{ length: { max: 5, method: 'head' } }, /not available/],
		[{ length: { max: 5, coverage: 0.5 } }, /length.coverage/],
		[{ length: { max: 5, method: 'expected', coverage: 2 } }, /length.coverage/],
		[{ length: { max: 5, method: 'first-step' }, sampler: 'autoregressive' }, /first-step/],
		[{ steps: 0 }, /steps is 0/],
		[{ length: 8, steps: 2, block: 2 }, /4 blocks/],
		[{ length: 8, block: 9 }, /block is 9/],
		[{ block: 0 }, /block/],
		[{ topK: -1 }, /topK/],
		[{ topP: 0 }, /topP/],
		[{ topP: 1.5 }, /topP/],
		[{ guidance: Number.POSITIVE_INFINITY }, /guidance/],
		[{ seed: -1 }, /seed/],
		[{ seed: 1.5 }, /seed/],
		[{ seed: 2n ** 64n }, /seed/],
		[{ signal: {} }, /signal/],
		[{ stepz: 3 }, /stepz is not known/],
		[{ temperature: Number.POSITIVE_INFINITY }, /temperature is Infinity/],
		[{ topP: Number.NaN }, /topP is NaN/],
		[{ guidance: Number.NaN }, /guidance is NaN/],
		[{ sampler: 'threshold', threshold: Number.NaN }, /threshold is NaN/],
		[{ length: Number.NaN }, /length is NaN/],
		[{ block: 2.5 }, /block is 2.5/],
		[{ sampler: 'greedy' }, /sampler is "greedy"/],
		[{ sampler: {} }, /decide/],
		[{ sampler: 'ancestral', threshold: 0.9 }, /threshold has no meaning for the sampler 'ancestral'/],
		[{ sampler: 'autoregressive', steps: 3 }, /steps has no meaning/],
		[{ sampler: 'first-hitting', steps: 3 }, /steps has no meaning/],
		[{ score: 'best' }, /score/],
		[{ plan: 'random' }, /plan/],
		[null, /options/],
	] as [object, RegExp][]) {
		await bad(prompt, options, message);
	}
	for (const [given, message] of [
		['', /empty string/],
		['text', /no tokenizer/],
		[{ prefix: '', suffix: '' }, /both empty/],
		[{ prefx: 'a' }, /prefx/],
		[{ tokens: [1, 2] }, /Int32Array/],
		[{ tokens: new Int32Array(0) }, /empty/],
		[{ tokens: Int32Array.of(1, 61) }, /token 1 is 61/],
		[{ tokens: Int32Array.of(-1) }, /token 0 is -1/],
		[{ tokens: Int32Array.of(1, 2), open: Uint8Array.of(1) }, /2 entries/],
		[{ tokens: Int32Array.of(1, 2), open: Uint8Array.of(1, 0) }, /position 0 is open/],
		[{ tokens: Int32Array.of(1, 2), suffix: 'a' }, /suffix/],
		[{ tokens: new Int32Array(65) }, /65/],
		[null, /null/],
		[7, /number/],
	] as [unknown, RegExp][]) {
		await bad(given, {}, message);
	}
	await bad({ tokens: Int32Array.of(1, maskId) }, { length: 3 }, /length cannot be combined/);
	await bad({ tokens: Int32Array.of(1, maskId, 2) }, { sampler: 'autoregressive' }, /only continues/);
	await t.throwsAsync(model.generateBatch([prompt], [{}, {}]), {
		code: 'ERR_DN_ARGUMENT',
		message: /1 prompts but 2 options/,
	});
	await model.dispose();

	const causal = await sharpModel({ attention: 'causal', maskId: -1 });
	await t.throwsAsync(causal.generate(prompt, { sampler: 'confidence' }), {
		code: 'ERR_DN_ARGUMENT',
		message: /causal/,
	});
	await t.throwsAsync(causal.generate(prompt, { guidance: 1 }), { code: 'ERR_DN_ARGUMENT', message: /guidance/ });
	await t.throwsAsync(causal.predictLength(prompt, { max: 3 }), { code: 'ERR_DN_ARGUMENT' });
	t.is((await causal.generate(prompt, { length: 5 })).tokens.length, 5);
	await causal.dispose();
});
