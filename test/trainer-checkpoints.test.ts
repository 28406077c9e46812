/** Checkpoints of training runs: which are kept, what a resumed run goes on with, and those that cannot be written or read. */
import { readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

import test from 'ava';
import { DiffuGPT, Trainer, type TrainMetrics, type TrainOptions } from 'diffusion-native';

import { collect, documents, fresh, nearly, tiny, weights } from './helpers/trainer.js';

test('ten steps are five, a checkpoint, and five: bit for bit', async (t) => {
	const data = await documents(30);
	const options: TrainOptions = {
		data,
		validation: await documents(20, 7, 2n),
		maxSteps: 10,
		batchTokens: 50,
		accumulate: 2,
		learningRate: { kind: 'one-cycle', peak: 3e-3, cycleBeta1: { base: 0.85, max: 0.95 } },
		attentionAnnealing: { steps: 8 },
		padding: { random: 4 },
		spindle: { lambda: 0.3 },
		evalEvery: 2,
		seed: 2n ** 63n + 5n,
	};
	const straight = await tiny();
	await using whole = new Trainer(straight, options);
	const expected = await collect(whole);
	const model = await tiny();
	const dir = fresh();
	const first = new Trainer(model, options);
	const seen = await collect(first, 5);
	await first.save(dir);
	await first.dispose();
	await model.dispose();
	const second = await Trainer.resume(dir, { device: 'cpu' });
	t.is(second.steps, 5);
	seen.push(...(await collect(second)));
	const facts = ({ ms: _, tokensPerSecond: __, ...rest }: TrainMetrics) => rest;
	t.deepEqual(seen.map(facts), expected.map(facts));
	t.is(nearly(weights(second.model), weights(straight)), 0);
	// A checkpoint is a model.
	const loaded = await DiffuGPT.fromPretrained(dir, { device: 'cpu' });
	t.is(loaded.config.maskId, 9);
	await second.dispose();
	for (const used of [straight, second.model, loaded]) await used.dispose();
});

test('a run folder keeps the newest and the best, and a log of every step', async (t) => {
	const data = await documents(50);
	const model = await tiny();
	const dir = fresh();
	const trainer = new Trainer(model, {
		data,
		validation: data,
		maxSteps: 12,
		learningRate: (step) => (step < 4 ? 3e-3 : 0.5),
		evalEvery: 2,
		checkpoint: { dir, every: 2, keep: 2, keepBest: 1 },
	});
	const seen = await collect(trainer);
	const judged = seen.filter((m) => m.validation !== undefined);
	t.is(judged.length, 6);
	const best = judged.reduce((a, b) => ((b.validation as number) < (a.validation as number) ? b : a));
	t.true(best.step <= 6, 'the large learning rate spoils the model');
	const expected = new Set([
		best.checkpoint,
		(seen[9] as TrainMetrics).checkpoint,
		(seen[11] as TrainMetrics).checkpoint,
	]);
	t.deepEqual(
		new Set(
			readdirSync(dir)
				.filter((name) => name !== 'metrics.jsonl')
				.map((name) => join(dir, name)),
		),
		expected,
	);
	const lines = readFileSync(join(dir, 'metrics.jsonl'), 'utf8')
		.trim()
		.split('\n')
		.map((line) => JSON.parse(line) as TrainMetrics);
	t.deepEqual(lines, seen);
	await trainer.dispose();
	await model.dispose();
	await t.throwsAsync(Trainer.resume(dir), {
		code: 'ERR_DN_ARGUMENT',
		message: /learning rate of this run was a function/,
	});
	const again = await Trainer.resume(dir, { learningRate: 1e-3, maxSteps: 13, device: 'cpu' });
	t.is(again.steps, 12);
	await collect(again);
	t.is(readFileSync(join(dir, 'metrics.jsonl'), 'utf8').trim().split('\n').length, 13);
	await again.dispose();
	await again.model.dispose();
	// A new run would be mistaken for the old one's past.
	const other = await tiny();
	await using stranger = new Trainer(other, { data, maxSteps: 2, checkpoint: { dir } });
	await t.throwsAsync(collect(stranger), { code: 'ERR_DN_ARGUMENT', message: /beyond step 0 of this run/ });
	await other.dispose();
});

test('the best k checkpoints stay beside the newest ones', async (t) => {
	const data = await documents(50);
	const model = await tiny();
	const dir = fresh();
	// The validation loss falls, then the large learning rate spoils it: the best steps are in the middle.
	await using trainer = new Trainer(model, {
		data,
		validation: data,
		maxSteps: 9,
		learningRate: (step) => (step < 5 ? 3e-3 : 0.5),
		evalEvery: 1,
		checkpoint: { dir, every: 1, keep: 1, keepBest: 3 },
	});
	const seen = await collect(trainer);
	const best = [...seen].sort((a, b) => (a.validation as number) - (b.validation as number)).slice(0, 3);
	const expected = [...best, seen[8] as TrainMetrics].map(({ checkpoint }) => checkpoint as string);
	t.is(new Set(expected).size, 4, 'the newest is none of the best');
	const kept = readdirSync(dir).filter((name) => name !== 'metrics.jsonl');
	t.deepEqual(kept.map((name) => join(dir, name)).sort(), expected.sort());
	await model.dispose();
});

test('early stop counts on over a resumed run, and a run that it ended stays ended', async (t) => {
	const data = await documents(50);
	const model = await tiny();
	const dir = fresh();
	const trainer = new Trainer(model, {
		data,
		validation: data,
		maxSteps: 100,
		learningRate: 0,
		evalEvery: 1,
		earlyStop: { patience: 3 },
		checkpoint: { dir, every: 1 },
	});
	await collect(trainer, 2);
	await trainer.dispose();
	await model.dispose();
	for (const steps of [[3, 4], []]) {
		const resumed = await Trainer.resume(dir, { device: 'cpu' });
		t.deepEqual(
			(await collect(resumed)).map(({ step }) => step),
			steps,
		);
		await resumed.dispose();
		await resumed.model.dispose();
	}
});

test('a checkpoint that cannot be written is an error, and the last good one stays', async (t) => {
	const data = await documents(50);
	const model = await tiny();
	const dir = fresh();
	await using trainer = new Trainer(model, { data, maxSteps: 10, checkpoint: { dir, every: 1 } });
	const running = (async () => {
		// A file where the folder must go fails the writer at its last moment, as a full disk does earlier.
		for await (const { step } of trainer.run()) if (step === 2) writeFileSync(join(dir, 'step-00000003'), 'in the way');
	})();
	await t.throwsAsync(running, { code: 'ERR_DN_CHECKPOINT', message: /step-00000003/ });
	rmSync(join(dir, 'step-00000003'));
	t.deepEqual(readdirSync(dir).sort(), ['metrics.jsonl', 'step-00000001', 'step-00000002']);
	const resumed = await Trainer.resume(dir, { device: 'cpu' });
	t.is(resumed.steps, 2);
	await resumed.dispose();
	await resumed.model.dispose();
	await model.dispose();
});

test('a damaged newest checkpoint is passed over; with none left the reasons are told', async (t) => {
	const data = await documents(50);
	const model = await tiny();
	const dir = fresh();
	await using trainer = new Trainer(model, { data, maxSteps: 2, checkpoint: { dir, every: 1 } });
	await collect(trainer);
	writeFileSync(join(dir, 'step-00000002', 'optimizer.safetensors'), 'short');
	const resumed = await Trainer.resume(dir, { device: 'cpu' });
	t.is(resumed.steps, 1);
	await resumed.dispose();
	await resumed.model.dispose();
	rmSync(join(dir, 'step-00000001', 'model.safetensors'));
	await t.throwsAsync(Trainer.resume(dir), {
		code: 'ERR_DN_CHECKPOINT',
		message: /optimizer\.safetensors has 5 bytes.*model\.safetensors is missing/,
	});
	await model.dispose();
});

test('an override that is undefined is one that was not given', async (t) => {
	const data = await documents(50);
	const model = await tiny();
	const dir = fresh();
	const trainer = new Trainer(model, { data, maxSteps: 4, learningRate: 1e-3, seed: 9, objective: 'autoregressive' });
	await collect(trainer, 2);
	await trainer.save(dir);
	await trainer.dispose();
	const given = {
		objective: undefined,
		learningRate: undefined,
		seed: undefined,
		maxSteps: undefined,
		data: undefined,
	};
	const resumed = await Trainer.resume(dir, { device: 'cpu', ...(given as object) });
	t.like(resumed.options, { objective: 'autoregressive', learningRate: 1e-3, seed: 9n, maxSteps: 4 });
	t.is((await collect(resumed)).length, 2);
	await resumed.dispose();
	await resumed.model.dispose();
	await model.dispose();
});
