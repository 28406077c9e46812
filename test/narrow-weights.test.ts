/** dtypes 'bf16' and 'int8' on the CPU: quality of the shipped model against fp32, checkpoints, and what is refused. */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import test from 'ava';
import { DiffuGPT, evaluate, info, Trainer } from 'diffusion-native';

import { binding } from '../lib/binding.js';

const scratch = mkdtempSync(join(tmpdir(), 'dn-narrow-'));
test.after.always(() => rmSync(scratch, { recursive: true, force: true }));
let count = 0;
const fresh = (): string => join(scratch, String(count++));

const tiny = 'diffusion-native/tiny';
const config = { layers: 2, heads: 2, channels: 48, context: 32, vocab: 97, maskId: 96 } as const;
const ids = Int32Array.from({ length: 20 }, (_, i) => (i * 37 + 11) % 96);

/** Pairs of the kinds the model was trained on, held here so that the numbers below are those of one data set. */
const numbers = [
	[58643, 'fifty eight thousand six hundred forty three'],
	[11841, 'eleven thousand eight hundred forty one'],
	[8163, 'eight thousand one hundred sixty three'],
	[3964, 'three thousand nine hundred sixty four'],
	[702, 'seven hundred two'],
	[95017, 'ninety five thousand seventeen'],
	[413, 'four hundred thirteen'],
	[27660, 'twenty seven thousand six hundred sixty'],
].map(([n, words]) => ({ prompt: `${n} in words:`, answer: String(words) }));
const texts = [
	{ prompt: 'spell lantern:', answer: 'l-a-n-t-e-r-n' },
	{ prompt: 'spell harvest:', answer: 'h-a-r-v-e-s-t' },
	{ prompt: 'lighthouse (noun):', answer: 'a tower with a light that gives warning of shoals to passing ships' },
	{ prompt: 'reluctant (adjective):', answer: 'unwillingness to do something contrary to your custom' },
];

test('the shipped model keeps its quality', async (t) => {
	await using fp32 = await DiffuGPT.fromPretrained(tiny, { device: 'cpu', dtype: 'fp32', localFilesOnly: true });
	await using bf16 = await DiffuGPT.fromPretrained(tiny, { device: 'cpu', dtype: 'bf16', localFilesOnly: true });
	await using int8 = await DiffuGPT.fromPretrained(tiny, { device: 'cpu', dtype: 'int8', localFilesOnly: true });
	const measured = [];
	for (const model of [fp32, bf16, int8]) {
		const { nelbo } = await evaluate(model, [...numbers, ...texts], { metric: 'nelbo', samples: 16, seed: 1 });
		const match = await evaluate(model, numbers, {
			metric: 'exact-match',
			seed: 1,
			generate: { sampler: 'confidence', length: 16, steps: 16 },
		});
		t.log(
			`${model.dtype}: NELBO ${nelbo.toFixed(5)} nats per token, ${match.rate * numbers.length} of ${numbers.length} numbers exact`,
		);
		measured.push({ dtype: model.dtype, nelbo, match: match.rate });
	}
	const [full, ...narrow] = measured as [(typeof measured)[0], ...typeof measured];
	t.true(full.match >= 0.75);
	t.deepEqual(
		narrow.map(({ dtype }) => dtype),
		['bf16', 'int8'],
	);
	const held = (model: DiffuGPT) => model.engine.run((native) => native.memory().parameters);
	t.true((await held(bf16)) < 0.55 * (await held(fp32)));
	t.true((await held(int8)) < 0.3 * (await held(fp32)));
	for (const { dtype, nelbo, match } of narrow) {
		t.true(Math.abs(nelbo - full.nelbo) < (dtype === 'bf16' ? 0.002 : 0.01) * full.nelbo, dtype);
		t.not(nelbo, full.nelbo, dtype);
		t.true(match >= full.match - 1 / numbers.length, dtype);
	}
});

test('bf16 weights are the stored ones rounded, from files of any type, and save exactly', async (t) => {
	await using fp32 = await DiffuGPT.fromConfig(config, { device: 'cpu', seed: 3 });
	const plain = fresh();
	const half = fresh();
	await fp32.save(plain);
	await fp32.save(half, { dtype: 'bf16' });
	await using bf16 = await DiffuGPT.fromPretrained(plain, { device: 'cpu', dtype: 'bf16' });
	t.is(bf16.dtype, 'bf16');
	// What a file in bf16 holds is what the weights are rounded to; position embeddings stay as they are.
	await using stored = await DiffuGPT.fromPretrained(half, { device: 'cpu', dtype: 'fp32' });
	for (const { name, shape } of fp32.parameters()) {
		const isHeldNarrow = shape.length === 2 && name !== 'wpe.weight';
		t.deepEqual(bf16.getParameter(name), (isHeldNarrow ? stored : fp32).getParameter(name), name);
	}

	// By default saved in fp32, which keeps every bit. Products are those of fp32 with these weights, or round what they
	// multiply, too.
	const saved = fresh();
	await bf16.save(saved);
	await using again = await DiffuGPT.fromPretrained(saved, { device: 'cpu', dtype: 'bf16' });
	const expected = await bf16.forward(ids);
	t.deepEqual(await again.forward(ids), expected);
	await using widened = await DiffuGPT.fromPretrained(saved, { device: 'cpu', dtype: 'fp32' });
	const [logits] = (await widened.forward(ids)) as [Float32Array];
	const magnitude = logits.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
	const largest = logits.reduce((most, value, i) => Math.max(most, Math.abs(value - (expected[0]?.[i] as number))), 0);
	t.true(largest <= (info().cpu.bf16 === 'fp32' ? 1e-5 : 0.02) * magnitude, `${largest} of ${magnitude}`);

	// With a cache products have one row; its logits are those of the whole sequence.
	const options = { sampler: 'autoregressive', length: 8, temperature: 0 } as const;
	const { sequence } = await bf16.generate({ tokens: ids.subarray(0, 6).slice() }, options);
	const [causal] = (await bf16.forward(sequence, { attention: 'causal' })) as [Float32Array];
	for (let i = 6; i < sequence.length; i++) {
		const row = causal.slice((i - 1) * config.vocab, i * config.vocab);
		row[config.maskId] = -Infinity;
		t.is(row.indexOf(Math.max(...row)), sequence[i] as number);
	}
});

test('an int8 model saves what it holds, and loads it again', async (t) => {
	await using fp32 = await DiffuGPT.fromConfig(config, { device: 'cpu', seed: 3 });
	const plain = fresh();
	await fp32.save(plain);
	await using int8 = await DiffuGPT.fromPretrained(plain, { device: 'cpu', dtype: 'int8' });
	const expected = await int8.forward(ids);
	const first = fresh();
	await int8.save(first);
	const bytes = readFileSync(join(first, 'model.safetensors'));
	const stored = JSON.parse(readFileSync(join(first, 'config.json'), 'utf8')) as Record<string, unknown>;
	t.deepEqual(stored['quantization_config'], { quant_method: 'diffusion_native', bits: 8 });

	const file = binding().openSafetensors(join(first, 'model.safetensors'));
	const kinds = new Map(file.tensors.map(({ name, dtype, shape }) => [name, `${dtype} ${shape}`]));
	t.is(kinds.get('transformer.wte.weight'), 'I8 97,48');
	t.is(kinds.get('transformer.wte.weight.scale'), 'F32 97');
	t.is(kinds.get('transformer.h.1.mlp.c_fc.weight'), 'I8 48,192');
	t.is(kinds.get('transformer.h.1.mlp.c_fc.weight.scale'), 'F32 192');
	t.is(kinds.get('transformer.wpe.weight'), 'F32 32,48');
	file.close();

	await using again = await DiffuGPT.fromPretrained(first, { device: 'cpu', dtype: 'int8' });
	t.deepEqual(await again.forward(ids), expected);
	const second = fresh();
	await again.save(second);
	t.true(readFileSync(join(second, 'model.safetensors')).equals(bytes), 'the second file has the bytes of the first');
	const third = fresh();
	await fp32.save(third, { dtype: 'int8' });
	t.true(readFileSync(join(third, 'model.safetensors')).equals(bytes), 'so has one saved from fp32');

	// fp32 widens what is stored.
	await using widened = await DiffuGPT.fromPretrained(first, { device: 'cpu', dtype: 'fp32' });
	for (const { name } of int8.parameters()) t.deepEqual(widened.getParameter(name), int8.getParameter(name), name);
	// So does bf16, and rounds; what it would be as int8 it saves.
	await using bf16 = await DiffuGPT.fromPretrained(first, { device: 'cpu', dtype: 'bf16' });
	const rounded = bf16.getParameter('wte.weight');
	const steps = new Int32Array(rounded.buffer).filter((bits) => (bits & 0xffff) !== 0);
	t.is(steps.length, 0, 'bf16 has the upper halves of fp32');
	t.true(widened.getParameter('wte.weight').every((x, i) => Math.abs(x - (rounded[i] as number)) <= Math.abs(x) / 256));
	const fourth = fresh();
	await bf16.save(fourth, { dtype: 'int8' });
	await using quantised = await DiffuGPT.fromPretrained(fourth, { device: 'cpu', dtype: 'int8' });
	const [logits, near] = [expected[0], (await quantised.forward(ids))[0]] as [Float32Array, Float32Array];
	const largest = logits.reduce((most, x, i) => Math.max(most, Math.abs(x - (near[i] as number))), 0);
	t.true(largest < 0.05 * logits.reduce((most, x) => Math.max(most, Math.abs(x)), 0), String(largest));
	const exact = fp32.getParameter('wte.weight');
	const difference = int8.getParameter('wte.weight').map((value, i) => value - (exact[i] as number));
	t.true(difference.some((d) => d !== 0) && difference.every((d) => Math.abs(d) < 0.001));
});

test('results do not depend on threads or on the batch', async (t) => {
	for (const dtype of ['bf16', 'int8'] as const) {
		const logits: Float32Array[] = [];
		for (const threads of [1, 2]) {
			await using model = await DiffuGPT.fromConfig(config, { device: 'cpu', dtype, seed: 5, threads });
			const [alone] = await model.forward(ids);
			const [, inBatch] = await model.forward([ids.subarray(3).slice(), ids]);
			t.deepEqual(inBatch, alone);
			logits.push(alone as Float32Array);
		}
		t.deepEqual(logits[1], logits[0], dtype);
	}
});

test('what narrow weights cannot do is refused with a reason', async (t) => {
	for (const dtype of ['bf16', 'int8'] as const) {
		await using model = await DiffuGPT.fromConfig(config, { device: 'cpu', dtype });
		t.throws(() => new Trainer(model, { maxSteps: 1 }), {
			code: 'ERR_DN_ARGUMENT',
			message: new RegExp(`'${dtype}' cannot be trained`),
		});
		const wte = model.getParameter('wte.weight');
		for (const value of [Number.NaN, dtype === 'bf16' ? 3.4e38 : Number.POSITIVE_INFINITY]) {
			const values = wte.slice();
			values[7] = value;
			t.throws(() => model.setParameter('wte.weight', values), {
				code: 'ERR_DN_ARGUMENT',
				message: /wte\.weight.*not finite/,
			});
		}
		t.deepEqual(model.getParameter('wte.weight'), wte, 'nothing was set');
	}
	await using model = await DiffuGPT.fromConfig(config, { device: 'cpu', dtype: 'int8' });
	await t.throwsAsync(model.save(fresh(), { dtype: 'int4' as 'int8' }), {
		code: 'ERR_DN_ARGUMENT',
		message: /expected 'fp32', 'fp16', 'bf16' or 'int8'/,
	});
	t.regex(info().cpu.bf16, /^(fp32|avx512-bf16|amx-bf16)$/);
	t.regex(info().cpu.int8, /^(portable|avx2|avx-vnni|avx512-vnni|amx-int8)$/);
});

test('damaged int8 directories are refused with the tensor', async (t) => {
	await using model = await DiffuGPT.fromConfig(config, { device: 'cpu', dtype: 'int8' });
	const good = fresh();
	await model.save(good);
	const bytes = readFileSync(join(good, 'model.safetensors'));
	const length = Number(bytes.readBigUInt64LE(0));
	type Header = Record<string, { dtype: string; shape: number[]; data_offsets: [number, number] }>;
	const header = JSON.parse(bytes.toString('utf8', 8, 8 + length)) as Header;
	const name = 'transformer.h.0.attn.c_proj.weight';
	const scale = `${name}.scale`;
	const damaged = async (change: (header: Header, data: Buffer) => void, message: RegExp): Promise<void> => {
		const copy = structuredClone(header);
		const data = Buffer.from(bytes.subarray(8 + length));
		change(copy, data);
		const json = Buffer.from(JSON.stringify(copy));
		const prefix = Buffer.alloc(8);
		prefix.writeBigUInt64LE(BigInt(json.length));
		const directory = fresh();
		await model.save(directory);
		writeFileSync(join(directory, 'model.safetensors'), Buffer.concat([prefix, json, data]));
		await t.throwsAsync(DiffuGPT.fromPretrained(directory, { device: 'cpu', dtype: 'int8' }), {
			code: 'ERR_DN_CHECKPOINT',
			message,
		});
		await t.throwsAsync(DiffuGPT.fromPretrained(directory, { device: 'cpu', dtype: 'fp32' }), {
			code: 'ERR_DN_CHECKPOINT',
			message,
		});
	};
	const entry = (from: Header, key: string): Header[string] => from[key] as Header[string];
	await damaged((h, data) => {
		data.writeFloatLE(Number.NaN, entry(h, scale).data_offsets[0] + 8);
	}, /c_proj\.weight\.scale.*NaN at index 2/);
	await damaged((h, data) => {
		data.writeFloatLE(-1, entry(h, scale).data_offsets[0]);
	}, /c_proj\.weight\.scale.*scale 0 is -1/);
	await damaged((h, data) => {
		data.writeInt8(-128, entry(h, name).data_offsets[0] + 5);
	}, /c_proj\.weight.*index 5 is -128/);
	await damaged((h) => {
		entry(h, scale).shape = [24, 2];
	}, /c_proj\.weight\.scale is F32 \(24, 2\), expected F32 \(48\)/);
	await damaged((h) => {
		h['transformer.other'] = entry(h, scale);
		delete h[scale];
	}, /c_proj\.weight is I8, but its scales.*missing/);
	await damaged((h) => {
		entry(h, name).dtype = 'U8';
	}, /c_proj\.weight is U8, expected F32, F16 or BF16, or I8/);

	const foreign = fresh();
	await model.save(foreign);
	const json = JSON.parse(readFileSync(join(foreign, 'config.json'), 'utf8')) as object;
	writeFileSync(
		join(foreign, 'config.json'),
		JSON.stringify({ ...json, quantization_config: { quant_method: 'gptq', bits: 4 } }),
	);
	await t.throwsAsync(DiffuGPT.fromPretrained(foreign, { device: 'cpu' }), {
		code: 'ERR_DN_CHECKPOINT',
		message: /quantization_config is .*gptq.*expected a quantisation of this package/,
	});
});
