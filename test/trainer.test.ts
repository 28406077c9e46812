import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import test from 'ava';
import {
	DiffuGPT,
	type DiffusionBatch,
	JsonlLogger,
	type MetricLogger,
	ProgressLogger,
	prepare,
	TensorBoardLogger,
	type TokenDataset,
	Trainer,
	type TrainMetrics,
	type TrainOptions,
} from 'diffusion-native';

import { MarkovSource } from './helpers/markov.js';

const root = mkdtempSync(join(tmpdir(), 'dn-trainer-'));
test.after.always(() => rmSync(root, { recursive: true, force: true }));
let names = 0;
const fresh = (): string => join(root, String(names++));

/** Ids 0-7 are the source's, 8 ends text, 9 is the mask. */
const ids = { encode: () => new Int32Array(0), vocabSize: 9 };
const shape = { layers: 2, heads: 2, channels: 32, context: 16, vocab: 10, eosId: 8, maskId: 9 };
const tiny = (seed = 1): Promise<DiffuGPT> => DiffuGPT.fromConfig(shape, { device: 'cpu', seed });

async function documents(count: number, length = 7, seed = 1n): Promise<TokenDataset> {
	const source = new MarkovSource(length);
	const records = Array.from({ length: count }, () => source.sample(seed));
	return prepare(records, { tokenizer: ids, out: `${fresh()}.bin`, format: 'documents', context: 16, eosId: 8 });
}

async function collect(trainer: Trainer, steps = Number.POSITIVE_INFINITY): Promise<TrainMetrics[]> {
	const seen: TrainMetrics[] = [];
	for await (const metrics of trainer.run()) {
		seen.push(metrics);
		if (seen.length >= steps) break;
	}
	return seen;
}

const weights = (model: DiffuGPT): Float32Array[] => model.parameters().map(({ name }) => model.getParameter(name));

/** Largest difference; NaN where only one of the two is NaN. */
function nearly(a: Float32Array[], b: Float32Array[]): number {
	let worst = 0;
	for (const [i, values] of a.entries()) {
		for (const [j, value] of values.entries()) {
			const other = (b[i] as Float32Array)[j] as number;
			if (Object.is(value, other)) continue;
			const difference = Math.abs(value - other);
			if (!(difference <= worst)) worst = difference;
		}
	}
	return worst;
}

test('metrics, and a loss that falls', async (t) => {
	const data = await documents(200);
	const model = await tiny();
	await using trainer = new Trainer(model, {
		data,
		maxSteps: 40,
		batchSize: 16,
		learningRate: 3e-3,
		objective: 'autoregressive',
	});
	const seen = await collect(trainer);
	t.deepEqual(
		seen.map((m) => m.step),
		Array.from({ length: 40 }, (_, i) => i + 1),
	);
	const [first, last] = [seen[0] as TrainMetrics, seen[39] as TrainMetrics];
	t.true(Math.abs(first.loss - Math.log(10)) < 0.3, String(first.loss));
	t.true(last.loss < first.loss - 0.5, `${first.loss} to ${last.loss}`);
	t.true(first.gradNorm > 0 && first.tokensPerSecond > 0);
	t.is(first.tokens, 16 * 9);
	t.is(last.totalTokens, 40 * 16 * 9);
	t.is(last.epoch, (40 * 16) / 200);
	t.is(first.learningRate, 3e-3);
	await model.dispose();
});

test('accumulated micro-batches are one big batch, also where sizes differ', async (t) => {
	const data = await documents(64);
	for (const normalise of ['tokens', 'masked', 'answer'] as const) {
		const run = async (batchSize: number, accumulate: number) => {
			const model = await tiny();
			const trainer = new Trainer(model, {
				data,
				maxSteps: 3,
				batchSize,
				accumulate,
				normalise,
				timeSampler: 'stratified',
				eps: 1e-3,
			});
			const seen = await collect(trainer);
			const result = { seen, weights: weights(model) };
			await trainer.dispose();
			await model.dispose();
			return result;
		};
		const whole = await run(12, 1);
		const parts = await run(3, 4);
		for (const [i, metrics] of whole.seen.entries()) {
			const other = parts.seen[i] as TrainMetrics;
			t.true(
				Math.abs(metrics.loss - other.loss) < 1e-4 * metrics.loss,
				`${normalise}: ${metrics.loss} and ${other.loss}`,
			);
			t.true(Math.abs(metrics.gradNorm - other.gradNorm) < 1e-3 * metrics.gradNorm);
		}
		t.true(nearly(whole.weights, parts.weights) < 1e-5);
	}
});

test('batchTokens fills micro-batches in the order of the data', async (t) => {
	const data = await documents(50);
	const model = await tiny();
	await using trainer = new Trainer(model, { data, maxSteps: 12, batchTokens: 40 });
	const seen = await collect(trainer);
	t.true(
		seen.every((m) => m.tokens === 36),
		'four documents of nine tokens fit 40',
	);
	await model.dispose();
});

test('a step on a given batch uses the given mask and time', async (t) => {
	const model = await tiny();
	await using trainer = new Trainer(model, { learningRate: 0 });
	const batch: DiffusionBatch = { tokens: [Int32Array.of(8, 1, 2, 3)], mask: [Uint8Array.of(0, 0, 1, 0)], t: [0.5] };
	const metrics = await trainer.step(batch);
	const expected = await model.loss(batch);
	t.is(metrics.loss, expected.loss);
	t.true(Math.abs(metrics.loss - (2 * metrics.unweighted) / 3) < 1e-6, 'weight 1/t over three predictable tokens');
	t.is(trainer.steps, 1);
	const before = weights(model);
	const gradients = await trainer.gradients(batch);
	t.is(nearly(weights(model), before), 0);
	let squares = 0;
	for (const values of gradients.values()) for (const value of values) squares += value * value;
	t.true(Math.abs(Math.sqrt(squares) - metrics.gradNorm) < 1e-5 * metrics.gradNorm);
	await model.dispose();
});

test('gradients are those of the loss', async (t) => {
	const model = await tiny();
	await using trainer = new Trainer(model, {});
	const batch: DiffusionBatch = {
		tokens: [Int32Array.of(8, 1, 2, 3, 4)],
		mask: [Uint8Array.of(0, 1, 1, 0, 1)],
		t: [0.4],
	};
	const gradients = await trainer.gradients(batch);
	const name = 'h.1.mlp.c_fc.weight';
	const values = model.getParameter(name);
	const gradient = gradients.get(name) as Float32Array;
	const index = gradient.reduce(
		(best, value, i) => (Math.abs(value) > Math.abs(gradient[best] as number) ? i : best),
		0,
	);
	const at = async (change: number): Promise<number> => {
		const moved = Float32Array.from(values);
		moved[index] = (moved[index] as number) + change;
		model.setParameter(name, moved);
		return (await model.loss(batch)).loss;
	};
	const slope = ((await at(0.02)) - (await at(-0.02))) / 0.04;
	t.true(Math.abs(slope - (gradient[index] as number)) < 0.02 * Math.abs(slope), `${slope} and ${gradient[index]}`);
	await model.dispose();
});

test('clipping scales the step, a batch with nothing masked changes nothing', async (t) => {
	const batch: DiffusionBatch = { tokens: [Int32Array.of(8, 1, 2, 3)], mask: [Uint8Array.of(0, 1, 1, 1)], t: [1] };
	const moved = async (gradClip: number): Promise<Float32Array[]> => {
		const model = await tiny();
		// Large epsilon: AdamW's step is then proportional to the gradient.
		const trainer = new Trainer(model, { gradClip, eps: 1e3, learningRate: 1e3, weightDecay: 0 });
		const before = weights(model);
		const { gradNorm } = await trainer.step(batch);
		t.true(gradNorm > 0.1);
		const after = weights(model);
		await trainer.dispose();
		await model.dispose();
		return after.map((values, i) =>
			values.map(
				(value, j) => (value - ((before[i] as Float32Array)[j] as number)) * (gradClip > 0 ? gradNorm / gradClip : 1),
			),
		);
	};
	const free = await moved(0);
	t.true(nearly(free, await moved(0.1)) < 1e-3);
	const model = await tiny();
	await using trainer = new Trainer(model, {});
	const before = weights(model);
	const metrics = await trainer.step({ ...batch, mask: [Uint8Array.of(0, 0, 0, 0)] });
	t.is(metrics.loss, 0);
	t.is(nearly(weights(model), before), 0);
	await model.dispose();
});

test('annealed attention is in the step: at first causal, at last full', async (t) => {
	const batch = (last: number): DiffusionBatch => ({
		tokens: [Int32Array.of(8, 1, 2, last)],
		mask: [Uint8Array.of(0, 1, 0, 0)],
		t: [1],
	});
	const loss = async (options: TrainOptions, last: number, steps: number): Promise<number> => {
		const model = await tiny();
		const trainer = new Trainer(model, { learningRate: 0, ...options });
		let value = 0;
		for (let i = 0; i < steps; i++) value = (await trainer.step(batch(last))).loss;
		await trainer.dispose();
		await model.dispose();
		return value;
	};
	const annealing: TrainOptions = { attentionAnnealing: { steps: 3, kind: 'seed' } };
	t.is(await loss(annealing, 3, 1), await loss(annealing, 5, 1), 'step 0 sees no later token');
	t.not(await loss(annealing, 3, 3), await loss(annealing, 5, 3));
	t.is(await loss(annealing, 3, 3), await loss({}, 3, 3), 'the last step is full attention');
});

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

test('abort stops between micro-batches, rejects with the reason, and the run can go on', async (t) => {
	const data = await documents(50);
	const model = await tiny();
	const options: TrainOptions = { data, maxSteps: 6, batchSize: 4, accumulate: 3, learningRate: 1e-3 };
	await using trainer = new Trainer(model, options);
	const stop = new AbortController();
	const reason = new Error('that will do');
	const running = (async () => {
		for await (const { step } of trainer.run({ signal: stop.signal }))
			if (step === 3) setTimeout(() => stop.abort(reason), 0);
	})();
	t.is(await t.throwsAsync(running), reason);
	await collect(trainer);
	const other = await tiny();
	await using whole = new Trainer(other, options);
	await collect(whole);
	t.is(nearly(weights(model), weights(other)), 0);
	await model.dispose();
	await other.dispose();
});

test('misuse is told', async (t) => {
	const model = await tiny();
	const data = await documents(10);
	const refused = (options: object, message: RegExp) =>
		t.throws(() => new Trainer(model, options as TrainOptions), { code: 'ERR_DN_ARGUMENT', message });
	refused({ maxStep: 5 }, /maxStep is not an option.*did you mean 'maxSteps'/);
	refused({ batchSize: 2, batchTokens: 3 }, /exclude each other/);
	refused({ accumulate: 0 }, /accumulate is 0/);
	refused({ betas: [0.9, 1] }, /betas/);
	refused({ objective: 'diffuse' }, /objective is "diffuse"/);
	refused({ objective: 'block-diffusion' }, /needs the option block/);
	refused({ learningRate: { kind: 'cosine', peak: 1 } }, /maxSteps/);
	refused({ earlyStop: { patience: 1 } }, /earlyStop needs validation/);
	const long = await prepare([Int32Array.from({ length: 30 }, () => 1)], {
		tokenizer: ids,
		out: `${fresh()}.bin`,
		format: 'documents',
		context: 64,
		eosId: 8,
	});
	refused({ data: long }, /32 tokens, more than the model's context of 16/);
	await using trainer = new Trainer(model, { data });
	t.throws(() => new Trainer(model, {}), { code: 'ERR_DN_BUSY' });
	await t.throwsAsync(collect(trainer), { message: /run needs the option maxSteps/ });
	await t.throwsAsync(trainer.step({ tokens: [new Int32Array(17)] }), {
		code: 'ERR_DN_ARGUMENT',
		message: /17 tokens, more than the model's context/,
	});
	await t.throwsAsync(trainer.step({ tokens: [Int32Array.of(1, 10)] }), {
		code: 'ERR_DN_ARGUMENT',
		message: /token 1 of sequence 0 is 10/,
	});
	const both = await Promise.allSettled([
		trainer.step({ tokens: [Int32Array.of(8, 1)] }),
		trainer.step({ tokens: [Int32Array.of(8, 1)] }),
	]);
	t.deepEqual(both.map((outcome) => outcome.status).sort(), ['fulfilled', 'rejected']);
	await trainer.dispose();
	await trainer.dispose();
	await t.throwsAsync(trainer.step({ tokens: [Int32Array.of(8, 1)] }), { code: 'ERR_DN_DISPOSED' });
	await model.dispose();
});

for (const objective of ['diffusion', 'autoregressive'] as const) {
	test(`toy language: ${objective} training reaches the entropy of the source`, async (t) => {
		const length = 6;
		const source = new MarkovSource(length);
		const data = await documents(30_000, length);
		const model = await DiffuGPT.fromConfig(
			{ ...shape, channels: 64, heads: 4, context: 8 },
			{ device: 'cpu', seed: 1 },
		);
		const trainer = new Trainer(model, {
			data,
			objective,
			maxSteps: objective === 'diffusion' ? 2500 : 500,
			batchSize: 64,
			timeSampler: 'stratified',
			learningRate: { kind: 'cosine', peak: 3e-3, warmupSteps: 50 },
			weightDecay: 0,
		});
		await collect(trainer);
		await trainer.dispose();
		// On the same sequences the source's own surprise is known, so few of them tell the excess exactly.
		let excess = 0;
		const count = 200;
		for (let i = 0; i < count; i++) {
			const tokens = source.sample(77n);
			const sequence = Int32Array.of(8, ...tokens, 8);
			excess += (await exactBound(model, sequence, objective)) + source.logProbability(tokens);
		}
		const relative = excess / count / source.entropy();
		t.log(`entropy ${source.entropy().toFixed(4)} nats, excess ${(100 * relative).toFixed(2)} %`);
		t.true(relative < 0.02 && relative > -0.005, String(relative));
		await model.dispose();
	});
}

/** The NELBO of one sequence behind its first token: every non-empty mask, weighted by the integral over t. */
async function exactBound(
	model: DiffuGPT,
	tokens: Int32Array,
	objective: 'diffusion' | 'autoregressive',
): Promise<number> {
	const L = tokens.length - 1;
	if (objective === 'autoregressive') {
		const { loss, tokens: counted } = await model.loss({ tokens: [tokens] }, { objective });
		return loss * counted;
	}
	const factorial = (n: number): number => (n <= 1 ? 1 : n * factorial(n - 1));
	const weight = (k: number): number => (factorial(k - 1) * factorial(L - k)) / factorial(L);
	const least = Math.min(...Array.from({ length: L }, (_, i) => weight(i + 1)));
	const mask: Uint8Array[] = [];
	const times: number[] = [];
	for (let set = 1; set < 2 ** L; set++) {
		const row = Uint8Array.from({ length: L + 1 }, (_, i) => (i > 0 && (set >> (i - 1)) & 1 ? 1 : 0));
		mask.push(row);
		times.push(least / weight(row.reduce((a, b) => a + b, 0)));
	}
	// The loss weighs by 1/t and divides by all predictable tokens: undo both.
	const all = await model.loss({ tokens: mask.map(() => tokens), mask, t: times });
	return all.loss * all.tokens * least;
}

test('TensorBoard files hold the metrics', async (t) => {
	const data = await documents(20);
	const model = await tiny();
	const dir = fresh();
	await using trainer = new Trainer(model, {
		data,
		validation: data,
		maxSteps: 3,
		loggers: [new TensorBoardLogger(dir)],
	});
	const seen = await collect(trainer);
	const [name] = readdirSync(dir);
	t.regex(name as string, /^events\.out\.tfevents\.\d+\./);
	const events = readEvents(readFileSync(join(dir, name as string)));
	t.is(events[0]?.version, 'brain.Event:2');
	const losses = events.filter((event) => event.tag === 'train/loss');
	t.deepEqual(
		losses.map(({ step, value }) => [step, value]),
		seen.map(({ step, loss }) => [step, Math.fround(loss)]),
	);
	const held = events.filter((event) => event.tag === 'validation/loss');
	t.deepEqual(
		held.map(({ step, value }) => [step, value]),
		[[3, Math.fround((seen[2] as TrainMetrics).validation as number)]],
	);
	await model.dispose();
});

interface ReadEvent {
	step: number;
	version?: string;
	tag?: string;
	value?: number;
}

/** A reader written from the format's description, bit by bit where the writer uses tables. */
function readEvents(bytes: Buffer): ReadEvent[] {
	const crc32c = (part: Uint8Array): number => {
		let crc = 0xffffffffn;
		for (const byte of part) {
			crc ^= BigInt(byte);
			for (let bit = 0; bit < 8; bit++) crc = crc & 1n ? (crc >> 1n) ^ 0x82f63b78n : crc >> 1n;
		}
		const value = crc ^ 0xffffffffn;
		return Number((((value >> 15n) | (value << 17n)) + 0xa282ead8n) & 0xffffffffn);
	};
	const events: ReadEvent[] = [];
	for (let at = 0; at < bytes.length; ) {
		const length = Number(bytes.readBigUInt64LE(at));
		if (bytes.readUInt32LE(at + 8) !== crc32c(bytes.subarray(at, at + 8))) throw new Error('checksum of a length');
		const message = bytes.subarray(at + 12, at + 12 + length);
		if (bytes.readUInt32LE(at + 12 + length) !== crc32c(message)) throw new Error('checksum of a message');
		at += 16 + length;
		const event: ReadEvent = { step: 0 };
		for (const { number, payload } of fields(message)) {
			if (number === 2) event.step = payload as number;
			if (number === 3) event.version = String(payload);
			if (number !== 5) continue;
			for (const value of fields(payload as Buffer)) {
				for (const inner of fields(value.payload as Buffer)) {
					if (inner.number === 1) event.tag = String(inner.payload);
					if (inner.number === 2) event.value = (inner.payload as Buffer).readFloatLE(0);
				}
			}
		}
		events.push(event);
	}
	return events;
}

function* fields(message: Buffer): Generator<{ number: number; payload: Buffer | number }> {
	let at = 0;
	const varint = (): number => {
		let value = 0;
		for (let scale = 1; ; scale *= 128) {
			const byte = message[at++] as number;
			value += (byte & 127) * scale;
			if (byte < 128) return value;
		}
	};
	while (at < message.length) {
		const key = varint();
		const kind = key & 7;
		if (kind === 0) {
			yield { number: key >> 3, payload: varint() };
			continue;
		}
		const size = kind === 1 ? 8 : kind === 5 ? 4 : varint();
		yield { number: key >> 3, payload: message.subarray(at, at + size) };
		at += size;
	}
}

test('the JSONL log drops what lies beyond the step a run continues from, and a half-written line', async (t) => {
	const path = join(fresh(), 'metrics.jsonl');
	const logger = new JsonlLogger(path);
	await logger.start({ step: 0 });
	for (let step = 1; step <= 4; step++) logger.log({ step } as TrainMetrics);
	writeFileSync(path, `${readFileSync(path, 'utf8')}{"step":5,"lo`);
	await logger.start({ step: 3 });
	t.is(readFileSync(path, 'utf8'), '{"step":1}\n{"step":2}\n{"step":3}\n');
});

test('progress is plain lines where there is no terminal', (t) => {
	const lines: string[] = [];
	const stream = { isTTY: false, write: (text: string) => lines.push(text) } as unknown as NodeJS.WriteStream;
	const logger: Required<MetricLogger> = new ProgressLogger({ stream, everySeconds: 1000 });
	logger.start({ step: 0, maxSteps: 50 });
	for (let step = 1; step <= 50; step++) logger.log({ step, loss: 1.5, tokensPerSecond: 12345 } as TrainMetrics);
	logger.close();
	t.is(lines.length, 2);
	t.regex(lines[1] as string, /^step 50\/50 {2}loss 1\.5000 {2}12,345 tok\/s {2}0s left\n$/);
});
