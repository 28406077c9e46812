/** evaluate: every metric against figures worked out by hand or by enumeration, bad input, the command line. */
import { spawnSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import test from 'ava';
import {
	DiffuGPT,
	type EvaluationData,
	type EvaluationProgress,
	evaluate,
	type Metric,
	type Metrics,
	prepare,
	TokenDataset,
	Tokenizer,
} from 'diffusion-native';

import { rouge } from '../lib/eval/rouge.js';
import { windows } from '../lib/eval/sequences.js';
import { wilson } from '../lib/eval/statistics.js';
import { root } from './helpers/fixtures.js';
import { sharpModel } from './helpers/models.js';

const folder = mkdtempSync(join(tmpdir(), 'dn-evaluate-'));
test.after.always(() => rmSync(folder, { recursive: true, force: true }));
let names = 0;
/** Writes a file and returns its path. */
function file(text: string, extension = 'jsonl'): string {
	const path = join(folder, `${names++}.${extension}`);
	writeFileSync(path, text);
	return path;
}

const lines = (records: readonly object[]): string => records.map((record) => `${JSON.stringify(record)}\n`).join('');

/** Everything of a result that must not change from run to run. */
function facts(result: object): object {
	const { ms: _, tokensPerSecond: __, ...rest } = result as Record<string, unknown>;
	return rest;
}

function logSumExp(values: ArrayLike<number>): number {
	const all = Array.from(values);
	const largest = Math.max(...all);
	return largest + Math.log(all.reduce((sum, value) => sum + Math.exp(value - largest), 0));
}

/** -log p of each target at its position, by the model's aligned logits on `input`. */
async function crossEntropies(
	model: DiffuGPT,
	input: Int32Array,
	target: Int32Array,
	where: number[],
): Promise<number[]> {
	const V = model.config.vocab;
	const [logits] = (await model.forward(input, { output: 'aligned-logits' })) as [Float32Array];
	return where.map((i) => {
		const row = logits.subarray(i * V, (i + 1) * V);
		return logSumExp(row) - (row[target[i] as number] as number);
	});
}

const factorial = (n: number): number => (n < 2 ? 1 : n * factorial(n - 1));

/** The NELBO of one sequence, nats: every mask, its weight from the definition. */
async function enumerated(model: DiffuGPT, tokens: Int32Array, scorable: number[]): Promise<number> {
	const L = scorable.length;
	let sum = 0;
	for (let bits = 1; bits < 2 ** L; bits++) {
		const masked = scorable.filter((_, j) => (bits >> j) & 1);
		const input = tokens.map((id, i) => (masked.includes(i) ? model.config.maskId : id));
		const costs = await crossEntropies(model, input, tokens, masked);
		const weight = (factorial(masked.length - 1) * factorial(L - masked.length)) / factorial(L);
		sum += weight * costs.reduce((a, b) => a + b, 0);
	}
	return sum;
}

const range = (from: number, to: number): number[] => Array.from({ length: to - from }, (_, i) => from + i);

/** Five short sequences of ids 1 .. 59, some with a prompt. */
const short = [
	{ tokens: [5, 17, 33, 2, 9], promptLength: 1 },
	{ tokens: [8, 8, 41, 20, 7, 3], promptLength: 2 },
	{ tokens: [50, 1, 2], promptLength: 0 },
	{ tokens: [11, 12, 13, 14, 15, 16, 17], promptLength: 3 },
	{ tokens: [30, 31], promptLength: 1 },
];

async function shortTruth(model: DiffuGPT): Promise<{ nats: number; tokens: number }> {
	let nats = 0;
	let tokens = 0;
	for (const record of short) {
		const ids = Int32Array.from(record.tokens);
		const scorable = range(Math.max(record.promptLength, model.config.shift ? 1 : 0), ids.length);
		nats += await enumerated(model, ids, scorable);
		tokens += scorable.length;
	}
	return { nats, tokens };
}

/**
 * A model that predicts `targets[i]` at position i whatever it sees. Only the embeddings are not zero: position i - 1 (the
 * row that predicts i) points to axis i, and so does the embedding of the target.
 */
async function rigged(
	targets: Record<number, number>,
	config: Partial<Parameters<typeof DiffuGPT.fromConfig>[0]> = {},
	tokenizer?: Tokenizer,
): Promise<DiffuGPT> {
	const channels = 32;
	const model = await DiffuGPT.fromConfig(
		{ layers: 1, heads: 2, channels, vocab: 61, context: 24, maskId: 60, eosId: 0, ...config },
		{ device: 'cpu', ...(tokenizer ? { tokenizer } : {}) },
	);
	for (const { name, count } of model.parameters()) {
		if (name.startsWith('ln') || name.includes('.ln_')) continue;
		model.setParameter(name, new Float32Array(count));
	}
	const wte = new Float32Array(model.config.vocab * channels);
	const wpe = new Float32Array(model.config.context * channels);
	for (const [position, id] of Object.entries(targets)) {
		const i = Number(position);
		wpe[(i - 1) * channels + i] = 1000;
		wte[id * channels + i] = 20;
	}
	model.setParameter('wte.weight', wte);
	model.setParameter('wpe.weight', wpe);
	return model;
}

const gpt2 = Tokenizer.gpt2();
const gpt2Config = { vocab: 50257, maskId: 10541, eosId: 50256 };

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

test('ROUGE and Wilson intervals by hand', (t) => {
	const near = (a: number, b: number): void => {
		t.true(Math.abs(a - b) < 1e-9, `${a}, expected ${b}`);
	};
	// In common: 5 of 6 words; 'the cat', 'on the', 'the mat' of 5 pairs; the subsequence 'the cat on the mat'.
	const found = rouge('The cat was on the mat.', 'the cat sat on the mat');
	near(found.rouge1, 5 / 6);
	near(found.rouge2, 3 / 5);
	near(found.rougeL, 5 / 6);
	// Order matters to L only: 'police killed the gunman' against 'the gunman killed police' share 4 words, a subsequence of 2.
	const order = rouge('the gunman killed police', 'police killed the gunman');
	near(order.rouge1, 1);
	near(order.rouge2, 1 / 3);
	near(order.rougeL, 1 / 2);
	// Repetition is clipped: one 'a' in common, P = 1/4, R = 1/2.
	near(rouge('a a a a', 'a b').rouge1, (2 * (1 / 4) * (1 / 2)) / (1 / 4 + 1 / 2));
	near(rouge('a', 'a a').rougeL, 2 / 3);
	near(rouge('', 'a').rouge1, 0);
	near(rouge('Été, 3-4!', 'été 3 4').rougeL, 1);
	const [low, high] = wilson(8, 10);
	t.true(Math.abs(low - 0.49016) < 1e-4 && Math.abs(high - 0.94332) < 1e-4);
	t.is(wilson(0, 20)[0], 0);
	t.is(wilson(20, 20)[1], 1);
	t.true(Math.abs(wilson(0, 20)[1] - 0.16113) < 1e-4);
});

test('exact-match: trimmed at the end token, per kind, with costs', async (t) => {
	const model = await rigged({ 2: 7, 3: 8, 4: 9, 5: 0, 6: 4 });
	const records = [
		{ prompt: [1, 2], answer: [7, 8, 9], kind: 'a' },
		{ prompt: [3, 4], answer: [7, 8], kind: 'a' },
		{ prompt: [1, 2, 3], answer: [8, 9], kind: 'b' },
	];
	const seen: unknown[] = [];
	const result = await evaluate(model, records, {
		metric: 'exact-match',
		generate: { length: { max: 6 } },
		onRecord: (record) => void seen.push(record['correct']),
	});
	t.is(result.correct, 2);
	t.is(result.count, 3);
	t.true(Math.abs(result.rate - 2 / 3) < 1e-12);
	t.deepEqual(result.interval, wilson(2, 3));
	t.deepEqual(seen, [true, false, true]);
	t.is(result.kinds['a']?.correct, 1);
	t.is(result.kinds['b']?.rate, 1);
	t.true(Math.abs(result.meanTokens - 8 / 3) < 1e-12);
	t.is(result.unreachable, 0);
	t.true(result.meanForwards >= 3);
	// A fixed length goes on after the end token; what follows it does not count.
	const fixed = await evaluate(model, records, { metric: 'exact-match', generate: { length: 5 } });
	t.is(fixed.correct, 2);
	const cramped = await evaluate(model, records, { metric: 'exact-match', generate: { length: { max: 3 } } });
	t.is(cramped.unreachable, 1);
	t.deepEqual(
		facts(await evaluate(model, records, { metric: 'exact-match', generate: { length: { max: 6 } }, concurrency: 1 })),
		facts(result),
	);
	await model.dispose();
});

test('exact-match: texts, and what follows the hashes', async (t) => {
	const answer = ' #### 1,234';
	const targets: Record<number, number> = {};
	const prompt = gpt2.encode('Q:');
	[...gpt2.encode(`Q:${answer}`).slice(prompt.length), 50256].forEach((id, i) => {
		targets[prompt.length + i] = id;
	});
	const model = await rigged(targets, gpt2Config, gpt2);
	const records = [
		{ question: 'Q:', answer: 'It is <<1200+34>> #### 1234' },
		{ question: 'Q:', answer: '#### 1,234' },
	];
	const generate = { length: { max: 10 } };
	t.is((await evaluate(model, records, { metric: 'exact-match', generate })).correct, 1);
	t.is((await evaluate(model, records, { metric: 'exact-match', generate, extract: 'after-hashes' })).correct, 2);
	await model.dispose();
});

test('multiple choice: the ending with the smaller cost, worked out from the logits', async (t) => {
	const model = await sharpModel({}, 11, 24);
	const context = [4, 5, 6];
	const endings = [[7, 8], [9, 10, 11], [12]];
	const costs = await Promise.all(
		endings.map((ending) => enumerated(model, Int32Array.from([...context, ...ending]), range(3, 3 + ending.length))),
	);
	const best = costs.indexOf(Math.min(...costs));
	const perToken = costs.map((cost, i) => cost / (endings[i] as number[]).length);
	const bestPerToken = perToken.indexOf(Math.min(...perToken));
	let found: number[] = [];
	const onRecord = (record: Readonly<Record<string, unknown>>): void => {
		found = record['costs'] as number[];
	};
	const right = await evaluate(model, [{ context, endings, label: best }], { metric: 'multiple-choice', onRecord });
	t.is(right.form, 'weighted');
	t.is(right.correct, 1);
	t.not(best, bestPerToken, 'the two rules disagree here, or this test shows nothing');
	t.is(right.perToken.correct, 0);
	const normal = await evaluate(model, [{ context, endings, label: bestPerToken }], { metric: 'multiple-choice' });
	t.deepEqual([normal.correct, normal.perToken.correct], [0, 1]);
	for (const [i, cost] of costs.entries()) t.true(Math.abs(cost - (found[i] as number)) < 1e-4 * cost);
	t.is(
		(await evaluate(model, [{ context, endings, label: (best + 1) % 3 }], { metric: 'multiple-choice' })).correct,
		0,
	);

	// T = 1 masks everything once: the mean cross-entropy of a wholly masked ending.
	const masked = await Promise.all(
		endings.map(async (ending) => {
			const ids = Int32Array.from([...context, ...ending]);
			const where = range(3, ids.length);
			const list = await crossEntropies(
				model,
				ids.map((id, i) => (i < 3 ? id : 60)),
				ids,
				where,
			);
			return list.reduce((a, b) => a + b, 0) / list.length;
		}),
	);
	const label = masked.indexOf(Math.min(...masked));
	const plain = await evaluate(model, [{ context, endings, label }], {
		metric: 'multiple-choice',
		form: 'unweighted',
		samples: 1,
		onRecord,
	});
	t.is(plain.correct, 1);
	for (const [i, cost] of masked.entries()) t.true(Math.abs(cost - (found[i] as number)) < 1e-4 * cost);
	await model.dispose();

	// Over many records and T = 32: expected cost under uniform predictions is ln V times the share of draws that mask something.
	const blind = await rigged({});
	let sum = 0;
	let count = 0;
	const many = Array.from({ length: 50 }, () => ({ context, endings: [[7], [8]], label: 0 }));
	await evaluate(blind, many, {
		metric: 'multiple-choice',
		form: 'unweighted',
		onRecord: (record) => {
			for (const cost of record['costs'] as number[]) {
				sum += cost / Math.log(61);
				count++;
			}
		},
	});
	// E = mean of k / 32 = 33 / 64; variance per ending below 1 / (6 * 32).
	t.true(Math.abs(sum / count - 33 / 64) < 4 * Math.sqrt(1 / (6 * 32) / count), String(sum / count));
	await blind.dispose();

	const causal = await sharpModel({ attention: 'causal' }, 5, 24);
	const chain = await Promise.all(
		endings.map(async (ending) => {
			const ids = Int32Array.from([...context, ...ending]);
			return (await crossEntropies(causal, ids, ids, range(3, ids.length))).reduce((a, b) => a + b, 0);
		}),
	);
	const likelier = chain.indexOf(Math.min(...chain));
	const left = await evaluate(causal, [{ context, endings, label: likelier }], { metric: 'multiple-choice' });
	t.is(left.form, 'autoregressive');
	t.is(left.correct, 1);
	await causal.dispose();
});

test('multiple choice: context and ending are tokenised together, or apart when compatible', async (t) => {
	const model = await rigged({}, gpt2Config, gpt2);
	const lengths = async (record: object, options: object = {}): Promise<unknown> => {
		let tokens: unknown;
		await evaluate(model, [record], {
			metric: 'multiple-choice',
			samples: 1,
			...options,
			onRecord: (found) => (tokens = found['tokens']),
		});
		return tokens;
	};
	const endings = ['lighthouse keeper', ' lighthouse keeper'];
	const joint = gpt2.encode(' lighthouse keeper').length;
	t.deepEqual(await lengths({ context: 'The', endings, label: '1' }), [joint, joint]);
	t.deepEqual(await lengths({ context: 'The  ', endings: ['a', 'b'], label: 0 }), [
		gpt2.encode('The  a').length - 1,
		gpt2.encode('The  b').length - 1,
	]);
	t.deepEqual(await lengths({ context: 'The', endings, label: 1 }, { compat: true }), [
		gpt2.encode('lighthouse keeper').length,
		joint,
	]);
	t.not(gpt2.encode('lighthouse keeper').length, joint);
	// One token spans prompt and answer: it belongs to the answer, or nothing of the answer would be hidden.
	t.is(gpt2.encode('Hello').length, 1);
	const seam = await evaluate(model, [{ prompt: 'Hel', answer: 'lo' }], { metric: 'likelihood', separator: '' });
	t.deepEqual([seam.records, seam.tokens], [1, 1]);
	await model.dispose();
});

test('lambada: the last word from its number of tokens; diffusion, causal, compatible', async (t) => {
	const first = 'the cat sat on the mat';
	const ids = gpt2.encode(first);
	const position = ids.length;
	const mat = ids.at(-1) as number;
	const path = file(`${first}\nthe cat sat on the dog\n\nthe cat sat on the mat \n`, 'txt');
	const model = await rigged({ [position]: mat }, gpt2Config, gpt2);
	const words: unknown[] = [];
	const result = await evaluate(model, path, { metric: 'lambada', onRecord: ({ word }) => words.push(word) });
	t.deepEqual([result.records, result.correct, result.meanForwards], [3, 2, 1]);
	t.deepEqual(words, ['mat', 'dog', 'mat']);
	// Without the token in front everything moves by one.
	t.is((await evaluate(model, path, { metric: 'lambada', compat: true })).correct, 0);
	const moved = await rigged({ [position - 1]: mat }, gpt2Config, gpt2);
	t.is((await evaluate(moved, [{ text: first }], { metric: 'lambada', compat: true })).correct, 1);
	const causal = await rigged({ [position]: mat }, { ...gpt2Config, attention: 'causal' }, gpt2);
	t.is((await evaluate(causal, path, { metric: 'lambada' })).correct, 2);
	for (const each of [model, moved, causal]) await each.dispose();
});

test('infilling: the middle at its own length; a causal model sees the prefix only', async (t) => {
	const [prefix, middle, suffix] = ['the cat', ' sat on', ' the mat'];
	const from = gpt2.encode(prefix).length;
	const [sat, on] = gpt2.encode(middle) as unknown as [number, number];
	const records = [
		{ prefix, middle, suffix },
		{ prefix, middle: ' sat down', suffix },
	];
	for (const attention of ['bidirectional', 'causal'] as const) {
		const model = await rigged({ [from]: sat, [from + 1]: on }, { ...gpt2Config, attention }, gpt2);
		const result = await evaluate(model, records, { metric: 'infilling' });
		t.is(result.exactMatch.correct, 1);
		t.true(Math.abs(result.rouge1 - (1 + 0.5) / 2) < 1e-12);
		t.true(Math.abs(result.rouge2 - (1 + 0) / 2) < 1e-12);
		t.true(Math.abs(result.rougeL - (1 + 0.5) / 2) < 1e-12);
		t.is(result.prefixOnly, attention === 'causal');
		t.is(result.meanForwards, 2);
		await model.dispose();
	}
	const model = await rigged({ 1: sat, 2: on }, gpt2Config, gpt2);
	t.is(
		(await evaluate(model, [{ prefix: '', middle: ' sat on', suffix: ' it' }], { metric: 'infilling' })).exactMatch
			.correct,
		1,
	);
	await model.dispose();
});

test('generative perplexity: the judge, entropy and distinct-2 by hand', async (t) => {
	// Generates 7 8 7 8 and then the end token.
	const model = await rigged({ 1: 7, 2: 8, 3: 7, 4: 8, 5: 0 });
	const uniform = await rigged({}, { attention: 'causal', context: 4 });
	const generate = { length: 8, sampler: 'confidence' } as const;
	const result = await evaluate(model, null, { metric: 'generative-perplexity', judge: uniform, samples: 3, generate });
	t.is(result.records, 3);
	t.is(result.tokens, 12);
	t.true(Math.abs(result.perplexity - 61) < 1e-3);
	t.true(Math.abs(result.entropy - Math.log(2)) < 1e-12);
	// The pairs 7 8 and 8 7, of three in each of three texts.
	t.true(Math.abs(result.distinct2 - 2 / 9) < 1e-12);

	// A judge with opinions: by hand, behind the prompt, which is not scored.
	const judge = await sharpModel({ attention: 'causal' }, 4, 16);
	const prompted = await evaluate(model, [{ prompt: [3, 5] }], { metric: 'generative-perplexity', judge, generate });
	const ids = Int32Array.of(0, 3, 5, 8, 7, 8);
	const costs = await crossEntropies(judge, ids, ids, [3, 4, 5]);
	t.is(prompted.tokens, 3);
	t.true(Math.abs(prompted.nll - costs.reduce((a, b) => a + b, 0) / 3) < 1e-4 * prompted.nll);
	// Drawn texts: a function of the seed, whatever runs beside them.
	const source = await sharpModel();
	const draw = async (seed: number, concurrency: number): Promise<object> => {
		const texts: unknown[] = [];
		const found = await evaluate(source, null, {
			metric: 'generative-perplexity',
			judge,
			samples: 6,
			seed,
			concurrency,
			generate: { length: 10 },
			onRecord: ({ text }) => void texts.push(text),
		});
		t.is(new Set(texts.map(String)).size, 6, 'texts differ');
		return { ...facts(found), texts };
	};
	const drawn = await draw(3, 64);
	t.deepEqual(await draw(3, 1), drawn);
	t.notDeepEqual(await draw(4, 64), drawn);
	await source.dispose();

	await t.throwsAsync(evaluate(model, null, { metric: 'generative-perplexity', judge: model }), {
		code: 'ERR_DN_ARGUMENT',
		message: /the judge is bidirectional/,
	});
	await t.throwsAsync(evaluate(model, null, { metric: 'generative-perplexity' } as never), {
		message: /needs the option judge/,
	});
	for (const each of [model, uniform, judge]) await each.dispose();
});

test('bad input is an ERR_DN_ARGUMENT that names the place', async (t) => {
	const model = await sharpModel({ context: 16 });
	const causal = await sharpModel({ attention: 'causal', maskId: -1 });
	const wordy = await rigged({}, gpt2Config, gpt2);
	const fails = async (who: DiffuGPT, data: unknown, options: object, message: RegExp): Promise<void> => {
		const error = await t.throwsAsync(evaluate(who, data as EvaluationData, options as { metric: 'nelbo' }), {
			code: 'ERR_DN_ARGUMENT',
			message,
		});
		t.true(error.message.length > 20);
	};
	await fails(model, file(''), { metric: 'nelbo' }, /\.jsonl holds no records/);
	await fails(model, [], { metric: 'nelbo' }, /the data holds no records/);
	await fails(model, join(folder, 'none.jsonl'), { metric: 'nelbo' }, /cannot be read/);
	await fails(model, file('{"tokens":[1,2]}\n{"tokens":[1,}\n'), { metric: 'nelbo' }, /line 2: not JSON/);
	await fails(model, file('{"tokens":[1,2]}\n\n[3]\n'), { metric: 'nelbo' }, /line 3: expected a JSON object/);
	await fails(model, file('hello', 'txt'), { metric: 'nelbo' }, /reads \.jsonl files/);
	await fails(model, [{ txt: 'a' }], { metric: 'nelbo' }, /record 0: there is no field 'text'; found txt/);
	await fails(model, [{ text: 'a' }], { metric: 'nelbo' }, /needs a tokenizer/);
	await fails(model, [{ tokens: [1, 61] }], { metric: 'nelbo' }, /record 0: the id 61 is outside/);
	await fails(model, [{ tokens: [1] }], { metric: 'nelbo' }, /no token to score/);
	await fails(model, [{ tokens: range(1, 18) }], { metric: 'nelbo' }, /17 tokens, more than the model's context of 16/);
	await fails(model, [{ prompt: [1], answer: range(1, 17) }], { metric: 'nelbo' }, /record 0: prompt and answer: 18/);
	await fails(model, [{ prompt: [1] }], { metric: 'likelihood' }, /no field 'answer'/);
	await fails(
		model,
		[{ prompt: [1], answer: range(1, 16) }],
		{ metric: 'exact-match' },
		/more than the model's context/,
	);
	await fails(model, [{ prompt: [1], answer: [] }], { metric: 'exact-match' }, /the answer is empty/);
	await fails(
		model,
		[{ prompt: [1, 2], answer: [3] }],
		{ metric: 'exact-match', generate: { length: 15 } },
		/record 0: .*do not fit/,
	);
	await fails(
		model,
		[{ prompt: [1], answer: [3] }],
		{ metric: 'exact-match', generate: { seed: 1 } },
		/generate\.seed: the metric/,
	);
	await fails(
		model,
		[{ context: [1], endings: [[2]], label: 0 }],
		{ metric: 'multiple-choice' },
		/expected a list of 2 to/,
	);
	await fails(
		model,
		[{ context: [1], endings: [[2], [3]], label: 2 }],
		{ metric: 'multiple-choice' },
		/expected the number of an ending, 0 to 1/,
	);
	await fails(
		model,
		[{ context: [1], endings: [[2], []], label: 0 }],
		{ metric: 'multiple-choice' },
		/ending 1 is empty/,
	);
	// While other records are in flight.
	const good = { prompt: [1], answer: [3] };
	const greedy = { metric: 'exact-match', generate: { length: { max: 14 } } };
	await fails(model, [good, good, { prompt: [1] }], greedy, /record 2: there is no field 'answer'/);
	await fails(model, [good, { prompt: [1, 2, 3], answer: [3] }, good], greedy, /record 1: .*do not fit/);
	await fails(wordy, [{ prefix: 'a', suffix: 'b' }], { metric: 'infilling' }, /no field 'middle'/);
	await fails(wordy, file('one\n', 'txt'), { metric: 'lambada' }, /passage 1: .*no two words/);
	await fails(model, short, { metric: 'perplexity' }, /needs a causal model, and this one is bidirectional/);
	await fails(causal, short, { metric: 'nelbo' }, /needs a masked diffusion model/);
	await fails(model, short, { metric: 'bleu' }, /option metric is "bleu", expected 'nelbo'/);
	await fails(model, short, { metric: 'nelbo', sample: 4 }, /option sample has no meaning/);
	await fails(model, short, { metric: 'nelbo', samples: 0 }, /option samples is 0/);
	await fails(model, short, { metric: 'nelbo', enumerate: 20 }, /option enumerate is 20/);
	await fails(model, short, { metric: 'nelbo', padding: { multiple: 0 } }, /option padding/);
	await fails(model, null, { metric: 'nelbo' }, /needs data/);
	await fails({} as DiffuGPT, short, { metric: 'nelbo' }, /not a model/);
	await model.dispose();
	await t.throwsAsync(evaluate(model, short, { metric: 'nelbo' }), { code: 'ERR_DN_DISPOSED' });
	await causal.dispose();
	await wordy.dispose();
});

test('aborting stops every metric and leaves the model usable', async (t) => {
	const model = await sharpModel();
	const forever = function* (): Generator<object, void> {
		for (let i = 1; ; i++) yield { prompt: [1, 2], answer: [1 + (i % 50)], tokens: [1, 2, 3] };
	};
	for (const metric of ['nelbo', 'likelihood', 'exact-match'] satisfies Metric[]) {
		const controller = new AbortController();
		const reason = new Error('enough');
		let records = 0;
		const options: Metrics['nelbo']['options'] = {
			signal: controller.signal,
			onProgress: (progress) => {
				records = progress.records;
				if (records === 100) controller.abort(reason);
			},
		};
		t.is(
			await t.throwsAsync(evaluate(model, forever() as EvaluationData, { metric: metric as 'nelbo', ...options })),
			reason,
		);
		t.true(records >= 100 && records < 400);
	}
	t.true((await evaluate(model, short, { metric: 'nelbo' })).nelbo > 0);
	await model.dispose();
});

test('the command: a result for people or as JSON, records in a file, wrong usage', async (t) => {
	const model = await rigged({ 1: 318 }, gpt2Config, gpt2);
	const path = join(folder, 'model');
	await model.save(path);
	await model.dispose();
	const data = file(
		lines([
			{ prompt: 'It', answer: 'is' },
			{ prompt: 'It', answer: 'was' },
		]),
	);
	const run = (...parameters: string[]): { status: number | null; stdout: string; stderr: string } =>
		spawnSync(process.execPath, [join(root, 'dist', 'lib', 'cli', 'main.js'), 'eval', path, ...parameters], {
			encoding: 'utf8',
			timeout: 60_000,
		});
	const output = join(folder, 'records.jsonl');
	const json = run(
		data,
		'--metric',
		'nelbo',
		'--samples',
		'2',
		'--seed',
		'4',
		'--no-end-token',
		'--json',
		'--output',
		output,
	);
	t.is(json.status, 0, json.stderr);
	const result = JSON.parse(json.stdout) as Record<string, unknown>;
	t.is(result['metric'], 'nelbo');
	t.is(result['tokens'], 2);
	t.is(result['seed'], '4');
	t.is(readFileSync(output, 'utf8').trim().split('\n').length, 2);
	const plain = run(data, '--metric', 'exact-match', '--generate', '{"length":1}');
	t.is(plain.status, 0, plain.stderr);
	t.regex(plain.stdout, /rate\s+0\.5/);
	const wrong = run(data, '--metric', 'bleu');
	t.is(wrong.status, 2);
	t.regex(wrong.stderr, /expected 'nelbo'/);
	const broken = run(file('{"prompt":1}\n'), '--metric', 'exact-match', '--json');
	t.is(broken.status, 2);
	t.regex(broken.stderr, /line 1: .*expected text/);
	t.is(run(data).status, 2);
});
