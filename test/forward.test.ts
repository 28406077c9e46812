/** forward, loss and parameters of the public model class. */
import { createHash } from 'node:crypto';
import { setTimeout as pause } from 'node:timers/promises';
import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';

import test from 'ava';
import { DiffuGPT } from 'diffusion-native';

import { logSoftmax, sharpModel, smallConfig } from './helpers/models.js';

const ids = Int32Array.of(3, 14, 15, 9, 26, 5);
const T = ids.length;
const V = smallConfig.vocab;

test('a bidirectional model looks right, a causal one does not', async (t) => {
	await using model = await sharpModel();
	const changed = ids.slice();
	changed[T - 1] = 40;
	for (const [attention, differs] of [
		['full', true],
		['causal', false],
		[{ blockCausal: 3 }, false],
	] as const) {
		const rows = [Int32Array.of(0), Int32Array.of(0)];
		const [a, b] = await model.forward([ids, changed], { attention, output: 'hidden', rows });
		if (differs) t.notDeepEqual(a, b);
		else t.deepEqual(a, b);
	}
});

test('a mask given as a matrix equals the mask it spells out', async (t) => {
	await using model = await sharpModel();
	const causal = Uint8Array.from({ length: T * T }, (_, i) => Number(i % T <= Math.floor(i / T)));
	const blocks = Uint8Array.from({ length: T * T }, (_, i) =>
		Number(Math.floor((i % T) / 2) <= Math.floor(Math.floor(i / T) / 2)),
	);
	t.deepEqual(
		await model.forward(ids, { attention: { matrix: causal } }),
		await model.forward(ids, { attention: 'causal' }),
	);
	t.deepEqual(
		await model.forward(ids, { attention: { matrix: blocks } }),
		await model.forward(ids, { attention: { blockCausal: 2 } }),
	);
	t.deepEqual(
		await model.forward(ids, { attention: { blockCausal: T } }),
		await model.forward(ids, { attention: 'full' }),
	);
	t.deepEqual(
		await model.forward(ids, { attention: { blockCausal: 1 } }),
		await model.forward(ids, { attention: 'causal' }),
	);
});

test('aligned logits are the rows that speak of each token', async (t) => {
	for (const shift of [true, false]) {
		await using model = await sharpModel({ shift });
		const [raw] = (await model.forward(ids)) as [Float32Array];
		const [aligned] = (await model.forward(ids, { output: 'aligned-logits' })) as [Float32Array];
		if (shift) {
			t.true(aligned.subarray(0, V).every(Number.isNaN));
			t.deepEqual(aligned.slice(V), raw.slice(0, (T - 1) * V));
		} else {
			t.deepEqual(aligned, raw);
		}
		const [some] = (await model.forward(ids, { output: 'aligned-logits', rows: [Int32Array.of(4, 0, 2)] })) as [
			Float32Array,
		];
		t.deepEqual(some, Float32Array.from([4, 0, 2].flatMap((i) => Array.from(aligned.subarray(i * V, (i + 1) * V)))));
	}
});

test('ragged batches and row lists do not change a row', async (t) => {
	await using model = await sharpModel();
	const other = Int32Array.of(7);
	const [a, b] = await model.forward([ids, other]);
	t.deepEqual([a], await model.forward(ids));
	t.deepEqual([b], await model.forward([other]));
	const [none] = await model.forward(ids, { rows: [new Int32Array(0)] });
	t.is(none?.length, 0);
	const [hidden] = await model.forward(ids, { output: 'hidden' });
	t.is(hidden?.length, T * smallConfig.channels);
});

test('loss with a given mask and time is the weighted cross-entropy of the masked tokens', async (t) => {
	for (const shift of [true, false]) {
		await using model = await sharpModel({ shift });
		const mask = Uint8Array.of(1, 0, 1, 0, 0, 1);
		const corrupted = ids.map((id, i) => (mask[i] ? smallConfig.maskId : id));
		const [logits] = (await model.forward(corrupted, { output: 'aligned-logits' })) as [Float32Array];
		// Training keeps the mask id in the softmax.
		const losses = [0, 2, 5]
			.filter((i) => !shift || i > 0)
			.map((i) => -(logSoftmax(logits.subarray(i * V, (i + 1) * V), -1)[ids[i] as number] as number));
		const sum = losses.reduce((a, b) => a + b, 0);
		const predictable = shift ? T - 1 : T;
		const result = await model.loss({ tokens: [ids], mask: [mask], t: [0.4] });
		t.is(result.masked, losses.length);
		t.is(result.tokens, predictable);
		t.true(Math.abs(result.loss - sum / 0.4 / predictable) < 1e-4 * result.loss);
		t.true(Math.abs(result.unweighted - sum / losses.length) < 1e-4 * result.unweighted);
		const none = await model.loss({ tokens: [ids], mask: [new Uint8Array(T)], t: [0.4] });
		t.deepEqual([none.loss, none.unweighted, none.masked], [0, 0, 0]);
	}
});

test('uniform logits give a loss of ln V', async (t) => {
	await using model = await DiffuGPT.fromConfig(smallConfig, { device: 'cpu' });
	model.setParameter('wte.weight', new Float32Array(V * smallConfig.channels));
	const { unweighted } = await model.loss({ tokens: [ids], mask: [new Uint8Array(T).fill(1)], t: [1] });
	t.true(Math.abs(unweighted - Math.log(V)) < 1e-6);
});

test('parameters are read and written by name, as copies', async (t) => {
	await using model = await DiffuGPT.fromConfig(smallConfig, { seed: 3, device: 'cpu' });
	const names = model.parameters().map(({ name }) => name);
	t.true(names.includes('wte.weight') && names.includes('h.1.attn.c_attn.weight') && names.includes('ln_f.bias'));
	const total = model.parameters().reduce((sum, { count }) => sum + count, 0);
	const { layers, channels: C, context } = smallConfig;
	t.is(total, V * C + context * C + layers * (12 * C * C + 13 * C) + 2 * C);
	const values = model.getParameter('h.0.mlp.c_fc.weight');
	const before = await model.forward(ids);
	values.fill(0.25);
	t.deepEqual(await model.forward(ids), before);
	model.setParameter('h.0.mlp.c_fc.weight', values);
	t.deepEqual(model.getParameter('h.0.mlp.c_fc.weight'), values);
	t.notDeepEqual(await model.forward(ids), before);
	t.throws(() => model.getParameter('h.9.mlp.c_fc.weight'), { code: 'ERR_DN_ARGUMENT' });
	t.throws(() => model.setParameter('ln_f.bias', new Float32Array(3)), {
		code: 'ERR_DN_ARGUMENT',
		message: /3 values/,
	});
});

test('the same seed gives the same weights, another one others', async (t) => {
	const weights = [];
	for (const seed of [1, 1n, 2]) {
		await using model = await DiffuGPT.fromConfig(smallConfig, { seed, device: 'cpu' });
		weights.push(model.getParameter('wte.weight'));
	}
	t.deepEqual(weights[0], weights[1]);
	t.notDeepEqual(weights[0], weights[2]);
});

test('bad arguments are named', async (t) => {
	await using model = await sharpModel();
	const bad = (sequences: unknown, options: unknown, message: RegExp) =>
		t.throwsAsync(model.forward(sequences as Int32Array, options as object), { code: 'ERR_DN_ARGUMENT', message });
	await bad([], {}, /at least one/);
	await bad(Int32Array.of(), {}, /sequence 0 has 0 tokens/);
	await bad(new Int32Array(65), {}, /65 tokens/);
	await bad(Int32Array.of(1, 61), {}, /token 1 is 61/);
	await bad(Int32Array.of(-1), {}, /token 0 is -1/);
	await bad([1, 2], {}, /Int32Array/);
	await bad(ids, { output: 'probabilities' }, /output/);
	await bad(ids, { attention: 'diagonal' }, /attention/);
	await bad(ids, { attention: { matrix: new Uint8Array(4) } }, /2 x 2/);
	await bad(ids, { rows: [Int32Array.of(6)] }, /row 6/);
	await bad(ids, { rows: [] }, /rows/);
	await bad(ids, { reuse: new Float32Array(4) }, /reuse is not a list/);
	await bad(ids, { reuse: [new Float64Array(4)] }, /reuse is not a list/);
	await bad(ids, { reuse: [new Float32Array(4)] }, /reuse has an array that forward did not return/);
	await t.throwsAsync(DiffuGPT.fromConfig({ ...smallConfig, heads: 3 }), { code: 'ERR_DN_ARGUMENT' });
	await t.throwsAsync(DiffuGPT.fromConfig(smallConfig, { device: 'tpu' as 'cpu' }), {
		code: 'ERR_DN_ARGUMENT',
		message: /device/,
	});
	await t.throwsAsync(DiffuGPT.fromConfig(smallConfig, { device: 'cpu', dtype: 'fp16' as 'bf16' }), {
		code: 'ERR_DN_ARGUMENT',
		message: /'fp32', 'bf16' or 'int8'/,
	});
	await t.throwsAsync(DiffuGPT.fromConfig(smallConfig, { device: 'cuda:99' }), { code: 'ERR_DN_DEVICE' });
});

test('after dispose every method fails with ERR_DN_DISPOSED, and dispose may be repeated', async (t) => {
	const model = await sharpModel();
	await model.dispose();
	await model.dispose();
	await t.throwsAsync(model.forward(ids), { code: 'ERR_DN_DISPOSED' });
	await t.throwsAsync(model.loss({ tokens: [ids] }), { code: 'ERR_DN_DISPOSED' });
	await t.throwsAsync(model.generate({ tokens: ids }), { code: 'ERR_DN_DISPOSED' });
	await t.throwsAsync(model.generateBatch([{ tokens: ids }]), { code: 'ERR_DN_DISPOSED' });
	await t.throwsAsync(model.predictLength({ tokens: ids }, { max: 4 }), { code: 'ERR_DN_DISPOSED' });
	t.throws(() => model.parameters(), { code: 'ERR_DN_DISPOSED' });
	t.throws(() => model.getParameter('wte.weight'), { code: 'ERR_DN_DISPOSED' });
});

test('a large result is not touched while it is kept, and a later one may lie in the memory of one that is not', async (t) => {
	// 300 rows of 4096 logits: 4.9 MB, which lie in memory of the library's own.
	const config = { ...smallConfig, vocab: 4096, context: 300 };
	await using model = await DiffuGPT.fromConfig(config, { seed: 3 });
	const tokens = [0, 1, 2].map((s) => Int32Array.from({ length: 300 }, (_, i) => (i * 37 + s * 101) % 4000));
	const [kept] = await model.forward(tokens[0] as Int32Array);
	const copy = (kept as Float32Array).slice();
	const bytesOf = (values: unknown) =>
		createHash('sha256')
			.update(values as Float32Array)
			.digest('hex');
	setFlagsFromString('--expose-gc');
	const gc = runInNewContext('gc') as () => void;
	for (let i = 0; i < 24; i++) {
		await model.forward(tokens[1 + (i % 2)] as Int32Array);
		if (i % 2 === 1) {
			gc();
			await pause(1);
		}
	}
	t.deepEqual(bytesOf(kept), bytesOf(copy));
	// A result in memory that an earlier one wrote is the result.
	const [again] = await model.forward(tokens[0] as Int32Array);
	t.deepEqual(bytesOf(again), bytesOf(copy));
});

test('results that are given back make room for the next ones, which need no memory of their own', async (t) => {
	// 600 rows of 4096 logits: 9.8 MB.
	const config = { ...smallConfig, vocab: 4096, context: 600 };
	await using model = await DiffuGPT.fromConfig(config, { seed: 3 });
	const tokens = Int32Array.from({ length: 600 }, (_, i) => (i * 37) % 4000);
	const [expected] = await model.forward(tokens);
	const values = (expected as Float32Array).slice();
	const before = process.memoryUsage().arrayBuffers;
	let last: Float32Array[] = [];
	let most = 0;
	for (let i = 0; i < 12; i++) {
		const reuse = last;
		last = await model.forward(tokens, { reuse });
		if (reuse[0]) t.true(reuse[0].buffer === last[0]?.buffer, 'the same memory');
		most = Math.max(most, process.memoryUsage().arrayBuffers - before);
	}
	t.true(Buffer.from(values.buffer).equals(Buffer.from(last[0]?.buffer as ArrayBuffer)), 'the same logits');
	t.true(most < 2 * values.byteLength, `one result at a time, found ${most} bytes`);
	// Fewer rows lie in the memory of more; much fewer, or more, in memory of their own.
	for (const rows of [500, 8, 600]) {
		const reuse = last;
		last = await model.forward(tokens, { rows: [Int32Array.from({ length: rows }, (_, i) => i)], reuse });
		t.is(reuse[0]?.length, rows === 500 ? values.length : 0);
		t.deepEqual(last[0]?.slice(), values.slice(0, rows * config.vocab));
	}
	// Two calls cannot both write there, and after the first it is as good as new.
	const both = [model.forward(tokens, { reuse: last }), model.forward(tokens, { reuse: last })] as const;
	await t.throwsAsync(both[1], { code: 'ERR_DN_ARGUMENT', message: /that another call is using again/ });
	last = await both[0];
	t.deepEqual(last[0]?.slice(), values);
	// A call that is refused or aborted empties nothing.
	await t.throwsAsync(model.forward(tokens, { reuse: last, output: 'x' as never }), { code: 'ERR_DN_ARGUMENT' });
	await t.throwsAsync(model.forward(tokens, { reuse: last, signal: AbortSignal.abort() }), { any: true });
	t.is(last[0]?.length, values.length);
	// Several sequences are views of one buffer: one of them empties all.
	const pair = await model.forward([tokens.subarray(0, 3), tokens.subarray(0, 5)]);
	await model.forward(tokens.subarray(0, 2), { reuse: pair.slice(0, 1) });
	t.deepEqual(
		pair.map(({ length }) => length),
		[0, 0],
	);
});
