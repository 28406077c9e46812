/** Saving a model: that it loads again to the bit, what the directory holds before, after and when the save fails. */
import { chmodSync, existsSync, mkdirSync, readdirSync, readFileSync, symlinkSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

import test from 'ava';
import { DiffusionNativeError, Tokenizer } from 'diffusion-native';

import { openCheckpoint } from '../lib/checkpoint.js';
import { saveCheckpoint } from '../lib/checkpoint-save.js';
import { denoise, expected, fresh, make, model, parameters, transformer } from './helpers/checkpoint.js';
import { f32, gpt2Tensors, tiny, tinyConfig, writeModel } from './helpers/safetensors.js';

test('a saved model loads with the same bits and config', async (t) => {
	const source = openCheckpoint(
		model(gpt2Tensors(denoise), { ...tinyConfig, diffusion_native: { maskId: 5, padId: 4, shift: false } }),
	);
	const native = make(source.config);
	await source.load(native);
	await native.initialise(3n);
	const target = join(fresh(), 'deep', 'down');
	await saveCheckpoint(target, { native, config: source.config, tokenizer: undefined });
	const again = openCheckpoint(target);
	t.deepEqual(again.config, source.config);
	again.close();
	const loaded = await parameters(target);
	for (const { name } of native.parameters) t.deepEqual(loaded[name], native.getParameter(name), name);
	t.deepEqual(readdirSync(target).sort(), ['config.json', 'generation_config.json', 'model.safetensors']);
	t.deepEqual(readdirSync(join(target, '..')), ['down']);
	native.dispose();
});

test('a saved directory has the names and layout of Hugging Face’s GPT-2', async (t) => {
	const source = openCheckpoint(model());
	const native = make(source.config);
	await source.load(native);
	const target = fresh();
	for (const dtype of ['F16', 'BF16', 'F32'] as const) {
		await saveCheckpoint(target, { native, config: source.config, tokenizer: undefined, dtype });
		const bytes = readFileSync(join(target, 'model.safetensors'));
		const header = JSON.parse(bytes.toString('utf8', 8, 8 + Number(bytes.readBigUInt64LE(0))));
		t.deepEqual(header.__metadata__, { format: 'pt' });
		delete header.__metadata__;
		t.deepEqual(
			Object.fromEntries(Object.entries(header).map(([name, entry]) => [name, (entry as { shape: number[] }).shape])),
			Object.fromEntries(Object.entries(gpt2Tensors(transformer)).map(([name, { shape }]) => [name, shape])),
		);
		t.is(header['transformer.h.0.attn.c_attn.weight'].dtype, dtype);
		t.deepEqual(await parameters(target), expected, 'the values are exact in every type');
	}
	const config = JSON.parse(readFileSync(join(target, 'config.json'), 'utf8'));
	t.like(config, { ...tinyConfig, diffusion_native: { maskId: -1, attention: 'causal', shift: true } });
	native.dispose();
});

test('saving replaces an old model and keeps files that are not a model’s', async (t) => {
	const source = openCheckpoint(model());
	const native = make(source.config);
	await source.load(native);
	const save = (directory: string) =>
		saveCheckpoint(directory, { native, config: source.config, tokenizer: undefined });
	const old = writeModel(fresh(), {
		'model.safetensors.index.json': '{}',
		'model-00001-of-00001.safetensors': 'x',
		'config.json': '{}',
	});
	await save(old);
	t.deepEqual(readdirSync(old).sort(), ['config.json', 'generation_config.json', 'model.safetensors']);
	const shared = writeModel(fresh(), { 'notes.txt': 'mine', 'merges.txt': 'old', 'config.json': '{}' });
	await save(shared);
	t.deepEqual(readdirSync(shared).sort(), ['config.json', 'generation_config.json', 'model.safetensors', 'notes.txt']);
	t.is(readFileSync(join(shared, 'notes.txt'), 'utf8'), 'mine');
	const link = fresh();
	mkdirSync(`${link}-real`);
	symlinkSync(`${link}-real`, link);
	await save(link);
	t.true(existsSync(join(`${link}-real`, 'config.json')));
	for (const target of [old, shared]) t.deepEqual(readdirSync(join(target, '..')), ['model']);
	native.dispose();
});

test('a save that fails says why and leaves the old model whole', async (t) => {
	const source = openCheckpoint(model());
	const native = make(source.config);
	await source.load(native);
	const save = (directory: string) =>
		saveCheckpoint(directory, { native, config: source.config, tokenizer: undefined });
	const file = fresh();
	writeFileSync(file, 'a file');
	for (const target of [file, join(file, 'below'), '/proc/dn/model', '/dev/full/model']) {
		const error = await t.throwsAsync(save(target), { instanceOf: DiffusionNativeError });
		t.is(error?.code, 'ERR_DN_CHECKPOINT', target);
		t.true(error?.message.includes(target));
	}
	t.is(readFileSync(file, 'utf8'), 'a file');
	const old = model();
	native.dispose();
	await t.throwsAsync(save(old), { instanceOf: DiffusionNativeError });
	t.deepEqual(await parameters(old), expected);
	t.deepEqual(readdirSync(join(old, '..')), ['model']);
	if (process.getuid?.() !== 0) {
		const locked = fresh();
		mkdirSync(locked, { mode: 0o500 });
		await t.throwsAsync(save(join(locked, 'model')), { instanceOf: DiffusionNativeError, message: /EACCES/ });
		chmodSync(locked, 0o700);
	}
});

test('the tokenizer is saved with the model and comes back equal', async (t) => {
	const size = { ...tiny, layers: 1, vocab: 50257 };
	const directory = model(gpt2Tensors(denoise, f32, size), {
		...tinyConfig,
		n_layer: 1,
		bos_token_id: 50256,
		eos_token_id: 50256,
	});
	const source = openCheckpoint(directory);
	t.is(source.tokenizer(), Tokenizer.gpt2());
	const native = make(source.config);
	await source.load(native);
	const target = fresh();
	await saveCheckpoint(target, { native, config: source.config, tokenizer: source.tokenizer() });
	const again = openCheckpoint(target);
	again.close();
	t.deepEqual(again.config, source.config);
	t.is(again.tokenizer()?.fingerprint, Tokenizer.gpt2().fingerprint);
	t.like(JSON.parse(readFileSync(join(target, 'tokenizer_config.json'), 'utf8')), { eos_token: '<|endoftext|>' });
	native.dispose();
});
