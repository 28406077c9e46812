/** Steps that mask nothing: they count as steps, and AdamW does not see them. */
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

import test from 'ava';
import { type DiffusionBatch, Trainer, type TrainOptions } from 'diffusion-native';

import { fresh, nearly, tiny, weights } from './helpers/trainer.js';

const masked: DiffusionBatch = {
	tokens: [Int32Array.of(8, 1, 2, 3)],
	mask: [Uint8Array.of(0, 1, 0, 1)],
	t: [0.5],
};
const nothing: DiffusionBatch = { ...masked, mask: [Uint8Array.of(0, 0, 0, 0)] };
const options: TrainOptions = { learningRate: 1e-2 };

test("a step that masks nothing leaves AdamW's count of updates as it was, also across a checkpoint", async (t) => {
	const model = await tiny();
	const plain = await tiny();
	await using trainer = new Trainer(model, options);
	await using without = new Trainer(plain, options);
	for (const batch of [nothing, masked, nothing]) await trainer.step(batch);
	await without.step(masked);
	t.deepEqual([trainer.steps, without.steps], [3, 1]);
	t.is(nearly(weights(model), weights(plain)), 0);

	const dir = fresh();
	await trainer.save(dir);
	const resumed = await Trainer.resume(dir, { device: 'cpu' });
	t.is(resumed.steps, 3);
	await resumed.step(masked);
	await without.step(masked);
	t.is(nearly(weights(resumed.model), weights(plain)), 0);
	await resumed.dispose();
	await resumed.model.dispose();
	await model.dispose();
	await plain.dispose();
});

test('a checkpoint without the count of updates goes on with that of its steps', async (t) => {
	const model = await tiny();
	await using trainer = new Trainer(model, options);
	for (let i = 0; i < 2; i++) await trainer.step(masked);
	const dir = fresh();
	await trainer.save(dir);
	const path = join(dir, 'trainer.json');
	const { updates, ...older } = JSON.parse(readFileSync(path, 'utf8'));
	t.is(updates, 2);
	writeFileSync(path, JSON.stringify(older));
	const resumed = await Trainer.resume(dir, { device: 'cpu' });
	await resumed.step(masked);
	await trainer.step(masked);
	t.is(nearly(weights(resumed.model), weights(model)), 0);
	await resumed.dispose();
	await resumed.model.dispose();
	await model.dispose();
});
