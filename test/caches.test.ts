/** Blocks with caches: against a plain reimplementation, exactness where it is promised, the drift meter, memory. */
import test, { type ExecutionContext } from 'ava';
import {
	type CacheKind,
	type DenoiseStep,
	type DiffuGPT,
	DiffusionNativeError,
	type GenerateOptions,
	type Prompt,
	type SamplerPolicy,
} from 'diffusion-native';

import { binding } from '../lib/binding.js';
import { collect } from './helpers/generate.js';
import { logSoftmax, sharpModel } from './helpers/models.js';
import { NaiveGpt2 } from './helpers/naive-gpt2.js';

const maskId = 60;
const prompt = [5, 17, 33, 2, 9];
const kinds: CacheKind[] = ['prefix', 'dual'];

interface CachedTrace {
	committed: number[][];
	/** Per step: mean and largest KL(exact || cached) of the rows looked at; 0 rows where the whole canvas was computed. */
	drift: { mean: number; max: number; rows: number }[];
	tokens: number[];
}

/** Threshold decoding by blocks with a cache, slowly: every row from the naive model's own keys and values. */
function cachedDecode(
	model: DiffuGPT,
	before: number[],
	length: number,
	after: number[],
	block: number,
	kind: CacheKind,
	tau: number,
	guidance = 0,
): CachedTrace {
	const shift = model.config.shift ? 1 : 0;
	const tokens = [...before, ...new Array<number>(length).fill(maskId), ...after];
	const T = tokens.length;
	const cached = new NaiveGpt2(model);
	const twinCached = new NaiveGpt2(model);
	/** Rows [from, to), mixed with those of the twin, in which all that is given is masked. */
	const rowsOf = (own: NaiveGpt2, twin: NaiveGpt2, from: number, to: number): number[][] => {
		const rows = own.forward(tokens, from, to, () => T);
		if (guidance === 0) return rows;
		const masked = tokens.map((id, i) => (i < before.length || i >= before.length + length ? maskId : id));
		const others = twin.forward(masked, from, to, () => T);
		return rows.map((row, r) =>
			row.map((l, v) => {
				const u = others[r]?.[v] as number;
				return u + (guidance + 1) * (l - u);
			}),
		);
	};
	const trace: CachedTrace = { committed: [], drift: [], tokens };
	for (let begin = before.length; begin < before.length + length; begin += block) {
		const end = Math.min(begin + block, before.length + length);
		for (let fresh = true; ; fresh = false) {
			const open = Array.from({ length: end - begin }, (_, i) => begin + i).filter((i) => tokens[i] === maskId);
			if (open.length === 0) break;
			const from = fresh ? 0 : begin - shift;
			const to = fresh || kind === 'prefix' ? T : end;
			const logits = rowsOf(cached, twinCached, from, to);
			const exact = rowsOf(new NaiveGpt2(model), new NaiveGpt2(model), 0, T);
			const rows = open
				.map((position) => {
					const log = logSoftmax(logits[position - shift - from] as number[], maskId);
					const true_ = logSoftmax(exact[position - shift] as number[], maskId);
					const best = log.indexOf(Math.max(...log));
					const kl = true_.reduce(
						(sum, l, v) => (v === maskId ? sum : sum + Math.exp(l) * (l - (log[v] as number))),
						0,
					);
					return { position, best, probability: Math.exp(log[best] as number), kl };
				})
				.sort((a, b) => b.probability - a.probability);
			const commit = rows.filter((row, i) => i === 0 || row.probability >= tau);
			for (const row of commit) tokens[row.position] = row.best;
			trace.committed.push(commit.map((row) => row.position).sort((a, b) => a - b));
			trace.drift.push(
				fresh
					? { mean: 0, max: 0, rows: 0 }
					: {
							mean: rows.reduce((sum, row) => sum + row.kl, 0) / rows.length,
							max: Math.max(...rows.map((row) => row.kl)),
							rows: rows.length,
						},
			);
		}
	}
	return trace;
}

for (const shift of [true, false]) {
	for (const kind of kinds) {
		test(`the ${kind} cache agrees with a plain reimplementation, ${shift ? 'shifted' : 'unshifted'}`, async (t) => {
			// Milder than the other tests' model, so that a stale cache is a small error and not nonsense.
			const model = await sharpModel({ shift }, 1, 12);
			let drifted = 0;
			for (const [length, after, block, tau, guidance] of [
				[17, [], 5, 0.25, 0],
				[12, [], 12, 0.2, 0],
				[12, [7, 8, 21], 4, 0.3, 0],
				[4, [11], 1, 0.5, 0],
				[9, [], 3, 2, 0],
				[10, [7], 4, 0.3, 0.7],
			] as [number, number[], number, number, number][]) {
				const expected = cachedDecode(model, prompt, length, after, block, kind, tau, guidance);
				const tokens = Int32Array.from([...prompt, ...new Array<number>(length).fill(maskId), ...after]);
				const { events, result } = await collect(
					model,
					{ tokens },
					{ sampler: 'threshold', threshold: tau, block, cache: kind, measureDrift: true, guidance },
				);
				t.deepEqual(
					events.map(({ committed }) => committed),
					expected.committed,
				);
				t.deepEqual(Array.from(result.sequence), expected.tokens);
				t.is(result.stats.forwards, expected.committed.length);
				for (const [i, { mean, max, rows }] of expected.drift.entries()) {
					const { drift } = events[i] as DenoiseStep;
					t.is(drift?.rows, rows);
					t.true(Math.abs((drift?.mean as number) - mean) < 1e-5 + 1e-3 * mean, `${drift?.mean} against ${mean}`);
					t.true(Math.abs((drift?.max as number) - max) < 1e-5 + 1e-3 * max, `${drift?.max} against ${max}`);
				}
				const rows = expected.drift.reduce((sum, d) => sum + d.rows, 0);
				const mean = expected.drift.reduce((sum, d) => sum + d.mean * d.rows, 0) / Math.max(1, rows);
				const { drift } = result.stats;
				t.is(drift?.rows, rows);
				t.true(Math.abs((drift?.mean as number) - mean) < 1e-5 + 1e-3 * mean);
				drifted = Math.max(drifted, drift?.max as number);
				const unmeasured = await model.generate(
					{ tokens },
					{ sampler: 'threshold', threshold: tau, block, cache: kind, guidance },
				);
				t.deepEqual(unmeasured.sequence, result.sequence, 'measuring changes nothing');
				t.is(unmeasured.stats.drift, undefined);
			}
			t.true(drifted > 1e-3, `a stale cache is not exact: largest KL ${drifted}`);
			await model.dispose();
		});
	}
}

const samplers: GenerateOptions[] = [
	{ sampler: 'confidence', steps: 9 },
	{ sampler: 'confidence', score: 'random', steps: 9, temperature: 1 },
	{ sampler: 'ancestral', steps: 12 },
	{ sampler: 'threshold', threshold: 0.4 },
	{ sampler: 'factor', factor: 2, temperature: 0.7 },
	{ sampler: 'entropy-bound', entropyBound: 1, guidance: 0.5 },
	{ sampler: 'klass', threshold: 0.3, divergence: 0.5, stableSteps: 1 },
	{ sampler: 'first-hitting', guidance: 1 },
];

/** Everything of an event that does not name the cache. */
function comparable(events: DenoiseStep[]): object[] {
	return events.map(({ drift: _, ...rest }) => rest);
}

for (const shift of [true, false]) {
	test(`block-causal: the cache is exact, bit for bit, ${shift ? 'shifted' : 'unshifted'}`, async (t) => {
		const model = await sharpModel({ shift, eosId: 43 });
		for (const [i, options] of samplers.entries()) {
			for (const length of [1, 13, { max: 18 }, { max: 18, method: 'block', block: 7 }] as const) {
				for (const blockCausal of [1, 4, 5, 64]) {
					const tokens = Int32Array.from(prompt.slice(0, 1 + (i % prompt.length)));
					// One step for every block at the least.
					const { steps, ...rest } = options;
					const common = {
						...(steps && blockCausal >= 4 && length !== 1 ? options : rest),
						length,
						seed: i,
						attention: { blockCausal },
					};
					const plain = await collect(model, { tokens }, common);
					for (const cache of kinds) {
						const cached = await collect(model, { tokens }, { ...common, cache });
						t.deepEqual(comparable(cached.events), comparable(plain.events));
						t.is(cached.result.stats.forwards, plain.result.stats.forwards);
					}
					const measured = await collect(model, { tokens }, { ...common, cache: 'dual', measureDrift: true });
					t.deepEqual(comparable(measured.events), comparable(plain.events));
					t.is(measured.result.stats.drift?.max, 0);
					t.is(
						measured.result.stats.drift?.rows === 0,
						measured.events.every(({ drift }) => drift?.rows === 0),
					);
				}
			}
		}
		await model.dispose();
	});
}

test('block-causal: whole distributions of cached rows have the same bits, and the windows follow the blocks', async (t) => {
	const model = await sharpModel();
	const recorder = (seen: Float64Array[], open: number[][]): SamplerPolicy => ({
		needsLogits: true,
		decide(view) {
			for (const k of view.positions.keys()) seen.push(view.logProbs(k));
			open.push(Array.from(view.open));
			return { commit: [view.positions[view.positions.length - 1] as number] };
		},
	});
	const tokens = Int32Array.from(prompt);
	const plain: Float64Array[] = [];
	const cached: Float64Array[] = [];
	const open: number[][] = [];
	const options = { length: 11, attention: { blockCausal: 4 } } as const;
	await model.generate({ tokens }, { ...options, sampler: recorder(plain, open) });
	await model.generate({ tokens }, { ...options, sampler: recorder(cached, []), cache: 'prefix' });
	t.deepEqual(cached, plain);
	t.deepEqual(
		[open[0], open[3], open[7]],
		[
			[5, 6, 7],
			[8, 9, 10, 11],
			[12, 13, 14, 15],
		],
	);
	// The first row of a block sees nothing of its own block: what the model was trained to do under the shift.
	const canvas = Int32Array.from([...prompt, 1, 2, 3, ...new Array<number>(4).fill(maskId)]);
	const other = canvas.map((id, i) => (i >= 8 ? 7 : id));
	const rows = (await model.forward([canvas, other], {
		attention: { blockCausal: 4 },
		rows: [Int32Array.of(7), Int32Array.of(7)],
	})) as [Float32Array, Float32Array];
	t.deepEqual(rows[0], rows[1]);
	await model.dispose();
});

test('scattered positions, infilling, growth and cuts work with caches', async (t) => {
	const model = await sharpModel({ eosId: 43 });
	const tokens = Int32Array.from({ length: 30 }, (_, i) => (i % 3 === 0 || i < 4 ? i : maskId));
	for (const cache of kinds) {
		for (const options of samplers.filter(({ steps }) => steps === undefined || steps >= 9)) {
			const { steps: _, ...rest } = options;
			const scattered = await collect(model, { tokens }, { ...rest, block: 4, cache, seed: 3 });
			t.is(scattered.result.sequence.includes(maskId), false);
			for (const [i, id] of tokens.entries()) if (id !== maskId) t.is(scattered.result.sequence[i], id);
			let canvas = 0;
			for (const length of [
				{ max: 20 },
				{ max: 20, method: 'block', block: 6 },
				{ max: 20, method: 'first-step' },
			] as const) {
				for (let seed = 0; seed < 6; seed++) {
					const common = { ...rest, length, seed, block: 4, cache, temperature: 1 };
					const { result } = await collect(model, { tokens: Int32Array.from(prompt) }, common);
					t.false(result.sequence.includes(maskId));
					canvas = Math.max(canvas, result.stats.canvas);
				}
			}
			t.true(canvas <= 25);
		}
		// One block that spans everything and fills in one step never reads its cache: exact.
		const one = { length: 12, block: 12, sampler: 'threshold', threshold: 0 } as const;
		const plain = await collect(model, { tokens: Int32Array.from(prompt) }, one);
		const cached = await collect(model, { tokens: Int32Array.from(prompt) }, { ...one, cache, measureDrift: true });
		t.deepEqual(comparable(cached.events), comparable(plain.events));
		t.deepEqual(cached.result.stats.drift, { mean: 0, max: 0, rows: 0 });
		const empty = await model.generate({ tokens: Int32Array.from(prompt) }, { length: 0, block: 3, cache });
		t.is(empty.stats.forwards, 0);
	}
	await model.dispose();
});

test('the cache is built anew when an end token cuts the canvas inside a block', async (t) => {
	const model = await sharpModel({ eosId: 43 });
	const sampler: SamplerPolicy = {
		decide: ({ positions, step }) =>
			step === 1 ? { commit: [positions[4] as number], tokens: [43] } : { commit: [positions[0] as number] },
	};
	for (const cache of kinds) {
		const options = { length: { max: 20 }, sampler, block: 8, cache, measureDrift: true, seed: 1 };
		const { events, result } = await collect(model, { tokens: Int32Array.from(prompt) }, options);
		t.is(result.tokens.length, 5);
		t.deepEqual(
			events.map(({ drift, tokens }) => [drift?.rows === 0, tokens.length]),
			[
				[true, 25],
				[false, 11],
				[true, 11],
				[false, 11],
				[false, 11],
				[false, 11],
			],
			cache,
		);
	}
	await model.dispose();
});

test('cached and uncached requests share a ragged batch, each with its own result', async (t) => {
	const model = await sharpModel({ eosId: 43 });
	const options = samplers.flatMap((sampler, i): GenerateOptions[] => {
		const { steps: _, ...rest } = sampler;
		return [
			{ ...rest, length: 9 + i, block: 4, cache: 'prefix', seed: i },
			{ ...rest, length: 12, block: 3, cache: 'dual', measureDrift: i % 2 === 0, seed: i },
			{ ...rest, length: 10, seed: i },
			{ ...rest, length: 10, attention: { blockCausal: 3 }, cache: 'dual', seed: i },
		];
	});
	const prompts = options.map((_, i) => ({ tokens: Int32Array.from(prompt.slice(0, 1 + (i % 5))) }));
	const { batches } = model.engine.counters;
	const together = await model.generateBatch(prompts, options);
	const merged = model.engine.counters.batches - batches;
	let forwards = 0;
	for (const [i, { stats, ...result }] of together.entries()) {
		const { stats: alone, ...expected } = await model.generate(prompts[i] as Prompt, options[i] as GenerateOptions);
		t.deepEqual(result, expected);
		t.deepEqual([stats.forwards, stats.drift], [alone.forwards, alone.drift]);
		forwards += stats.forwards;
	}
	t.true(merged < forwards / 4, `${forwards} forwards in ${merged} batches`);
	await model.dispose();
});

test.serial('caches are freed when a generation ends, fails, is aborted or left', async (t) => {
	const model = await sharpModel();
	const given = { tokens: Int32Array.from(prompt) };
	const options: GenerateOptions = { length: 20, block: 5, cache: 'dual', guidance: 1 };
	// The workspace grows to its final size first.
	await model.generate(given, { ...options, measureDrift: true });
	await model.generate(given, { sampler: 'autoregressive', length: 20, guidance: 1 });
	const before = binding().externalMemory();
	const held = async (run: () => Promise<unknown>): Promise<void> => {
		await run();
		t.is(binding().externalMemory(), before);
	};
	await held(() => model.generate(given, options));
	for (const each of [options, { sampler: 'autoregressive', length: 20 } as const]) {
		await held(async () => {
			for await (const { step } of model.stream(given, each)) {
				t.true(binding().externalMemory() > before, 'a cache is held meanwhile');
				if (step === 3) break;
			}
		});
		await held(async () => {
			const controller = new AbortController();
			const stream = model.stream(given, { ...each, signal: controller.signal });
			await stream.next();
			const next = stream.next();
			controller.abort(new Error('enough'));
			await t.throwsAsync(next, { message: 'enough' });
		});
	}
	await held(() =>
		t.throwsAsync(
			model.generate(given, {
				...options,
				sampler: {
					decide() {
						throw new RangeError('mine');
					},
				},
			}),
			{ message: 'mine' },
		),
	);
	await model.dispose();
});

test('contradictory cache options are named', async (t) => {
	const model = await sharpModel();
	const bad = async (options: object, message: RegExp, given: Prompt = { tokens: Int32Array.from(prompt) }) =>
		isNamed(t, () => model.generate(given, { length: 8, ...options } as GenerateOptions), message);
	await bad({ cache: 'dual' }, /cache needs option block/);
	await bad({ cache: 'both', block: 4 }, /cache is "both"/);
	await bad({ measureDrift: true, block: 4 }, /measureDrift needs option cache/);
	await bad({ measureDrift: 1, block: 4, cache: 'dual' }, /measureDrift is 1/);
	await bad({ sampler: 'revocable', block: 4, cache: 'dual' }, /cannot be combined with the sampler 'revocable'/);
	await bad({ sampler: 'autoregressive', cache: 'dual' }, /cache has no meaning/);
	await bad({ attention: 'causal' }, /attention is "causal"/);
	await bad({ attention: { blockCausal: 0 } }, /blockCausal/);
	await bad({ attention: { blockCausal: 2, extra: 1 } }, /attention/);
	await bad({ attention: { blockCausal: 4 }, block: 3 }, /attention.blockCausal fixes the blocks at 4/);
	await bad({ attention: { blockCausal: 4 }, steps: 2 }, /fewer than the 3 blocks/);
	await bad({ attention: { blockCausal: 4 }, length: { max: 8, method: 'first-step' } }, /whole canvas/);
	await bad({ attention: { blockCausal: 4 }, length: { max: 8, method: 'rho-eos' } }, /whole canvas/);
	await model.dispose();
});

async function isNamed(t: ExecutionContext, run: () => Promise<unknown>, message: RegExp): Promise<void> {
	const error = await t.throwsAsync(run, { instanceOf: DiffusionNativeError, code: 'ERR_DN_ARGUMENT' });
	t.regex(error?.message ?? '', message);
}
