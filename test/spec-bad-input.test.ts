/**
 * Bad input through the public names: every case must be a `DiffusionNativeError` with the documented code and a message that
 * names the file, tensor, option or field. Files are made by hand, byte by byte.
 */
import { spawn } from 'node:child_process';
import { existsSync, mkdirSync, mkdtempSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import test from 'ava';
import { DiffuGPT, type PrepareOptions, prepare, TokenDataset, Tokenizer } from 'diffusion-native';

import { root } from './helpers/fixtures.js';
import { refuses } from './helpers/refuses.js';
import { f32, gpt2Tensors, gpt2Values, safetensorsBytes, tinyConfig, writeModel } from './helpers/safetensors.js';

const scratch = mkdtempSync(join(tmpdir(), 'dn-spec-bad-'));
let count = 0;
const fresh = (): string => join(scratch, String(count++));
test.after.always(() => rmSync(scratch, { recursive: true, force: true }));

type Header = Record<string, { dtype?: unknown; shape?: unknown; data_offsets?: unknown }>;
const whole = Buffer.from(safetensorsBytes(gpt2Tensors()));
const headerLength = Number(whole.readBigUInt64LE(0));
const headerText = whole.toString('utf8', 8, 8 + headerLength);
const data = whole.subarray(8 + headerLength);

/** A file from any header text, with any claimed length of it. */
function file(header: string, body: Uint8Array = data, claim?: bigint): Buffer {
	const bytes = Buffer.from(header);
	const length = Buffer.alloc(8);
	length.writeBigUInt64LE(claim ?? BigInt(bytes.length));
	return Buffer.concat([length, bytes, body]);
}

function changed(change: (header: Header) => void): Buffer {
	const header = JSON.parse(headerText) as Header;
	change(header);
	return file(JSON.stringify(header));
}

const bias = (fields: Header[string]) => changed((header) => Object.assign(header['ln_f.bias'] as object, fields));

const malformed: [string, Buffer, RegExp][] = [
	['an empty file', Buffer.alloc(0), /0 bytes/],
	['seven bytes', Buffer.alloc(7), /7 bytes/],
	['a header of 1 GB', file('{}', data, 1n << 30n), /1073741824/],
	['a header of 2^63 bytes', file('{}', data, 1n << 63n), /9223372036854775808/],
	['a header of 2^64 - 1 bytes', file('{}', data, (1n << 64n) - 1n), /18446744073709551615/],
	['a header longer than the file', file('{}', Buffer.alloc(0), 4096n), /4096.*truncated/],
	['a header that is no JSON', file('{"ln_f.bias":'), /header/],
	['a header that is a list', file('[]'), /header/],
	['a header nested 10^5 deep', file(`{"a":${'['.repeat(100_000)}`), /header|deep|nest/],
	['bytes past the end', bias({ data_offsets: [data.length - 16, data.length + 16] }), /ln_f\.bias.*past the/],
	['overlapping bytes', bias({ data_offsets: [0, 32] }), /overlap.*ln_f\.bias|ln_f\.bias.*overlap/],
	['a negative offset', bias({ data_offsets: [-32, 0] }), /ln_f\.bias.*non-negative/],
	['reversed offsets', bias({ data_offsets: [64, 32] }), /ln_f\.bias.*reversed/],
	['offsets that are no integers', bias({ data_offsets: [0.5, 32.5] }), /ln_f\.bias.*integers/],
	[
		'an offset beyond 64 bits',
		file(headerText.replace('"data_offsets":[0,', '"data_offsets":[18446744073709551616,')),
		/wte\.weight/,
	],
	['a shape that does not fit its bytes', bias({ shape: [9] }), /ln_f\.bias.*32 bytes, expected 36/],
	['a negative shape', bias({ shape: [-8] }), /ln_f\.bias.*shape/],
	['a shape whose product overflows', bias({ shape: [2 ** 32, 2 ** 32] }), /ln_f\.bias.*too large/],
	['no shape', bias({ shape: undefined }), /ln_f\.bias.*shape/],
	['an unknown dtype', bias({ dtype: 'Q4' }), /ln_f\.bias.*"Q4"/],
	['an integer dtype', bias({ dtype: 'I32' }), /ln_f\.bias.*I32, expected F32, F16 or BF16/],
	[
		'a name twice',
		file(headerText.replace('{', '{"ln_f.bias":{"dtype":"F32","shape":[8],"data_offsets":[0,32]},')),
		/"ln_f\.bias" appears twice/,
	],
	['bytes after the last tensor', Buffer.concat([whole, Buffer.alloc(8)]), /8 bytes after/],
	['the last byte missing', whole.subarray(0, -1), /ln_f\.bias.*past the .*truncated/],
	['the file cut in its header', whole.subarray(0, 100), /truncated/],
];

const load = (path: string, options: object = {}): Promise<DiffuGPT> =>
	DiffuGPT.fromPretrained(path, { device: 'cpu', threads: 1, ...options });

test('malformed weight files are refused with the file and the tensor', async (t) => {
	for (const [label, bytes, message] of malformed) {
		const path = writeModel(fresh(), { 'config.json': tinyConfig, 'model.safetensors': bytes });
		await refuses(t, () => load(path), 'ERR_DN_CHECKPOINT', message, label);
		await refuses(t, () => load(path), 'ERR_DN_CHECKPOINT', new RegExp(join(path, 'model.safetensors')), label);
	}
	for (const value of [Number.NaN, Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY]) {
		const values = gpt2Values().get('h.1.mlp.c_proj.weight') as Float32Array;
		values[7] = value;
		const tensors = { ...gpt2Tensors(), 'h.1.mlp.c_proj.weight': f32([32, 8], values) };
		const path = writeModel(fresh(), { 'config.json': tinyConfig, 'model.safetensors': safetensorsBytes(tensors) });
		await refuses(t, () => load(path), 'ERR_DN_CHECKPOINT', /h\.1\.mlp\.c_proj\.weight.*index 7/, String(value));
	}
});

test('configurations that are missing, contradictory or of another architecture are refused with the field', async (t) => {
	for (const [change, message] of [
		[{ n_head: undefined }, /n_head is missing/],
		[{ n_positions: undefined, n_ctx: undefined }, /n_positions is missing/],
		[{ n_ctx: 15 }, /n_positions is 16 but n_ctx is 15/],
		[{ n_head: 0 }, /n_head is 0/],
		[{ n_layer: 2.5 }, /n_layer is 2\.5/],
		[{ n_layer: 1 }, /h\.1\.ln_1/],
		[{ n_layer: 3 }, /h\.2\.ln_1/],
		[{ n_embd: 16 }, /wte\.weight/],
		[{ model_type: 'gpt2', architectures: ['LlamaForCausalLM'] }, /LlamaForCausalLM/],
		[{ model_type: 'llama', architectures: ['GPT2LMHeadModel'] }, /llama/],
		[{ activation_function: 'relu' }, /activation_function is "relu"/],
		[{ scale_attn_by_inverse_layer_idx: true }, /scale_attn_by_inverse_layer_idx/],
		[{ add_cross_attention: true }, /add_cross_attention/],
		[{ pad_token_id: 67 }, /pad_token_id is 67/],
		[{ mask_token_id: 67 }, /mask id is 67/],
		[{ diffusion_native: { shift: 'yes' } }, /diffusion_native\.shift/],
	] as [object, RegExp][]) {
		const path = writeModel(fresh(), { 'config.json': { ...tinyConfig, ...change }, 'model.safetensors': whole });
		await refuses(t, () => load(path), 'ERR_DN_CHECKPOINT', message, JSON.stringify(change));
		await refuses(t, () => load(path), 'ERR_DN_CHECKPOINT', new RegExp(path), JSON.stringify(change));
	}
	const path = writeModel(fresh(), { 'config.json': tinyConfig, 'model.safetensors': whole });
	for (const config of [{ maskId: 67 }, { maskId: Number.NaN }, { colour: 1 }, { family: 'llama' }, { eosId: -2 }])
		await refuses(t, () => load(path, { config }), 'ERR_DN_ARGUMENT', /config\./, JSON.stringify(config));
});

test('paths that are missing, files, or not readable as what they should be', async (t) => {
	const directory = writeModel(fresh(), { 'config.json': tinyConfig });
	mkdirSync(join(directory, 'model.safetensors'));
	await refuses(
		t,
		() => load(directory),
		'ERR_DN_CHECKPOINT',
		/model\.safetensors.*directory/,
		'a directory as weights',
	);
	const other = writeModel(fresh(), { 'model.safetensors': whole });
	mkdirSync(join(other, 'config.json'));
	await refuses(t, () => load(other), 'ERR_DN_CHECKPOINT', /config\.json/, 'a directory as config');
	const torch = writeModel(fresh(), { 'config.json': tinyConfig, 'pytorch_model.bin': 'x' });
	await refuses(t, () => load(torch), 'ERR_DN_CHECKPOINT', /neither model\.safetensors/, 'a torch checkpoint');
	await refuses(t, () => load(join(scratch, 'nowhere')), 'ERR_DN_CHECKPOINT', /nowhere/, 'no directory');
	await refuses(t, () => load(join(torch, 'config.json')), 'ERR_DN_ARGUMENT', /config\.json is a file/, 'a file');
	await refuses(t, () => load(''), 'ERR_DN_ARGUMENT', /empty name/, 'no name');
	for (const bytes of ['{nope', '[]', Buffer.from([0xff, 0xfe])]) {
		const broken = writeModel(fresh(), {
			'config.json': tinyConfig,
			'model.safetensors': whole,
			'tokenizer.json': bytes,
		});
		await refuses(t, () => load(broken), 'ERR_DN_CHECKPOINT', /tokenizer\.json/, `tokenizer ${bytes}`);
	}
});

test('files that are no text, or lack what the format needs, leave no token file behind', async (t) => {
	const folder = fresh();
	mkdirSync(folder);
	const write = (name: string, bytes: string | Uint8Array): string => {
		writeFileSync(join(folder, name), bytes);
		return join(folder, name);
	};
	const tokenizer = Tokenizer.gpt2();
	for (const [path, options, message] of [
		[write('empty.jsonl', ''), {}, /empty\.jsonl is empty/],
		[write('empty.csv', ''), {}, /empty\.csv is empty/],
		[write('header.csv', 'text\n'), {}, /header\.csv is empty/],
		[write('quote.csv', 'text\n"open\n'), {}, /quote\.csv.*line 2/],
		[write('columns.csv', 'a,b\n1,2\n'), { format: 'pairs' }, /columns\.csv.*'prompt'.*'a', 'b'/],
		[write('list.jsonl', '[1]\n'), {}, /list\.jsonl, line 1/],
		[write('null.jsonl', '{"text":"a"}\nnull\n'), {}, /null\.jsonl, line 2/],
		[write('binary.jsonl', Buffer.from([0x7b, 0, 0x7d])), {}, /binary\.jsonl.*binary/],
		[write('latin.csv', Buffer.from('text\ncaf\xe9\n', 'latin1')), {}, /latin\.csv.*UTF-8/],
		[write('line.csv', `text\n${'x'.repeat(5000)}\n`), { maxLine: 1000 }, /line\.csv.*1000/],
		[
			write('prompt.jsonl', '{"prompt":"","answer":"b"}\n'),
			{ format: 'pairs' },
			/prompt\.jsonl, line 1.*prompt is empty/,
		],
	] as [string, Partial<PrepareOptions>, RegExp][]) {
		const out = join(folder, 'out.bin');
		await refuses(
			t,
			() => prepare(path, { tokenizer, out, format: 'documents', ...options }),
			'ERR_DN_ARGUMENT',
			message,
			path,
		);
		t.false(existsSync(out), path);
	}
	const missing = { tokenizer, out: join(folder, 'out.bin'), format: 'documents' } as const;
	await refuses(t, () => prepare(join(folder, 'missing.txt'), missing), 'ERR_DN_CHECKPOINT', /missing\.txt/, 'missing');
	t.deepEqual(
		readdirSync(folder).filter((name) => /tmp|\.bin/.test(name)),
		[],
	);
	const text = [{ text: 'some text' }];
	await refuses(
		t,
		() => prepare(text, { tokenizer, out: '/proc/x.bin', format: 'documents' }),
		'ERR_DN_CHECKPOINT',
		/\/proc\/x\.bin/,
		'unwritable',
	);
	await refuses(
		t,
		() => prepare([{ tokens: Int32Array.of(50257) }], { tokenizer, out: fresh(), format: 'documents' }),
		'ERR_DN_ARGUMENT',
		/50257/,
		'an id beyond the vocabulary',
	);
	for (const promptLength of [-1, 1.5, 4]) {
		const pair = [{ tokens: Int32Array.of(1, 2, 3), promptLength }];
		const options = { tokenizer, out: fresh(), format: 'pairs' } as const;
		await refuses(t, () => prepare(pair, options), 'ERR_DN_ARGUMENT', /record 0: promptLength/, String(promptLength));
	}
	await refuses(
		t,
		() => TokenDataset.open(write('empty.bin', '')),
		'ERR_DN_CHECKPOINT',
		/empty\.bin/,
		'an empty token file',
	);
	await refuses(t, () => TokenDataset.open(folder), 'ERR_DN_CHECKPOINT', /not a file/, 'a folder');
});

/** Runs the command line; its exit status and what it wrote. */
function run(...parameters: string[]): Promise<{ code: number | null; stdout: string; stderr: string }> {
	return new Promise((resolve, reject) => {
		const child = spawn(process.execPath, [join(root, 'dist', 'lib', 'cli', 'main.js'), ...parameters], {
			stdio: ['ignore', 'pipe', 'pipe'],
		});
		let stdout = '';
		let stderr = '';
		child.stdout.setEncoding('utf8').on('data', (chunk: string) => {
			stdout += chunk;
		});
		child.stderr.setEncoding('utf8').on('data', (chunk: string) => {
			stderr += chunk;
		});
		child.on('error', reject);
		child.on('close', (code) => resolve({ code, stdout, stderr }));
	});
}

test('every command: --help is 0, wrong usage 2, a failure 1, and errors are one line on standard error', async (t) => {
	const missing = join(scratch, 'missing');
	const cases: [number, RegExp, string[]][] = [
		...['generate', 'train', 'prepare', 'eval', 'info'].map((name): [number, RegExp, string[]] => [
			0,
			/^$/,
			[name, '--help'],
		]),
		...['generate', 'train', 'prepare', 'eval', 'info'].map((name): [number, RegExp, string[]] => [
			2,
			/--bogus|required/,
			[name, '--bogus'],
		]),
		[2, /config/, ['train']],
		[2, /inputs/, ['prepare', '--out', 'x.bin']],
		[1, /ERR_DN_CHECKPOINT.*missing/, ['train', '--config', missing]],
		[1, /ERR_DN_CHECKPOINT.*missing/, ['train', '--resume', missing]],
		[1, /ERR_DN_CHECKPOINT.*missing/, ['prepare', missing, '--out', join(scratch, 'out.bin')]],
		[1, /ERR_DN_CHECKPOINT.*missing/, ['eval', missing, missing, '--metric', 'nelbo']],
		[1, /ERR_DN_CHECKPOINT.*missing/, ['generate', missing, 'A']],
	];
	const ended = await Promise.all(cases.map(([, , parameters]) => run(...parameters)));
	for (const [i, [code, message, parameters]] of cases.entries()) {
		const { stdout, stderr, code: actual } = ended[i] as Awaited<ReturnType<typeof run>>;
		const label = `${parameters.join(' ')}: ${stderr}`;
		t.is(actual, code, label);
		t.regex(stderr, message, label);
		if (code > 0) t.is(stdout, '', label);
		t.notRegex(stderr, /\n {4}at /, `no stack trace: ${label}`);
	}
	const { stdout } = await run('info', '--json');
	t.is(typeof (JSON.parse(stdout) as { cpu: { isa: unknown } }).cpu.isa, 'string');
	t.is(stdout.trim().split('\n').length, 1);
});
