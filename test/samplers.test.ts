/** Deterministic samplers against a slow reimplementation; what the stochastic ones promise besides their distribution. */
import test, { type ExecutionContext } from 'ava';
import type { DenoiseStep, DiffuGPT, GenerateOptions, GenerateResult } from 'diffusion-native';

import { Stream, uniform } from '../lib/random.js';
import { logSoftmax, sharpModel } from './helpers/models.js';
import * as reference from './helpers/reference-samplers.js';

const prompt = [5, 17, 33, 2];

async function collect(
	model: DiffuGPT,
	tokens: number[],
	options: GenerateOptions,
): Promise<{ events: DenoiseStep[]; result: GenerateResult }> {
	const stream = model.stream({ tokens: Int32Array.from(tokens) }, options);
	const events: DenoiseStep[] = [];
	for (;;) {
		const { done, value } = await stream.next();
		if (done) return { events, result: value };
		events.push(value);
	}
}

async function agrees(
	t: ExecutionContext,
	model: DiffuGPT,
	options: GenerateOptions & { length: number },
	expected: Promise<reference.Trace>,
): Promise<void> {
	const { events, result } = await collect(model, prompt, { seed: 1, ...options });
	const trace = await expected;
	t.deepEqual(
		events.map((event) => event.committed),
		trace.committed,
	);
	t.deepEqual(
		events.map((event) => event.tokens),
		trace.canvases,
	);
	t.deepEqual(result.sequence, trace.tokens);
	t.is(result.stats.forwards, trace.forwards);
	t.true(trace.lead > 1e-3, `two tokens are ${trace.lead} nats apart`);
	if (trace.reopened.length > 0) {
		t.deepEqual(
			events.map((event) => event.reopened),
			trace.reopened,
		);
	}
}

const scores = {
	probability: (row: { probability: number }) => row.probability,
	margin: (row: { margin: number }) => row.margin,
	entropy: (row: { entropy: number }) => -row.entropy,
} as const;

for (const shift of [true, false]) {
	const name = shift ? 'shifted' : 'unshifted';
	test(`confidence agrees with its formulas, ${name}`, async (t) => {
		const model = await sharpModel({ shift });
		const setup = { prompt, length: 18 };
		for (const score of ['probability', 'margin', 'entropy'] as const) {
			const rank = scores[score] as (row: object) => number;
			await agrees(
				t,
				model,
				{ length: 18, steps: 7, score },
				reference.decode(
					model,
					setup,
					reference.even(rank, () => 7),
				),
			);
			await agrees(
				t,
				model,
				{ length: 18, steps: 7, score, plan: 'linear' },
				reference.decode(model, setup, reference.linear(rank, 7)),
			);
			// 18 = 5 + 5 + 5 + 3 tokens; 10 steps = 3 + 3 + 2 + 2.
			await agrees(
				t,
				model,
				{ length: 18, steps: 10, score, block: 5 },
				reference.decode(
					model,
					{ ...setup, block: 5 },
					reference.even(rank, (b) => (b < 2 ? 3 : 2)),
				),
			);
		}
		// More steps than tokens: the empty ones cost nothing.
		await agrees(
			t,
			model,
			{ length: 7, steps: 8 },
			reference.decode(
				model,
				{ prompt, length: 7 },
				reference.even(scores.probability, () => 8),
			),
		);
		await agrees(
			t,
			model,
			{ length: 7, steps: 20, plan: 'linear' },
			reference.decode(model, { prompt, length: 7 }, reference.linear(scores.probability, 20)),
		);
		await model.dispose();
	});

	test(`adaptive samplers agree with their formulas, ${name}`, async (t) => {
		const model = await sharpModel({ shift });
		const setup = { prompt, length: 20 };
		let parallel = 0;
		for (const tau of [0, 0.3, 0.5, 0.7, 1.1]) {
			const trace = reference.decode(model, setup, reference.threshold(tau));
			await agrees(t, model, { length: 20, sampler: 'threshold', threshold: tau }, trace);
			const { forwards } = await trace;
			if (tau === 0) t.is(forwards, 1);
			else if (tau > 1) t.is(forwards, 20);
			else if (forwards > 1 && forwards < 20) parallel++;
			await agrees(
				t,
				model,
				{ length: 20, sampler: 'threshold', threshold: tau, block: 6 },
				reference.decode(model, { ...setup, block: 6 }, reference.threshold(tau)),
			);
		}
		t.true(parallel > 0, 'some threshold lies between the extremes');
		for (const f of [0, 0.5, 1, 2, 4]) {
			await agrees(
				t,
				model,
				{ length: 20, sampler: 'factor', factor: f },
				reference.decode(model, setup, reference.factor(f)),
			);
		}
		t.is((await reference.decode(model, setup, reference.factor(0))).forwards, 20);
		for (const gamma of [0, 0.5, 2, 8, 1000]) {
			await agrees(
				t,
				model,
				{ length: 20, sampler: 'entropy-bound', entropyBound: gamma },
				reference.decode(model, setup, reference.entropyBound(gamma)),
			);
		}
		for (const [tau, epsilon, stableSteps] of [
			[0.3, 0.05, 1],
			[0.2, 0.5, 2],
			[0, 100, 3],
		] as const) {
			await agrees(
				t,
				model,
				{ length: 20, sampler: 'klass', threshold: tau, divergence: epsilon, stableSteps },
				reference.decode(model, setup, reference.klass(tau, epsilon, stableSteps)),
			);
		}
		await model.dispose();
	});

	test(`revocable agrees with its formulas, ${name}`, async (t) => {
		const model = await sharpModel({ shift });
		let reopened = 0;
		for (const [draft, verify, attempts] of [
			[0.2, 0.3, 2],
			[0, 0.5, 3],
			[0.4, 0.9, 1],
			[0.3, 0, 2],
			[0.3, 0.9, 0],
		] as const) {
			const trace = reference.revocable(model, { prompt, length: 16 }, draft, verify, attempts);
			await agrees(t, model, { length: 16, sampler: 'revocable', threshold: draft, verify, attempts }, trace);
			const count = (await trace).reopened.flat().length;
			if (verify === 0 || attempts === 0) t.is(count, 0);
			reopened += count;
		}
		t.true(reopened > 0, 'some draft was revoked');
		await model.dispose();
	});

	test(`guidance follows its formula, ${name}`, async (t) => {
		const model = await sharpModel({ shift });
		const setup = { prompt, length: 14, guidance: 1.5 };
		const guided = reference.decode(
			model,
			setup,
			reference.even(scores.probability, () => 6),
		);
		const plain = await reference.decode(
			model,
			{ prompt, length: 14 },
			reference.even(scores.probability, () => 6),
		);
		await agrees(t, model, { length: 14, steps: 6, guidance: 1.5 }, guided);
		t.notDeepEqual((await guided).tokens, plain.tokens);
		const common = { length: 14, guidance: 1.5 };
		for (const [options, rule] of [
			[{ score: 'margin', steps: 7, block: 5 }, reference.even(scores.margin, (b) => (b < 1 ? 3 : 2))],
			[{ score: 'entropy', steps: 5, plan: 'linear' }, reference.linear(scores.entropy, 5)],
			[{ sampler: 'threshold', threshold: 0.4 }, reference.threshold(0.4)],
			[{ sampler: 'factor', factor: 1.5 }, reference.factor(1.5)],
			[{ sampler: 'entropy-bound', entropyBound: 2 }, reference.entropyBound(2)],
			[{ sampler: 'klass', threshold: 0.2, divergence: 0.5, stableSteps: 1 }, reference.klass(0.2, 0.5, 1)],
		] as [GenerateOptions, Parameters<typeof reference.decode>[2]][]) {
			const { block } = options;
			const given = block === undefined ? setup : { ...setup, block };
			await agrees(t, model, { ...options, ...common }, reference.decode(model, given, rule));
		}
		let reopened = 0;
		for (const verify of [0.2, 0.4, 0.6, 0.8, 0.95, 0.99]) {
			const trace = reference.revocable(model, setup, 0.05, verify, 3);
			const options = { ...common, sampler: 'revocable', threshold: 0.05, verify, attempts: 3 } as const;
			await agrees(t, model, options, trace);
			reopened += (await trace).reopened.flat().length;
		}
		t.true(reopened > 0, 'some draft was revoked');
		await model.dispose();
	});
}

test('cached autoregressive decoding equals full recomputation', async (t) => {
	for (const attention of ['causal', 'bidirectional'] as const) {
		const model = await sharpModel({ attention, ...(attention === 'causal' ? { maskId: -1 } : {}) });
		const { result } = await collect(model, prompt, { sampler: 'autoregressive', temperature: 0, length: 24 });
		const tokens = [...prompt];
		for (let i = 0; i < 24; i++) {
			const [logits] = await model.forward(Int32Array.from(tokens), {
				attention: 'causal',
				rows: [Int32Array.of(tokens.length - 1)],
			});
			const logProbs = logSoftmax(logits as Float32Array, model.config.maskId);
			tokens.push(logProbs.indexOf(Math.max(...logProbs)));
		}
		t.deepEqual(Array.from(result.sequence), tokens);
		t.is(result.stats.forwards, 24);
		await model.dispose();
	}
});

test('guided autoregressive decoding follows its formula', async (t) => {
	const model = await sharpModel();
	const { result } = await collect(model, prompt, {
		sampler: 'autoregressive',
		temperature: 0,
		length: 12,
		guidance: 1,
	});
	const { maskId, vocab } = model.config;
	const tokens = [...prompt];
	for (let i = 0; i < 12; i++) {
		const row = tokens.length - 1;
		const twin = tokens.map((id, j) => (j < prompt.length ? maskId : id));
		const options = { attention: 'causal', rows: [Int32Array.of(row), Int32Array.of(row)] } as const;
		const [l, u] = (await model.forward([Int32Array.from(tokens), Int32Array.from(twin)], options)) as [
			Float32Array,
			Float32Array,
		];
		const mixed = Array.from({ length: vocab }, (_, v) => (u[v] as number) + 2 * ((l[v] as number) - (u[v] as number)));
		const logProbs = logSoftmax(mixed, maskId);
		tokens.push(logProbs.indexOf(Math.max(...logProbs)));
	}
	t.deepEqual(Array.from(result.sequence), tokens);
	await model.dispose();
});

test('ancestral reveals each position at a step of its own, and steps without any cost nothing', async (t) => {
	const model = await sharpModel();
	for (const [steps, length] of [
		[1, 50],
		[2, 50],
		[8, 50],
		[8, 8],
		[1000, 20],
		[65536, 5],
	] as const) {
		const { events, result } = await collect(model, prompt, { sampler: 'ancestral', steps, length, seed: 4 });
		const revealed = new Map<number, number[]>();
		for (let i = 0; i < length; i++) {
			const position = prompt.length + i;
			const step = Math.floor(uniform(4n, Stream.order, 0, position) * steps);
			revealed.set(step, [...(revealed.get(step) ?? []), position]);
		}
		t.deepEqual(
			events.map(({ committed }) => committed),
			[...revealed].sort(([a], [b]) => a - b).map(([, positions]) => positions),
		);
		t.is(result.stats.forwards, revealed.size);
		t.true(steps > 1 || result.stats.forwards === 1);
	}
	await model.dispose();
});

test('first-hitting takes one forward per open position', async (t) => {
	const model = await sharpModel();
	const { events, result } = await collect(model, prompt, { sampler: 'first-hitting', length: 21 });
	t.is(result.stats.forwards, 21);
	t.true(events.every((event) => event.committed.length === 1));
	await model.dispose();
});

test('random order commits by the plan and depends on the seed alone', async (t) => {
	const model = await sharpModel();
	const orders = [];
	for (const seed of [1, 1, 2]) {
		const { events } = await collect(model, prompt, { score: 'random', steps: 4, length: 10, seed });
		t.deepEqual(
			events.map((event) => event.committed.length),
			[3, 3, 2, 2],
		);
		orders.push(events.map((event) => event.committed));
	}
	t.deepEqual(orders[0], orders[1]);
	t.notDeepEqual(orders[0], orders[2]);
	await model.dispose();
});
