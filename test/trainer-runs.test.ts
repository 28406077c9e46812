/** Training runs: padding and masked ends, early stop, divergence, aborts, one at a time. */
import { readdirSync } from 'node:fs';

import test from 'ava';
import { prepare, Trainer, type TrainMetrics, type TrainOptions } from 'diffusion-native';

import { collect, documents, fresh, ids, nearly, tiny, weights } from './helpers/trainer.js';

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
