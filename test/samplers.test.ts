/** Deterministic samplers against a slow reimplementation; stochastic ones against brute-force distributions. */
import test, { type ExecutionContext } from 'ava';
import type { DenoiseStep, DiffuGPT, GenerateOptions, GenerateResult, SamplerPolicy } from 'diffusion-native';

import { uniform } from '../lib/random.js';
import { logSoftmax, sharpModel } from './helpers/models.js';
import * as reference from './helpers/reference-samplers.js';
import { chiSquare } from './helpers/statistics.js';

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
	t.deepEqual(result.sequence, trace.tokens);
	t.is(result.stats.forwards, trace.forwards);
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
		await agrees(
			t,
			model,
			{ length: 14, sampler: 'threshold', threshold: 0.4, guidance: 1.5 },
			reference.decode(model, setup, reference.threshold(0.4)),
		);
		await agrees(
			t,
			model,
			{ length: 14, sampler: 'klass', threshold: 0.2, divergence: 0.5, stableSteps: 1, guidance: 1.5 },
			reference.decode(model, setup, reference.klass(0.2, 0.5, 1)),
		);
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

/** A toy that can be enumerated: four text ids and a mask, four open positions after one given token. */
const toy = { vocab: 5, maskId: 4, eosId: 3, context: 8, channels: 16 } as const;
const L = 4;

interface Toy {
	model: DiffuGPT;
	/** p(token | canvas, position): canvas is a base-5 number of the four positions, 4 = open. */
	conditional(canvas: number[], position: number): number[];
}

async function makeToy(temperature = 1): Promise<Toy> {
	const model = await sharpModel(toy, 3, 16);
	const canvases = Array.from({ length: 5 ** L }, (_, n) =>
		Array.from({ length: L }, (_, i) => Math.floor(n / 5 ** i) % 5),
	);
	const rows = await model.forward(
		canvases.map((canvas) => Int32Array.from([1, ...canvas])),
		{ output: 'aligned-logits' },
	);
	return {
		model,
		conditional(canvas, position) {
			const n = canvas.reduce((sum, id, i) => sum + id * 5 ** i, 0);
			const logits = (rows[n] as Float32Array).subarray((position + 1) * 5, (position + 2) * 5);
			return logSoftmax(
				logits.map((l) => l / temperature),
				4,
			)
				.slice(0, 4)
				.map(Math.exp);
		},
	};
}

/** Exact distribution over the 256 texts of a process that reveals each open position with probability r(step). */
function ancestralDistribution({ conditional }: Toy, T: number): Float64Array {
	let states = new Map<number, number>([[5 ** L - 1, 1]]);
	const digits = (n: number): number[] => Array.from({ length: L }, (_, i) => Math.floor(n / 5 ** i) % 5);
	for (let step = 0; step < T; step++) {
		const r = 1 / (T - step);
		const next = new Map<number, number>();
		const visit = (before: number[], after: number[], i: number, weight: number): void => {
			if (weight === 0) return;
			if (i === L) {
				const n = after.reduce((sum, id, j) => sum + id * 5 ** j, 0);
				next.set(n, (next.get(n) ?? 0) + weight);
				return;
			}
			if (before[i] !== 4) {
				visit(before, after, i + 1, weight);
				return;
			}
			visit(before, after, i + 1, weight * (1 - r));
			for (const [id, p] of conditional(before, i).entries()) {
				visit(
					before,
					after.map((old, j) => (j === i ? id : old)),
					i + 1,
					weight * r * p,
				);
			}
		};
		for (const [n, weight] of states) visit(digits(n), digits(n), 0, weight);
		states = next;
	}
	return toTexts(states);
}

/** The model's any-order distribution: the mean over all orders of the product of conditionals. */
function anyOrderDistribution({ conditional }: Toy): Float64Array {
	const states = new Map<number, number>();
	const visit = (canvas: number[], weight: number): void => {
		const open = canvas.flatMap((id, i) => (id === 4 ? [i] : []));
		if (open.length === 0) {
			const n = canvas.reduce((sum, id, j) => sum + id * 5 ** j, 0);
			states.set(n, (states.get(n) ?? 0) + weight);
			return;
		}
		for (const i of open) {
			for (const [id, p] of conditional(canvas, i).entries()) {
				visit(
					canvas.map((old, j) => (j === i ? id : old)),
					(weight * p) / open.length,
				);
			}
		}
	};
	visit(new Array<number>(L).fill(4), 1);
	return toTexts(states);
}

function toTexts(states: Map<number, number>): Float64Array {
	const texts = new Float64Array(4 ** L);
	for (const [n, weight] of states) {
		const ids = Array.from({ length: L }, (_, i) => Math.floor(n / 5 ** i) % 5);
		const index = ids.reduce((sum, id, i) => sum + id * 4 ** i, 0);
		texts[index] = (texts[index] as number) + weight;
	}
	return texts;
}

/** Texts drawn with seeds first .. first + draws - 1. */
async function draw(model: DiffuGPT, draws: number, options: GenerateOptions): Promise<Float64Array> {
	const counts = new Float64Array(4 ** L);
	for (let first = 0; first < draws; first += 2000) {
		const seeds = Array.from({ length: Math.min(2000, draws - first) }, (_, i) => first + i);
		const results = await model.generateBatch(
			seeds.map(() => ({ tokens: Int32Array.of(1) })),
			seeds.map((seed) => ({ ...options, length: L, seed })),
		);
		for (const { tokens } of results) {
			const index = tokens.reduce((sum, id, i) => sum + id * 4 ** i, 0);
			counts[index] = (counts[index] as number) + 1;
		}
	}
	return counts;
}

/** 2e5 with DN_SLOW_TESTS=1. */
const draws = process.env['DN_SLOW_TESTS'] ? 200_000 : 8_000;

test('first-hitting reproduces the any-order distribution', async (t) => {
	const made = await makeToy();
	const expected = anyOrderDistribution(made);
	const p = chiSquare(await draw(made.model, draws, { sampler: 'first-hitting' }), expected);
	t.true(p > 1e-4, `p = ${p}`);
	await made.model.dispose();
});

test('ancestral reproduces its exact distribution, which tends to the any-order one', async (t) => {
	const made = await makeToy();
	const anyOrder = anyOrderDistribution(made);
	const distance = (a: Float64Array): number =>
		a.reduce((sum, value, i) => sum + Math.abs(value - (anyOrder[i] as number)), 0) / 2;
	const few = ancestralDistribution(made, 2);
	const many = ancestralDistribution(made, 16);
	t.true(distance(many) < distance(few) / 3);
	for (const steps of [1, 2, 16]) {
		const exact = steps === 2 ? few : steps === 16 ? many : ancestralDistribution(made, 1);
		const p = chiSquare(await draw(made.model, draws / 2, { sampler: 'ancestral', steps }), exact);
		t.true(p > 1e-4, `${steps} steps: p = ${p}`);
	}
	await made.model.dispose();
});

test('temperature means what it says', async (t) => {
	const made = await makeToy(0.5);
	const p = chiSquare(
		await draw(made.model, draws / 2, { sampler: 'first-hitting', temperature: 0.5 }),
		anyOrderDistribution(made),
	);
	t.true(p > 1e-4, `p = ${p}`);
	await made.model.dispose();
});

test('the test of the distribution sees a wrong temperature and coarse Gumbel noise', async (t) => {
	const made = await makeToy();
	const expected = anyOrderDistribution(made);
	const hot = chiSquare(await draw(made.model, draws / 2, { sampler: 'first-hitting', temperature: 1.3 }), expected);
	t.true(hot < 1e-6, `temperature 1.3: p = ${hot}`);
	// Gumbel noise from uniforms of 2 bits: what low precision does to the tails.
	const coarse: SamplerPolicy = {
		name: 'coarse-gumbel',
		needsLogits: true,
		choose: ({ open, seed, step }) => [open[Math.floor(uniform(seed, 77, step, 0) * open.length)] as number],
		decide(view) {
			const noisy = Array.from(view.logProbs(0), (log, id) => {
				const u = (Math.floor(uniform(view.seed, 78, view.step, id) * 4) + 0.5) / 4;
				return log - Math.log(-Math.log(u));
			});
			return { commit: Array.from(view.positions), tokens: [noisy.indexOf(Math.max(...noisy))] };
		},
	};
	const planted = chiSquare(await draw(made.model, draws / 2, { sampler: coarse }), expected);
	t.true(planted < 1e-6, `coarse Gumbel: p = ${planted}`);
	await made.model.dispose();
});

test('ancestral takes exactly its steps while anything is open', async (t) => {
	const model = await sharpModel();
	for (const steps of [1, 2, 5, 8]) {
		const { stats } = await model.generate(
			{ tokens: Int32Array.from(prompt) },
			{ sampler: 'ancestral', steps, length: 50, seed: 4 },
		);
		t.is(stats.forwards, steps);
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
