/** Length methods against slow reimplementations, calibration, heads, metrics, the evaluation and its report, bad input. */
import { execFile } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';

import test from 'ava';
import {
	calibrateLength,
	coverageChart,
	DiffuGPT,
	evaluate,
	evaluateLength,
	type GenerateOptions,
	htmlReport,
	type LengthMethod,
	type LengthOptions,
	type SamplerPolicy,
	speedChart,
	Trainer,
	textReport,
	trainLengthHead,
} from 'diffusion-native';

import { conformalQuantile, endSignal } from '../lib/length/calibrate.js';
import { Dense } from '../lib/length/dense.js';
import { repetitiveTail } from '../lib/length/method.js';
import { bestConstant, bootstrapDifference, boundMetrics, pinballLosses, wasserstein } from '../lib/length/metrics.js';
import { ticks } from '../lib/length/report-svg.js';
import { daedalAdapter, rhoAdapter } from '../lib/length/resize.js';
import { estimatorOf, groupOf, type LengthLook, spreadOfEnds } from '../lib/length/rules.js';
import { uniform } from '../lib/random.js';
import { toyLengthModel, toyPairs } from './helpers/lengths.js';
import { logSoftmax, sharpModel } from './helpers/models.js';

const root = fileURLToPath(new URL('../..', import.meta.url));
const maskId = 60;
const eosId = 43;
const given = [5, 17, 33, 2];
const prompt = { tokens: Int32Array.from(given) };

let toy: DiffuGPT;
test.before(async () => {
	toy = await toyLengthModel();
});
test.after.always(async () => {
	await toy?.dispose();
});

/** Log probabilities (T, V) of every position of a canvas, from full logits; position 0 has none. */
async function rows(model: DiffuGPT, tokens: number[]): Promise<number[][]> {
	const { vocab, shift, maskId: mask } = model.config;
	const [logits] = (await model.forward(Int32Array.from(tokens))) as [Float32Array];
	return tokens.map((_, i) => {
		const row = shift ? i - 1 : i;
		return row < 0 ? [] : logSoftmax(logits.subarray(row * vocab, (row + 1) * vocab), mask);
	});
}

function masks(n: number): number[] {
	return new Array<number>(n).fill(maskId);
}

function lookWith(e: readonly number[]): LengthLook {
	return { e: Float32Array.from(e), tail: () => 0 };
}

test('a bound is at least the length exactly when its level is at least the score', (t) => {
	const settings = [
		{ method: 'threshold' },
		{ method: 'quantile' },
		{ method: 'expected' },
		{ method: 'first-step' },
		{ method: 'constant' },
		{ method: 'daedal' },
		{ method: 'first-step', form: 'multiplicative' },
		{ method: 'head', head: 'token' },
	] as const;
	let checked = 0;
	for (let round = 0; round < 300; round++) {
		const n = 1 + Math.floor(12 * uniform(1n, 60, 0, round));
		const e = Array.from({ length: n }, (_, i) => Math.round(8 * uniform(2n, 60, round, i)) / 8);
		const look = lookWith(e);
		for (const setting of settings) {
			const estimator = estimatorOf(setting);
			const scores = Array.from({ length: n + 1 }, (_, length) => estimator.score(look, length));
			for (let length = 0; length < n; length++) {
				for (const level of scores) {
					const end = estimator.bound(look, level);
					const bound = end < 0 ? Number.POSITIVE_INFINITY : end;
					t.is(
						bound >= length,
						level >= (scores[length] as number),
						`${JSON.stringify({ setting, e, length, level })}`,
					);
					checked++;
				}
			}
		}
	}
	t.true(checked > 10000);
});

test('calibrated rules follow their formulas', (t) => {
	const e = [0.1, 0.2, 0.1, 0.6, 0.4, 0.9];
	const look = lookWith(e);
	t.is(estimatorOf({ method: 'threshold' }).bound(look, 0.3), 3);
	t.is(estimatorOf({ method: 'threshold' }).bound(look, Math.fround(0.6)), 5);
	t.is(estimatorOf({ method: 'threshold' }).bound(look, 1), -1);
	t.is(estimatorOf({ method: 'quantile' }).bound(look, 0.5), 3);
	// H: 0.105, 0.329, 0.434, 1.350, 1.861, 4.164
	t.is(estimatorOf({ method: 'expected' }).bound(look, 0.4), 2);
	t.is(estimatorOf({ method: 'expected' }).bound(look, 1.5), 4);
	t.true(Math.abs(estimatorOf({ method: 'expected' }).score(look, 4) + Math.log(0.9 * 0.8 * 0.9 * 0.4)) < 1e-6);
	t.is(estimatorOf({ method: 'first-step' }).bound(look, -2), 3);
	t.is(estimatorOf({ method: 'first-step', form: 'multiplicative' }).bound(look, 1.5), 8);
	t.is(spreadOfEnds(look.e), 6);
	t.is(groupOf(lookWith([0, 0.5, 1, 1]), [2]), 0);
	t.is(groupOf(look, [2]), 1);
	t.is(groupOf(look, []), 0);
});

test('infilling: the length is where the suffix fits', async (t) => {
	const model = await sharpModel({ eosId });
	const suffix = [9, 30, 9];
	const max = 12;
	const fill = { tokens: Int32Array.from([...given, ...masks(1), ...suffix]) };
	// Text needs a tokenizer: the gap of a prompt in ids is asked for through the parsed form.
	const text = {
		encode: (part: string) => Int32Array.from(part.split(' ').filter(Boolean).map(Number)),
		decode: (ids: Int32Array) => ids.join(' '),
	};
	t.is(fill.tokens.length, 8);
	const { predictLength } = await import('../lib/generate.js');
	const ask = (options: Partial<LengthOptions>) =>
		predictLength(model.engine, text, { prefix: given.join(' '), suffix: suffix.join(' ') }, { max, ...options });
	const logs = await rows(model, [...given, ...masks(max + 3)]);
	const evidence = Array.from({ length: max + 1 }, (_, i) =>
		suffix.reduce((sum, id, j) => sum + ((logs[4 + i + j] as number[])[id] as number), 0),
	);
	const first = await ask({ method: 'first-step' });
	t.is(first.probabilities.length, max + 1);
	for (const [i, log] of evidence.entries()) {
		t.true(Math.abs((first.probabilities[i] as number) - Math.exp(log / 3)) < 1e-5);
	}
	t.is(first.length, evidence.indexOf(Math.max(...evidence)));
	const weights = evidence.map((log) => Math.exp(log));
	const total = weights.reduce((a, b) => a + b, 0);
	for (const coverage of [0.2, 0.5, 0.9, 0.999]) {
		let sum = 0;
		const expected = weights.findIndex((weight) => {
			sum += weight / total;
			return sum >= coverage;
		});
		t.is((await ask({ method: 'expected', coverage })).length, expected, `coverage ${coverage}`);
	}
	const bar = (first.probabilities[first.length] as number) * 0.999;
	const over = Array.from(first.probabilities).findIndex((p) => p >= bar);
	t.is((await ask({ method: 'threshold', probability: bar })).length, over);
	t.is((await ask({ method: 'constant' })).length, max);
	for (const method of ['quantile', 'head', 'rho-eos', 'block'] as const) {
		await t.throwsAsync(ask({ method }), { code: 'ERR_DN_ARGUMENT', message: /no meaning before a suffix/ }, method);
	}
	// The suffix moves with the canvas, and generation uses the same first canvas.
	const { denoise, prepareRequest } = await import('../lib/generate.js');
	for (const length of [
		{ max, method: 'first-step' },
		{ max, method: 'daedal', initial: 2, grow: 3 },
	] as const) {
		const request = prepareRequest(
			model.engine,
			text,
			{ prefix: given.join(' '), suffix: suffix.join(' ') },
			{ length, seed: 1 },
		);
		const stream = denoise(model.engine, text, request);
		for (;;) {
			const { done, value } = await stream.next();
			if (!done) continue;
			t.deepEqual(Array.from(value.sequence.slice(-3)), suffix);
			if (length.method === 'first-step') t.is(value.stats.canvas, 4 + first.length + 3);
			t.true(value.sequence.length <= 4 + max + 3);
			break;
		}
	}
	await model.dispose();
});

interface Slow {
	tokens: number[];
	growths: number;
	shrinks: number;
	insertions: number;
}

/** One token per forward, most probable first, with a canvas that changes: DAEDAL or rho-EOS once more, plainly. */
async function slowDecode(
	model: DiffuGPT,
	options: {
		method: 'daedal' | 'rho-eos';
		initial: number;
		grow: number;
		max: number;
		low: number;
		high: number;
		window: number;
	},
): Promise<Slow> {
	const { method, initial, grow, max, low, high, window } = options;
	const slow: Slow = { tokens: [], growths: 0, shrinks: 0, insertions: 0 };
	const tail = (logs: number[][], open: number[]): number => {
		let sum = 0;
		let found = 0;
		for (const i of [...open].reverse()) {
			const log = logs[i] as number[];
			if (log.indexOf(Math.max(...log)) !== eosId || found === window) continue;
			sum += Math.exp(log[eosId] as number);
			found++;
		}
		return sum / window;
	};
	const openOf = (tokens: number[]): number[] => tokens.flatMap((id, i) => (id === maskId ? [i] : []));
	let tokens = [...given, ...masks(initial)];
	if (method === 'daedal') {
		for (;;) {
			const room = max - (tokens.length - 4);
			if (tail(await rows(model, tokens), openOf(tokens)) >= low || room === 0) break;
			tokens = [...tokens, ...masks(Math.min(grow, room))];
			slow.growths++;
		}
	}
	while (tokens.includes(maskId)) {
		const logs = await rows(model, tokens);
		const open = openOf(tokens);
		const best = open.map((i) => Math.max(...(logs[i] as number[])));
		const k = best.indexOf(Math.max(...best));
		const position = open[k] as number;
		tokens[position] = (logs[position] as number[]).indexOf(best[k] as number);
		const end = tokens.indexOf(eosId, 4);
		if (end >= 0) {
			tokens = tokens.slice(0, end + 1);
			continue;
		}
		const room = max - (tokens.length - 4);
		if (method === 'rho-eos') {
			const ends = open.filter((i, j) => (logs[i] as number[])[eosId] === best[j]).length;
			const rho = ends / open.length;
			if (rho < low && room > 0) {
				tokens = [...tokens, ...masks(Math.min(grow, room))];
				slow.growths++;
			} else if (rho > high) {
				for (let n = 0; n < grow && tokens.at(-1) === maskId && openOf(tokens).length > 1; n++) {
					tokens.pop();
					slow.shrinks++;
				}
			}
		} else if (tail(logs, open) < high && room > 0 && grow > 1) {
			const still = open.filter((i) => i !== position && Math.max(...(logs[i] as number[])) < Math.log(0.1));
			const confidence = still.map((i) => Math.max(...(logs[i] as number[])));
			const at = still[confidence.indexOf(Math.min(...confidence))];
			if (at !== undefined) {
				tokens.splice(at, 0, ...masks(Math.min(grow - 1, room)));
				slow.insertions++;
			}
		}
	}
	slow.tokens = tokens;
	return slow;
}

test('daedal and rho-eos change the canvas as their formulas say', async (t) => {
	const seen = { growths: 0, shrinks: 0, insertions: 0 };
	for (const [seed, scale] of [
		[1, 32],
		[2, 20],
		[3, 8],
		[4, 6],
		[5, 8],
		[6, 24],
	] as const) {
		const model = await sharpModel({ eosId }, seed, scale);
		for (const method of ['daedal', 'rho-eos'] as const) {
			// Without a lower bound the first stage adds nothing, and the second has room.
			const low = method === 'daedal' && seed % 2 === 1 ? 0 : 0.02;
			const rule = { initial: 6, grow: 3, max: 24, low, high: method === 'daedal' ? 0.5 : 0.05 };
			const slow = await slowDecode(model, { ...rule, method, window: 2 });
			const length = { ...rule, method, ...(method === 'daedal' ? { window: 2 } : {}) };
			const fast = await model.generate(prompt, { length, sampler: 'threshold', threshold: 2, seed: 1 });
			t.deepEqual(Array.from(fast.sequence), slow.tokens, `${method}, model ${seed}`);
			for (const key of ['growths', 'shrinks', 'insertions'] as const) seen[key] += slow[key];
			// Several tokens per step, blocks, a plan: every canvas is filled and stays in bounds.
			for (const sampler of [
				{ steps: 3 },
				{ steps: 6, block: 2 },
				{ sampler: 'factor', block: 4 },
			] as GenerateOptions[]) {
				const result = await model.generate(prompt, { ...sampler, length, seed: 2 });
				t.false(result.sequence.includes(maskId));
				t.true(result.sequence.length <= 4 + 24);
			}
		}
		await model.dispose();
	}
	t.true(seen.growths > 0 && seen.shrinks > 0 && seen.insertions > 0, JSON.stringify(seen));
});

test('adapters on hand-made gaps', (t) => {
	const gap = {
		positions: Int32Array.of(4, 5, 6, 7),
		open: Uint8Array.of(0, 1, 1, 1),
		isEnd: Uint8Array.of(0, 0, 1, 1),
		end: Float32Array.of(0.1, 0.2, 0.8, 0.9),
		probability: Float32Array.of(0.9, 0.05, 0.08, 0.9),
		begin: 4,
		stop: 8,
		blockBegin: 4,
		blockEnd: 8,
	};
	const rho = { grow: 8, max: 10 };
	// rho is exactly a half: both thresholds are strict.
	t.is(rhoAdapter({ ...rho, low: 0.5, high: 0.5 })(gap), undefined);
	t.deepEqual(rhoAdapter({ ...rho, low: 0.6, high: 0.7 })(gap), { at: 8, removed: 0, inserted: 6 });
	t.deepEqual(rhoAdapter({ ...rho, low: 0.1, high: 0.4 })(gap), { at: 6, removed: 2, inserted: 0 });
	const daedal = { window: 2, grow: 4, max: 20, infilling: false };
	t.deepEqual(daedalAdapter({ ...daedal, high: 0.9 })(gap), { at: 5, removed: 0, inserted: 3 });
	t.is(daedalAdapter({ ...daedal, high: 0.84 })(gap), undefined, 'the mean of 0.9 and 0.8 is enough');
	t.deepEqual(daedalAdapter({ ...daedal, high: 0.85, infilling: true })(gap), { at: 5, removed: 0, inserted: 3 });
	t.deepEqual(daedalAdapter({ ...daedal, high: 0.9 })({ ...gap, blockBegin: 6 }), { at: 6, removed: 0, inserted: 3 });
	t.is(daedalAdapter({ ...daedal, high: 0.9, max: 4 })(gap), undefined);
});

test('stop rules of block', async (t) => {
	const model = await sharpModel({ eosId });
	const writing = (text: number[]): SamplerPolicy => ({
		decide: ({ positions }) => ({
			commit: Array.from(positions),
			tokens: Array.from(positions, (position) => text[position - 4] as number),
		}),
	});
	const run = (text: number[], length: LengthOptions) => model.generate(prompt, { sampler: writing(text), length });
	const text = [eosId, 1, 2, 3, 4, 5, eosId, 7, 7, 7, 7, 7];
	const first = await run(text, { max: 12, method: 'block', block: 4 });
	t.deepEqual(Array.from(first.tokens), []);
	const second = await run(text, { max: 12, method: 'block', block: 4, stop: 'second-end' });
	t.deepEqual(Array.from(second.tokens), text.slice(0, 6));
	t.is(second.finishReason, 'end-of-text');
	t.is(second.stats.canvas, 4 + 8);
	const dull = [1, 2, 3, 4, 5, 6, 6, 6, 6, 6, 6, 6];
	const stopped = await run(dull, { max: 12, method: 'block', block: 4, stop: 'entropy', window: 3, entropy: 0.5 });
	t.deepEqual(Array.from(stopped.tokens), dull.slice(0, 5), 'the dull tail of the second block is dropped');
	t.is(stopped.finishReason, 'length');
	// Four tokens, two and two: ln 2 nats; three alike and one: 0.562.
	t.is(repetitiveTail(Int32Array.of(9, 1, 1, 2, 2), 4, 0.69), 0);
	t.is(repetitiveTail(Int32Array.of(9, 1, 1, 2, 2), 4, 0.7), 4);
	t.is(repetitiveTail(Int32Array.of(1, 1, 2, 2), 4, 9), 0, 'only once there is more than the window');
	await model.dispose();
});

test('the conformal quantile keeps its promise on synthetic data', (t) => {
	t.is(conformalQuantile([3, 1, 2], 0.5), 2, 'k = 2 of 3');
	t.is(conformalQuantile([3, 1, 2], 0.75), 3);
	t.is(conformalQuantile([3, 1, 2], 0.76), null, 'k = 4 of 3: no finite margin');
	t.is(
		conformalQuantile(
			Array.from({ length: 99 }, (_, i) => i + 1),
			0.95,
		),
		95,
	);
	const n = 39;
	for (const coverage of [0.5, 0.8, 0.9, 0.95]) {
		let covered = 0;
		const rounds = 4000;
		for (let round = 0; round < rounds; round++) {
			const draw = (i: number): number => uniform(3n, 61, round, i) ** 3;
			const margin = conformalQuantile(
				Array.from({ length: n }, (_, i) => draw(i)),
				coverage,
			) as number;
			if (draw(n) <= margin) covered++;
		}
		const promise = Math.ceil((n + 1) * coverage) / (n + 1);
		const error = Math.sqrt((promise * (1 - promise)) / rounds);
		t.true(Math.abs(covered / rounds - promise) < 4 * error, `${coverage}: ${covered / rounds}, promised ${promise}`);
	}
});

test('metrics of a hand-worked example', (t) => {
	const bounds = [5, 3, 7, 4];
	const lengths = [5, 4, 2, 6];
	const found = boundMetrics(bounds, lengths, 10);
	t.like(found, { pairs: 4, correct: 0.5, below: 0.5, above: 0.25, exact: 0.25 });
	t.like(found, { tightness: 5, looseness: 2.5, shortfall: 1.5, bound: 4.75, saved: 5.25 });
	t.true(Math.abs(found.rmse - Math.sqrt(30 / 4)) < 1e-12);
	t.is(boundMetrics([1], [2], 4).tightness, null);
	const losses = pinballLosses(bounds, lengths, 0.8);
	for (const [i, loss] of [0, 0.8, 1, 1.6].entries()) t.true(Math.abs((losses[i] as number) - loss) < 1e-12);
	t.is(bestConstant([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 0.8), 8);
	const sample = Array.from({ length: 57 }, (_, i) => Math.floor(20 * uniform(5n, 62, 0, i)));
	for (const coverage of [0.3, 0.8, 0.95]) {
		const mean = (bound: number): number =>
			pinballLosses(
				sample.map(() => bound),
				sample,
				coverage,
			).reduce((a, b) => a + b, 0);
		const best = Math.min(...Array.from({ length: 21 }, (_, bound) => mean(bound)));
		t.true(mean(bestConstant(sample, coverage)) <= best + 1e-9);
	}
	t.is(wasserstein([1, 2, 3], [2, 3, 4]), 1);
	t.is(wasserstein([0, 0], [0, 4]), 2);
	t.true(Math.abs(wasserstein([1], [0, 3]) - 1.5) < 1e-12);
	const difference = bootstrapDifference([1, 2, 3, 4], [0, 1, 2, 3]);
	t.deepEqual(difference, { mean: 1, interval: [1, 1] });
	const noisy = bootstrapDifference(
		sample,
		sample.map(() => 9.5),
		{ samples: 400 },
	);
	t.true(noisy.interval[0] < noisy.mean && noisy.mean < noisy.interval[1]);
	t.deepEqual(ticks([0, 9.2]), [0, 2, 4, 6, 8, 10]);
	const sure = endSignal([lookWith([0, 0, 1, 1])], [2]);
	t.deepEqual(sure, { before: 0, after: 1, auc: 1 });
	t.is(endSignal([lookWith([0.3, 0.3, 0.3])], [1]).auc, 0.5, 'ties count half');
	t.is(endSignal([lookWith([0.9, 0.1, 0.5])], [1]).auc, 0);
});

test("a dense layer's first step goes against the gradient", (t) => {
	const make = (): Dense => new Dense(3, 4, 2).initialise(7n, 0);
	const x = Float32Array.from({ length: 15 }, (_, i) => 2 * uniform(8n, 63, 0, i) - 1);
	const loss = (dense: Dense): number => dense.forward(x).reduce((sum, y, i) => sum + (y - Math.sin(i)) ** 2, 0);
	const before = make();
	const after = make();
	after.step(x, (y) => y.map((value, i) => 2 * (value - Math.sin(i))), 1e-3);
	let compared = 0;
	for (let i = 0; i < before.weights.length; i++) {
		const moved = (delta: number): number => {
			const dense = make();
			dense.weights[i] = (dense.weights[i] as number) + delta;
			return loss(dense);
		};
		const slope = (moved(1e-2) - moved(-1e-2)) / 2e-2;
		if (Math.abs(slope) < 1e-2) continue;
		compared++;
		// Adam's first step is the learning rate against the sign of the gradient.
		const step = (after.weights[i] as number) - (before.weights[i] as number);
		t.true(Math.abs(step + 1e-3 * Math.sign(slope)) < 1e-5, `weight ${i}`);
	}
	t.true(compared > 20);
});

test.serial('calibrated bounds cover fresh pairs, group by group, and survive a save', async (t) => {
	const max = 14;
	const fresh = toyPairs(600, 77n);
	for (const method of ['expected', 'threshold', 'first-step', 'constant', 'quantile', 'daedal'] as const) {
		const extra = method === 'daedal' ? { initial: 4, grow: 2, window: 3 } : {};
		const report = await calibrateLength(toy, toyPairs(500, 55n), { method, max, coverage: [0.8, 0.9], ...extra });
		t.is(report.calibration.pairs, 500);
		t.deepEqual(report.warnings, []);
		for (const { coverage, share, looseness } of report.achieved) {
			t.true(share >= coverage && looseness > -2 && looseness < 12, `${method}: ${share}, ${looseness}`);
			const kinds: Record<string, number[]> = { sharp: [], loose: [] };
			for (const { prompt: ids, answer, kind } of fresh) {
				const asked = { tokens: Int32Array.from(ids) };
				const { length } = await toy.predictLength(asked, { max, method, coverage });
				kinds[kind]?.push(Number(length >= answer.length));
			}
			const shareOf = (hits: number[]): number => hits.reduce((a, b) => a + b, 0) / hits.length;
			const all = shareOf([...(kinds['sharp'] as number[]), ...(kinds['loose'] as number[])]);
			t.true(all > coverage - 0.06, `${method} ${coverage}: ${all}`);
			if (report.calibration.edges.length > 0) {
				// A margin never goes below an end at even odds, so what fixes the length is not cut to meet a low target.
				if (report.calibration.form === 'level' && method !== 'quantile')
					t.true(shareOf(kinds['sharp'] as number[]) > 0.98);
				t.true(
					shareOf(kinds['loose'] as number[]) > coverage - 0.09,
					`${method} ${coverage}: ${shareOf(kinds['loose'] as number[])}`,
				);
			}
		}
	}
	const head = await trainLengthHead(toy, toyPairs(600, 56n), { max, units: 16, epochs: 8 });
	t.is(head.pairs, 600);
	for (const kind of ['token', 'pooled', 'quantile'] as const) {
		await calibrateLength(toy, toyPairs(500, 55n), { method: 'head', head: kind, max, coverage: 0.9 });
	}
	let exact = 0;
	for (let k = 0; k < 8; k++) {
		const asked = { tokens: Int32Array.of(1, 2 + k) };
		const token = await toy.predictLength(asked, { max, method: 'head' });
		const pooled = await toy.predictLength(asked, { max, method: 'head', head: 'pooled' });
		t.is(token.probabilities.length, max);
		// The first position after the answer is as much an end as the padding behind it.
		if (token.length === k + 1 && (token.probabilities[k + 1] as number) > 0.97) exact++;
		t.true(Math.abs(pooled.length - (k + 1)) <= 3, `pooled: ${pooled.length} for ${k + 1}`);
	}
	t.true(exact >= 7, `${exact} of 8 by the token head`);
	const directory = mkdtempSync(join(tmpdir(), 'dn-length-'));
	try {
		await toy.save(join(directory, 'model'));
		const loaded = await DiffuGPT.fromPretrained(join(directory, 'model'), { device: 'cpu' });
		for (const length of [
			{ max, method: 'expected', coverage: 0.9 },
			{ max, method: 'constant', coverage: 0.8 },
			{ max, method: 'head', coverage: 0.9 },
			{ max, method: 'head', head: 'quantile', coverage: 0.9 },
			{ max, method: 'head', head: 'pooled' },
		] as const) {
			for (const ids of [
				[1, 12],
				[1, 5],
			]) {
				const asked = { tokens: Int32Array.from(ids) };
				t.deepEqual(await loaded.predictLength(asked, length), await toy.predictLength(asked, length));
			}
		}
		await loaded.dispose();
		for (const [file, text, message] of [
			['length.json', '{"version":2}', /version is 2/],
			['length.json', '{"version":1,"calibrations":[{"method":"guess"}]}', /calibration 0/],
			['length-head.json', '{"version":1,"max":3}', /expected max, pairs/],
			['length-head.json', '{"version":1,"max":14,"pairs":1,"units":5,"levels":[0.5]}', /expected \(32, 5\)/],
		] as const) {
			await toy.save(join(directory, 'model'));
			writeFileSync(join(directory, 'model', file), text);
			await t.throwsAsync(DiffuGPT.fromPretrained(join(directory, 'model')), { code: 'ERR_DN_CHECKPOINT', message });
		}
	} finally {
		rmSync(directory, { recursive: true });
	}
});

test.serial('a ragged batch equals solo calls, bit for bit, under every method', async (t) => {
	const max = 14;
	const methods: LengthOptions[] = [
		{ max, method: 'head' },
		{ max, method: 'head', head: 'quantile', coverage: 0.9 },
		{ max, method: 'expected', coverage: 0.9 },
		{ max, method: 'daedal', initial: 4, grow: 2 },
		{ max, method: 'rho-eos', initial: 4, grow: 2 },
		{ max, method: 'block', block: 3 },
		{ max },
	];
	const prompts = Array.from({ length: 21 }, (_, i) => ({
		tokens: Int32Array.from([...masksOf(i % 3), 1, 2 + (i % 11)]),
	}));
	const options = prompts.map(
		(_, i): GenerateOptions => ({
			length: methods[i % methods.length] as LengthOptions,
			sampler: 'first-hitting',
			seed: i,
		}),
	);
	const together = await toy.generateBatch(prompts, options);
	for (const [i, result] of together.entries()) {
		const alone = await toy.generate(prompts[i] as (typeof prompts)[number], options[i] as GenerateOptions);
		t.deepEqual(result.sequence, alone.sequence);
		t.is(result.stats.forwards, alone.stats.forwards);
	}
});

function masksOf(n: number): number[] {
	return new Array<number>(n).fill(1);
}

test.serial('evaluateLength: its numbers are those of the methods, and the reports hold them', async (t) => {
	const max = 14;
	const pairs = toyPairs(120, 91n);
	const found = await evaluateLength(toy, pairs, {
		max,
		calibration: toyPairs(400, 92n),
		coverage: [0.8, 0.9],
		generations: 12,
		seeds: [1, 2],
		batch: 5,
		likelihoods: 6,
		samples: 3,
		generate: { sampler: 'threshold' },
	});
	t.is(found.pairs, 120);
	t.deepEqual(Object.keys(found.kinds), ['', 'loose', 'sharp']);
	t.is(found.calibration.source, 'data');
	t.true((found.signal['sharp'] as { auc: number }).auc > 0.95);
	t.deepEqual(found.warnings, []);
	// Uncalibrated threshold, all pairs, by solo calls.
	const bounds: number[] = [];
	for (const pair of pairs) {
		bounds.push(
			(await toy.predictLength({ tokens: Int32Array.from(pair.prompt) }, { max, method: 'threshold' })).length,
		);
	}
	const expected = boundMetrics(
		bounds,
		pairs.map(({ answer }) => answer.length),
		max,
	);
	const row = found.bounds.find(
		({ method, coverage, kind }) => method === 'threshold' && coverage === null && kind === '',
	);
	t.like(row, { ...expected });
	const constant = found.bounds.find(
		({ method, coverage, kind }) => method === 'constant' && coverage === 0.9 && kind === '',
	);
	t.true((constant?.versusConstant?.mean as number) >= -1e-9, 'no constant beats the best one');
	const rowsOf = found.generations?.rows ?? [];
	const fixed = rowsOf.find(({ method, kind }) => method === 'fixed' && kind === '');
	t.is(fixed?.canvas, 16);
	t.deepEqual(fixed?.speedup, { mean: 1, min: 1, max: 1 });
	const sharp = rowsOf.find(({ method, kind }) => method === 'expected' && kind === 'sharp');
	t.true((sharp?.exactMatch.mean as number) > 0.8, `exact match ${sharp?.exactMatch.mean}`);
	t.true((sharp?.canvas as number) < 14);
	t.is(rowsOf.find(({ method }) => method === 'rho-eos')?.nelbo, null);
	t.true((fixed?.nelbo as number) > 0);
	const html = htmlReport(found, 'Report <1>');
	t.true(html.includes('Report &#60;1&#62;') && html.includes('<svg'));
	t.is(html.replaceAll('http://www.w3.org/2000/svg', '').match(/https?:|src=|@import|url\(/), null, 'self-contained');
	t.true(html.includes(`${(100 * expected.correct).toFixed(1)} %`));
	for (const svg of [coverageChart(found), speedChart(found) as string]) {
		t.is(svg.split('<g').length - 1, svg.split('</g>').length - 1);
		t.false(/NaN|Infinity|undefined/.test(svg));
	}
	t.regex(textReport(found), /threshold +90\.0 %/);
	const {
		metric,
		records,
		bounds: same,
	} = await evaluate(toy, pairs, {
		...{ metric: 'length', max, calibration: 'split', generations: 0, methods: ['expected'] },
	});
	t.is(metric, 'length');
	t.is(records, 60);
	const split = await evaluateLength(toy, pairs, { max, calibration: 'split', generations: 0, methods: ['expected'] });
	t.is(split.pairs, 60);
	t.deepEqual(same, split.bounds);
	t.is(split.generations, null);
	await t.throwsAsync(evaluateLength(toy, [], { max }), { code: 'ERR_DN_ARGUMENT', message: /no records/ });
	await t.throwsAsync(evaluateLength(toy, pairs, { max, coverage: [2] }), { message: /coverage/ });
	await t.throwsAsync(evaluateLength(toy, pairs, { max, generations: 2, judge: toy }), { message: /judge/ });
});

test.serial('eval length on the command line', async (t) => {
	const directory = mkdtempSync(join(tmpdir(), 'dn-eval-length-'));
	const cli = join(root, 'dist/lib/cli/main.js');
	const lines = (pairs: unknown[]): string => pairs.map((pair) => `${JSON.stringify(pair)}\n`).join('');
	try {
		await toy.save(join(directory, 'model'));
		writeFileSync(join(directory, 'pairs.jsonl'), lines(toyPairs(40, 93n)));
		writeFileSync(join(directory, 'other.jsonl'), lines(toyPairs(60, 94n)));
		writeFileSync(join(directory, 'bad.jsonl'), `${lines(toyPairs(2, 93n))}{"prompt"\n`);
		writeFileSync(join(directory, 'empty.jsonl'), '');
		const run = (...args: string[]) =>
			promisify(execFile)(process.execPath, [cli, 'eval', 'length', ...args], { cwd: directory });
		const out = await run(
			...['model', 'pairs.jsonl', '--max', '14', '--limit', '30', '--calibrate', 'other.jsonl', '--save', 'calibrated'],
			...['--methods', 'constant,expected', '--coverage', '0.8', '--generations', '4', '--seeds', '1', '--json'],
			...['--html', 'report.html', '--svg', 'plots'],
		);
		const found = JSON.parse(out.stdout) as {
			pairs: number;
			bounds: { method: string }[];
			generations: { pairs: number };
		};
		t.is(found.pairs, 30);
		t.is(found.generations.pairs, 4);
		t.true(readFileSync(join(directory, 'report.html'), 'utf8').startsWith('<!doctype html>'));
		t.true(readFileSync(join(directory, 'plots', 'coverage.svg'), 'utf8').startsWith('<svg'));
		const stored = JSON.parse(readFileSync(join(directory, 'calibrated', 'length.json'), 'utf8')) as {
			calibrations: { method: string; max: number; levels: { coverage: number }[] }[];
		};
		const own = stored.calibrations.filter(
			({ levels }) => levels.some(({ coverage }) => coverage === 0.8) && levels.length === 1,
		);
		t.deepEqual(
			own.map(({ method }) => method),
			['constant', 'expected'],
		);
		for (const [args, message] of [
			[['model', 'bad.jsonl', '--max', '14'], /bad.jsonl, line 3/],
			[['model', 'empty.jsonl', '--max', '14'], /empty.jsonl/],
			[['model', 'pairs.jsonl', '--max', '24'], /max is 24/],
			[['model', 'pairs.jsonl', '--max', '14', '--save', 'x'], /--save/],
		] as const) {
			const error = await t.throwsAsync<Error & { code: number; stderr: string }>(run(...args));
			t.is(error?.code as unknown as number, 2);
			t.regex(error?.stderr ?? '', message);
		}
	} finally {
		rmSync(directory, { recursive: true });
	}
});

test('bad input is named', async (t) => {
	const model = await sharpModel({ eosId });
	const pairs = toyPairs(20, 1n);
	const ask = (length: object): Promise<unknown> => model.predictLength(prompt, length as LengthOptions);
	for (const [length, message] of [
		[{ max: 61 }, /64/],
		[{ max: 5, method: 'head' }, /no length head/],
		[{ max: 5, method: 'constant', coverage: 0.9 }, /no calibration of 'constant'/],
		[{ max: 5, method: 'expected', probability: 0.5 }, /length.probability has no meaning/],
		[{ max: 5, method: 'rho-eos' }, /while it denoises/],
		[{ max: 5, method: 'block' }, /while it denoises/],
		[{ max: 5, method: 'rho-eos', low: 0.7, high: 0.6 }, /low is 0.7/],
		[{ max: 5, method: 'block', entropy: 1 }, /stop 'entropy'/],
		[{ max: 5, method: 'block', stop: 'never' }, /length.stop/],
		[{ max: 5, method: 'daedal', grow: 0 }, /length.grow is 0/],
		[{ max: 5, method: 'head', head: 'tail' }, /length.head/],
	] as const) {
		await t.throwsAsync(ask(length), { code: 'ERR_DN_ARGUMENT', message }, JSON.stringify(length));
	}
	for (const sampler of [{ sampler: 'autoregressive' }, { block: 2, cache: 'prefix' }] as GenerateOptions[]) {
		await t.throwsAsync(model.generate(prompt, { ...sampler, length: { max: 5, method: 'rho-eos' } }), {
			code: 'ERR_DN_ARGUMENT',
			message: /rho-eos/,
		});
	}
	const calibrate = (options: object, data: unknown = pairs): Promise<unknown> =>
		calibrateLength(model, data as typeof pairs, { method: 'expected', max: 14, ...options } as never);
	for (const [options, message] of [
		[{ method: 'block' }, /while it denoises/],
		[{ coverage: 1 }, /coverage/],
		[{ method: 'head' }, /no length head/],
		[{ form: 'additive' }, /its own knob/],
		[{ max: 64 }, /max is 64/],
		[{ max: 2 }, /none of the \d+ pairs fits|pairs fits/],
		[{ edges: [3, 1] }, /edges/],
		[{ head: 'token' }, /head has no meaning/],
	] as const) {
		if (options === undefined) continue;
		const data =
			'max' in options && options.max === 2 ? pairs.map((pair) => ({ ...pair, answer: [14, 14, 14] })) : pairs;
		await t.throwsAsync(calibrate(options, data), { code: 'ERR_DN_ARGUMENT', message }, JSON.stringify(options));
	}
	await t.throwsAsync(calibrate({}, [{ prompt: [1] }]), { message: /record 0.*answer/ });
	await calibrateLength(model, pairs, { method: 'constant', max: 14, coverage: 0.8 });
	await t.throwsAsync(ask({ max: 14, method: 'constant', coverage: 0.9 }), { message: /calibrated for 0.8/ });
	await t.throwsAsync(ask({ max: 15, method: 'constant', coverage: 0.8 }), {
		message: /calibrated for max 14, not 15/,
	});
	t.true(((await ask({ max: 14, method: 'constant', coverage: 0.8 })) as { length: number }).length < 14);
	// Other weights, other probabilities: what was fitted on the old ones is dropped.
	model.setParameter('ln_f.bias', model.getParameter('ln_f.bias'));
	await t.throwsAsync(ask({ max: 14, method: 'constant', coverage: 0.8 }), { message: /no calibration/ });
	await calibrateLength(model, pairs, { method: 'constant', max: 14, coverage: 0.8 });
	const trainer = new Trainer(model, { learningRate: 1e-6 });
	await trainer.step({ tokens: [Int32Array.of(1, 2, 3, 4)], mask: [Uint8Array.of(0, 1, 1, 0)], t: [0.5] });
	await trainer.dispose();
	await t.throwsAsync(ask({ max: 14, method: 'constant', coverage: 0.8 }), { message: /no calibration/ });
	await model.dispose();

	// Never trained on lengths: said, and measured.
	const flat = await DiffuGPT.fromConfig({
		layers: 1,
		heads: 1,
		channels: 8,
		vocab: 16,
		context: 24,
		maskId: 15,
		eosId: 0,
	});
	const report = await calibrateLength(flat, toyPairs(60, 2n), { method: 'expected' as LengthMethod, max: 14 });
	t.regex(report.warnings[0] ?? '', /flat .*area under the curve/);
	await flat.dispose();
	const endless = await DiffuGPT.fromConfig({
		layers: 1,
		heads: 1,
		channels: 8,
		vocab: 16,
		context: 24,
		maskId: 15,
		eosId: 15,
	});
	await t.throwsAsync(endless.predictLength({ tokens: Int32Array.of(1) }, { max: 4 }), { message: /no end token/ });
	await endless.dispose();
});
