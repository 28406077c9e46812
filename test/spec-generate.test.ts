/**
 * Generation against its meaning: what is drawn against probabilities computed here from `forward`, what a prompt keeps, and
 * what streams, seeds and aborts promise. Nothing is compared with the library's own statistics.
 */
import test, { type ExecutionContext } from 'ava';
import { DiffuGPT, type GenerateOptions, Tokenizer } from 'diffusion-native';

import { logSoftmax, sharpModel, smallConfig } from './helpers/models.js';
import { chiSquare } from './helpers/statistics.js';

const { vocab: V, maskId } = smallConfig;
const prompt = { tokens: Int32Array.of(0, 17, 4, 33, 8) };
const draws = 4000;

/** Probabilities of the filters in their order: temperature, nucleus (the id that crosses stays), top-k (ties stay). */
function filtered(logits: Float32Array, { temperature = 1, topP = 1, topK = 0 }: GenerateOptions): number[] {
	let p = logSoftmax(
		Array.from(logits, (value) => value / temperature),
		maskId,
	).map(Math.exp);
	const order = Array.from(p.keys()).sort((a, b) => (p[b] as number) - (p[a] as number));
	let before = 0;
	for (const [rank, id] of order.entries()) {
		const mass = p[id] as number;
		if (rank > 0 && before > topP) p[id] = 0;
		before += mass;
	}
	if (topK > 0) {
		const bound = p[order[topK - 1] as number] as number;
		p = p.map((value) => (value < bound ? 0 : value));
	}
	const sum = p.reduce((a, b) => a + b, 0);
	return p.map((value) => value / sum);
}

async function counts(model: DiffuGPT, options: GenerateOptions): Promise<number[]> {
	const found = new Array<number>(V).fill(0);
	const results = await model.generateBatch(
		Array.from({ length: draws }, () => prompt),
		Array.from({ length: draws }, (_, seed) => ({ ...options, length: 1, seed })),
	);
	for (const { tokens } of results) found[tokens[0] as number] = (found[tokens[0] as number] as number) + 1;
	return found;
}

test('one token is drawn with the probabilities of the forward pass at any temperature, top-p and top-k', async (t) => {
	await using model = await sharpModel({ layers: 1 }, 2, 12);
	// Scales the logits so that the distribution is neither flat nor a point.
	model.setParameter(
		'ln_f.weight',
		model.getParameter('ln_f.weight').map((value) => value * 0.35),
	);
	const canvas = Int32Array.of(...prompt.tokens, maskId);
	const at = async (attention: 'full' | 'causal', tokens: Int32Array): Promise<Float32Array> =>
		(await model.forward(tokens, { attention, rows: [Int32Array.of(prompt.tokens.length - 1)] }))[0] as Float32Array;
	const filters: GenerateOptions[] = [
		{ temperature: 1 },
		{ temperature: 0.5 },
		{ temperature: 2 },
		{ temperature: 1, topK: 5 },
		{ temperature: 1, topP: 0.6 },
		{ temperature: 0.8, topP: 0.8, topK: 7 },
	];
	for (const sampler of ['ancestral', 'autoregressive'] as const) {
		const logits = sampler === 'ancestral' ? await at('full', canvas) : await at('causal', prompt.tokens);
		for (const options of filters) {
			const expected = filtered(logits, options);
			const seen = await counts(model, { ...options, sampler });
			const name = `${sampler} ${JSON.stringify(options)}`;
			t.is(seen[maskId], 0, `${name}: the mask id`);
			t.true(expected.filter((p) => p * draws > 20).length > 3, `${name}: the test has something to tell apart`);
			t.deepEqual(
				seen.flatMap((n, id) => (n > 0 && expected[id] === 0 ? [id] : [])),
				[],
				`${name}: outside the set`,
			);
			const p = chiSquare(seen, expected);
			t.true(p > 1e-4, `${name}: p = ${p}`);
			if (options.temperature === 0.5) {
				const wrong = chiSquare(seen, filtered(logits, { ...options, temperature: 0.6 }));
				t.true(wrong < 1e-4, `${name}: a temperature of 0.6 would be seen, p = ${wrong}`);
			}
		}
		const greedy = filtered(logits, {}).reduce((best, p, id, all) => (p > (all[best] as number) ? id : best), 0);
		const { tokens } = await model.generate(prompt, { length: 1, sampler, temperature: 0 });
		t.is(tokens[0], greedy, `${sampler} at temperature 0`);
	}
});

test('filters that keep everything change nothing, and top-k of one is greedy', async (t) => {
	await using model = await sharpModel();
	const base = { length: 12, sampler: 'ancestral', steps: 6, seed: 5 } as const;
	const plain = await model.generate(prompt, base);
	t.deepEqual((await model.generate(prompt, { ...base, topK: 0, topP: 1 })).tokens, plain.tokens);
	t.deepEqual((await model.generate(prompt, { ...base, topK: V })).tokens, plain.tokens);
	t.deepEqual(
		(await model.generate(prompt, { ...base, topK: 1 })).tokens,
		(await model.generate(prompt, { ...base, temperature: 0 })).tokens,
	);
});

test('generate is the return value of stream, also with a bigint seed', async (t) => {
	await using model = await sharpModel();
	for (const sampler of ['ancestral', 'confidence', 'threshold', 'first-hitting', 'autoregressive'] as const) {
		const options = { length: 10, sampler, temperature: 1 };
		const stream = model.stream(prompt, { ...options, seed: 9n });
		let step = await stream.next();
		let last: Int32Array | undefined;
		while (!step.done) {
			last = step.value.tokens;
			step = await stream.next();
		}
		const whole = await model.generate(prompt, { ...options, seed: 9 });
		t.deepEqual(step.value.tokens, whole.tokens, sampler);
		t.deepEqual(step.value.sequence, whole.sequence);
		t.deepEqual(last, whole.sequence, 'the last event is the final canvas');
		t.is(step.value.seed, 9n);
		t.is(whole.seed, 9n);
		t.is(step.value.text, whole.text);
		t.is(step.value.finishReason, 'length');
	}
	const largest = 2n ** 64n - 1n;
	t.is((await model.generate(prompt, { length: 2, seed: largest })).seed, largest);
	const free = await model.generate(prompt, { length: 10, sampler: 'ancestral' });
	const again = await model.generate(prompt, { length: 10, sampler: 'ancestral', seed: free.seed });
	t.deepEqual(again.tokens, free.tokens, 'the seed that comes back reproduces the result');
});

test('concurrent streams take turns', async (t) => {
	await using model = await sharpModel();
	const order: number[] = [];
	const run = async (id: number): Promise<void> => {
		for await (const _ of model.stream(prompt, { length: 24, steps: 24, seed: id })) order.push(id);
	};
	await Promise.all([run(0), run(1), run(2)]);
	t.is(order.length, 72);
	const seen = [0, 0, 0];
	for (const id of order) {
		seen[id] = (seen[id] as number) + 1;
		t.true(Math.max(...seen) - Math.min(...seen) <= 2, `after ${seen}`);
	}
});

test('a stream that is left early, or aborted, stops and leaves the model as it was', async (t) => {
	await using model = await sharpModel();
	const options = { length: 30, steps: 30, seed: 4 };
	const whole = await model.generate(prompt, options);
	let steps = 0;
	for await (const { step } of model.stream(prompt, options)) {
		steps = step;
		if (step === 3) break;
	}
	t.is(steps, 3);
	for (const reason of [new Error('stop'), 'a string', 0]) {
		const controller = new AbortController();
		const stream = model.stream(prompt, { ...options, signal: controller.signal });
		await stream.next();
		controller.abort(reason);
		const outcome = await stream.next().then(
			() => 'went on',
			(error: unknown) => error,
		);
		t.is(outcome, reason);
		t.deepEqual(await stream.next(), { done: true, value: undefined } as never);
		const failed = await model.generateBatch([prompt, prompt], { ...options, signal: controller.signal }).then(
			() => 'went on',
			(error: unknown) => error,
		);
		t.is(failed, reason);
	}
	t.deepEqual((await model.generate(prompt, options)).tokens, whole.tokens);
});

/** A model over GPT-2's vocabulary; 50257 rows of 8 channels. */
const textModel = (): Promise<DiffuGPT> =>
	DiffuGPT.fromConfig(
		{ layers: 1, heads: 2, channels: 8, vocab: 50257, context: 48 },
		{ device: 'cpu', seed: 3, tokenizer: Tokenizer.gpt2() },
	);

function sequenceOf(
	t: ExecutionContext,
	sequence: Int32Array,
	before: Int32Array,
	filled: Int32Array,
	after: Int32Array,
): void {
	t.deepEqual([...sequence], [...before, ...filled, ...after]);
}

test('infilling keeps prefix and suffix, and only what lies between is text', async (t) => {
	await using model = await textModel();
	const tokenizer = Tokenizer.gpt2();
	const none = new Int32Array(0);
	const options = { length: 5, seed: 2, sampler: 'ancestral', steps: 3 } as const;
	const prefix = 'Once upon a';
	const suffix = ' the end. ¶ 漢字';
	const both = await model.generate({ prefix, suffix }, options);
	sequenceOf(t, both.sequence, tokenizer.encode(prefix), both.tokens, tokenizer.encode(suffix));
	t.is(both.text, tokenizer.decode(both.tokens));
	t.is(both.tokens.length, 5);
	const onlySuffix = await model.generate({ suffix }, options);
	sequenceOf(t, onlySuffix.sequence, Int32Array.of(50256), onlySuffix.tokens, tokenizer.encode(suffix));
	const onlyPrefix = await model.generate({ prefix }, options);
	t.deepEqual(onlyPrefix.sequence, (await model.generate(prefix, options)).sequence);
	sequenceOf(t, onlyPrefix.sequence, tokenizer.encode(prefix), onlyPrefix.tokens, none);
	const scattered = { tokens: Int32Array.of(5, 6, 7, 8, 9), open: Uint8Array.of(0, 1, 0, 1, 0) };
	const filled = await model.generate(scattered, { seed: 1 });
	t.deepEqual(
		[0, 2, 4].map((i) => filled.sequence[i]),
		[5, 7, 9],
	);
	t.deepEqual([...filled.tokens], [filled.sequence[1], filled.sequence[3]]);
	await t.throwsAsync(model.generate({ prefix: 'a b '.repeat(30) }), {
		code: 'ERR_DN_ARGUMENT',
		message: /context of? ?48|48/,
	});
	await t.throwsAsync(model.generate(''), { code: 'ERR_DN_ARGUMENT', message: /empty/ });
});

test('threads, batches and seeds: the same text bit for bit', async (t) => {
	const texts: string[] = [];
	for (const threads of [1, 2, 8]) {
		await using model = await DiffuGPT.fromConfig(
			{ layers: 2, heads: 2, channels: 32, vocab: 50257, context: 48 },
			{ device: 'cpu', seed: 3, threads, tokenizer: Tokenizer.gpt2() },
		);
		const options = [
			{ length: 20, sampler: 'ancestral', temperature: 0.9, topP: 0.9, seed: 1 },
			{ length: 12, sampler: 'confidence', block: 4, temperature: 1, seed: 2 },
			{ length: 16, sampler: 'autoregressive', topK: 40, seed: 3 },
		] as const;
		const prompts = ['A', { prefix: 'In the', suffix: ' sea.' }, 'The quick brown'] as const;
		const batch = await model.generateBatch(prompts, options);
		texts.push(JSON.stringify(batch.map(({ text, tokens }) => [text, ...tokens])));
		for (const [i, each] of batch.entries()) {
			const alone = await model.generate(prompts[i] as string, options[i] as GenerateOptions);
			t.deepEqual(alone.tokens, each.tokens, `${threads} threads, prompt ${i}`);
		}
	}
	t.is(texts[1], texts[0]);
	t.is(texts[2], texts[0]);
});

test('greedy autoregressive text is the arg max of a full recomputation at each token', async (t) => {
	await using model = await sharpModel({ attention: 'causal', maskId: -1, eosId: 0 }, 6);
	const { tokens } = await model.generate(prompt, { length: 20, temperature: 0 });
	const canvas = [...prompt.tokens];
	for (const token of tokens) {
		const [row] = (await model.forward(Int32Array.from(canvas), { rows: [Int32Array.of(canvas.length - 1)] })) as [
			Float32Array,
		];
		t.is(row.indexOf(Math.max(...row)), token);
		canvas.push(token);
	}
});
