/** The columns of the generation table of evaluateLength, each worked out another way. */
import test from 'ava';
import { DiffuGPT, evaluate, evaluateLength, type GenerateResult, type GenerationRow } from 'diffusion-native';

import { wasserstein } from '../lib/length/metrics.js';
import { toyLengthModel, toyPairs } from './helpers/lengths.js';

const max = 14;
const pairs = toyPairs(10, 91n);
/** One token a forward. */
const sampler = { sampler: 'threshold', threshold: 2 } as const;

const mean = (values: readonly number[]): number => values.reduce((a, b) => a + b, 0) / values.length;

test('exact match, truncation, distance, judged likelihood and NELBO of a method are what single calls give', async (t) => {
	const toy = await toyLengthModel();
	const causal = {
		layers: 1,
		heads: 2,
		channels: 32,
		vocab: 16,
		context: 24,
		maskId: 15,
		eosId: 0,
		attention: 'causal',
	} as const;
	const judge = await DiffuGPT.fromConfig(causal, { seed: 3, device: 'cpu' });
	const near = (a: number | null | undefined, b: number, what: string): void => {
		t.true(Math.abs((a as number) - b) < 1e-5 * Math.max(1, Math.abs(b)), `${what}: ${a}, expected ${b}`);
	};
	const { generations } = await evaluateLength(toy, pairs, {
		...{ max, calibration: toyPairs(60, 92n), methods: ['threshold'], coverage: [0.8] },
		...{ generations: 10, seeds: [1, 2], batch: 4, likelihoods: 6, samples: 3, generate: sampler, judge },
	});
	t.deepEqual([...new Set(generations?.rows.map(({ method }) => method))], ['fixed', 'early cut', 'threshold']);
	const results: Record<string, GenerateResult[]> = { 'early cut': [], fixed: [] };
	for (const { prompt } of pairs) {
		const asked = { tokens: Int32Array.from(prompt) };
		results['early cut']?.push(await toy.generate(asked, { ...sampler, length: { max }, seed: 5 }));
		results['fixed']?.push(await toy.generate(asked, { ...sampler, length: max, seed: 5 }));
	}
	for (const method of ['early cut', 'fixed']) {
		const row = generations?.rows.find((entry) => entry.method === method && entry.kind === '') as GenerationRow;
		const answers = (results[method] as GenerateResult[]).map(({ tokens }) => {
			const end = tokens.indexOf(0);
			return { tokens: end < 0 ? tokens : tokens.slice(0, end), ended: method === 'fixed' ? end >= 0 : true };
		});
		if (method === 'early cut') {
			for (const [i, { finishReason }] of (results[method] as GenerateResult[]).entries())
				(answers[i] as { ended: boolean }).ended = finishReason === 'end-of-text';
		}
		// The fixed canvas pays for every position, the early cut for those before the end.
		t.is(row.forwards === max, method === 'fixed', `${method}: ${row.forwards} forwards`);
		const hits = answers.map(({ tokens }, i) => Number(tokens.join() === pairs[i]?.answer.join()));
		near(row.exactMatch.mean, mean(hits), `${method} exact match`);
		near(row.truncated.mean, mean(answers.map(({ ended }) => Number(!ended))), `${method} truncated`);
		const lengths = answers.map(({ tokens }) => tokens.length);
		near(
			row.wasserstein.mean,
			wasserstein(
				lengths,
				pairs.map(({ answer }) => answer.length),
			),
			`${method} distance`,
		);
		near(row.meanLength, mean(lengths), `${method} length`);
		let nats = 0;
		let tokens = 0;
		for (const [i, { tokens: answer, ended }] of answers.entries()) {
			const whole = { prompt: pairs[i]?.prompt, answer: [...answer, ...(ended ? [0] : [])] };
			const { logLikelihood } = await evaluate(judge, [whole], { metric: 'likelihood' });
			nats -= logLikelihood;
			tokens += whole.answer.length;
		}
		near(row.judged?.mean, nats / tokens, `${method} judged`);
		t.is(row.judgedVersusFixed === null, method === 'fixed');
	}
	// References behind their end padded to the whole canvas.
	const padded = pairs.slice(0, 6).map(({ prompt, answer }) => {
		const tokens = new Int32Array(prompt.length + max);
		tokens.set([...prompt, ...answer]);
		return { tokens, promptLength: prompt.length };
	});
	const bound = await evaluate(toy, padded, { metric: 'nelbo', samples: 3, seed: 0 });
	const fixed = generations?.rows.find(({ method, kind }) => method === 'fixed' && kind === '');
	t.is(bound.tokens, 6 * max);
	near(fixed?.nelbo, bound.nelbo * max, 'NELBO');
	t.is(fixed?.fits, 1);
	const other = await DiffuGPT.fromConfig({ ...causal, vocab: 20 }, { seed: 3, device: 'cpu' });
	await t.throwsAsync(evaluateLength(toy, pairs, { max, generations: 2, methods: ['threshold'], judge: other }), {
		code: 'ERR_DN_ARGUMENT',
		message: /judge: it has 20 ids and the model 16/,
	});
	for (const model of [toy, judge, other]) await model.dispose();
});

test('margins are applied with the settings that they were fitted with', async (t) => {
	const toy = await toyLengthModel();
	const common = { max, coverage: [0.8], calibration: toyPairs(60, 92n), seeds: [1], generate: sampler } as const;
	const methods = [
		{ method: 'daedal', initial: 12, low: 0 },
		{ method: 'daedal', initial: 4, low: 0 },
		'daedal',
	] as const;
	const together = await evaluateLength(toy, pairs, { ...common, methods, generations: 6, likelihoods: 0 });
	for (const choice of methods) {
		const alone = await evaluateLength(toy, pairs, { ...common, methods: [choice], generations: 6, likelihoods: 0 });
		const name = alone.bounds[0]?.method;
		const rows = (list: readonly { method: string }[]) => list.filter(({ method }) => method === name);
		t.true(rows(alone.bounds).length > 1);
		t.deepEqual(rows(together.bounds), rows(alone.bounds), name);
		const figures = (list: readonly GenerationRow[] = []) =>
			list
				.filter(({ method }) => method === name)
				.map(({ canvas, exactMatch, meanLength }) => ({ canvas, exactMatch, meanLength }));
		t.deepEqual(figures(together.generations?.rows), figures(alone.generations?.rows), name);
	}
	// Stored margins of other settings are none of this method's.
	const stored = { max, coverage: [0.8], methods: [methods[0]], generations: 0 } as const;
	await evaluateLength(toy, pairs, { ...stored, calibration: toyPairs(60, 92n), keep: true });
	const own = await evaluateLength(toy, pairs, { ...stored, calibration: 'stored' });
	t.true(own.bounds.some(({ coverage }) => coverage === 0.8));
	const other = await evaluateLength(toy, pairs, { ...stored, methods: [methods[1]], calibration: 'stored' });
	t.deepEqual([...new Set(other.bounds.map(({ coverage }) => coverage))], [null]);
	const plain = await evaluateLength(toy, pairs, { ...stored, methods: ['daedal'], calibration: 'stored' });
	t.deepEqual(
		plain.bounds.map(({ method: _, ...row }) => row),
		own.bounds.map(({ method: _, ...row }) => row),
		'a method without options has those of its margins',
	);
	const alike = [
		{ method: 'daedal', initial: 4 },
		{ method: 'daedal', grow: 4 },
	] as const;
	const told = await evaluateLength(toy, pairs, { ...common, methods: alike, generations: 0 });
	t.deepEqual([...new Set(told.bounds.map(({ method }) => method))], ['daedal initial 4', 'daedal grow 4']);
	await toy.dispose();
});
