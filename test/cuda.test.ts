/**
 * The library on a CUDA device: a real one, or the emulator's (`npm run build:emulator`, then DIFFUSION_NATIVE_BINDING).
 * Where there is neither, only that asking for one is refused with the reason.
 */
import test from 'ava';
import { DiffuGPT, info, Trainer } from 'diffusion-native';

import { binding } from '../lib/binding.js';
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

test('a dtype that a device has not is refused, natively too', async (t) => {
	await t.throwsAsync(DiffuGPT.fromConfig(smallConfig, { device: 'cpu', dtype: 'bf16' }), { code: 'ERR_DN_ARGUMENT' });
	const { layers, heads, channels, context, vocab } = smallConfig;
	for (const [device, dtype] of [
		['cpu', 'bf16'],
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
