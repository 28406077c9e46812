/** Trainer: steps, gradients, annealing, aborts, misuse, and what a run learns. */
import test from 'ava';
import {
	DiffuGPT,
	type DiffusionBatch,
	prepare,
	Trainer,
	type TrainMetrics,
	type TrainOptions,
} from 'diffusion-native';

import { MarkovSource } from './helpers/markov.js';
import { collect, documents, fresh, ids, nearly, shape, tiny, weights } from './helpers/trainer.js';

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
	// Two to thirteen tokens, so that micro-batches differ in tokens and in masked tokens.
	const sequences = Array.from({ length: 64 }, (_, i) =>
		Int32Array.from({ length: 1 + ((i * 5) % 12) }, (__, j) => (3 * i + j) % 8),
	);
	const data = await prepare(sequences, {
		tokenizer: ids,
		out: `${fresh()}.bin`,
		format: 'documents',
		context: 16,
		eosId: 8,
	});
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

test('spindle takes the information of tokens from their frequencies in the data', async (t) => {
	const data = await documents(40);
	const model = await tiny();
	await using trainer = new Trainer(model, { data, learningRate: 0, spindle: { lambda: 0.4 }, seed: 3 });
	const batch: DiffusionBatch = { tokens: Array.from({ length: 16 }, (_, i) => data.get(i).tokens) };
	const { loss } = await trainer.step(batch);
	const counts = new Float64Array(shape.vocab);
	let total = shape.vocab / 2;
	for (let i = 0; i < data.sequences; i++) {
		for (const id of data.get(i).tokens) {
			counts[id] = (counts[id] as number) + 1;
			total++;
		}
	}
	const information = Float32Array.from(counts, (n) => -Math.log((n + 0.5) / total));
	t.is((await model.loss(batch, { seed: 3, spindle: { lambda: 0.4, information } })).loss, loss);
	t.not((await model.loss(batch, { seed: 3 })).loss, loss);
	await trainer.dispose();
	await using told = new Trainer(model, { learningRate: 0, spindle: { lambda: 0.4, information }, seed: 3 });
	t.is((await told.step(batch)).loss, loss);
	await model.dispose();
});

test('a clipped range of times is the one that is drawn from', async (t) => {
	const model = await tiny();
	const batch: DiffusionBatch = { tokens: Array.from({ length: 64 }, () => Int32Array.of(8, 1, 2, 3, 4, 5, 6, 7)) };
	// Every weight is 1/t, so the weighted loss over all masked tokens is the unweighted one over t.
	for (const time of [0.25, 0.5]) {
		const options = { timeRange: [time, time] as const, normalise: 'masked' as const };
		const { loss, unweighted } = await model.loss(batch, options);
		t.true(Math.abs((loss * time) / unweighted - 1) < 1e-5, `${time}: ${loss} and ${unweighted}`);
		await using trainer = new Trainer(model, { ...options, learningRate: 0 });
		t.is((await trainer.step(batch)).loss, loss);
	}
	await model.dispose();
});

test('what a loss takes, a trainer takes: a step has the loss of the same options and step', async (t) => {
	const model = await tiny();
	const batch: DiffusionBatch = { tokens: Array.from({ length: 8 }, (_, i) => Int32Array.of(8, 1, 2, i, 4, 5, 6, 7)) };
	const losses = new Set<number>();
	for (const options of [
		{},
		{ seed: 7 },
		{ objective: 'autoregressive' },
		{ objective: 'block-diffusion', block: 4 },
		{ normalise: 'answer', weight: 'none' },
		{ normalise: 'masked', timeSampler: 'stratified' },
		{ timeSampler: 'exact-count' },
		{ timeRange: [0.4, 0.6] },
	] as const) {
		await using trainer = new Trainer(model, { ...options, learningRate: 0 });
		for (const step of [0, 1]) {
			const { loss } = await trainer.step(batch);
			t.is(loss, (await model.loss(batch, { ...options, step })).loss, JSON.stringify(options));
			losses.add(loss);
		}
	}
	t.is(losses.size, 15, 'every option tells, and every step but in the autoregressive objective');
	await model.dispose();
});

test('abort stops between micro-batches, rejects with the reason, and the run can go on', async (t) => {
	const data = await documents(50);
	const model = await tiny();
	const options: TrainOptions = { data, maxSteps: 40, batchSize: 4, accumulate: 3, learningRate: 1e-3 };
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
	refused({ spindle: { lambda: 0.1 } }, /spindle needs data to count tokens in, or information/);
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
