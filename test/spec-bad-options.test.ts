/** Options that are misspelt, of the wrong type or out of range: `ERR_DN_ARGUMENT` with the option's name, never a default. */
import { mkdtempSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import test from 'ava';
import { DiffuGPT, evaluate, prepare, Tokenizer, Trainer, type TrainOptions } from 'diffusion-native';

import { smallConfig } from './helpers/models.js';
import { refuses } from './helpers/refuses.js';

const scratch = mkdtempSync(join(tmpdir(), 'dn-spec-options-'));
let count = 0;
const fresh = (): string => join(scratch, String(count++));
test.after.always(() => rmSync(scratch, { recursive: true, force: true }));

test('model sizes and options out of range are refused with the field', async (t) => {
	const make = (config: object, options: object = {}) =>
		DiffuGPT.fromConfig({ ...smallConfig, ...config } as never, { device: 'cpu', ...options });
	for (const [field, values] of Object.entries({
		layers: [0, -1, 1.5, Number.NaN, '2', 1e9],
		heads: [0, Number.NaN],
		channels: [0, Number.NaN, 31, 1e9],
		vocab: [0, Number.NaN, 1e12],
		context: [0, -1, Number.NaN, 1e12],
		maskId: [61, -2, Number.NaN, 1.5],
		padId: [61],
		shift: ['yes', 1],
		attention: ['sideways'],
		family: ['llama'],
		colour: [1],
	})) {
		for (const value of values)
			await refuses(t, () => make({ [field]: value }), 'ERR_DN_ARGUMENT', new RegExp(field), `${field}: ${value}`);
	}
	for (const [name, value] of [
		['threads', -1],
		['threads', Number.NaN],
		['threads', 1.5],
		['threads', 1025],
		['seed', -1],
		['seed', Number.NaN],
		['seed', 2n ** 64n],
		['dtype', 'fp64'],
		['device', 'tpu'],
	] as const)
		await refuses(t, () => make({}, { [name]: value }), 'ERR_DN_ARGUMENT', new RegExp(name), `${name}: ${value}`);
});

test('training options out of range are refused with their name', async (t) => {
	await using model = await DiffuGPT.fromConfig(smallConfig, { device: 'cpu' });
	const not: Record<string, unknown[]> = {
		maxSteps: [0, -1, 1.5, Number.NaN],
		batchSize: [0, Number.NaN],
		batchTokens: [0, -1],
		accumulate: [0, Number.NaN],
		learningRate: [-1, Number.NaN, 1e39, 'fast', { kind: 'steep' }, { kind: 'constant', peak: Number.NaN }],
		weightDecay: [-1, Number.NaN, 1e39],
		betas: [[0.9], [Number.NaN, 0.9], 0.9, [0.9, 1]],
		eps: [-1, Number.NaN],
		gradClip: [-1, Number.NaN],
		normalise: ['sequences'],
		weight: ['t'],
		timeSampler: ['random'],
		timeRange: [
			[0, 1],
			[0.9, 0.1],
			[0.5, 2],
		],
		attentionAnnealing: [{ steps: -1 }, { steps: 2.5 }, { steps: 5, kind: 'slow' }, { step: 5 }, 5],
		earlyStop: [{}, 5, { patience: 0 }],
		padding: ['some', { multiple: 0 }, { random: Number.NaN }, { every: 3 }],
		recompute: ['yes', 1],
		loggers: [5, [5], [{}]],
		data: [5, 'train.bin'],
		validation: [{}],
		maxStep: [5],
		precision: ['fp64'],
		evalEvery: [0],
		checkpoint: [5, {}, { dir: 'x', evry: 1 }, { dir: '' }, { dir: 'x', every: 0 }, { dir: 'x', keep: 0 }],
		seed: [-1, Number.NaN, 'x'],
	};
	for (const [name, values] of Object.entries(not)) {
		for (const value of values) {
			const call = async (): Promise<void> => {
				const trainer = new Trainer(model, { [name]: value } as TrainOptions);
				await trainer.dispose();
			};
			await refuses(t, call, 'ERR_DN_ARGUMENT', new RegExp(name), `${name}: ${JSON.stringify(value)}`);
		}
	}
	await using trainer = new Trainer(model, {});
	for (const batch of [
		{} as never,
		{ tokens: [] },
		{ tokens: [new Int32Array(0)] },
		{ tokens: [Int32Array.of(61)] },
		{ tokens: [new Int32Array(65)] },
		{ tokens: [Int32Array.of(1, 2)], t: [0] },
		{ tokens: [Int32Array.of(1, 2)], t: [Number.NaN] },
		{ tokens: [Int32Array.of(1, 2)], t: [0.5, 0.5] },
		{ tokens: [Int32Array.of(1, 2)], mask: [Uint8Array.of(1)] },
		{ tokens: [Int32Array.of(1, 2)], mask: [Uint8Array.of(0, 2)] },
	]) {
		await refuses(t, () => trainer.step(batch), 'ERR_DN_ARGUMENT', /batch|sequence/, JSON.stringify(batch));
		await refuses(t, () => model.loss(batch), 'ERR_DN_ARGUMENT', /batch|sequence/, JSON.stringify(batch));
	}
	t.is(trainer.steps, 0);
	const before = model.getParameter('wte.weight');
	await refuses(t, () => trainer.save(''), 'ERR_DN_ARGUMENT', /path of a directory/, 'an empty path');
	await refuses(t, () => trainer.save('/dev/null/x'), 'ERR_DN_CHECKPOINT', /\/dev\/null\/x/, 'an unwritable path');
	for (const path of [fresh(), '/etc/passwd', scratch])
		await refuses(t, () => Trainer.resume(path), 'ERR_DN_CHECKPOINT', /holds no checkpoint/, path);
	for (const dtype of ['bf16', 'int8'] as const)
		await refuses(
			t,
			() => Trainer.resume(fresh(), { device: 'cpu', dtype }),
			'ERR_DN_ARGUMENT',
			/'fp32' to train/,
			dtype,
		);
	t.deepEqual(model.getParameter('wte.weight'), before);
});

test('an option that is not known, or options that are no object, are refused everywhere', async (t) => {
	await using model = await DiffuGPT.fromConfig(smallConfig, { device: 'cpu' });
	const path = fresh();
	await model.save(path);
	const ids = Int32Array.of(1, 2, 3);
	const text = [{ text: 'some text' }];
	const tokenizer = Tokenizer.gpt2();
	const calls: Record<string, (options: object) => unknown> = {
		fromPretrained: (options) => DiffuGPT.fromPretrained(path, options),
		fromConfig: (options) => DiffuGPT.fromConfig(smallConfig, options),
		forward: (options) => model.forward(ids, options),
		loss: (options) => model.loss({ tokens: [ids] }, options),
		save: (options) => model.save(fresh(), options),
		generate: (options) => model.generate({ tokens: ids }, options),
		prepare: (options) => prepare(text, options && ({ tokenizer, out: fresh(), ...options } as never)),
	};
	for (const [name, call] of Object.entries(calls)) {
		await refuses(t, () => call({ colour: 1 }), 'ERR_DN_ARGUMENT', /colour is not known/, name);
		await refuses(t, () => call(null as never), 'ERR_DN_ARGUMENT', /options/, `${name}(null)`);
	}
	for (const name of ['fromPretrained', 'forward', 'generate', 'prepare'])
		await refuses(t, () => calls[name]?.({ signal: 5 }), 'ERR_DN_ARGUMENT', /signal is not an AbortSignal/, name);
	for (const name of ['fromPretrained', 'prepare'])
		await refuses(t, () => calls[name]?.({ onProgress: 5 }), 'ERR_DN_ARGUMENT', /onProgress is not a function/, name);
	await refuses(t, () => calls.loss?.({ shift: 'x' }), 'ERR_DN_ARGUMENT', /shift is "x"/, 'shift');
	await refuses(t, () => calls.loss?.({ timeRange: 0.5 }), 'ERR_DN_ARGUMENT', /timeRange is 0\.5/, 'timeRange');
	await refuses(t, () => calls.fromPretrained?.({ config: 5 }), 'ERR_DN_ARGUMENT', /config is 5/, 'config');
	await refuses(t, () => calls.fromConfig?.({ tokenizer: {} }), 'ERR_DN_ARGUMENT', /tokenizer/, 'tokenizer');
	await refuses(t, () => DiffuGPT.fromConfig(null as never), 'ERR_DN_ARGUMENT', /config is null/, 'no config');
	await refuses(t, () => new Trainer(model, null as never), 'ERR_DN_ARGUMENT', /options/, 'no training options');
	for (const input of [null, 5, [5], [null], [{ text: 5 }]])
		await refuses(
			t,
			() => prepare(input as never, { tokenizer, out: fresh() }),
			'ERR_DN_ARGUMENT',
			/input|record 0/,
			String(input),
		);
	for (const options of [{ container: 'zip' }, { maxLine: 0 }, { padding: { every: 3 } }, { validation: 1 }])
		await refuses(
			t,
			() => calls.prepare?.(options),
			'ERR_DN_ARGUMENT',
			new RegExp(Object.keys(options)[0] as string),
			JSON.stringify(options),
		);
	t.deepEqual(readdirSync(scratch), [path.slice(scratch.length + 1)], 'nothing was written');
});

test('values that have no JSON are shown all the same, and defaults are compared with what is given', async (t) => {
	await using model = await DiffuGPT.fromConfig(smallConfig, { device: 'cpu' });
	const circular: Record<string, unknown> = {};
	circular['self'] = circular;
	const ids = Int32Array.of(1, 2, 3);
	const prompt = { tokens: ids };
	for (const [options, message] of [
		[{ sampler: 1n }, /sampler is 1n, expected ancestral/],
		[{ score: 2n }, /option score is 2n/],
		[{ score: circular }, /option score is object/],
		[{ attention: { blockCausal: 4n } }, /option attention is \{"blockCausal":"4n"\}/],
		[{ length: { max: 4, method: 3n } }, /option length.method is 3n/],
		[{ length: { max: 4, method: 'head', head: 3n } }, /option length.head is 3n/],
		[{ length: { max: 4, method: 'rho-eos', low: 0.7 } }, /length.low is 0.7, above length.high, 0.6/],
		[{ length: { max: 4, method: 'rho-eos', high: 0.3 } }, /length.low is 0.4, above length.high, 0.3/],
		[{ length: { max: 4, method: 'daedal', low: 0.95 } }, /length.low is 0.95, above length.high, 0.9/],
	] as [object, RegExp][]) {
		await refuses(t, () => model.generate(prompt, options), 'ERR_DN_ARGUMENT', message, String(message));
	}
	for (const [name, call] of Object.entries({
		loss: () => model.loss({ tokens: [ids] }, { objective: 1n as never }),
		Trainer: () => new Trainer(model, { precision: 1n as never }),
		evaluate: () => evaluate(model, [], { metric: 1n } as never),
		forward: () => model.forward(ids, { output: 1n as never }),
	})) {
		await refuses(t, call, 'ERR_DN_ARGUMENT', / is 1n, expected/, name);
	}
});

test('a run whose folder cannot be made ends at once', async (t) => {
	await using model = await DiffuGPT.fromConfig(smallConfig, { device: 'cpu' });
	const data = await prepare([Int32Array.of(1, 2, 3)], {
		tokenizer: { encode: () => new Int32Array(0), vocabSize: 60 },
		out: join(tmpdir(), `dn-spec-options-${process.pid}.bin`),
		format: 'documents',
		eosId: 0,
		context: 32,
	});
	for (const dir of ['/proc/dn/run', '/dev/null/run']) {
		await using trainer = new Trainer(model, { data, maxSteps: 1, checkpoint: { dir } });
		const run = async (): Promise<void> => {
			for await (const _ of trainer.run());
		};
		await refuses(t, run, 'ERR_DN_CHECKPOINT', new RegExp(dir), dir);
	}
	data.close();
	rmSync(data.path);
});
