/** Long loops of the library let timers and aborts through. */
import test from 'ava';
import { trainLengthHead } from 'diffusion-native';

import { bootstrapDifference } from '../lib/length/metrics.js';
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
