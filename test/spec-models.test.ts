/**
 * Loading and saving as a user meets them: directories in every published spelling through `DiffuGPT.fromPretrained`, judged
 * by what the loaded model computes, not by what the reader says it read.
 */
import { spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import test, { type ExecutionContext } from 'ava';
import { DiffuGPT, type PretrainedOptions, Tokenizer } from 'diffusion-native';

import { close, same } from './helpers/close.js';
import { root } from './helpers/fixtures.js';
import { sharpModel } from './helpers/models.js';
import {
	bf16,
	f16,
	gpt2Tensors,
	gpt2Values,
	safetensorsBytes,
	type Tensors,
	tiny,
	tinyConfig,
	writeModel,
} from './helpers/safetensors.js';

const scratch = mkdtempSync(join(tmpdir(), 'dn-spec-models-'));
let count = 0;
const fresh = (): string => join(scratch, String(count++));
test.after.always(() => rmSync(scratch, { recursive: true, force: true }));

function directory(tensors: Tensors, config: object = tinyConfig, extra: Record<string, string | object> = {}): string {
	return writeModel(fresh(), { 'config.json': config, 'model.safetensors': safetensorsBytes(tensors), ...extra });
}

const load = (path: string, options: PretrainedOptions = {}): Promise<DiffuGPT> =>
	DiffuGPT.fromPretrained(path, { device: 'cpu', threads: 1, ...options });

const transformer = (name: string): string => `transformer.${name}`;
const denoise = (name: string): string => (name === 'wte.weight' ? 'embed_tokens.weight' : `denoise_model.${name}`);
const headOnly = (name: string): string => (name === 'wte.weight' ? 'lm_head.weight' : transformer(name));
const ids = Int32Array.of(3, 14, 15, 9, 26, 5, 35, 66);

/** Full and causal logits of a directory, and all its parameters. */
async function computed(path: string): Promise<Float32Array[]> {
	await using model = await load(path);
	const [full] = (await model.forward(ids, { attention: 'full' })) as [Float32Array];
	const [causal] = (await model.forward(ids, { attention: 'causal' })) as [Float32Array];
	return [full, causal, ...model.parameters().map(({ name }) => model.getParameter(name))];
}

test('one model in every spelling and storage type computes the same logits, bit for bit', async (t) => {
	const expected = await computed(directory(gpt2Tensors()));
	t.true((expected[0] as Float32Array).every(Number.isFinite));
	t.notDeepEqual(expected[0], expected[1], 'full and causal attention differ');
	const spellings: Record<string, Tensors> = {
		'transformer.': gpt2Tensors(transformer),
		'denoise_model.': gpt2Tensors(denoise),
		'lm_head only': gpt2Tensors(headOnly),
		'fp16 with all three embeddings': {
			...gpt2Tensors(denoise, f16),
			'lm_head.weight': gpt2Tensors(undefined, f16)['wte.weight'] as never,
			'transformer.wte.weight': gpt2Tensors(undefined, f16)['wte.weight'] as never,
		},
		bf16: gpt2Tensors(transformer, bf16),
		'mixed types': {
			...gpt2Tensors(transformer, f16),
			...gpt2Tensors((n) => (/c_fc/.test(n) ? transformer(n) : undefined), bf16),
		},
	};
	for (const [name, tensors] of Object.entries(spellings)) {
		const actual = await computed(directory(tensors));
		for (const [i, values] of actual.entries()) same(t, values, expected[i] as Float32Array, `${name}, array ${i}`);
	}
});

test('three shards and an index compute what one file computes', async (t) => {
	const entries = Object.entries(gpt2Tensors(denoise));
	const files: Record<string, Uint8Array | object> = { 'config.json': tinyConfig };
	const weightMap: Record<string, string> = {};
	for (let i = 0; i < 3; i++) {
		const name = `model-0000${i + 1}-of-00003.safetensors`;
		const part = entries.filter((_, index) => index % 3 === i);
		files[name] = safetensorsBytes(Object.fromEntries(part));
		for (const [key] of part) weightMap[key] = name;
	}
	files['model.safetensors.index.json'] = { metadata: { total_size: 1 }, weight_map: weightMap };
	const actual = await computed(writeModel(fresh(), files));
	const expected = await computed(directory(gpt2Tensors()));
	for (const [i, values] of actual.entries()) same(t, values, expected[i] as Float32Array, `array ${i}`);
});

/** A model of GPT-2's vocabulary size, one layer of 8 channels. */
function sized(vocab: number, rename: (name: string) => string, extra: Record<string, string | object> = {}): string {
	const size = { ...tiny, layers: 1, vocab };
	const config = { ...tinyConfig, n_layer: 1, vocab_size: 50257, bos_token_id: 50256, eos_token_id: 50256 };
	return directory(gpt2Tensors(rename, f16, size), config, extra);
}

test('a DiffuGPT directory generates with the mask id of its rule, a GPT-2 one left to right', async (t) => {
	for (const [path, maskId, vocab, config] of [
		[sized(50257, denoise), 10541, 50257, {}],
		[sized(50258, denoise), 50257, 50258, {}],
		[sized(50257, denoise, { 'tokenizer_config.json': { mask_token: ' the' } }), 262, 50257, {}],
		[sized(50257, denoise), 77, 50257, { maskId: 77 }],
	] as [string, number, number, object][]) {
		await using model = await load(path, { config });
		t.like(model.config, { maskId, vocab, attention: 'bidirectional', shift: true });
		t.is(
			model.parameters().find(({ name }) => name === 'wte.weight')?.shape[0],
			vocab,
			'V is the tensor’s, not the config’s',
		);
		const open = Int32Array.of(50256, 1, maskId, 2, maskId, maskId);
		const result = await model.generate({ tokens: open }, { seed: 3, sampler: 'ancestral' });
		t.is(result.tokens.length, 3, 'positions that hold the mask id are open');
		t.false(result.sequence.includes(maskId));
		let left = 3;
		for await (const { tokens, committed } of model.stream({ tokens: open }, { seed: 3, steps: 3 })) {
			left -= committed.length;
			t.is(tokens.filter((id) => id === maskId).length, left, 'what is still open holds the mask id');
		}
		t.is(left, 0);
	}
	await using causal = await load(sized(50257, transformer));
	t.like(causal.config, { maskId: -1, attention: 'causal' });
	const text = await causal.generate('Hello', { length: 4, seed: 1 });
	t.is(text.stats.forwards, 4);
	await t.throwsAsync(causal.loss({ tokens: [ids] }), { code: 'ERR_DN_ARGUMENT', message: /maskId/ });
});

test('after loading, a DiffuGPT sees the future and a GPT-2 does not', async (t) => {
	const hidden = async (path: string, config: object, changed: number): Promise<Float32Array> => {
		await using model = await load(path, { config });
		const other = Int32Array.from(ids);
		other[5] = changed;
		return (await model.forward(other, { output: 'hidden' }))[0] as Float32Array;
	};
	const early = tiny.channels * 5;
	for (const [rename, config, sees] of [
		[denoise, { maskId: 60 }, true],
		[transformer, {}, false],
	] as [(name: string) => string, object, boolean][]) {
		const path = directory(gpt2Tensors(rename));
		const a = await hidden(path, config, 5);
		const b = await hidden(path, config, 6);
		const differs = a.subarray(0, early).some((value, i) => value !== b[i]);
		t.is(differs, sees);
		t.notDeepEqual(a.subarray(early), b.subarray(early));
	}
});

test('the whole context of 1024 works and one token more is refused', async (t) => {
	await using model = await sharpModel({ context: 1024, layers: 1 }, 5, 8);
	const long = Int32Array.from({ length: 1024 }, (_, i) => (i * 7919) % 60);
	const [whole] = (await model.forward(long, { attention: 'causal', output: 'hidden' })) as [Float32Array];
	const [part] = (await model.forward(long.subarray(0, 300), { attention: 'causal', output: 'hidden' })) as [
		Float32Array,
	];
	same(t, whole.subarray(0, part.length), part, 'causal rows do not depend on what follows');
	const [one] = (await model.forward(long.subarray(0, 1), { attention: 'full' })) as [Float32Array];
	const [ragged] = (await model.forward([long.subarray(0, 1), long], { attention: 'full' })) as [Float32Array];
	same(t, ragged, one, 'T = 1 beside T = 1024');
	await t.throwsAsync(model.forward(new Int32Array(1025)), { code: 'ERR_DN_ARGUMENT', message: /1025 tokens.*1024/ });
	const last = await model.generate({ tokens: long.subarray(0, 1020) }, { length: 4, seed: 1 });
	t.is(last.sequence.length, 1024);
	t.is(last.stats.canvas, 1024);
	await t.throwsAsync(model.generate({ tokens: long.subarray(0, 1020) }, { length: 5 }), {
		code: 'ERR_DN_ARGUMENT',
		message: /1020 tokens and 5 new ones do not fit .* 1024/,
	});
	const { tokens } = await model.loss({ tokens: [long], t: [0.5] });
	t.is(tokens, 1023);
});

const digest = (path: string): string =>
	readdirSync(path)
		.sort()
		.map(
			(name) =>
				name +
				createHash('sha256')
					.update(readFileSync(join(path, name)))
					.digest('hex'),
		)
		.join('\n');

test('a model saved over the directory it was loaded from is the changed model', async (t) => {
	const path = directory(gpt2Tensors(denoise, f16), { ...tinyConfig, diffusion_native: { maskId: 9 } });
	await using model = await load(path);
	const bias = model.getParameter('ln_f.bias').map((value, i) => value + i);
	model.setParameter('ln_f.bias', bias);
	await model.save(path);
	await using again = await load(path);
	t.deepEqual(again.config, model.config);
	t.deepEqual(again.getParameter('ln_f.bias'), bias);
	t.deepEqual(await again.forward(ids), await model.forward(ids));
	await model.save(path, { dtype: 'bf16' });
	await using rounded = await load(path);
	const original = model.getParameter('wte.weight');
	close(t, rounded.getParameter('wte.weight'), original, 2 ** -8, 'bf16 keeps 8 bits');
});

test('what save writes is what Hugging Face’s GPT-2 has: names, shapes, config', async (t) => {
	const path = fresh();
	await using model = await DiffuGPT.fromConfig(
		{ layers: 2, heads: 2, channels: 8, context: 16, vocab: 67, maskId: 66, eosId: 65 },
		{ device: 'cpu', seed: 4 },
	);
	await model.save(path);
	const bytes = readFileSync(join(path, 'model.safetensors'));
	const header = JSON.parse(bytes.toString('utf8', 8, 8 + Number(bytes.readBigUInt64LE(0)))) as Record<string, object>;
	t.deepEqual(
		Object.keys(header)
			.filter((key) => key !== '__metadata__')
			.sort(),
		[...gpt2Values().keys()].map(transformer).sort(),
	);
	t.like(header['transformer.h.0.attn.c_attn.weight'], { shape: [8, 24], dtype: 'F32' });
	t.like(JSON.parse(readFileSync(join(path, 'config.json'), 'utf8')), {
		model_type: 'gpt2',
		architectures: ['GPT2LMHeadModel'],
		n_layer: 2,
		n_head: 2,
		n_embd: 8,
		n_positions: 16,
		vocab_size: 67,
		activation_function: 'gelu_new',
		layer_norm_epsilon: 1e-5,
		tie_word_embeddings: true,
		eos_token_id: 65,
	});
});

/** Runs a script whose files cannot grow beyond `blocks` of 512 bytes; a write beyond fails with EFBIG as on a full disk. */
function limited(t: ExecutionContext, blocks: number, source: string): string {
	const { status, stdout, stderr } = spawnSync(
		'sh',
		['-c', `ulimit -f ${blocks} && exec "$0" --input-type=module --eval "$1"`, process.execPath, source],
		{ cwd: root, encoding: 'utf8', timeout: 60_000 },
	);
	t.is(status, 0, stderr);
	return stdout;
}

const onLimitedFiles = process.platform === 'win32' ? test.skip : test;

onLimitedFiles('a disk that fills up while saving: an error, nothing half-written, the old model intact', async (t) => {
	const parent = fresh();
	const old = writeModel(join(parent, 'old'), {
		'config.json': tinyConfig,
		'model.safetensors': safetensorsBytes(gpt2Tensors()),
	});
	const before = digest(old);
	const source = `
		import { DiffuGPT } from 'diffusion-native';
		const model = await DiffuGPT.fromConfig({ layers: 1, heads: 2, channels: 32, vocab: 4096, context: 64 }, { device: 'cpu' });
		for (const path of ${JSON.stringify([old, join(parent, 'new')])}) {
			try {
				await model.save(path);
				console.log('saved');
			} catch (error) {
				console.log(error.code, error.message.includes(path.slice(path.lastIndexOf('/') + 1)));
			}
		}
		await model.dispose();`;
	t.is(limited(t, 64, source), 'ERR_DN_CHECKPOINT true\nERR_DN_CHECKPOINT true\n');
	t.deepEqual(readdirSync(parent), ['old'], 'no temporary directory stays');
	t.is(digest(old), before);
	t.deepEqual(await computed(old), await computed(directory(gpt2Tensors())));
});

test('the tokenizer of the directory, else GPT-2’s, travels through save and load', async (t) => {
	await using model = await load(sized(50257, denoise));
	t.is(model.tokenizer?.fingerprint, Tokenizer.gpt2().fingerprint);
	const path = fresh();
	await model.save(path);
	t.true(readdirSync(path).includes('tokenizer.json'));
	await using again = await load(path);
	const text = 'The <|endoftext|> naïve 🦊';
	t.deepEqual(again.tokenizer?.encode(text), model.tokenizer?.encode(text));
	t.false(again.tokenizer?.encode(text).includes(50256), 'text never turns into special tokens');
	const options = { length: 6, seed: 11n, sampler: 'ancestral' } as const;
	t.is((await again.generate('A', options)).text, (await model.generate('A', options)).text);
});
