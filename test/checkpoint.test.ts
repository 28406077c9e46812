/** Reading a model's directory: every spelling of its tensors, its configuration and tokenizer, and what is refused. */
import { rmSync } from 'node:fs';

import test from 'ava';
import { DiffuGPT, DiffusionNativeError, type LoadProgress, type ModelConfig } from 'diffusion-native';

import { openCheckpoint } from '../lib/checkpoint.js';
import { denoise, expected, fresh, make, model, parameters, transformer } from './helpers/checkpoint.js';
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
