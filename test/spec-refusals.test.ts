/**
 * What must not pass silently or as a TypeError: signals that are none, misspelt keys, schedules without a number, losses that
 * are none, models without a mask token. And what a message must not name: this library's internals and temporary files.
 */
import { mkdtempSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import test from 'ava';
import {
	annealingRatio,
	calibrateLength,
	DiffuGPT,
	type DiffusionBatch,
	DiffusionNativeError,
	evaluate,
	evaluateLength,
	type LossOptions,
	prepare,
	type Schedule,
	scheduleAt,
	TokenDataset,
	Trainer,
	trainLengthHead,
	trainTokenizer,
} from 'diffusion-native';

import { smallConfig } from './helpers/models.js';
import { refuses } from './helpers/refuses.js';

const scratch = mkdtempSync(join(tmpdir(), 'dn-spec-refusals-'));
let count = 0;
const fresh = (): string => join(scratch, String(count++));
test.after.always(() => rmSync(scratch, { recursive: true, force: true }));

const ids = Int32Array.of(1, 2, 3);
const pairs = [{ prompt: [1, 2], answer: [3] }];
const tokenizer = { encode: () => new Int32Array(0), vocabSize: 60 };
const dataset = (): Promise<TokenDataset> =>
	prepare([ids, Int32Array.of(4, 5)], { tokenizer, out: fresh(), format: 'documents', eosId: 0, context: 32 });

test('a signal that is no AbortSignal is refused wherever one is taken', async (t) => {
	await using model = await DiffuGPT.fromConfig(smallConfig, { device: 'cpu' });
	const path = fresh();
	await model.save(path);
	using data = await dataset();
	await using trainer = new Trainer(model, { data, maxSteps: 1 });
	const calls: Record<string, (signal: never) => unknown> = {
		fromPretrained: (signal) => DiffuGPT.fromPretrained(path, { signal }),
		forward: (signal) => model.forward(ids, { signal }),
		generate: (signal) => model.generate({ tokens: ids }, { length: 2, signal }),
		generateBatch: (signal) => model.generateBatch([{ tokens: ids }], { length: 2, signal }),
		stream: (signal) => model.stream({ tokens: ids }, { length: 2, signal }).next(),
		predictLength: (signal) => model.predictLength({ tokens: ids }, { max: 4, signal }),
		run: (signal) => trainer.run({ signal }).next(),
		evaluate: (signal) => evaluate(model, data, { metric: 'nelbo', signal }),
		evaluateLength: (signal) => evaluateLength(model, pairs, { max: 4, signal }),
		calibrateLength: (signal) => calibrateLength(model, pairs, { max: 4, method: 'expected', signal }),
		trainLengthHead: (signal) => trainLengthHead(model, pairs, { max: 4, signal }),
		prepare: (signal) => prepare([ids], { tokenizer, out: fresh(), eosId: 0, signal }),
		trainTokenizer: (signal) => trainTokenizer([{ text: 'a' }], { vocabSize: 300, signal }),
	};
	for (const [name, call] of Object.entries(calls)) {
		for (const signal of [5, null, {}, { aborted: false }, 'x'])
			await refuses(t, () => call(signal as never), 'ERR_DN_ARGUMENT', /signal is not an AbortSignal/, name);
	}
	t.is(trainer.steps, 0);
});

test('options that are missing, no object, or have a key nobody knows: the message suggests the right one', async (t) => {
	await using model = await DiffuGPT.fromConfig(smallConfig, { device: 'cpu' });
	using data = await dataset();
	const text = [{ text: 'some text' }];
	const misspelt: [string, (options: never) => unknown, object, RegExp][] = [
		[
			'trainTokenizer',
			(options) => trainTokenizer(text, options),
			{ vocabsize: 300 },
			/vocabsize is not known, did you mean 'vocabSize'/,
		],
		['open', (options) => TokenDataset.open(data.path, options), { contxt: 8 }, /contxt.*did you mean 'context'/],
		['batch', (batch) => model.loss(batch), { tokens: [ids], masks: [] }, /batch\.masks.*did you mean 'mask'/],
		['generate', (options) => model.generate({ tokens: ids }, options), { topk: 4 }, /topk.*did you mean 'topK'/],
		['forward', (options) => model.forward(ids, options), { row: [] }, /row.*did you mean 'rows'/],
		[
			'evaluateLength',
			(options) => evaluateLength(model, pairs, options),
			{ max: 4, covrage: [0.5] },
			/covrage.*did you mean 'coverage'/,
		],
		[
			'calibrateLength',
			(options) => calibrateLength(model, pairs, options),
			{ max: 4, methods: 'expected' },
			/methods.*did you mean 'method'/,
		],
		[
			'trainLengthHead',
			(options) => trainLengthHead(model, pairs, options),
			{ max: 4, epoch: 1 },
			/epoch.*did you mean 'epochs'/,
		],
	];
	for (const [name, call, options, message] of misspelt) {
		await refuses(t, () => call(options as never), 'ERR_DN_ARGUMENT', message, name);
		await refuses(
			t,
			() => call({ ...options, zzzzzzzzzz: 1 } as never),
			'ERR_DN_ARGUMENT',
			/not known/,
			`${name}, far from everything`,
		);
		for (const none of [null, 5])
			await refuses(t, () => call(none as never), 'ERR_DN_ARGUMENT', /./, `${name}(${none})`);
	}
	const without = trainTokenizer as unknown as (input: unknown, options?: unknown) => Promise<unknown>;
	await refuses(t, () => without(text), 'ERR_DN_ARGUMENT', /needs the option vocabSize/, 'trainTokenizer(x)');
	await refuses(
		t,
		() => without(undefined, { vocabSize: 300 }),
		'ERR_DN_ARGUMENT',
		/the input is undefined/,
		'no input',
	);
	for (const [options, message] of [
		[{ specials: 'x' }, /specials/],
		[{ specials: [5] }, /specials/],
		[{ columns: 'text' }, /columns/],
		[{ maxLine: 0 }, /maxLine/],
		[{ out: 5 }, /out/],
	] as [object, RegExp][])
		await refuses(t, () => without(text, { vocabSize: 300, ...options }), 'ERR_DN_ARGUMENT', message, String(message));
	for (const [options, message] of [
		[{ tokenizer: 5 }, /tokenizer/],
		[{ tokenizer: {} }, /tokenizer/],
	] as [object, RegExp][]) {
		const open = (): unknown => TokenDataset.open(data.path, options as never);
		await refuses(t, open, 'ERR_DN_ARGUMENT', message, JSON.stringify(options));
	}
	await refuses(t, () => TokenDataset.open(5 as never), 'ERR_DN_ARGUMENT', /the path is 5/, 'a path that is none');
	for (const [name, value] of [
		['eosId', 60],
		['bosId', 'x'],
		['padId', -1],
		['splitSeed', Number.NaN],
		['validationOut', ''],
	] as [string, unknown][]) {
		const call = (): unknown => prepare([ids], { tokenizer, out: fresh(), eosId: 0, [name]: value } as never);
		await refuses(t, call, 'ERR_DN_ARGUMENT', new RegExp(`${name} is`), name);
	}
});

test('a batch whose fields are of the wrong kind is refused with the field', async (t) => {
	await using model = await DiffuGPT.fromConfig(smallConfig, { device: 'cpu' });
	for (const [batch, message] of [
		[{ maskable: 5 }, /batch\.maskable is number/],
		[{ maskable: [undefined] }, /batch\.maskable\[0\] is not a Uint8Array/],
		[{ mask: [[1, 0, 0]] }, /batch\.mask\[0\] is not a Uint8Array/],
		[{ t: 0.5 }, /batch\.t is number/],
		[{ t: 'a' }, /batch\.t is string/],
		[{ maskable: [Uint8Array.of(1, 0, 1)], mask: [Uint8Array.of(1, 1, 0)] }, /batch\.mask\[0\]\[1\] is 1 where/],
	] as [object, RegExp][]) {
		const call = (): unknown => model.loss({ tokens: [ids], ...batch });
		await refuses(t, call, 'ERR_DN_ARGUMENT', message, JSON.stringify(batch));
	}
});

test('schedules and annealing give a number or an error, never NaN', async (t) => {
	const rates: [unknown, unknown, unknown, RegExp][] = [
		[{ kind: 'cosine', peak: 1 }, Number.NaN, 10, /step is NaN/],
		[{ kind: 'cosine', peak: 1 }, undefined, 10, /step is undefined/],
		[1e-3, -1, 10, /step is -1/],
		[{ kind: 'linear', peak: 1 }, 1, Number.NaN, /maxSteps is NaN/],
		[{ kind: 'one-cycle', peak: 1 }, 1, undefined, /maxSteps is undefined/],
		[{ kind: 'one-cycle', peak: 1, steps: 0 }, 1, 10, /learningRate\.steps is 0/],
		[{ kind: 'cosine', peak: Number.NaN }, 1, 10, /learningRate\.peak is NaN/],
		[{ kind: 'cosine', peak: 1, warmupSteps: 0.5 }, 0, 10, /learningRate\.warmupSteps is 0\.5/],
		[{ kind: 'one-cycle', peak: 1, cycleBeta1: { base: Number.NaN, max: 0.9 } }, 1, 10, /cycleBeta1/],
		[{ kind: 'one-cycle', peak: 1, cycleBeta1: null }, 1, 10, /cycleBeta1/],
		[{ kind: 'steep', peak: 1 }, 1, 10, /learningRate\.kind is "steep"/],
		[Number.NaN, 1, 10, /learningRate is NaN/],
		[null, 1, 10, /learningRate is null/],
		[undefined, 1, 10, /learningRate is undefined/],
		[() => Number.NaN, 1, 10, /learning rate function returned NaN at step 1/],
	];
	for (const [schedule, step, maxSteps, message] of rates) {
		const call = (): unknown => scheduleAt(schedule as Schedule, step as number, maxSteps as number);
		await refuses(t, call, 'ERR_DN_ARGUMENT', message, JSON.stringify([schedule, step, maxSteps]));
	}
	t.is(scheduleAt({ kind: 'constant', peak: 2 }, 7, Number.POSITIVE_INFINITY).learningRate, 2);
	for (const [annealing, step, message] of [
		[{ steps: Number.NaN }, 1, /attentionAnnealing\.steps is NaN/],
		[{ steps: -3 }, 1, /attentionAnnealing\.steps is -3/],
		[{ stps: 3 }, 1, /attentionAnnealing\.stps.*did you mean 'steps'/],
		[{ steps: 3, kind: 'slow' }, 1, /attentionAnnealing\.kind is "slow"/],
		[{ steps: 3 }, Number.NaN, /step is NaN/],
		[{ steps: 0 }, undefined, /step is undefined/],
		[null, 1, /attentionAnnealing is null/],
	] as [never, never, RegExp][])
		await refuses(
			t,
			() => annealingRatio(annealing, step),
			'ERR_DN_ARGUMENT',
			message,
			JSON.stringify([annealing, step]),
		);
});

test('a loss that is no number is an error that says what to look for', async (t) => {
	await using model = await DiffuGPT.fromConfig(smallConfig, { device: 'cpu' });
	using data = await dataset();
	const scale = model.getParameter('ln_f.weight');
	model.setParameter('ln_f.weight', scale.with(3, Number.NaN));
	const batch = { tokens: [ids], mask: [Uint8Array.of(0, 1, 1)], t: [0.5] };
	await refuses(t, () => model.loss(batch), 'ERR_DN_DIVERGED', /the loss is NaN.*parameter.*checkpoint/, 'loss');
	await using trainer = new Trainer(model, {});
	await refuses(t, () => trainer.evaluate(data), 'ERR_DN_DIVERGED', /validation data .*NaN/, 'Trainer.evaluate');
	const questions = [{ context: [1, 2], endings: [[3], [2, 1]], label: 0 }];
	const message = /sequence sum to NaN.*parameter/;
	for (const metric of ['multiple-choice', 'likelihood', 'nelbo'] as const) {
		const records = metric === 'multiple-choice' ? questions : pairs;
		await refuses(t, () => evaluate(model, records, { metric }), 'ERR_DN_DIVERGED', message, metric);
	}
	model.setParameter('ln_f.weight', scale);
	t.true(Number.isFinite((await model.loss(batch)).loss));
});

test('a bidirectional model without a mask token says maskId where one is needed, and runs where none is', async (t) => {
	const { maskId: _, ...sizes } = smallConfig;
	await using model = await DiffuGPT.fromConfig({ ...sizes, attention: 'bidirectional' }, { device: 'cpu' });
	t.is(model.config.maskId, -1);
	t.is((await model.forward(ids)).length, 1);
	const batch = { tokens: [ids] };
	t.true(Number.isFinite((await model.loss(batch, { objective: 'autoregressive' })).loss));
	const prompt = { tokens: ids };
	for (const [name, call] of Object.entries({
		generate: () => model.generate(prompt, { length: 2 }),
		guidance: () => model.generate(prompt, { length: 2, sampler: 'autoregressive', guidance: 1 }),
		predictLength: () => model.predictLength(prompt, { max: 4 }),
		loss: () => model.loss(batch),
		Trainer: () => new Trainer(model, {}),
		evaluate: () => evaluate(model, [{ tokens: [1, 2, 3] }], { metric: 'nelbo' }),
		evaluateLength: () => evaluateLength(model, pairs, { max: 4 }),
	}))
		await refuses(t, call, 'ERR_DN_ARGUMENT', /needs a mask token.*maskId.*fromConfig.*fromPretrained/, name);
});

test('options that an objective does not read are refused, never ignored', async (t) => {
	await using model = await DiffuGPT.fromConfig(smallConfig, { device: 'cpu' });
	const matrix = new Uint8Array(9).fill(1);
	const spindle = { lambda: 0.1, information: new Float32Array(61).fill(1) };
	const one = { tokens: [ids] };
	const two = { tokens: [ids, ids] };
	for (const [options, message, batch = one] of [
		[{ objective: 'autoregressive', attention: 'full' }, /option attention.*'autoregressive'.*'causal'/],
		[{ objective: 'autoregressive', timeSampler: 'stratified' }, /option timeSampler .*'autoregressive'/],
		[{ objective: 'autoregressive', timeRange: [0.5, 1] }, /option timeRange .*'autoregressive'/],
		[{ objective: 'autoregressive', block: 2 }, /option block .*'autoregressive'/],
		[{ objective: 'autoregressive', spindle }, /option spindle .*'autoregressive'/],
		[{ objective: 'block-diffusion', block: 2, attention: 'causal' }, /option attention.*'block-diffusion'/],
		[{ objective: 'block-diffusion', block: 2, attention: { matrix } }, /option attention.*'block-diffusion'/],
		[{ block: 3 }, /option block .*'diffusion'/],
		[{ block: -3.5 }, /option block .*'diffusion'/],
		[{ timeSampler: 'exact-count', timeRange: [0.5, 1] }, /option timeRange .*'exact-count'/],
		[{ attention: { matrix } }, /takes one sequence, 2 were given/, two],
		[{ attention: { matrix: new Uint8Array(16) } }, /matrix is 4 x 4, the sequence has 3/],
		[{ attention: { matrix: new Uint8Array(4) } }, /matrix is 2 x 2, the sequence has 3/],
	] as [LossOptions, RegExp, DiffusionBatch?][]) {
		await refuses(t, () => model.loss(batch, options), 'ERR_DN_ARGUMENT', message, JSON.stringify(options));
	}
	for (const options of [
		{ objective: 'autoregressive', attention: 'causal' },
		{ objective: 'block-diffusion', block: 2, attention: 'full' },
		{ attention: { matrix } },
	] as const) {
		await t.notThrowsAsync(model.loss(one, options));
	}
	const annealed = { objective: 'block-diffusion', block: 2, attentionAnnealing: { steps: 3 } } as const;
	await refuses(
		t,
		() => new Trainer(model, annealed),
		'ERR_DN_ARGUMENT',
		/attentionAnnealing .*'block-diffusion'/,
		'Trainer',
	);
});

test('no message names an internal function or field', async (t) => {
	await using model = await DiffuGPT.fromConfig(smallConfig, { device: 'cpu' });
	const information = new Float32Array(61).fill(1);
	const mask = [Uint8Array.of(0, 1, 0)];
	const spindle = { lambda: 0.1, information };
	for (const [batch, options] of [
		[{}, { objective: 'autoregressive', shift: false }],
		[{ mask, t: [0.5] }, { objective: 'autoregressive' }],
		[{}, { spindle, timeSampler: 'exact-count' }],
		[{}, { spindle: { lambda: 0.1, information: new Float32Array(61) } }],
		[{}, { spindle: { lambda: 0.1, information: 5 } }],
		[{ mask }, { spindle }],
		[{ mask, maskable: [Uint8Array.of(1, 0, 1)] }, {}],
	] as [object, object][]) {
		const label = JSON.stringify([batch, options]);
		const error = await t.throwsAsync(async () => model.loss({ tokens: [ids], ...batch }, options), {
			instanceOf: DiffusionNativeError,
		});
		t.is(error?.code, 'ERR_DN_ARGUMENT', label);
		t.notRegex(error?.message ?? '', /corrupt:|native call|[a-z]_[a-z]/, label);
	}
});

test('a save that fails names the folder asked for and leaves nothing', async (t) => {
	await using model = await DiffuGPT.fromConfig(smallConfig, { device: 'cpu' });
	await using trainer = new Trainer(model, {});
	model.setParameter('ln_f.bias', model.getParameter('ln_f.bias').fill(Number.NaN));
	for (const [name, save] of [
		['model', (path: string) => model.save(path)],
		['trainer', (path: string) => trainer.save(path)],
	] as const) {
		const folder = fresh();
		const target = join(folder, name);
		const message = new RegExp(`${target}/model\\.safetensors.*ln_f\\.bias|ln_f\\.bias.*${target}/model\\.safetensors`);
		await refuses(t, () => save(target), 'ERR_DN_CHECKPOINT', message, name);
		await refuses(t, () => save(target), 'ERR_DN_CHECKPOINT', /^(?!.*\.tmp)/, name);
		t.deepEqual(readdirSync(folder), []);
	}
	const file = fresh();
	writeFileSync(file, '');
	await refuses(t, () => model.save(file), 'ERR_DN_CHECKPOINT', new RegExp(`${file}: cannot`), 'a file');
});
