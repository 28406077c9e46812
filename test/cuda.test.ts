/**
 * The library on a CUDA device: a real one, or the emulator's (`npm run build:emulator`, then DIFFUSION_NATIVE_BINDING).
 * Where there is neither, only that asking for one is refused with the reason.
 */
import test from 'ava';
import { type DenoiseStep, DiffuGPT, type GenerateOptions, info, type Prompt, Trainer } from 'diffusion-native';

import { binding } from '../lib/binding.js';
import { chooseDevice } from '../lib/device.js';
import { sharpModel, smallConfig } from './helpers/models.js';
import { collect, documents, fresh, shape, weights } from './helpers/trainer.js';

const { cuda } = info();
const withoutDevice = cuda.devices.length > 0 ? test.skip : test;
const onDevice = cuda.devices.length > 0 ? test.serial : test.serial.skip;

/** ||a - b|| / ||b|| over all numbers. */
function relativeError(a: readonly Float32Array[], b: readonly Float32Array[]): number {
	let difference = 0;
	let size = 0;
	for (const [i, values] of b.entries()) {
		for (const [j, value] of values.entries()) {
			difference += ((a[i]?.[j] ?? Number.NaN) - value) ** 2;
			size += value ** 2;
		}
	}
	return Math.sqrt(difference / size);
}

/** The same weights on another device. */
async function copyTo(model: DiffuGPT, dtype: 'auto' | 'fp32'): Promise<DiffuGPT> {
	const copy = await DiffuGPT.fromConfig(smallConfig, { device: 'cuda', dtype });
	for (const { name } of model.parameters()) copy.setParameter(name, model.getParameter(name));
	return copy;
}

test('info says what there is, and why not', (t) => {
	t.is(cuda.products !== undefined, cuda.compiled);
	if (cuda.compiled) t.regex(cuda.products as string, /^(cuBLASLt \d+|own kernels: .+)$/);
	if (cuda.devices.length === 0) t.true((cuda.reason ?? '').length > 0);
});

withoutDevice('without a device, asking for one is refused with the reason', async (t) => {
	const error = await t.throwsAsync(DiffuGPT.fromConfig(smallConfig, { device: 'cuda' }), { code: 'ERR_DN_DEVICE' });
	t.true(error.message.includes(cuda.reason as string), error.message);
	await using model = await DiffuGPT.fromConfig(smallConfig);
	t.is(model.device, 'cpu');
	t.is(model.deviceNote, cuda.reason);
});

test('auto passes over devices that are too old, and says why it takes the CPU', (t) => {
	const list = (...capabilities: string[]) => ({
		compiled: true,
		devices: capabilities.map((capability, i) => ({ name: `GPU ${i}`, memory: 2 ** 34, capability })),
	});
	const chosen = (...capabilities: string[]) => chooseDevice('auto', 'auto', list(...capabilities));
	t.deepEqual(chosen('8.0'), { device: 'cuda:0', note: undefined });
	t.deepEqual(chosen('7.5', '12.0', '9.0'), { device: 'cuda:1', note: undefined });
	t.deepEqual(chosen('7.5', '6.1'), {
		device: 'cpu',
		note: 'no CUDA device has compute capability 8.0 or newer: GPU 0 has 7.5, GPU 1 has 6.1',
	});
	t.deepEqual(chosen(), { device: 'cpu', note: 'no CUDA device was found' });
	t.is(chooseDevice('auto', 'int8', list('9.0')).device, 'cpu');
	t.is(chooseDevice('cuda', 'auto', list('7.5', '9.0')).device, 'cuda:1');
	// What is asked for by number is left to the addon, whose error names the capability.
	t.is(chooseDevice('cuda:0', 'auto', list('7.5')).device, 'cuda:0');
	t.is(chooseDevice('cuda', 'auto', list('7.5')).device, 'cuda:0');
	t.throws(() => chooseDevice('cuda:1', 'auto', list('9.0')), { code: 'ERR_DN_DEVICE', message: /are 1 CUDA devices/ });
	t.throws(() => chooseDevice('cuda', 'auto', list()), { code: 'ERR_DN_DEVICE', message: /no CUDA device was found/ });
});

test('a dtype that a device has not is refused, natively too', async (t) => {
	const { layers, heads, channels, context, vocab } = smallConfig;
	for (const [device, dtype] of [
		['cpu', 'fp16'],
		['cuda:0', 'int8'],
	] as const) {
		t.throws(
			() =>
				binding().createModel(
					{ layers, heads, channels, context, vocab },
					{ device, threads: 1, dtype: dtype as 'bf16' },
				),
			{ message: new RegExp(`dtype "${dtype}" is not available on device "${device}"`) },
		);
	}
	if (cuda.devices.length === 0) return;
	await t.throwsAsync(DiffuGPT.fromConfig(smallConfig, { device: 'cuda', dtype: 'int8' }), { code: 'ERR_DN_ARGUMENT' });
});

onDevice('the same logits as the CPU, and dtype chooses how close', async (t) => {
	await using cpu = await sharpModel();
	const ids = Int32Array.of(3, 14, 15, 9, 26, 5);
	const expected = (await cpu.forward(ids)) as Float32Array[];
	for (const [dtype, name, allowed] of [
		['fp32', /^cuda:0\/sm_\d+\/fp32$/, 1e-5],
		['auto', /^cuda:0\/sm_\d+$/, 5e-2],
	] as const) {
		await using model = await copyTo(cpu, dtype);
		t.is(model.device, 'cuda:0');
		t.is(model.dtype, dtype === 'auto' ? 'bf16' : dtype);
		t.regex(model.engine.backend, name);
		const error = relativeError((await model.forward(ids)) as Float32Array[], expected);
		t.true(error < allowed, `${dtype}: ${error}`);
	}
});

onDevice('the same text as the CPU, greedy and drawn', async (t) => {
	await using cpu = await sharpModel();
	await using model = await copyTo(cpu, 'fp32');
	for (const options of [
		{ steps: 6, temperature: 0 },
		{ steps: 6, temperature: 1, seed: 5 },
		{ steps: 6, temperature: 0.8, topP: 0.9, seed: 6 },
	]) {
		const prompt = { tokens: Int32Array.from([7, 8, 9, ...new Array<number>(12).fill(60)]) };
		const [a, b] = [await model.generate(prompt, options), await cpu.generate(prompt, options)];
		t.deepEqual(a.tokens, b.tokens, JSON.stringify(options));
	}
});

/** Every event of a stream, and what it returns but the time. */
async function record(model: DiffuGPT, prompt: Prompt, options: GenerateOptions) {
	const events: DenoiseStep[] = [];
	const stream = model.stream(prompt, options);
	for (;;) {
		const { done, value } = await stream.next();
		if (!done) {
			events.push(value);
			continue;
		}
		const { stats, ...result } = value;
		return { events, result, stats: { ...stats, ms: 0, tokensPerSecond: 0 } };
	}
}

const scattered = { tokens: Int32Array.from([7, 60, 9, 60, 60, 3, ...new Array<number>(14).fill(60), 5, 60]) };
const continued = { tokens: Int32Array.of(7, 8, 9) };

for (const [name, prompt, options] of [
	['ancestral', scattered, { sampler: 'ancestral', steps: 9 }],
	['ancestral in blocks', continued, { sampler: 'ancestral', length: 20, block: 6, steps: 11, topK: 5 }],
	['confidence', scattered, { steps: 7 }],
	['more steps than tokens', scattered, { steps: 40, plan: 'linear', score: 'random' }],
	['margin, linear', continued, { length: 21, steps: 8, score: 'margin', plan: 'linear', temperature: 0.7 }],
	['entropy, in blocks', continued, { length: 21, block: 5, steps: 12, score: 'entropy', temperature: 1, topP: 0.8 }],
	['random', scattered, { steps: 5, score: 'random', temperature: 1 }],
	['threshold', scattered, { sampler: 'threshold', threshold: 0.6 }],
	['threshold, bounded', continued, { sampler: 'threshold', threshold: 0.97, length: 20, block: 10, steps: 6 }],
	['factor', continued, { sampler: 'factor', factor: 1.2, length: 20 }],
	['entropy-bound', scattered, { sampler: 'entropy-bound', entropyBound: 0.4 }],
	['block-causal', continued, { sampler: 'threshold', length: 20, attention: { blockCausal: 8 } }],
	['one position', { tokens: Int32Array.of(7, 60) }, { steps: 1 }],
	['none', { tokens: Int32Array.of(7, 8) }, {}],
	['single steps: guidance', continued, { length: 12, steps: 6, guidance: 0.5 }],
	['single steps: klass', continued, { length: 12, sampler: 'klass' }],
] as const satisfies readonly (readonly [string, Prompt, GenerateOptions])[]) {
	onDevice(`one result whatever stepsPerCall: ${name}`, async (t) => {
		await using cpu = await sharpModel();
		for (const dtype of ['auto', 'fp32'] as const) {
			await using model = await copyTo(cpu, dtype);
			const single = await record(model, prompt, { ...options, seed: 3, stepsPerCall: 1 });
			for (const stepsPerCall of [3, 8]) {
				const { batches } = model.engine.counters;
				const several = await record(model, prompt, { ...options, seed: 3, stepsPerCall });
				t.deepEqual(several, single, `${dtype}, ${stepsPerCall} steps`);
				const calls = model.engine.counters.batches - batches;
				const { forwards } = single.stats;
				if (name.startsWith('single')) t.is(calls, forwards);
				else t.true(calls <= Math.ceil(forwards / stepsPerCall), `${calls} calls for ${forwards} forwards`);
			}
		}
	});
}

onDevice('a canvas that is cut at an end token is cut the same within a call', async (t) => {
	await using cpu = await sharpModel({}, 1, 8);
	await using model = await copyTo(cpu, 'auto');
	let cut = 0;
	for (let seed = 1; seed <= 12; seed++) {
		const options = { sampler: 'ancestral', length: { max: 30 }, steps: 10, temperature: 1.5, seed } as const;
		const single = await record(model, continued, { ...options, stepsPerCall: 1 });
		t.deepEqual(await record(model, continued, { ...options, stepsPerCall: 8 }), single, `seed ${seed}`);
		if (single.events.slice(0, -1).some(({ resized }) => resized)) cut++;
	}
	t.true(cut > 0, 'no canvas was cut before the last step');
});

onDevice('requests that run together take their steps together', async (t) => {
	await using cpu = await sharpModel();
	await using model = await copyTo(cpu, 'auto');
	const options = [
		{ steps: 8, seed: 1 },
		{ sampler: 'ancestral', steps: 16, seed: 2 },
		{ sampler: 'threshold', seed: 3 },
	] as const;
	const alone = [];
	for (const each of options) alone.push((await model.generate(scattered, each)).tokens);
	const { batches } = model.engine.counters;
	const together = await model.generateBatch([scattered, scattered, scattered], options);
	t.deepEqual(
		together.map(({ tokens }) => tokens),
		alone,
	);
	t.true(model.engine.counters.batches - batches <= 4, `${model.engine.counters.batches - batches} calls`);
});

onDevice('aborting takes effect after the call, and streams go step by step unless asked', async (t) => {
	await using cpu = await sharpModel();
	await using model = await copyTo(cpu, 'auto');
	const controller = new AbortController();
	const reason = new Error('enough');
	const { batches } = model.engine.counters;
	const stream = model.stream(scattered, { steps: 12, stepsPerCall: 4, signal: controller.signal });
	await stream.next();
	controller.abort(reason);
	t.is(await t.throwsAsync(stream.next()), reason);
	t.is(model.engine.counters.batches, batches + 1);
	for await (const { step } of model.stream(scattered, { steps: 3 })) {
		t.is(model.engine.counters.batches, batches + 1 + step);
	}
});

for (const [from, to] of [
	['cpu', 'cuda'],
	['cuda', 'cpu'],
] as const) {
	onDevice(`a run that began on ${from} goes on on ${to}`, async (t) => {
		const data = await documents(40);
		const dir = fresh();
		const options = { data, maxSteps: 8, batchSize: 4, learningRate: 1e-3 };
		await using model = await DiffuGPT.fromConfig(shape, { device: from, dtype: 'fp32', seed: 1 });
		await using trainer = new Trainer(model, { ...options, checkpoint: { dir, every: 4 } });
		const before = await collect(trainer, 4);
		await trainer.checkpoint();
		await using moved = await Trainer.resume(dir, { device: to, dtype: 'fp32', checkpoint: { dir: fresh() } });
		t.true(moved.model.device.startsWith(to));
		t.deepEqual(weights(moved.model), weights(model), 'nothing is rounded on the way');
		const [stayed, went] = [await collect(trainer), await collect(moved)];
		t.is(stayed.length, 4);
		t.is(went.length, 4);
		for (const [i, { loss }] of went.entries()) {
			const expected = (stayed[i] as { loss: number }).loss;
			t.true(
				Math.abs(loss - expected) < 1e-4 * expected,
				`step ${before.length + i + 1}: ${loss}, not moved ${expected}`,
			);
		}
		const error = relativeError(weights(moved.model), weights(model));
		t.true(error < 1e-4, `weights: ${error}`);
		await moved.model.dispose();
	});
}

onDevice('loading, generating and disposing leaves nothing behind', async (t) => {
	const before = binding().externalMemory();
	for (let cycle = 0; cycle < 100; cycle++) {
		await using model = await DiffuGPT.fromConfig(smallConfig, { device: 'cuda', seed: cycle });
		await model.generate({ tokens: Int32Array.of(1, 60, 60) }, { steps: 1 });
	}
	t.true(binding().externalMemory() <= before, 'a model of an earlier test may be collected meanwhile');
});
