/**
 * Writes a bidirectional GPT-2 as ONNX, straight as protobuf. 'fp32' uses the operators that an exporter gives; 'int8' is
 * onnxruntime's dynamic quantisation: weights per output column, activations at run time, and its own fused attention, layer
 * norm and GELU, which is what makes it fastest.
 * Input: ids (1, T) int64. Output: out, (1, T, V) logits or (1, T, C) after the final layer norm.
 */
import { closeSync, openSync, writeSync } from 'node:fs';

import { type Bytes, byteLength, float, integer, message, string } from './protobuf.js';
import type { Weights } from './weights.js';

export interface OnnxOptions {
	dtype: 'fp32' | 'int8';
	output: 'logits' | 'hidden';
}

type Attribute = number | string | readonly number[] | { float: number };

const types = { float32: 1, int8: 3, int64: 7 } as const;
const microsoft = 'com.microsoft';
const domains = { opset: 20, ir: 10 };

/** Nodes and initialisers in the order they are asked for. */
class Graph {
	readonly nodes: Bytes[] = [];
	readonly initialisers: Bytes[] = [];
	readonly #known = new Set<string>();

	constant(name: string, data: Float32Array | Int8Array | BigInt64Array, shape: readonly number[]): string {
		if (this.#known.has(name)) return name;
		this.#known.add(name);
		const type = data instanceof Float32Array ? types.float32 : data instanceof Int8Array ? types.int8 : types.int64;
		this.initialisers.push([
			...shape.flatMap((size) => integer(1, size)),
			...integer(2, type),
			...string(8, name),
			...message(9, [new Uint8Array(data.buffer, data.byteOffset, data.byteLength)]),
		]);
		return name;
	}

	integers(name: string, values: readonly number[]): string {
		return this.constant(name, BigInt64Array.from(values, BigInt), [values.length]);
	}

	scalar(name: string, value: number): string {
		return this.constant(name, BigInt64Array.of(BigInt(value)), []);
	}

	/** Adds a node and names its outputs; '' stands for an input that is left out. */
	op(
		type: string,
		inputs: readonly string[],
		attributes: Record<string, Attribute> = {},
		{ outputs = 1, domain = '', name = '' } = {},
	): string[] {
		const names = Array.from({ length: outputs }, (_, i) =>
			i === 0 && name !== '' ? name : `${type}_${this.nodes.length}_${i}`,
		);
		this.nodes.push([
			...inputs.flatMap((input) => string(1, input)),
			...names.flatMap((output) => string(2, output)),
			...string(3, `node_${this.nodes.length}`),
			...string(4, type),
			...Object.entries(attributes).flatMap(([key, value]) => message(5, attribute(key, value))),
			...(domain === '' ? [] : string(7, domain)),
		]);
		return names;
	}

	/** A node with one output. */
	one(type: string, inputs: readonly string[], attributes: Record<string, Attribute> = {}, domain = ''): string {
		return this.op(type, inputs, attributes, { domain })[0] as string;
	}
}

function attribute(name: string, value: Attribute): Bytes {
	const key = string(1, name);
	if (typeof value === 'number') return [...key, ...integer(3, value), ...integer(20, 2)];
	if (typeof value === 'string') return [...key, ...string(4, value), ...integer(20, 3)];
	if ('float' in value) return [...key, ...float(2, value.float), ...integer(20, 1)];
	return [...key, ...value.flatMap((item) => integer(8, item)), ...integer(20, 7)];
}

/** (K, N) weights as int8 with one scale per column. */
function quantise(w: Float32Array, K: number, N: number): { values: Int8Array; scales: Float32Array } {
	const scales = new Float32Array(N);
	for (let k = 0; k < K; k++)
		for (let n = 0; n < N; n++) scales[n] = Math.max(scales[n] as number, Math.abs(w[k * N + n] as number));
	for (let n = 0; n < N; n++) scales[n] = (scales[n] as number) / 127 || 1;
	const values = new Int8Array(K * N);
	for (let k = 0; k < K; k++)
		for (let n = 0; n < N; n++)
			values[k * N + n] = Math.max(-127, Math.min(127, Math.round((w[k * N + n] as number) / (scales[n] as number))));
	return { values, scales };
}

function transpose(w: Float32Array, rows: number, columns: number): Float32Array {
	const out = new Float32Array(w.length);
	for (let r = 0; r < rows; r++) for (let c = 0; c < columns; c++) out[c * rows + r] = w[r * columns + c] as number;
	return out;
}

export function writeOnnx(path: string, weights: Weights, { dtype, output }: OnnxOptions): void {
	const { layers: L, channels: C, heads: H, vocab: V, context } = weights.config;
	const graph = new Graph();
	const fused = dtype === 'int8';
	const vector = (name: string): string => {
		const data = weights.get(name);
		return graph.constant(name, data, [data.length]);
	};
	const quantised = (x: string, name: string, w: Float32Array, K: number, N: number, bias: string): string => {
		const { values, scales } = quantise(w, K, N);
		const inputs = [
			x,
			graph.constant(`${name}.int8`, values, [K, N]),
			graph.constant(`${name}.scale`, scales, [N]),
			graph.constant(`${name}.zero`, new Int8Array(N), [N]),
			bias,
		];
		return graph.one('DynamicQuantizeMatMul', inputs, {}, microsoft);
	};
	const linear = (x: string, name: string, K: number, N: number): string => {
		const w = weights.get(`${name}.weight`);
		if (fused) return quantised(x, name, w, K, N, vector(`${name}.bias`));
		const product = graph.one('MatMul', [x, graph.constant(`${name}.weight`, w, [K, N])]);
		return graph.one('Add', [product, vector(`${name}.bias`)]);
	};
	const norm = (x: string, name: string): string =>
		graph.one('LayerNormalization', [x, vector(`${name}.weight`), vector(`${name}.bias`)], {
			axis: -1,
			epsilon: { float: 1e-5 },
		});
	/** x + y and its layer norm. */
	const addNorm = (x: string, y: string, name: string): { sum: string; normed: string } => {
		if (!fused) {
			const sum = graph.one('Add', [x, y]);
			return { sum, normed: norm(sum, name) };
		}
		const inputs = [x, y, vector(`${name}.weight`), vector(`${name}.bias`)];
		const options = { outputs: 4, domain: microsoft };
		const [normed, , , sum] = graph.op('SkipLayerNormalization', inputs, { epsilon: { float: 1e-5 } }, options);
		return { sum: sum as string, normed: normed as string };
	};
	const attend = (q: string, k: string, v: string): string => {
		if (fused) return graph.one('MultiHeadAttention', [q, k, v], { num_heads: H }, microsoft);
		const split = graph.integers('split_heads', [0, 0, H, C / H]);
		const heads = (x: string, perm: readonly number[]) =>
			graph.one('Transpose', [graph.one('Reshape', [x, split])], { perm });
		const scale = graph.constant('attention_scale', Float32Array.of((C / H) ** -0.5), []);
		const products = graph.one('MatMul', [heads(q, [0, 2, 1, 3]), heads(k, [0, 2, 3, 1])]);
		const shares = graph.one('Softmax', [graph.one('Mul', [products, scale])], { axis: -1 });
		const mixed = graph.one('MatMul', [shares, heads(v, [0, 2, 1, 3])]);
		const joined = graph.one('Transpose', [mixed], { perm: [0, 2, 1, 3] });
		return graph.one('Reshape', [joined, graph.integers('join_heads', [0, 0, C])]);
	};

	const wte = weights.get('wte.weight');
	const embedding = graph.constant('wte.weight', wte, [V, C]);
	const length = graph.one('Squeeze', [graph.one('Shape', ['ids'], { start: 1, end: 2 })]);
	const positions = graph.one('Range', [graph.scalar('zero', 0), length, graph.scalar('one', 1)]);
	const wpe = graph.constant('wpe.weight', weights.get('wpe.weight'), [context, C]);
	let x = graph.one('Add', [graph.one('Gather', [embedding, 'ids']), graph.one('Gather', [wpe, positions])]);
	let h = norm(x, 'h.0.ln_1');
	for (let l = 0; l < L; l++) {
		const qkv = linear(h, `h.${l}.attn.c_attn`, C, 3 * C);
		const parts = graph.op('Split', [qkv, graph.integers('thirds', [C, C, C])], { axis: 2 }, { outputs: 3 });
		const [q, k, v] = parts as [string, string, string];
		const attended = linear(attend(q, k, v), `h.${l}.attn.c_proj`, C, C);
		({ sum: x, normed: h } = addNorm(x, attended, `h.${l}.ln_2`));
		const wide = linear(h, `h.${l}.mlp.c_fc`, C, 4 * C);
		const active = fused
			? graph.one('FastGelu', [wide], {}, microsoft)
			: graph.one('Gelu', [wide], { approximate: 'tanh' });
		const narrow = linear(active, `h.${l}.mlp.c_proj`, 4 * C, C);
		({ sum: x, normed: h } = addNorm(x, narrow, l === L - 1 ? 'ln_f' : `h.${l + 1}.ln_1`));
	}
	let out: string;
	if (output === 'hidden') {
		// A copy of (T, C), so that the graph ends in a node of its own.
		out = graph.one('Identity', [h]);
	} else if (fused) {
		out = quantised(h, 'head', transpose(wte, V, C), C, V, '');
	} else {
		const rows = graph.one('Reshape', [h, graph.integers('rows', [-1, C])]);
		const logits = graph.one('Gemm', [rows, embedding], { transB: 1 });
		out = graph.one('Reshape', [logits, graph.integers('batch', [1, -1, V])]);
	}
	const dimension = (size: number | string) =>
		message(1, typeof size === 'number' ? integer(1, size) : string(2, size));
	const value = (name: string, type: number, shape: readonly (number | string)[]) => [
		...string(1, name),
		...message(2, message(1, [...integer(1, type), ...message(2, shape.flatMap(dimension))])),
	];
	const content = [
		...graph.nodes.flatMap((node) => message(1, node)),
		...string(2, 'gpt2'),
		...graph.initialisers.flatMap((tensor) => message(5, tensor)),
		...message(11, value('ids', types.int64, [1, 'T'])),
		...message(12, value(out, types.float32, [1, 'T', output === 'logits' ? V : C])),
	];
	const model = [
		...integer(1, domains.ir),
		...string(2, 'diffusion-native-bench'),
		...message(7, content),
		...message(8, [...string(1, ''), ...integer(2, domains.opset)]),
		...message(8, [...string(1, microsoft), ...integer(2, 1)]),
	];
	if (byteLength(model) >= 2 ** 31) throw new Error(`${path}: an ONNX file ends at 2 GiB`);
	const file = openSync(path, 'w');
	try {
		for (const piece of model) for (let at = 0; at < piece.byteLength; ) at += writeSync(file, piece, at);
	} finally {
		closeSync(file);
	}
}
