/**
 * The state of a run: what counts, what early stop takes for an improvement, and what a checkpoint says of its own step and of
 * the place in the data that it was taken from.
 */
import { readFileSync, renameSync } from 'node:fs';
import { join } from 'node:path';

import test from 'ava';
import { TokenDataset, Trainer, type TrainMetrics } from 'diffusion-native';

import { afterStep, afterValidation, noProgress, type Progress, progressIn } from '../lib/training/progress.js';
import { collect, documents, fresh, tiny } from './helpers/trainer.js';

test('a step counts its tokens, and as an update where it masked something', (t) => {
	const first = afterStep(noProgress, { masked: 3, tokens: 10 });
	t.deepEqual(first, { ...noProgress, step: 1, updates: 1, totalTokens: 10 });
	t.deepEqual(afterStep(first, { masked: 0, tokens: 5 }), { ...first, step: 2, totalTokens: 15 });
	t.is(afterStep({ ...first, validationLoss: 2 }, { masked: 1, tokens: 1 }).validationLoss, null, 'of the step before');
});

test('a fall within minDelta is no improvement, until it adds up to more', (t) => {
	const judge = (losses: number[], earlyStop?: { patience: number; minDelta?: number }): Progress =>
		losses.reduce((progress, loss) => afterValidation(progress, loss, earlyStop), noProgress);
	const slow = { patience: 2, minDelta: 0.5 };
	t.like(judge([4, 3.7], slow), { validationLoss: 3.7, best: 4, worse: 1, stopped: false });
	t.like(judge([4, 3.7, 3.4], slow), { validationLoss: 3.4, best: 3.4, worse: 0, stopped: false });
	t.like(judge([4, 3.7, 3.5], slow), { validationLoss: 3.5, best: 4, worse: 2, stopped: true });
	t.like(judge([4, 3.7, 3.5], { patience: 2 }), { best: 3.5, worse: 0, stopped: false });
	t.like(judge([4, 4, 4]), { best: 4, worse: 2, stopped: false });
});

test('progress comes out of a stored state alone, stopped only where the run has an early stop', (t) => {
	const progress = { ...noProgress, step: 7, stopped: true };
	const state = { ...progress, position: { epoch: 1, index: 2 }, seed: '3' };
	t.deepEqual(progressIn(state, { patience: 1 }), progress);
	t.deepEqual(progressIn(state, undefined), { ...progress, stopped: false });
});

test('a checkpoint holds the counts and the validation loss of its own step', async (t) => {
	const data = await documents(50);
	const model = await tiny();
	const dir = fresh();
	await using trainer = new Trainer(model, {
		data,
		validation: data,
		maxSteps: 4,
		evalEvery: 2,
		learningRate: 0,
		checkpoint: { dir, every: 1, keep: 4 },
	});
	const seen = await collect(trainer);
	const loss = seen[1]?.validation as number;
	for (const { step, totalTokens, validation, checkpoint } of seen) {
		const state = JSON.parse(readFileSync(join(checkpoint as string, 'trainer.json'), 'utf8'));
		t.like(state, {
			step,
			updates: step,
			totalTokens,
			position: { epoch: 0, index: 8 * step },
			validationLoss: validation ?? null,
			best: step < 2 ? null : loss,
			worse: step < 4 ? 0 : 1,
			stopped: false,
		});
	}
	t.deepEqual(
		seen.map(({ validation }) => validation),
		[undefined, loss, undefined, loss],
	);
	await model.dispose();
});

test('a resumed run goes on in its data, also where that was moved to, and begins with other data', async (t) => {
	const data = await documents(50);
	const model = await tiny();
	const dir = fresh();
	const trainer = new Trainer(model, { data, maxSteps: 4, learningRate: 0 });
	await collect(trainer, 2);
	await trainer.save(dir);
	await trainer.dispose();
	await model.dispose();
	const moved = `${fresh()}.bin`;
	renameSync(data.path, moved);
	const epochs: number[] = [];
	for (const given of [await TokenDataset.open(moved), await documents(40)]) {
		const resumed = await Trainer.resume(dir, { data: given, device: 'cpu' });
		epochs.push(((await collect(resumed, 1))[0] as TrainMetrics).epoch);
		await resumed.dispose();
		await resumed.model.dispose();
	}
	t.deepEqual(epochs, [24 / 50, 8 / 40]);
});

test('resuming tells how much of weights and moments is loaded, and stops in either', async (t) => {
	const dir = fresh();
	const model = await tiny();
	const parameters = await model.engine.run((native) => native.parameters);
	const bytes = parameters.reduce((sum, { count }) => sum + 4 * count, 0);
	await using trainer = new Trainer(model, {});
	await trainer.step({ tokens: [Int32Array.of(8, 1, 2, 3)] });
	await trainer.save(dir);

	const seen: number[] = [];
	const resumed = await Trainer.resume(dir, {
		device: 'cpu',
		onProgress: (progress) => {
			if (progress.status !== 'load') return;
			t.is(progress.total, 3 * bytes);
			seen.push(progress.loaded);
		},
	});
	t.is(seen.length, 3 * parameters.length);
	t.deepEqual(
		seen,
		[...new Set(seen)].sort((a, b) => a - b),
		'it grows',
	);
	t.is(seen.at(-1), 3 * bytes);
	await resumed.dispose();
	await resumed.model.dispose();

	for (const share of [0.5, 1, 2.5]) {
		const stop = new AbortController();
		const reason = new Error('enough');
		let last = 0;
		const aborted = Trainer.resume(dir, {
			device: 'cpu',
			signal: stop.signal,
			onProgress: (progress) => {
				if (progress.status !== 'load') return;
				last = progress.loaded;
				if (last >= share * bytes) stop.abort(reason);
			},
		});
		t.is(await t.throwsAsync(aborted), reason);
		t.true(last < share * bytes + bytes / 2, `${last} of ${3 * bytes} bytes were read`);
	}
	await model.dispose();
});
