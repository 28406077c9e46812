/** Training runs: checkpoints, resumption bit for bit, early stop, divergence, failures. */
import { readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

import test from 'ava';
import { DiffuGPT, prepare, Trainer, type TrainMetrics, type TrainOptions } from 'diffusion-native';

import { collect, documents, fresh, ids, nearly, tiny, weights } from './helpers/trainer.js';

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

test("padding 'batch': every sequence of a micro-batch is as long as its longest", async (t) => {
	const records = Array.from({ length: 12 }, (_, i) => ({
		tokens: Int32Array.from({ length: 3 + (i % 6) }, (__, j) => 1 + ((i + j) % 7)),
		promptLength: 2,
	}));
	const data = await prepare(records, {
		tokenizer: ids,
		out: `${fresh()}.bin`,
		format: 'pairs',
		context: 16,
		eosId: 8,
		padding: 'batch',
	});
	t.is(data.padding, 'batch');
	const model = await tiny();
	const tokens = async (options: TrainOptions): Promise<number[]> => {
		await using trainer = new Trainer(model, { data, validation: data, maxSteps: 4, learningRate: 0, ...options });
		return (await collect(trainer)).map((m) => m.tokens);
	};
	// The longest of all twelve has eight tokens and the end.
	t.deepEqual(await tokens({ batchSize: 12 }), [108, 108, 108, 108]);
	t.true((await tokens({ batchTokens: 40 })).every((count) => count <= 40 && count > 20));
	t.deepEqual(await tokens({ batchSize: 12, padding: 'none' }), [78, 78, 78, 78]);
	await model.dispose();
});

test('maskEnds: end and padding tokens are masked however small t is', async (t) => {
	const records = Array.from({ length: 8 }, (_, i) => ({
		tokens: Int32Array.of(1, 2, 3 + (i % 4), 4),
		promptLength: 2,
	}));
	const data = await prepare(records, {
		tokenizer: ids,
		out: `${fresh()}.bin`,
		format: 'pairs',
		context: 16,
		eosId: 8,
		padding: { multiple: 8 },
	});
	const model = await tiny();
	// At this t hardly a token is drawn: a step without any has no loss.
	const quiet = { data, maxSteps: 6, learningRate: 0, batchSize: 8, timeRange: [1e-3, 1e-3] as const };
	const losses = async (options: TrainOptions): Promise<number[]> => {
		await using trainer = new Trainer(model, { ...quiet, ...options });
		return (await collect(trainer)).map((m) => m.unweighted);
	};
	t.true((await losses({})).filter((loss) => loss > 0).length < 6);
	// The cross-entropy of ends and padding, the same in every epoch.
	const hidden = await losses({ maskEnds: true });
	t.true(hidden.every((loss) => loss > 1));
	const { masked } = await model.loss(
		{ tokens: [Int32Array.of(1, 2, 3, 8, 8)], maskable: [Uint8Array.of(0, 0, 1, 2, 2)], t: [1e-9] },
		{},
	);
	t.is(masked, 2);
	for (const wrong of [{ objective: 'autoregressive' }, { timeSampler: 'exact-count' }] as const) {
		t.throws(() => new Trainer(model, { ...quiet, ...wrong, maskEnds: true }), { message: /maskEnds/ });
	}
	await model.dispose();
});

test('early stop', async (t) => {
	const data = await documents(50);
	const model = await tiny();
	await using trainer = new Trainer(model, {
		data,
		validation: data,
		maxSteps: 100,
		learningRate: 0,
		evalEvery: 1,
		earlyStop: { patience: 3 },
	});
	t.is((await collect(trainer)).length, 4);
	await model.dispose();
});

test('a loss that is not finite stops the run before the weights change', async (t) => {
	const data = await documents(50);
	const model = await tiny();
	const dir = fresh();
	await using trainer = new Trainer(model, { data, maxSteps: 10, learningRate: 1e-3, checkpoint: { dir, every: 1 } });
	await collect(trainer, 3);
	const bias = model.getParameter('ln_f.bias');
	bias[0] = Number.NaN;
	model.setParameter('ln_f.bias', bias);
	const before = weights(model);
	await t.throwsAsync(collect(trainer), {
		code: 'ERR_DN_DIVERGED',
		message: /step 4 \(epoch 0, sequences from 24\).*NaN.*learning rate/,
	});
	t.is(nearly(weights(model), before), 0);
	t.is(trainer.steps, 3);
	t.deepEqual(readdirSync(dir).sort(), ['metrics.jsonl', 'step-00000002', 'step-00000003']);
	const resumed = await Trainer.resume(dir, { device: 'cpu' });
	t.is((await collect(resumed)).length, 7);
	await resumed.dispose();
	await resumed.model.dispose();
	await model.dispose();
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

/** A run that is aborted once so many steps are done: while the last of them is validated. */
async function abortedAt(trainer: Trainer, steps: number, reason: Error): Promise<void> {
	const stop = new AbortController();
	const watch = setInterval(() => {
		if (trainer.steps === steps) stop.abort(reason);
	}, 1);
	try {
		for await (const _ of trainer.run({ signal: stop.signal }));
	} finally {
		clearInterval(watch);
	}
}

test('an abort reaches a validation; the step before it stands and is logged', async (t) => {
	const data = await documents(600);
	const model = await tiny();
	const dir = fresh();
	const reason = new Error('enough');
	const logged: [number, boolean][] = [];
	await using trainer = new Trainer(model, {
		data,
		validation: data,
		maxSteps: 4,
		evalEvery: 2,
		evalSequences: 600,
		batchSize: 1,
		checkpoint: { dir },
		loggers: [{ log: ({ step, validation }) => void logged.push([step, validation !== undefined]) }],
	});
	t.is(await t.throwsAsync(abortedAt(trainer, 2, reason)), reason);
	t.is(trainer.steps, 2);
	t.deepEqual(logged, [
		[1, false],
		[2, false],
	]);
	t.deepEqual(
		(await collect(trainer)).map(({ step }) => step),
		[3, 4],
	);
	await model.dispose();
});

test('an abort of the last validation leaves the last checkpoint', async (t) => {
	const data = await documents(600);
	const model = await tiny();
	const dir = fresh();
	const enough = new Error('enough');
	const options = { data, validation: data, maxSteps: 2, evalSequences: 600, batchSize: 1, checkpoint: { dir } };
	await using trainer = new Trainer(model, options);
	t.is(await t.throwsAsync(abortedAt(trainer, 2, enough)), enough);
	t.deepEqual(readdirSync(dir).sort(), ['metrics.jsonl', 'step-00000002']);
	await model.dispose();
});

test('a validation that is not finite leaves no checkpoint of its step', async (t) => {
	const data = await documents(50);
	const model = await tiny();
	const dir = fresh();
	const logged: number[] = [];
	await using trainer = new Trainer(model, {
		data,
		validation: data,
		maxSteps: 4,
		evalEvery: 1,
		checkpoint: { dir, every: 1 },
		// After step 2 its weights are spoilt, before they are validated.
		learningRate: (step) => (step === 1 ? 1e30 : 1e-3),
		loggers: [{ log: ({ step }) => void logged.push(step) }],
	});
	await t.throwsAsync(collect(trainer), { code: 'ERR_DN_DIVERGED' });
	t.deepEqual(readdirSync(dir).sort(), ['metrics.jsonl', 'step-00000001']);
	t.deepEqual(logged, [1, 2]);
	await model.dispose();
});

test('one run at a time; every logger is closed, whichever fails', async (t) => {
	const data = await documents(50);
	const model = await tiny();
	const events: string[] = [];
	const bad = new Error('cannot start');
	let failing = false;
	const logger = (name: string) => ({
		start: () => {
			events.push(`${name} starts`);
			if (failing && name === 'b') throw bad;
		},
		log: () => {},
		close: () => {
			events.push(`${name} ends`);
			if (failing && name === 'a') throw new Error('cannot close');
		},
	});
	await using trainer = new Trainer(model, { data, maxSteps: 6, loggers: [logger('a'), logger('b')] });
	const first = trainer.run();
	const { value } = await first.next();
	t.is((value as TrainMetrics).step, 1);
	await t.throwsAsync(trainer.run().next(), { code: 'ERR_DN_BUSY', message: /is running/ });
	t.deepEqual(events, ['a starts', 'b starts'], 'the second run touched nothing');
	t.is(((await first.next()).value as TrainMetrics).step, 2);
	await first.return();
	t.deepEqual(events.splice(0), ['a starts', 'b starts', 'a ends', 'b ends']);
	failing = true;
	await t.throwsAsync(trainer.run().next(), { message: 'cannot close' });
	t.deepEqual(events.splice(0), ['a starts', 'b starts', 'a ends', 'b ends']);
	failing = false;
	t.is((await collect(trainer)).length, 4);
	await model.dispose();
});

test('numbers of AdamW that fp32 cannot hold are refused', async (t) => {
	const model = await tiny();
	for (const eps of [0, 1e-50, -1, Number.NaN])
		t.throws(() => new Trainer(model, { eps }), {
			code: 'ERR_DN_ARGUMENT',
			message: /eps is .*, expected a number > 0/,
		});
	for (const beta of [1, 0.99999999])
		t.throws(() => new Trainer(model, { betas: [0.9, beta] }), { code: 'ERR_DN_ARGUMENT', message: /betas is/ });
	await model.dispose();
});

test('a signal that is aborted stops a single step, gradients and an evaluation', async (t) => {
	const data = await documents(20);
	const model = await tiny();
	await using trainer = new Trainer(model, { data });
	const batch = { tokens: [data.get(0).tokens] };
	const enough = new Error('enough');
	const signal = AbortSignal.abort(enough);
	const before = weights(model);
	for (const call of [
		() => trainer.step(batch, { signal }),
		() => trainer.gradients(batch, { signal }),
		() => trainer.evaluate(data, { signal }),
		() => model.loss(batch, { signal }),
	])
		t.is(await t.throwsAsync(call()), enough);
	t.is(nearly(weights(model), before), 0);
	t.is((await trainer.step(batch)).step, 1);
	const dir = fresh();
	await trainer.save(dir);
	t.is(await t.throwsAsync(Trainer.resume(dir, { signal, device: 'cpu' })), enough);
	await model.dispose();
});
