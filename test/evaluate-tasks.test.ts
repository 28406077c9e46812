/** evaluate: exact match, multiple choice, LAMBADA, infilling and generative perplexity against figures worked out by hand. */
import test from 'ava';
import { evaluate } from 'diffusion-native';

import { rouge } from '../lib/eval/rouge.js';
import { wilson } from '../lib/eval/statistics.js';
import { crossEntropies, enumerated, facts, file, gpt2, gpt2Config, range, rigged } from './helpers/evaluate.js';
import { sharpModel } from './helpers/models.js';

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
		{ question: 'Q:', answer: '1,234' },
	];
	const generate = { length: { max: 10 } };
	t.is((await evaluate(model, records, { metric: 'exact-match', generate })).correct, 1);
	t.is((await evaluate(model, records, { metric: 'exact-match', generate, extract: 'after-hashes' })).correct, 3);
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
	// A model without a preference: greedy says the same every time, upstream's draws differ.
	const blind = await rigged({}, gpt2Config, gpt2);
	for (const compat of [false, true]) {
		const said = new Set<unknown>();
		await evaluate(blind, new Array(6).fill({ text: first }), {
			...{ metric: 'lambada', compat, onRecord: ({ generated }) => void said.add(generated) },
		});
		t.is(said.size > 1, compat, [...said].join('|'));
	}
	for (const each of [model, moved, causal, blind]) await each.dispose();
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
	const shares: (number | undefined)[] = [];
	const onProgress = ({ fraction }: { fraction?: number | undefined }) => void shares.push(fraction);
	const few = { metric: 'generative-perplexity', judge: uniform, limit: 2, generate, onProgress } as const;
	t.is((await evaluate(model, null, few)).records, 2);
	t.deepEqual([shares.at(-1), shares.every((share) => (share as number) <= 1)], [1, true]);
	await t.throwsAsync(evaluate(model, null, { ...few, concurrency: 1200 }), {
		message: /concurrency is 1200, expected .* to 512/,
	});
	await t.throwsAsync(evaluate(model, [{ prompt: [3] }], { ...few, columns: { promt: 'q' } }), {
		message: /columns\.promt is not known, did you mean 'prompt'/,
	});

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
