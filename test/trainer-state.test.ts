/** What a checkpoint says of its run: the validation of its own step, and the place in the data that it was taken from. */
import { readFileSync, renameSync } from 'node:fs';
import { join } from 'node:path';

import test from 'ava';
import { TokenDataset, Trainer, type TrainMetrics } from 'diffusion-native';

import { collect, documents, fresh, tiny } from './helpers/trainer.js';

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
