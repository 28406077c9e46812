/** Writes small safetensors files and GPT-2 model directories in every spelling, without the library under test. */
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

export interface TensorData {
	dtype: 'F32' | 'F16' | 'BF16' | 'U8' | 'I64';
	shape: number[];
	data: Uint8Array;
}

export type Tensors = Record<string, TensorData>;

/** Sizes of the model that the directories hold: V is odd, C splits in two heads. */
export const tiny = { layers: 2, heads: 2, channels: 8, context: 16, vocab: 67 } as const;

export const tinyConfig: Readonly<Record<string, unknown>> = {
	model_type: 'gpt2',
	architectures: ['GPT2LMHeadModel'],
	n_layer: tiny.layers,
	n_head: tiny.heads,
	n_embd: tiny.channels,
	n_positions: tiny.context,
	n_ctx: tiny.context,
	vocab_size: tiny.vocab,
	activation_function: 'gelu_new',
	layer_norm_epsilon: 1e-5,
	bos_token_id: 66,
	eos_token_id: 66,
};

export function f32(shape: number[], values: ArrayLike<number>): TensorData {
	return { dtype: 'F32', shape, data: new Uint8Array(Float32Array.from(values).buffer) };
}

/** The upper half of each fp32, so the values must be exact in bf16. */
export function bf16(shape: number[], values: ArrayLike<number>): TensorData {
	const words = new Uint32Array(Float32Array.from(values).buffer);
	return { dtype: 'BF16', shape, data: new Uint8Array(Uint16Array.from(words, (word) => word >>> 16).buffer) };
}

/** For normal fp16 numbers and zero, which the values must be exactly. */
export function f16(shape: number[], values: ArrayLike<number>): TensorData {
	const words = new Uint32Array(Float32Array.from(values).buffer);
	const halves = Uint16Array.from(words, (word) => {
		const exponent = ((word >>> 23) & 255) - 112;
		return ((word >>> 16) & 0x8000) | (exponent <= 0 ? 0 : (exponent << 10) | ((word >>> 13) & 0x3ff));
	});
	return { dtype: 'F16', shape, data: new Uint8Array(halves.buffer) };
}

export function safetensorsBytes(tensors: Tensors, metadata?: Record<string, string>): Uint8Array {
	const header: Record<string, unknown> = metadata ? { __metadata__: metadata } : {};
	let offset = 0;
	for (const [name, { dtype, shape, data }] of Object.entries(tensors)) {
		header[name] = { dtype, shape, data_offsets: [offset, offset + data.length] };
		offset += data.length;
	}
	let text = JSON.stringify(header);
	text += ' '.repeat((8 - (text.length % 8)) % 8);
	const length = Buffer.alloc(8);
	length.writeBigUInt64LE(BigInt(text.length));
	return Buffer.concat([length, Buffer.from(text), ...Object.values(tensors).map(({ data }) => data)]);
}

/** Names and shapes of a GPT-2 without prefix, matrices [in, out]. */
export function gpt2Shapes(
	size: { layers: number; channels: number; context: number; vocab: number } = tiny,
): [string, number[]][] {
	const C = size.channels;
	const shapes: [string, number[]][] = [
		['wte.weight', [size.vocab, C]],
		['wpe.weight', [size.context, C]],
	];
	for (let i = 0; i < size.layers; i++) {
		for (const norm of ['ln_1', 'ln_2']) shapes.push([`h.${i}.${norm}.weight`, [C]], [`h.${i}.${norm}.bias`, [C]]);
		for (const [name, rows, columns] of [
			['attn.c_attn', C, 3 * C],
			['attn.c_proj', C, C],
			['mlp.c_fc', C, 4 * C],
			['mlp.c_proj', 4 * C, C],
		] as const) {
			shapes.push([`h.${i}.${name}.weight`, [rows, columns]], [`h.${i}.${name}.bias`, [columns]]);
		}
	}
	shapes.push(['ln_f.weight', [C]], ['ln_f.bias', [C]]);
	return shapes;
}

/** Values that are exact in fp32, fp16 and bf16, different in every tensor. */
export function gpt2Values(
	size: { layers: number; channels: number; context: number; vocab: number } = tiny,
): Map<string, Float32Array> {
	let state = 12345;
	const draw = (): number => {
		state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
		return ((state >>> 16) % 127) / 64 - 1;
	};
	return new Map(
		gpt2Shapes(size).map(([name, shape]) => [
			name,
			Float32Array.from({ length: shape.reduce((a, b) => a * b, 1) }, draw),
		]),
	);
}

/** The tensors of a GPT-2 under other names; `rename` returning undefined leaves one out. */
export function gpt2Tensors(
	rename: (name: string) => string | undefined = (name) => name,
	encode: (shape: number[], values: ArrayLike<number>) => TensorData = f32,
	size: { layers: number; channels: number; context: number; vocab: number } = tiny,
): Tensors {
	const values = gpt2Values(size);
	const tensors: Tensors = {};
	for (const [name, shape] of gpt2Shapes(size)) {
		const renamed = rename(name);
		if (renamed !== undefined) tensors[renamed] = encode(shape, values.get(name) as Float32Array);
	}
	return tensors;
}

/** Writes files into a new directory; objects become JSON, tensors safetensors. */
export function writeModel(directory: string, files: Record<string, Uint8Array | string | object>): string {
	mkdirSync(directory, { recursive: true });
	for (const [name, content] of Object.entries(files)) {
		const isText = typeof content === 'string' || content instanceof Uint8Array;
		writeFileSync(join(directory, name), isText ? content : JSON.stringify(content));
	}
	return directory;
}
