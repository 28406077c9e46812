/** The statistics behind length methods: conformal quantiles, metrics of bounds, the dense layer of the heads. */
import test from 'ava';

import { conformalQuantile, endSignal } from '../lib/length/calibrate.js';
import { Dense } from '../lib/length/dense.js';
import { bestConstant, bootstrapDifference, boundMetrics, pinballLosses, wasserstein } from '../lib/length/metrics.js';
import { ticks } from '../lib/length/report-svg.js';
import { uniform } from '../lib/random.js';
import { lookWith } from './helpers/length-canvas.js';

test('the conformal quantile keeps its promise on synthetic data', (t) => {
	t.is(conformalQuantile([3, 1, 2], 0.5), 2, 'k = 2 of 3');
	t.is(conformalQuantile([3, 1, 2], 0.75), 3);
	t.is(conformalQuantile([3, 1, 2], 0.76), null, 'k = 4 of 3: no finite margin');
	t.is(
		conformalQuantile(
			Array.from({ length: 99 }, (_, i) => i + 1),
			0.95,
		),
		95,
	);
	const n = 39;
	for (const coverage of [0.5, 0.8, 0.9, 0.95]) {
		let covered = 0;
		const rounds = 4000;
		for (let round = 0; round < rounds; round++) {
			const draw = (i: number): number => uniform(3n, 61, round, i) ** 3;
			const margin = conformalQuantile(
				Array.from({ length: n }, (_, i) => draw(i)),
				coverage,
			) as number;
			if (draw(n) <= margin) covered++;
		}
		const promise = Math.ceil((n + 1) * coverage) / (n + 1);
		const error = Math.sqrt((promise * (1 - promise)) / rounds);
		t.true(Math.abs(covered / rounds - promise) < 4 * error, `${coverage}: ${covered / rounds}, promised ${promise}`);
	}
});

test('metrics of a hand-worked example', async (t) => {
	const bounds = [5, 3, 7, 4];
	const lengths = [5, 4, 2, 6];
	const found = boundMetrics(bounds, lengths, 10);
	t.like(found, { pairs: 4, correct: 0.5, below: 0.5, above: 0.25, exact: 0.25 });
	t.like(found, { tightness: 5, looseness: 2.5, shortfall: 1.5, bound: 4.75, saved: 5.25 });
	t.true(Math.abs(found.rmse - Math.sqrt(30 / 4)) < 1e-12);
	t.is(boundMetrics([1], [2], 4).tightness, null);
	const losses = pinballLosses(bounds, lengths, 0.8);
	for (const [i, loss] of [0, 0.8, 1, 1.6].entries()) t.true(Math.abs((losses[i] as number) - loss) < 1e-12);
	t.is(bestConstant([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 0.8), 8);
	const sample = Array.from({ length: 57 }, (_, i) => Math.floor(20 * uniform(5n, 62, 0, i)));
	for (const coverage of [0.3, 0.8, 0.95]) {
		const mean = (bound: number): number =>
			pinballLosses(
				sample.map(() => bound),
				sample,
				coverage,
			).reduce((a, b) => a + b, 0);
		const best = Math.min(...Array.from({ length: 21 }, (_, bound) => mean(bound)));
		t.true(mean(bestConstant(sample, coverage)) <= best + 1e-9);
	}
	t.is(wasserstein([1, 2, 3], [2, 3, 4]), 1);
	t.is(wasserstein([0, 0], [0, 4]), 2);
	t.true(Math.abs(wasserstein([1], [0, 3]) - 1.5) < 1e-12);
	const difference = await bootstrapDifference([1, 2, 3, 4], [0, 1, 2, 3]);
	t.deepEqual(difference, { mean: 1, interval: [1, 1] });
	const noisy = await bootstrapDifference(
		sample,
		sample.map(() => 9.5),
		{ samples: 400 },
	);
	t.true(noisy.interval[0] < noisy.mean && noisy.mean < noisy.interval[1]);
	t.deepEqual(ticks([0, 9.2]), [0, 2, 4, 6, 8, 10]);
	const sure = endSignal([lookWith([0, 0, 1, 1])], [2]);
	t.deepEqual(sure, { before: 0, after: 1, auc: 1 });
	t.is(endSignal([lookWith([0.3, 0.3, 0.3])], [1]).auc, 0.5, 'ties count half');
	t.is(endSignal([lookWith([0.9, 0.1, 0.5])], [1]).auc, 0);
});

test("a dense layer's first step goes against the gradient", (t) => {
	const make = (): Dense => new Dense(3, 4, 2).initialise(7n, 0);
	const x = Float32Array.from({ length: 15 }, (_, i) => 2 * uniform(8n, 63, 0, i) - 1);
	const loss = (dense: Dense): number => dense.forward(x).reduce((sum, y, i) => sum + (y - Math.sin(i)) ** 2, 0);
	const before = make();
	const after = make();
	after.step(x, (y) => y.map((value, i) => 2 * (value - Math.sin(i))), 1e-3);
	let compared = 0;
	for (let i = 0; i < before.weights.length; i++) {
		const moved = (delta: number): number => {
			const dense = make();
			dense.weights[i] = (dense.weights[i] as number) + delta;
			return loss(dense);
		};
		const slope = (moved(1e-2) - moved(-1e-2)) / 2e-2;
		if (Math.abs(slope) < 1e-2) continue;
		compared++;
		// Adam's first step is the learning rate against the sign of the gradient.
		const step = (after.weights[i] as number) - (before.weights[i] as number);
		t.true(Math.abs(step + 1e-3 * Math.sign(slope)) < 1e-5, `weight ${i}`);
	}
	t.true(compared > 20);
});
