/**
 * A trainer's hold on its model: one computing call at a time, and disposing in the middle of its work, before the next
 * trainer of the model, and while the queue is full.
 */
import test from 'ava';
import { type DiffuGPT, type DiffusionBatch, Trainer } from 'diffusion-native';

import { collect, documents, fresh, nearly, tiny, weights } from './helpers/trainer.js';

const batch = (last: number): DiffusionBatch => ({
	tokens: [Int32Array.of(8, 1, 2, last)],
	mask: [Uint8Array.of(0, 1, 0, 1)],
	t: [0.5],
});

/** As many calls as may wait. */
const fill = (model: DiffuGPT): Promise<unknown> =>
	Promise.all(Array.from({ length: 1024 }, () => model.engine.run(() => undefined)));

const isTraining = (model: DiffuGPT): Promise<boolean> =>
	model.engine
		.run((native) => native.gradientSumOfSquares())
		.then(
			() => true,
			() => false,
		);

test('a trainer that is disposed of in a step computes nothing more, and the next one is alone', async (t) => {
	const model = await tiny();
	const before = weights(model);
	let disposal: Promise<void> | undefined;
	let refused: unknown;
	const first: Trainer = new Trainer(model, {
		// Called once gradients and moments are allocated, before the first native call of the step.
		learningRate: () => {
			disposal = first.dispose();
			refused = t.throws(() => new Trainer(model, {}), { code: 'ERR_DN_BUSY' });
			return 1e-2;
		},
	});
	await t.throwsAsync(first.step(batch(3)), { code: 'ERR_DN_DISPOSED', message: /this trainer was disposed/ });
	t.truthy(refused);
	await disposal;
	t.is(first.steps, 0);
	t.is(nearly(weights(model), before), 0);
	t.false(await isTraining(model));

	const other = await tiny();
	for (const each of [model, other]) {
		await using trainer = new Trainer(each, { learningRate: 1e-2 });
		await trainer.step(batch(4));
	}
	t.is(nearly(weights(model), weights(other)), 0);
	await model.dispose();
	await other.dispose();
});

test('a call that waits when its trainer is disposed of is not made', async (t) => {
	const model = await tiny();
	const trainer = new Trainer(model, {});
	await trainer.step(batch(3));
	const before = weights(model);
	const work = [trainer.step(batch(4)), trainer.dispose(), trainer.dispose()] as const;
	await t.throwsAsync(work[0], { code: 'ERR_DN_DISPOSED' });
	await Promise.all(work.slice(1));
	t.is(nearly(weights(model), before), 0);
	t.false(await isTraining(model));
	const gradients = new Trainer(model, {});
	const both = [gradients.gradients(batch(3)), gradients.dispose()] as const;
	await t.throwsAsync(both[0], { code: 'ERR_DN_DISPOSED' });
	await both[1];
	await model.dispose();
});

test('a checkpoint that is being written when its trainer is disposed of is whole', async (t) => {
	const model = await tiny();
	const trainer = new Trainer(model, {});
	await trainer.step(batch(3));
	const dir = fresh();
	const saving = trainer.save(dir);
	await trainer.dispose();
	await saving;
	const resumed = await Trainer.resume(dir, { device: 'cpu' });
	t.is(resumed.steps, 1);
	t.is(nearly(weights(resumed.model), weights(model)), 0);
	await resumed.dispose();
	await resumed.model.dispose();
	await model.dispose();
});

test('a trainer that is disposed of again leaves the next one alone', async (t) => {
	const model = await tiny();
	const first = new Trainer(model, {});
	await first.step(batch(3));
	await first.dispose();
	const second = new Trainer(model, {});
	await second.step(batch(3));
	await first.dispose();
	t.true(await isTraining(model));
	t.throws(() => new Trainer(model, {}), { code: 'ERR_DN_BUSY' });
	t.is((await second.step(batch(4))).step, 2);
	await second.dispose();
	await model.dispose();
});

test('a trainer and its model may be disposed of at once', async (t) => {
	const model = await tiny();
	const trainer = new Trainer(model, {});
	await trainer.step(batch(3));
	await t.notThrowsAsync(Promise.all([trainer.dispose(), model.dispose()]));
});

test('a full queue refuses a step, not the steps after it, and never dispose', async (t) => {
	const model = await tiny();
	const trainer = new Trainer(model, {});
	let filled = fill(model);
	await t.throwsAsync(trainer.step(batch(3)), { code: 'ERR_DN_BUSY', message: /1024 requests/ });
	await filled;
	t.is((await trainer.step(batch(3))).step, 1);
	filled = fill(model);
	await t.notThrowsAsync(trainer.dispose());
	await filled;
	t.false(await isTraining(model));
	await model.dispose();
});

test('one call computes or saves at a time, for one trainer; after dispose none does', async (t) => {
	const data = await documents(10);
	const model = await tiny();
	const trainer = new Trainer(model, { data, maxSteps: 9, checkpoint: { dir: fresh() } });
	const calls: [string, () => Promise<unknown>][] = [
		['step', () => trainer.step(batch(3))],
		['gradients', () => trainer.gradients(batch(3))],
		['evaluate', () => trainer.evaluate(data)],
		['save', () => trainer.save(fresh())],
	];
	for (const [begun, begin] of calls) {
		const working = begin();
		const refusal = { code: 'ERR_DN_BUSY', message: /^this trainer is in the middle of a step/ };
		const refused = calls.map(([name, call]) => t.throwsAsync(call(), refusal, `${name} during ${begun}`));
		t.throws(() => new Trainer(model, {}), { code: 'ERR_DN_BUSY', message: /^this model already has a trainer/ });
		await Promise.all(refused);
		await t.notThrowsAsync(working, begun);
	}
	await trainer.dispose();
	calls.push(['run', () => collect(trainer)], ['checkpoint', () => trainer.checkpoint()]);
	for (const [name, call] of calls)
		await t.throwsAsync(call(), { code: 'ERR_DN_DISPOSED', message: 'this trainer was disposed' }, name);
	await model.dispose();
});

test("a validation of a run is the trainer's one work, and dispose waits for it", async (t) => {
	const data = await documents(600);
	const model = await tiny();
	const trainer = new Trainer(model, { data, validation: data, maxSteps: 1, evalSequences: 600, batchSize: 1 });
	let over = false;
	const run = t.throwsAsync(collect(trainer), { code: 'ERR_DN_DISPOSED' }).then(() => {
		over = true;
	});
	while (trainer.steps === 0) await new Promise((resolve) => setImmediate(resolve));
	await t.throwsAsync(trainer.step(batch(3)), { code: 'ERR_DN_BUSY', message: /in the middle of a step/ });
	const disposed = trainer.dispose();
	t.throws(() => new Trainer(model, {}), { code: 'ERR_DN_BUSY' });
	await disposed;
	t.notThrows(() => void new Trainer(model, {}).dispose());
	await run;
	t.true(over);
	await model.dispose();
});
