import {
	chmodSync,
	existsSync,
	mkdirSync,
	mkdtempSync,
	readdirSync,
	readFileSync,
	rmSync,
	symlinkSync,
	writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import test from 'ava';
import { DiffuGPT, DiffusionNativeError, type LoadProgress, type ModelConfig, Tokenizer } from 'diffusion-native';

import { binding } from '../lib/binding.js';
import { openCheckpoint } from '../lib/checkpoint.js';
import { saveCheckpoint } from '../lib/checkpoint-save.js';
import type { NativeModel } from '../lib/native-types.js';
import {
	bf16,
	f16,
	f32,
	gpt2Tensors,
	gpt2Values,
	safetensorsBytes,
	type Tensors,
	tiny,
	tinyConfig,
	writeModel,
} from './helpers/safetensors.js';

const scratch = mkdtempSync(join(tmpdir(), 'dn-checkpoint-'));
let count = 0;
/** A path in a directory of its own, which does not exist yet. */
const fresh = (): string => {
	const parent = join(scratch, String(count++));
	mkdirSync(parent);
	return join(parent, 'model');
};
test.after.always(() => rmSync(scratch, { recursive: true, force: true }));

function model(
	tensors: Tensors = gpt2Tensors(),
	config: object = tinyConfig,
	extra: Record<string, string | object> = {},
): string {
	return writeModel(fresh(), { 'config.json': config, 'model.safetensors': safetensorsBytes(tensors), ...extra });
}

function make(config: ModelConfig): NativeModel {
	const { layers, heads, channels, context, vocab } = config;
	return binding().createModel(
		{ layers, heads, channels, context, vocab },
		{ device: 'cpu', threads: 1, dtype: 'fp32' },
	);
}

/** Loads a directory and returns every parameter. */
async function parameters(directory: string): Promise<Record<string, Float32Array>> {
	const checkpoint = openCheckpoint(directory);
	const native = make(checkpoint.config);
	await checkpoint.load(native);
	const values = Object.fromEntries(native.parameters.map(({ name }) => [name, native.getParameter(name)]));
	native.dispose();
	return values;
}

function refuses(
	t: import('ava').ExecutionContext,
	directory: string,
	message: RegExp,
	overrides: Partial<ModelConfig> = {},
): void {
	const open = (): void => {
		const checkpoint = openCheckpoint(directory, overrides);
		try {
			checkpoint.tokenizer();
		} finally {
			checkpoint.close();
		}
	};
	const error = t.throws(open, { instanceOf: DiffusionNativeError });
	t.is(error?.code, 'ERR_DN_CHECKPOINT');
	t.regex(error?.message ?? '', message);
	t.true(error?.message.includes(directory), `the message names the directory: ${error?.message}`);
}

const expected = Object.fromEntries(gpt2Values());
const transformer = (name: string): string => `transformer.${name}`;
const denoise = (name: string): string => (name === 'wte.weight' ? 'embed_tokens.weight' : `denoise_model.${name}`);

const spellings: Record<string, Tensors> = {
	'without prefix': gpt2Tensors(),
	'with transformer.': gpt2Tensors(transformer),
	'as DiffuGPT': gpt2Tensors(denoise),
	'as DiffuGPT with the head only': gpt2Tensors((name) => (name === 'wte.weight' ? 'lm_head.weight' : denoise(name))),
	'with embedding and head': { ...gpt2Tensors(transformer), 'lm_head.weight': gpt2Tensors()['wte.weight'] as never },
	'with attention buffers and a second copy': {
		...gpt2Tensors(transformer),
		'transformer.h.0.attn.bias': { dtype: 'U8', shape: [4], data: new Uint8Array(4) },
		'h.1.attn.bias': f32([1], [1]),
		'transformer.h.0.attn.masked_bias': f32([], [-1e4]),
		'model.transformer.wte.weight': f32([1], [1]),
	},
	'in fp16': gpt2Tensors(transformer, f16),
	'in bf16': gpt2Tensors(denoise, bf16),
};
for (const [name, tensors] of Object.entries(spellings)) {
	test(`a checkpoint ${name} loads with exactly its values`, async (t) => {
		t.deepEqual(await parameters(model(tensors)), expected);
	});
}

test('an index with shards loads like one file', async (t) => {
	const entries = Object.entries(gpt2Tensors(transformer));
	const shards = [entries.slice(0, 7), entries.slice(7)].map((part) => Object.fromEntries(part));
	const names = ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors'];
	const map = Object.fromEntries(shards.flatMap((shard, i) => Object.keys(shard).map((key) => [key, names[i]])));
	const files = (weightMap: object, keep = 2): string =>
		writeModel(fresh(), {
			'config.json': tinyConfig,
			'model.safetensors.index.json': { weight_map: weightMap },
			...Object.fromEntries(shards.slice(0, keep).map((shard, i) => [names[i], safetensorsBytes(shard)])),
		});
	t.deepEqual(await parameters(files(map)), expected);
	refuses(t, files(map, 1), /model-00002-of-00002\.safetensors that it names does not exist/);
	refuses(t, files({ ...map, 'transformer.wte.weight': names[1] }), /transformer\.wte\.weight/);
	refuses(t, files({ ...map, 'transformer.extra': names[1] }), /lacks the tensor transformer\.extra/);
	const { 'transformer.wpe.weight': _, ...less } = map;
	refuses(t, files(less), /holds the tensor transformer\.wpe\.weight, which .* does not list/);
	for (const evil of [
		'../model-00001-of-00002.safetensors',
		'/etc/x.safetensors',
		'a/b.safetensors',
		'c:x.safetensors',
		5,
	]) {
		refuses(t, files({ ...map, 'transformer.wte.weight': evil }), /transformer\.wte\.weight is said to be in/);
	}
	refuses(t, files({}), /weight_map is empty/);
});

test('matrices stored as [out, in] are recognised and transposed', async (t) => {
	const turn = (shape: number[], values: ArrayLike<number>) => {
		const [rows, columns] = shape as [number, number];
		const isEmbedding = rows === tiny.vocab || rows === tiny.context;
		if (shape.length < 2 || isEmbedding) return f32(shape, values);
		return f32(
			[columns, rows],
			Float32Array.from(
				{ length: rows * columns },
				(_, i) => values[(i % rows) * columns + Math.floor(i / rows)] as number,
			),
		);
	};
	const linear = gpt2Tensors(transformer, turn);
	t.deepEqual(await parameters(model(linear)), expected);
	const mixed = {
		...linear,
		'transformer.h.1.mlp.c_fc.weight': gpt2Tensors(transformer)['transformer.h.1.mlp.c_fc.weight'] as never,
	};
	refuses(t, model(mixed), /h\.1\.mlp\.c_fc\.weight is stored as \[in, out\] but .* expected one layout/);
});

test('missing, unexpected, duplicate and wrongly shaped tensors are named', (t) => {
	const change = (changes: Record<string, unknown>): string => model({ ...gpt2Tensors(), ...changes } as Tensors);
	refuses(
		t,
		model(gpt2Tensors((name) => (name === 'h.1.ln_2.bias' ? undefined : name))),
		/missing tensors: h\.1\.ln_2\.bias/,
	);
	refuses(t, change({ 'h.2.ln_1.bias': f32([8], new Float32Array(8)) }), /2 layers does not have: h\.2\.ln_1\.bias/);
	refuses(
		t,
		change({ 'transformer.ln_f.bias': f32([8], new Float32Array(8)) }),
		/transformer\.ln_f\.bias and ln_f\.bias are the same parameter twice/,
	);
	refuses(
		t,
		change({ 'wpe.weight': f32([8, 8], new Float32Array(64)) }),
		/wpe\.weight is \(8, 8\), expected \(16, 8\)/,
	);
	refuses(
		t,
		change({ 'h.0.mlp.c_proj.weight': f32([16, 16], new Float32Array(256)) }),
		/c_proj\.weight is \(16, 16\), expected \(32, 8\)/,
	);
	refuses(
		t,
		change({ 'ln_f.weight': { dtype: 'I64', shape: [8], data: new Uint8Array(64) } }),
		/ln_f\.weight is I64, expected F32, F16 or BF16/,
	);
	refuses(t, model(gpt2Tensors((name) => (name === 'wte.weight' ? undefined : name))), /no token embedding/);
	const head = gpt2Values().get('wte.weight') as Float32Array;
	head[11] = 5;
	refuses(
		t,
		change({ 'lm_head.weight': f32([67, 8], head) }),
		/lm_head\.weight .* tied .* differ at element 11: 5 and/,
	);
	refuses(
		t,
		change({ 'lm_head.weight': f32([66, 8], new Float32Array(66 * 8)) }),
		/lm_head\.weight \(66, 8\) and wte\.weight \(67, 8\)/,
	);
});

test('a NaN weight is refused with the name of its tensor', async (t) => {
	const values = gpt2Values().get('h.1.mlp.c_fc.bias') as Float32Array;
	values[3] = Number.NaN;
	const directory = model({ ...gpt2Tensors(), 'h.1.mlp.c_fc.bias': f32([32], values) });
	const checkpoint = openCheckpoint(directory);
	const native = make(checkpoint.config);
	const error = await t.throwsAsync(checkpoint.load(native), { instanceOf: DiffusionNativeError });
	t.is(error?.code, 'ERR_DN_CHECKPOINT');
	t.regex(error?.message ?? '', /h\.1\.mlp\.c_fc\.bias/);
	native.dispose();
});

test('malformed configurations are refused with the field', (t) => {
	const bad = (changes: object, message: RegExp): void =>
		refuses(t, model(undefined, { ...tinyConfig, ...changes }), message);
	bad({ n_embd: undefined }, /n_embd is missing/);
	bad({ n_layer: 'two' }, /n_layer is "two"/);
	bad({ n_head: 3 }, /n_embd 8 is not a multiple of n_head 3/);
	bad({ n_ctx: 8 }, /n_positions is 16 but n_ctx is 8/);
	bad({ n_positions: 32, n_ctx: 32 }, /wpe\.weight is \(16, 8\), expected \(32, 8\)/);
	bad({ n_layer: 3 }, /missing tensors: h\.2\.ln_1/);
	bad({ n_embd: 16 }, /wte\.weight is \(67, 8\), expected \(67, 16\)/);
	bad({ activation_function: 'gelu' }, /activation_function is "gelu"/);
	bad({ layer_norm_epsilon: 1e-6 }, /layer_norm_epsilon is 0\.000001/);
	bad({ n_inner: 16 }, /n_inner is 16/);
	bad({ architectures: ['LlamaForCausalLM'], model_type: 'llama' }, /"llama" is not supported/);
	bad({ architectures: ['BertForMaskedLM'] }, /"BertForMaskedLM" is not supported/);
	bad({ eos_token_id: 67 }, /eos_token_id is 67, but the embedding has 67 rows/);
	bad({ bos_token_id: -3 }, /bos_token_id is -3/);
	bad({ diffusion_native: { attention: 'sideways' } }, /diffusion_native\.attention is "sideways"/);
	bad({ diffusion_native: { maskId: 99 } }, /the mask id is 99/);
	bad({ diffusion_native: 3 }, /diffusion_native is not an object/);
	refuses(t, model(undefined, []), /config\.json: expected a JSON object/);
	refuses(t, writeModel(fresh(), { 'config.json': '{"n_embd": 8', 'model.safetensors': '' }), /not valid JSON/);
	refuses(
		t,
		writeModel(fresh(), { 'model.safetensors': safetensorsBytes(gpt2Tensors()) }),
		/config\.json: no such file/,
	);
	refuses(
		t,
		writeModel(fresh(), { 'config.json': tinyConfig }),
		/neither model\.safetensors nor model\.safetensors\.index\.json/,
	);
	refuses(
		t,
		writeModel(fresh(), { 'config.json': tinyConfig, 'model.safetensors': 'not tensors' }),
		/model\.safetensors/,
	);
	const whole = safetensorsBytes(gpt2Tensors());
	refuses(
		t,
		writeModel(fresh(), { 'config.json': tinyConfig, 'model.safetensors': whole.subarray(0, whole.length - 4) }),
		/model\.safetensors/,
	);
});

test('overrides win over the files and are checked as arguments', (t) => {
	const directory = model(undefined, { ...tinyConfig, diffusion_native: { maskId: 5, shift: false } });
	const read = (overrides: Partial<ModelConfig> = {}): ModelConfig => {
		const checkpoint = openCheckpoint(directory, overrides);
		checkpoint.close();
		return checkpoint.config;
	};
	t.like(read(), { ...tiny, maskId: 5, shift: false, attention: 'bidirectional', eosId: 66, padId: 66 });
	t.like(read({ maskId: 6, shift: true, eosId: 1, padId: 2, attention: 'causal' }), {
		maskId: 6,
		shift: true,
		eosId: 1,
		padId: 2,
		attention: 'causal',
	});
	for (const overrides of [{ maskId: 67 }, { vocab: 66 }, { colour: 1 } as never]) {
		t.is(t.throws(() => read(overrides), { instanceOf: DiffusionNativeError })?.code, 'ERR_DN_ARGUMENT');
	}
});

test('what is overridden is not asked of the files, however wrong it is there', (t) => {
	const read = (change: object, overrides: Partial<ModelConfig>, extra: Record<string, object> = {}): ModelConfig => {
		const checkpoint = openCheckpoint(model(undefined, { ...tinyConfig, ...change }, extra), overrides);
		checkpoint.close();
		return checkpoint.config;
	};
	const own = (values: object): object => ({ diffusion_native: values });
	for (const value of [tiny.vocab, -1, 'none']) {
		t.like(read({ pad_token_id: value }, { padId: 3 }), { padId: 3 }, `pad_token_id ${value}`);
		t.like(read({ eos_token_id: value }, { eosId: 3 }), { eosId: 3, padId: 3 }, `eos_token_id ${value}`);
		t.like(read({ bos_token_id: value }, { bosId: 3 }), { bosId: 3 }, `bos_token_id ${value}`);
	}
	t.like(read(own({ maskId: tiny.vocab }), { maskId: 5 }), { maskId: 5, attention: 'bidirectional' });
	t.like(read(own({ shift: 'no', attention: 'both' }), { shift: false, attention: 'causal' }), {
		shift: false,
		attention: 'causal',
	});
	const undeclared = { 'tokenizer_config.json': { mask_token: '[nowhere]' } };
	t.like(read({}, { maskId: 5 }, undeclared), { maskId: 5, attention: 'bidirectional' });
	// What is not overridden is still asked, and undefined overrides nothing.
	t.throws(() => read({ pad_token_id: tiny.vocab }, { maskId: 5 }), {
		code: 'ERR_DN_CHECKPOINT',
		message: /pad_token_id/,
	});
	t.throws(() => read({ pad_token_id: tiny.vocab }, { padId: undefined } as never), { code: 'ERR_DN_CHECKPOINT' });
	t.throws(() => read({}, {}, undeclared), { code: 'ERR_DN_CHECKPOINT', message: /not in the vocabulary/ });
});

test('mask ids follow the tokenizer, then the rule of the vocabulary, for diffusion checkpoints only', (t) => {
	const sized = (
		vocab: number,
		rename: (name: string) => string,
		extra: Record<string, string | object> = {},
		overrides: Partial<ModelConfig> = {},
	): ModelConfig => {
		const size = { ...tiny, layers: 1, vocab };
		const directory = model(
			gpt2Tensors(rename, f32, size),
			{ ...tinyConfig, n_layer: 1, bos_token_id: 50256, eos_token_id: 50256 },
			extra,
		);
		const checkpoint = openCheckpoint(directory, overrides);
		checkpoint.close();
		rmSync(directory, { recursive: true });
		return checkpoint.config;
	};
	t.like(sized(50257, transformer), { maskId: -1, attention: 'causal', eosId: 50256 });
	t.like(sized(50257, denoise), { maskId: 10541, attention: 'bidirectional', shift: true });
	t.like(sized(50258, denoise), { maskId: 50257, attention: 'bidirectional' });
	t.like(sized(50257, transformer, {}, { attention: 'bidirectional' }), { maskId: 10541 });
	t.like(sized(50257, transformer, {}, { maskId: 7 }), { maskId: 7, attention: 'bidirectional' });
	t.like(sized(50257, denoise, { 'tokenizer_config.json': { mask_token: ' the' } }), { maskId: 262 });
	t.like(
		sized(50258, denoise, {
			'tokenizer_config.json': { mask_token: { content: '[M]' }, added_tokens_decoder: { 9: { content: '[M]' } } },
		}),
		{ maskId: 9 },
	);
	t.like(sized(67, transformer), { maskId: -1, attention: 'causal', eosId: 66 });
	const undeclared = { 'tokenizer_config.json': { mask_token: '[nowhere]' } };
	t.regex(t.throws(() => sized(50257, denoise, undeclared))?.message ?? '', /"\[nowhere\]" is not in the vocabulary/);
});

test('the tokenizer is the directory’s, else GPT-2’s when it fits, else none', (t) => {
	const chars = Array.from({ length: 67 }, (_, i) => [String.fromCharCode(i < 60 ? 33 + i : 0x100 + i), i] as const);
	const vocab = Object.fromEntries(chars);
	const own = openCheckpoint(model(undefined, tinyConfig, { 'vocab.json': vocab, 'merges.txt': '#version: 0.2\n' }));
	t.deepEqual([...(own.tokenizer()?.encode('"!') ?? [])], [1, 0]);
	own.close();
	const none = openCheckpoint(model());
	t.is(none.tokenizer(), undefined);
	none.close();
	refuses(
		t,
		model(undefined, tinyConfig, { 'vocab.json': { ...vocab, A: 67 }, 'merges.txt': '' }),
		/the tokenizer has 68 tokens, the embedding 67 rows/,
	);
	refuses(t, model(undefined, tinyConfig, { 'vocab.json': vocab }), /no merges\.txt/);
	refuses(t, model(undefined, tinyConfig, { 'tokenizer.json': '{}' }), /tokenizer\.json: not a tokenizer/);
});

test('a tokenizer that is refused while the weights load leaves nothing behind', async (t) => {
	const directory = model(undefined, tinyConfig, { 'tokenizer.json': '{}' });
	const events: number[] = [];
	const onProgress = (event: LoadProgress): void => {
		if (event.status === 'load') events.push(event.loaded);
	};
	const loading = DiffuGPT.fromPretrained(directory, { device: 'cpu', onProgress });
	await t.throwsAsync(loading, { code: 'ERR_DN_CHECKPOINT', message: /tokenizer\.json: not a tokenizer/ });
	const parameters = gpt2Values().size;
	t.true(events.length < parameters, `${events.length} of ${parameters} tensors were loaded after the refusal`);
	const seen = events.length;
	await new Promise((resolve) => setTimeout(resolve, 20));
	t.is(events.length, seen, 'nothing goes on loading');
});

test('loading reports its progress and stops when aborted', async (t) => {
	const directory = model();
	const first = openCheckpoint(directory);
	const native = make(first.config);
	const seen: number[] = [];
	await first.load(native, {
		onProgress: (event) => {
			if (event.status === 'load') seen.push(event.loaded / event.total);
		},
	});
	t.is(seen.at(-1), 1);
	t.true(seen.every((value, i) => i === 0 || value > (seen[i - 1] as number)));
	const reason = new Error('enough');
	await t.throwsAsync(openCheckpoint(directory).load(native, { signal: AbortSignal.abort(reason) }), { is: reason });
	native.dispose();
});

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
