import test from 'ava';
import { annealingRatio, type Schedule, scheduleAt } from 'diffusion-native';

import { annealedMask, checkSchedule } from '../lib/training/schedules.js';

const near = (a: number, b: number): boolean =>
	Math.abs(a - b) <= 1e-12 * Math.max(1, Math.abs(a), Math.abs(b)) || Math.abs(a / b - 1) < 1e-9;

test('one-cycle is the published schedule: 15000 steps, peak 6e-4', (t) => {
	const schedule: Schedule = { kind: 'one-cycle', peak: 6e-4 };
	const rate = (step: number): number => scheduleAt(schedule, step, 15000).learningRate;
	t.true(near(rate(0), 2.4e-5));
	t.true(near(rate(1499), 6e-4));
	t.true(near(rate(14999), 2.4e-9));
	t.true(near(rate(20000), 2.4e-9));
	// Half-way up and half-way down a half cosine is the mean of its ends.
	t.true(near((rate(749) + rate(750)) / 2, (2.4e-5 + 6e-4) / 2));
	t.true(near(rate(8249), (6e-4 + 2.4e-9) / 2));
	for (let step = 1; step < 1499; step++) t.true(rate(step) > rate(step - 1));
});

test('one-cycle moves beta1 against the learning rate', (t) => {
	const schedule: Schedule = { kind: 'one-cycle', peak: 1e-3, cycleBeta1: { base: 0.85, max: 0.95 } };
	const beta = (step: number): number => scheduleAt(schedule, step, 1000).beta1 as number;
	t.true(near(beta(0), 0.95));
	t.true(near(beta(99), 0.85));
	t.true(near(beta(999), 0.95));
	t.is(scheduleAt({ kind: 'one-cycle', peak: 1e-3 }, 5, 1000).beta1, undefined);
});

test('a one-cycle too short to rise has no NaN', (t) => {
	for (const steps of [1, 2, 5, 10, 11]) {
		for (let step = 0; step < steps; step++) {
			t.true(
				Number.isFinite(scheduleAt({ kind: 'one-cycle', peak: 1 }, step, steps).learningRate),
				`${step} of ${steps}`,
			);
		}
	}
});

test('cosine and linear warm up in equal parts and end at their final rate', (t) => {
	for (const kind of ['cosine', 'linear'] as const) {
		const schedule: Schedule = { kind, peak: 1, warmupSteps: 10, final: 0.1 };
		const rate = (step: number): number => scheduleAt(schedule, step, 101).learningRate;
		for (let step = 0; step < 10; step++) t.true(near(rate(step), (step + 1) / 10));
		t.is(rate(10), 1);
		t.true(near(rate(55), 0.55), `${kind} half-way: ${rate(55)}`);
		t.true(near(rate(100), 0.1));
		t.true(near(rate(500), 0.1));
	}
	const cosine: Schedule = { kind: 'cosine', peak: 2 };
	t.true(near(scheduleAt(cosine, 25, 101).learningRate, 1 + Math.cos(Math.PI / 4)));
	const linear: Schedule = { kind: 'linear', peak: 2 };
	t.true(near(scheduleAt(linear, 25, 101).learningRate, 1.5));
});

test('constant, number and function', (t) => {
	t.is(scheduleAt(0.5, 7, 10).learningRate, 0.5);
	t.is(scheduleAt({ kind: 'constant', peak: 3 }, 7, 10).learningRate, 3);
	t.is(scheduleAt({ kind: 'constant', peak: 3, warmupSteps: 3 }, 0, 10).learningRate, 1);
	t.is(scheduleAt((step) => step * 2, 7, 10).learningRate, 14);
	t.throws(() => scheduleAt(() => Number.NaN, 7, 10), { code: 'ERR_DN_ARGUMENT', message: /step 7/ });
});

test('a schedule with an unknown or missing field is refused', (t) => {
	t.throws(() => checkSchedule({ kind: 'cosine', peak: 1, warmup: 3 } as never), { message: /warmup is not a field/ });
	t.throws(() => checkSchedule({ kind: 'cosin', peak: 1 } as never), { message: /'cosine'/ });
	t.throws(() => checkSchedule({ kind: 'linear' } as never), { message: /peak/ });
	t.throws(() => checkSchedule(-1), { code: 'ERR_DN_ARGUMENT' });
});

test('learning rates and betas that fp32 cannot hold are refused by name', (t) => {
	for (const [schedule, message] of [
		[1e39, /^learningRate is 1e\+39, expected a number >= 0 within the range of fp32/],
		[{ kind: 'constant', peak: 1e39 }, /learningRate\.peak is 1e\+39/],
		[{ kind: 'cosine', peak: 1, final: 1e39 }, /learningRate\.final is 1e\+39/],
		[{ kind: 'one-cycle', peak: 1e30, div: 1e-10 }, /peak \/ div, is 1e\+40/],
		[{ kind: 'one-cycle', peak: 1e30, finalDiv: 1e-12 }, /peak \/ div \/ finalDiv, is/],
		[{ kind: 'one-cycle', peak: 1, cycleBeta1: { base: 0.8, max: 1 - 1e-12 } }, /cycleBeta1 .* below 1, in fp32 too/],
	] as const) {
		t.throws(() => checkSchedule(schedule), { code: 'ERR_DN_ARGUMENT', message });
	}
	t.throws(() => scheduleAt(() => -1e39, 7, 10), { code: 'ERR_DN_ARGUMENT', message: /-1e\+39 at step 7, expected/ });
	t.notThrows(() => checkSchedule(3e38));
});

test('both published annealings', (t) => {
	const steps = 1000;
	t.is(annealingRatio({ steps }, 0), 1 / 1000);
	t.is(annealingRatio({ steps }, 499), 0.5);
	t.is(annealingRatio({ steps }, 999), 1);
	t.is(annealingRatio({ steps }, 5000), 1);
	t.is(annealingRatio({ steps, kind: 'seed' }, 0), 0);
	t.is(annealingRatio({ steps, kind: 'seed' }, 999), 1);
	t.true(near(annealingRatio({ steps, kind: 'seed' }, 333), 333 / 999));
	t.is(annealingRatio({ steps, kind: 'seed' }, 1000), 1);
	t.is(annealingRatio({ steps: 0, kind: 'seed' }, 0), 1);
	t.is(annealingRatio({ steps: 1 }, 0), 1);
	t.deepEqual(annealedMask({ steps: 4 }, 3, 9n), { kind: 'full' });
	t.deepEqual(annealedMask({ steps: 4 }, 1, 9n), { kind: 'annealed', ratio: 0.5, seed: 9n, step: 1 });
});
