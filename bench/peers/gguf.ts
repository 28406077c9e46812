/** Writes a GPT-2 as GGUF version 3, the file format of llama.cpp, with weights in F32, F16, BF16 or blocks of 32 (Q8_0). */
import { closeSync, openSync, writeSync } from 'node:fs';

import type { Weights } from './weights.js';

export type GgufType = 'F32' | 'F16' | 'BF16' | 'Q8_0';

/** Numbers of the format: the tensor's type, the file's type, bytes of 32 values. */
const types = {
	F32: { tensor: 0, file: 0, bytes: 128 },
	F16: { tensor: 1, file: 1, bytes: 64 },
	BF16: { tensor: 30, file: 32, bytes: 64 },
	Q8_0: { tensor: 8, file: 7, bytes: 34 },
} as const;
const alignment = 32;

const bits = new Float32Array(1);
const word = new Uint32Array(bits.buffer);

/** fp16 of a finite value, rounded to nearest even. */
export function toHalf(value: number): number {
	bits[0] = value;
	const u = word[0] as number;
	const sign = (u >>> 16) & 0x8000;
	const exponent = ((u >>> 23) & 0xff) - 112;
	const fraction = (u & 0x7fffff) | 0x800000;
	if (exponent >= 31) return sign | 0x7c00;
	const dropped = exponent > 0 ? 13 : 14 - exponent;
	if (dropped > 24) return sign;
	const kept = fraction >>> dropped;
	const rest = fraction & ((1 << dropped) - 1);
	const half = 1 << (dropped - 1);
	const up = rest > half || (rest === half && (kept & 1) === 1) ? 1 : 0;
	// With an exponent the leading bit of `kept` adds one to it; a carry out of the fraction does the same.
	return sign | ((exponent > 0 ? ((exponent - 1) << 10) + kept : kept) + up);
}

/** bf16 of a finite value, rounded to nearest even. */
export function toBfloat(value: number): number {
	bits[0] = value;
	const u = word[0] as number;
	return (u + 0x7fff + ((u >>> 16) & 1)) >>> 16;
}

function encode(values: Float32Array, type: GgufType): Uint8Array {
	if (type === 'F32') return new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
	if (type === 'F16' || type === 'BF16') {
		const convert = type === 'F16' ? toHalf : toBfloat;
		const out = new Uint16Array(values.length);
		for (let i = 0; i < out.length; i++) out[i] = convert(values[i] as number);
		return new Uint8Array(out.buffer);
	}
	const out = new DataView(new ArrayBuffer((values.length / 32) * types.Q8_0.bytes));
	for (let block = 0; block * 32 < values.length; block++) {
		const at = block * types.Q8_0.bytes;
		let largest = 0;
		for (let i = 0; i < 32; i++) largest = Math.max(largest, Math.abs(values[block * 32 + i] as number));
		const scale = largest / 127;
		out.setUint16(at, toHalf(scale), true);
		for (let i = 0; i < 32; i++) {
			const q = scale === 0 ? 0 : Math.round((values[block * 32 + i] as number) / scale);
			out.setInt8(at + 2 + i, q);
		}
	}
	return new Uint8Array(out.buffer);
}

/** (in, out) to (out, in), which is how the format stores a linear layer. */
function transpose(w: Float32Array, rows: number, columns: number): Float32Array {
	const out = new Float32Array(w.length);
	for (let r = 0; r < rows; r++) for (let c = 0; c < columns; c++) out[c * rows + r] = w[r * columns + c] as number;
	return out;
}

const u32 = (value: number) => Buffer.from(Uint32Array.of(value).buffer);
const u64 = (value: number) => Buffer.from(BigUint64Array.of(BigInt(value)).buffer);
const text = (value: string) => Buffer.concat([u64(Buffer.byteLength(value)), Buffer.from(value)]);

type Field = { u32: number } | { f32: number } | { text: string } | { texts: string[] } | { i32s: number[] };

function field(key: string, value: Field): Buffer {
	const head = text(key);
	if ('u32' in value) return Buffer.concat([head, u32(4), u32(value.u32)]);
	if ('f32' in value) return Buffer.concat([head, u32(6), Buffer.from(Float32Array.of(value.f32).buffer)]);
	if ('text' in value) return Buffer.concat([head, u32(8), text(value.text)]);
	const list = 'texts' in value ? value.texts.map(text) : [Buffer.from(Int32Array.from(value.i32s).buffer)];
	const count = 'texts' in value ? value.texts.length : value.i32s.length;
	return Buffer.concat([head, u32(9), u32('texts' in value ? 8 : 5), u64(count), ...list]);
}

interface Stored {
	name: string;
	shape: number[];
	type: GgufType;
	values(): Float32Array;
}

/** The tensors under llama.cpp's names; vectors and positions stay F32. */
function tensors(weights: Weights, type: GgufType): Stored[] {
	const { layers, channels: C, vocab, context } = weights.config;
	const plain = (name: string, source: string, shape: number[], as: GgufType = 'F32'): Stored => ({
		name,
		shape,
		type: as,
		values: () => weights.get(source),
	});
	const linear = (name: string, source: string, inputs: number, outputs: number): Stored[] => [
		{
			name: `${name}.weight`,
			shape: [outputs, inputs],
			type,
			values: () => transpose(weights.get(`${source}.weight`), inputs, outputs),
		},
		plain(`${name}.bias`, `${source}.bias`, [outputs]),
	];
	const norm = (name: string, source: string): Stored[] =>
		['weight', 'bias'].map((part) => plain(`${name}.${part}`, `${source}.${part}`, [C]));
	return [
		plain('token_embd.weight', 'wte.weight', [vocab, C], type),
		plain('position_embd.weight', 'wpe.weight', [context, C]),
		...norm('output_norm', 'ln_f'),
		...Array.from({ length: layers }, (_, l) => [
			...norm(`blk.${l}.attn_norm`, `h.${l}.ln_1`),
			...linear(`blk.${l}.attn_qkv`, `h.${l}.attn.c_attn`, C, 3 * C),
			...linear(`blk.${l}.attn_output`, `h.${l}.attn.c_proj`, C, C),
			...norm(`blk.${l}.ffn_norm`, `h.${l}.ln_2`),
			...linear(`blk.${l}.ffn_up`, `h.${l}.mlp.c_fc`, C, 4 * C),
			...linear(`blk.${l}.ffn_down`, `h.${l}.mlp.c_proj`, 4 * C, C),
		]).flat(),
	];
}

export function writeGguf(path: string, weights: Weights, type: GgufType): void {
	const { layers, heads, channels, vocab, context } = weights.config;
	const end = vocab - 1;
	const fields = [
		field('general.architecture', { text: 'gpt2' }),
		field('general.name', { text: 'random' }),
		field('general.file_type', { u32: types[type].file }),
		field('gpt2.context_length', { u32: context }),
		field('gpt2.embedding_length', { u32: channels }),
		field('gpt2.block_count', { u32: layers }),
		field('gpt2.feed_forward_length', { u32: 4 * channels }),
		field('gpt2.attention.head_count', { u32: heads }),
		field('gpt2.attention.layer_norm_epsilon', { f32: 1e-5 }),
		field('tokenizer.ggml.model', { text: 'gpt2' }),
		field('tokenizer.ggml.pre', { text: 'gpt-2' }),
		field('tokenizer.ggml.tokens', {
			texts: Array.from({ length: vocab }, (_, i) => (i === end ? '<|end|>' : `t${i}`)),
		}),
		field('tokenizer.ggml.token_type', { i32s: Array.from({ length: vocab }, (_, i) => (i === end ? 3 : 1)) }),
		field('tokenizer.ggml.merges', { texts: ['t 1', 't 2'] }),
		field('tokenizer.ggml.bos_token_id', { u32: end }),
		field('tokenizer.ggml.eos_token_id', { u32: end }),
	];
	const list = tensors(weights, type);
	const padded = (size: number) => Math.ceil(size / alignment) * alignment;
	let offset = 0;
	const table = list.map(({ name, shape, type: as }) => {
		const entry = Buffer.concat([
			text(name),
			u32(shape.length),
			...[...shape].reverse().map(u64),
			u32(types[as].tensor),
			u64(offset),
		]);
		offset += padded((shape.reduce((product, size) => product * size) / 32) * types[as].bytes);
		return entry;
	});
	const file = openSync(path, 'w');
	let written = 0;
	const write = (piece: Uint8Array): void => {
		for (let at = 0; at < piece.byteLength; ) at += writeSync(file, piece, at);
		written += piece.byteLength;
	};
	const pad = (): void => write(new Uint8Array(padded(written) - written));
	try {
		const counts = [u64(list.length), u64(fields.length)];
		for (const piece of [Buffer.from('GGUF'), u32(3), ...counts, ...fields, ...table]) write(piece);
		pad();
		for (const { values, type: as } of list) {
			write(encode(values(), as));
			pad();
		}
	} finally {
		closeSync(file);
	}
}
