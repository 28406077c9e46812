/** Length methods against slow reimplementations: levels, infilling, changing canvases, stop rules. */
import test from 'ava';
import type { DiffuGPT, GenerateOptions, LengthOptions, SamplerPolicy } from 'diffusion-native';

import { repetitiveTail } from '../lib/length/method.js';
import { daedalAdapter, rhoAdapter } from '../lib/length/resize.js';
import { estimatorOf, groupOf, spreadOfEnds } from '../lib/length/rules.js';
import { uniform } from '../lib/random.js';
import { eosId, given, lookWith, maskId, masks, prompt, rows } from './helpers/length-canvas.js';
import { sharpModel } from './helpers/models.js';

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
				{ steps: 12, block: 2 },
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
	t.is(stopped.stats.forwards, 2, 'and no third one is begun');
	// Four tokens, two and two: ln 2 nats; three alike and one: 0.562.
	t.is(repetitiveTail(Int32Array.of(9, 1, 1, 2, 2), 4, 0.69), 0);
	t.is(repetitiveTail(Int32Array.of(9, 1, 1, 2, 2), 4, 0.7), 4);
	t.is(repetitiveTail(Int32Array.of(1, 1, 2, 2), 4, 9), 0, 'only once there is more than the window');
	await model.dispose();
});
