/** What the addon itself refuses: calls that no code of this library makes, which must be errors and never end the process. */
import test from 'ava';
import { binding } from '../lib/binding.js';
import type { Binding, NativeConfig, NativeNoise, NativeTrainBatch } from '../lib/native-types.js';
import { root } from './helpers/fixtures.js';

const config: NativeConfig = { layers: 1, heads: 2, channels: 16, vocab: 20, context: 32 };
type Device = Parameters<Binding['createModel']>[1];
const onCpu: Device = { device: 'cpu', threads: 1, dtype: 'fp32' };
const tiny = `${root}/models/tiny/model.safetensors`;

test('a device that is not cpu or cuda:N is ERR_DN_DEVICE', (t) => {
	for (const device of ['cuda:x', 'cuda:', 'cuda:1x', 'cuda:-1', 'cuda: 1', 'cuda:99999999999', 'cuda', 'tpu']) {
		const error = t.throws(
			() => binding().createModel(config, { ...onCpu, device }),
			{ code: 'ERR_DN_DEVICE' },
			device,
		);
		t.regex(error?.message ?? '', /expected cpu or cuda:N/, device);
	}
});

test('while a call runs, what may change is refused and what stays is told', async (t) => {
	const model = binding().createModel(config, onCpu);
	for (const call of [model.beginTraining(), undefined]) {
		const running = call ?? model.endTraining();
		t.throws(() => model.memory(), { code: 'ERR_DN_INTERNAL', message: /busy/ });
		t.false(model.deviceLoop);
		t.regex(model.backend, /^cpu/);
		t.is(model.parameters[0]?.name, 'wte.weight');
		await running;
		t.is(model.memory().training > 0, call !== undefined);
	}
	model.dispose();
	t.throws(() => model.deviceLoop, { code: 'ERR_DN_DISPOSED' });
});

test("a getter called on another class's object, or on none, is an error", async (t) => {
	const model = binding().createModel(config, onCpu);
	const file = binding().openSafetensors(tiny);
	await model.initialise(1n);
	const cache = model.createCache(4);
	const objects: object[] = [model, file, cache];
	for (const owner of objects) {
		const getters = Object.entries(Object.getOwnPropertyDescriptors(Object.getPrototypeOf(owner))).filter(
			([, { get }]) => get,
		);
		t.true(getters.length >= 2);
		for (const [name, { get }] of getters) {
			t.notThrows(() => get?.call(owner), name);
			for (const other of [...objects.filter((each) => each !== owner), {}, Object.create(owner), undefined, 1]) {
				t.throws(() => get?.call(other), { code: 'ERR_DN_INTERNAL', message: /this is not/ }, name);
			}
		}
	}
	file.close();
	cache.dispose();
	model.dispose();
});

test('a batch tells the losses of its rows where no gradients are asked for', async (t) => {
	const model = binding().createModel(config, onCpu);
	await model.initialise(1n);
	await model.beginTraining();
	const batch: NativeTrainBatch = {
		ids: Int32Array.of(2, 3, 4, 5),
		offsets: Int32Array.of(0, 4),
		maskable: null,
		mask: Uint8Array.of(0, 1, 0, 1),
		t: Float64Array.of(0.5),
		firstSequence: 0,
		stepSequences: 1,
	};
	const noise: NativeNoise = {
		objective: 'diffusion',
		timeSampler: 'uniform',
		normalise: 'tokens',
		weighted: true,
		shift: true,
		maskId: 1,
		tMin: 0.001,
		tMax: 1,
		block: 0,
		seed: 1n,
		step: 0,
		attention: { kind: 'full' },
		spindleInformation: null,
		spindleLambda: 0,
	};
	const { rows, losses, ...sums } = await model.trainBatch(batch, noise, {
		recompute: false,
		precision: 'fp32',
		backward: false,
	});
	t.deepEqual(rows, Int32Array.of(0, 2));
	t.is(sums.unweighted, (losses[0] as number) + (losses[1] as number));
	t.deepEqual(await model.trainBatch(batch, noise, { recompute: false, precision: 'fp32', backward: true }), sums);
	model.dispose();
});
