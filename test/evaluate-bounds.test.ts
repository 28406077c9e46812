/** evaluate: NELBO, perplexity and likelihood against figures worked out by enumeration. */
import { join } from 'node:path';

import test from 'ava';
import { type EvaluationData, type EvaluationProgress, evaluate, prepare, TokenDataset } from 'diffusion-native';

import { windows } from '../lib/eval/sequences.js';
import {
	crossEntropies,
	enumerated,
	facts,
	file,
	folder,
	lines,
	range,
	rigged,
	short,
	shortTruth,
} from './helpers/evaluate.js';
import { sharpModel } from './helpers/models.js';

test('nelbo: enumeration gives the exact bound, drawing gives it within three standard errors', async (t) => {
	for (const shift of [true, false]) {
		const model = await sharpModel({ shift }, 3, 24);
		const { nats, tokens } = await shortTruth(model);
		const exact = await evaluate(model, short, { metric: 'nelbo', enumerate: 8 });
		t.is(exact.tokens, tokens);
		t.is(exact.records, 5);
		t.is(exact.standardError, 0);
		t.true(Math.abs(exact.nelbo - nats / tokens) < 1e-4 * exact.nelbo, `${exact.nelbo} against ${nats / tokens}`);
		const drawn = await evaluate(model, short, { metric: 'nelbo', samples: 64, seed: 5 });
		t.is(drawn.draws, 5 * 64);
		const error = drawn.standardError as number;
		t.true(error > 0 && error < 0.2 * exact.nelbo, String(error));
		t.true(Math.abs(drawn.nelbo - exact.nelbo) < 3 * error, `${drawn.nelbo} +- ${error} against ${exact.nelbo}`);
		await model.dispose();
	}
});

test('nelbo: the mean over many seeds is the exact bound, and the stated error covers the spread', async (t) => {
	const model = await sharpModel({}, 3, 24);
	const { nelbo: exact } = await evaluate(model, short, { metric: 'nelbo', enumerate: 8 });
	for (const samples of [1, 3]) {
		const seeds = 300;
		const found: number[] = [];
		let stated = 0;
		for (let seed = 0; seed < seeds; seed++) {
			const result = await evaluate(model, short, { metric: 'nelbo', samples, seed });
			found.push(result.nelbo);
			stated += (result.standardError ?? 0) ** 2 / seeds;
			if (samples === 1) t.is(result.standardError, null);
		}
		const mean = found.reduce((a, b) => a + b, 0) / seeds;
		const variance = found.reduce((sum, value) => sum + (value - mean) ** 2, 0) / (seeds - 1);
		t.true(Math.abs(mean - exact) < 3.5 * Math.sqrt(variance / seeds), `${mean} against ${exact}`);
		if (samples > 1) {
			const ratio = stated / variance;
			t.true(ratio > 0.8 && ratio < 4, `stated variance is ${ratio} times the true one`);
		}
	}
	await model.dispose();
});

test('nelbo: uniform predictions cost ln V, whatever is drawn', async (t) => {
	const model = await rigged({});
	const result = await evaluate(model, short, { metric: 'nelbo', samples: 3 });
	t.true(Math.abs(result.nelbo - Math.log(61)) < 1e-6);
	t.true(Math.abs(result.perplexityBound - 61) < 1e-4);
	t.true((result.standardError as number) < 1e-6 && (result.populationError as number) < 1e-6);
	t.false(result.seesFuture, 'a model without weights cannot see');
	await model.dispose();
});

test('nelbo: batches, sources of the data and runs change nothing; seeds and kinds do', async (t) => {
	const model = await sharpModel();
	const records = short.map((record, i) => ({ ...record, kind: i % 2 === 0 ? 'even' : 'odd' }));
	const options = { metric: 'nelbo', samples: 4, seed: 9n } as const;
	const whole = await evaluate(model, records, options);
	t.true(whole.seesFuture);
	for (const batchTokens of [1, 20, 100])
		t.deepEqual(facts(await evaluate(model, records, { ...options, batchTokens })), facts(whole));
	t.deepEqual(facts(await evaluate(model, file(lines(records)), options)), facts(whole));
	async function* stream(): AsyncGenerator<object, void> {
		yield* records;
	}
	t.deepEqual(facts(await evaluate(model, stream() as EvaluationData, options)), facts(whole));
	t.not((await evaluate(model, records, { ...options, seed: 10 })).nelbo, whole.nelbo);
	t.deepEqual(Object.keys(whole.kinds), ['even', 'odd']);
	const { even, odd } = whole.kinds as Required<Record<'even' | 'odd', (typeof whole.kinds)[string]>>;
	t.is(even.tokens + odd.tokens, whole.tokens);
	t.true(Math.abs((even.mean * even.tokens + odd.mean * odd.tokens) / whole.tokens - whole.nelbo) < 1e-9);

	// A token file of the same sequences.
	const tokenizer = { encode: () => new Int32Array(0), vocabSize: 61 };
	const pairs = short
		.filter(({ promptLength }) => promptLength > 0)
		.map((record) => ({ ...record, tokens: Int32Array.from(record.tokens) }));
	const out = join(folder, 'pairs.bin');
	(await prepare(pairs, { tokenizer, out, format: 'pairs', context: 24, eosId: 0 })).close();
	const withEnd = pairs.map(({ tokens, promptLength }) => ({ tokens: [...tokens, 0], promptLength }));
	const fromRecords = await evaluate(model, withEnd, options);
	t.deepEqual(facts(await evaluate(model, out, options)), facts(fromRecords));
	using opened = await TokenDataset.open(out);
	const seen: EvaluationProgress[] = [];
	t.deepEqual(
		facts(await evaluate(model, opened, { ...options, onProgress: (p) => seen.push(p) })),
		facts(fromRecords),
	);
	t.deepEqual(seen.at(-1), { records: 4, fraction: 1 });
	t.is((await evaluate(model, opened, { ...options, limit: 2 })).records, 2);
	await model.dispose();
});

test('nelbo: prompts are never masked, the end token counts, padding counts when asked for', async (t) => {
	const model = await sharpModel();
	const records = [
		{ prompt: [4, 5, 6], answer: [7, 8] },
		{ prompt: [9], answer: [1, 2, 3, 4] },
	];
	const count = async (options: object): Promise<number> =>
		(await evaluate(model, records, { metric: 'nelbo', samples: 1, ...options })).tokens;
	t.is(await count({}), 3 + 5);
	t.is(await count({ endToken: false }), 2 + 4);
	t.is(await count({ padding: { multiple: 8 } }), 5 + 7);
	// The same answers after other prompts: only the prompt's influence differs, so the bound of a model that ignores what it sees is equal.
	const blind = await rigged({ 3: 7 });
	const one = await evaluate(blind, [{ prompt: [4, 5, 6], answer: [7] }], {
		metric: 'nelbo',
		enumerate: 4,
		endToken: false,
	});
	t.true(one.nelbo < 1e-6, 'the answer is predicted with certainty, the prompt does not count');
	// What is scored is answer and end token, and nothing of the prompt: by enumeration.
	const exact = await evaluate(model, records, { metric: 'nelbo', enumerate: 8 });
	const truth =
		(await enumerated(model, Int32Array.of(4, 5, 6, 7, 8, 0), [3, 4, 5])) +
		(await enumerated(model, Int32Array.of(9, 1, 2, 3, 4, 0), [1, 2, 3, 4, 5]));
	t.true(Math.abs(exact.nelbo - truth / 8) < 1e-4 * exact.nelbo);
	await model.dispose();
	await blind.dispose();
});

test('perplexity: exp of the mean cross-entropy of the logits; texts longer than the context in windows', async (t) => {
	const model = await sharpModel({ attention: 'causal', context: 8 }, 2, 16);
	const records = [{ tokens: [5, 17, 33, 2, 9] }, { prompt: [8, 8, 41], answer: [20, 7] }, { text: range(1, 20) }];
	const result = await evaluate(model, records, { metric: 'perplexity', seed: 1 });
	const nats = async (tokens: number[], from: number): Promise<number> => {
		const ids = Int32Array.from(tokens);
		return (await crossEntropies(model, ids, ids, range(from, ids.length))).reduce((a, b) => a + b, 0);
	};
	const text = [0, ...range(1, 20), 0];
	let sum = (await nats([5, 17, 33, 2, 9], 1)) + (await nats([8, 8, 41, 20, 7, 0], 3));
	// Windows of 8 that overlap by one: 0-7, 7-14, 14-20.
	sum += (await nats(text.slice(0, 8), 1)) + (await nats(text.slice(7, 15), 1)) + (await nats(text.slice(14), 1));
	t.is(result.tokens, 4 + 3 + 20);
	t.is(result.records, 5);
	t.true(Math.abs(result.nll - sum / 27) < 1e-4 * result.nll, `${result.nll} against ${sum / 27}`);
	t.true(Math.abs(Math.log(result.perplexity) - result.nll) < 1e-9);
	t.false(result.seesFuture);
	t.deepEqual(facts(await evaluate(model, records, { metric: 'perplexity', seed: 1, batchTokens: 1 })), facts(result));
	t.deepEqual(windows(10, 6, 3), [
		{ begin: 0, from: 1, to: 6 },
		{ begin: 3, from: 6, to: 9 },
		{ begin: 6, from: 9, to: 10 },
	]);
	await model.dispose();
});

test('likelihood: short answers exactly, longer ones by draws, causal models by the chain rule', async (t) => {
	const records = [
		{ prompt: [4, 5, 6], answer: [7, 8] },
		{ prompt: [9, 3], answer: [1, 2, 3, 4] },
	];
	const model = await sharpModel({}, 3, 24);
	const truth = -(
		(await enumerated(model, Int32Array.of(4, 5, 6, 7, 8), [3, 4])) +
		(await enumerated(model, Int32Array.of(9, 3, 1, 2, 3, 4), [2, 3, 4, 5]))
	);
	const exact = await evaluate(model, records, { metric: 'likelihood' });
	t.is(exact.exact, 2);
	t.is(exact.tokens, 6);
	t.true(Math.abs(exact.logLikelihood - truth / 2) < 1e-4 * Math.abs(truth));
	t.true(Math.abs(exact.perToken - truth / 6) < 1e-4 * Math.abs(truth));
	const drawn = await evaluate(model, records, { metric: 'likelihood', enumerate: 0, samples: 100 });
	t.is(drawn.exact, 0);
	t.true(Math.abs(drawn.logLikelihood - exact.logLikelihood) < 3 * (drawn.standardError as number));
	await model.dispose();

	const causal = await sharpModel({ attention: 'causal' }, 3, 24);
	const ids = Int32Array.of(4, 5, 6, 7, 8);
	const [a, b] = (await crossEntropies(causal, ids, ids, [3, 4])) as [number, number];
	const chain = await evaluate(causal, records.slice(0, 1), { metric: 'likelihood' });
	t.true(Math.abs(chain.logLikelihood + a + b) < 1e-4 * (a + b));
	await causal.dispose();
});
