/** Long loops of the library let timers and aborts through. */
import test from 'ava';
import { type TokenDataset, trainLengthHead } from 'diffusion-native';

import { bootstrapDifference } from '../lib/length/metrics.js';
import { permutation, permutationInTurns, Stream } from '../lib/random.js';
import { validate } from '../lib/training/validation.js';
import { Turns } from '../lib/turns.js';
import { toyLengthModel, toyPairs } from './helpers/lengths.js';

const enough = new Error('enough');

test('a loop that takes its turns lets a timer fire, and does not wait in every round', async (t) => {
	const turns = new Turns();
	let fired = 0;
	const timer = setInterval(() => fired++, 5);
	let waited = 0;
	let rounds = 0;
	for (; waited < 8; rounds++) {
		const turn = turns.next();
		if (turn) waited++;
		await turn;
	}
	clearInterval(timer);
	t.true(fired >= 7, `${fired} times`);
	t.true(rounds > 100 * waited, `${waited} waits in ${rounds} rounds`);
});

test('a permutation in turns is the permutation, and ends at an abort', async (t) => {
	for (const n of [0, 1, 2, 5000]) {
		const order = await permutationInTurns(n, 3n, Stream.data, 2, undefined);
		t.deepEqual(order, permutation(n, 3n, Stream.data, 2), `of ${n}`);
	}
	const stop = new AbortController();
	setTimeout(() => stop.abort(enough), 20);
	// So many take seconds.
	t.is(await t.throwsAsync(permutationInTurns(1e7, 3n, Stream.data, 2, stop.signal)), enough);
});

test.serial('validation draws its sequences once, in turns', async (t) => {
	const model = await toyLengthModel();
	const read: number[] = [];
	const tokens = Int32Array.of(0, 1, 2, 3);
	const data = {
		sequences: 1_000_000,
		path: 'none',
		get: (index: number) => {
			read.push(index);
			return { tokens, promptLength: 0 };
		},
	} as unknown as TokenDataset;
	const options = {
		objective: 'diffusion',
		evalSequences: 3,
		batchSize: 2,
		batchTokens: undefined,
		padding: 'none',
		precision: 'fp32',
	} as const;
	const count = async (): Promise<number> => {
		const { setImmediate: own } = globalThis;
		let turns = 0;
		globalThis.setImmediate = ((...all: Parameters<typeof own>) => {
			turns++;
			return own(...all);
		}) as typeof own;
		try {
			await validate(model.engine, model.config, data, options, undefined);
		} finally {
			globalThis.setImmediate = own;
		}
		return turns;
	};
	const first = await count();
	t.true(first >= 5, `${first} turns`);
	t.true((await count()) < first / 2);
	const drawn = [...permutation(1_000_000, 0n, Stream.data, 0).subarray(0, 3)];
	t.deepEqual(read, [...drawn, ...drawn]);
	await model.dispose();
});

test('a bootstrap of many rows ends at an abort', async (t) => {
	const rows = Array.from({ length: 50_000 }, (_, i) => i % 7);
	const stop = new AbortController();
	setTimeout(() => stop.abort(enough), 50);
	// So many samples take a quarter of an hour: only the abort ends them.
	const resampling = bootstrapDifference(rows, [...rows].reverse(), { samples: 1e6, signal: stop.signal });
	t.is(await t.throwsAsync(resampling), enough);
});

test('training a length head ends at an abort within a pass', async (t) => {
	const model = await toyLengthModel();
	const stop = new AbortController();
	const passes: number[] = [];
	// So many that a pass takes many turns on any machine.
	const training = trainLengthHead(model, toyPairs(5000, 3n), {
		max: 14,
		epochs: 200,
		signal: stop.signal,
		onProgress: ({ stage, fraction }) => {
			if (stage === 'training') passes.push(fraction);
			else if (fraction === 1) setTimeout(() => stop.abort(enough), 10);
		},
	});
	t.is(await t.throwsAsync(training), enough);
	t.deepEqual(passes, [], 'no pass came to its end');
	await model.dispose();
});
