/**
 * GPT-2 in double precision with plain loops, and a key-value cache whose rows are overwritten by position: the oracle of
 * cached decoding. Shares no code with the library.
 */
import type { DiffuGPT } from 'diffusion-native';

export class NaiveGpt2 {
	readonly #model: DiffuGPT;
	readonly #parameters = new Map<string, Float32Array>();
	/** keys[layer][position], values[layer][position]: (C). */
	readonly keys: number[][][];
	readonly values: number[][][];

	constructor(model: DiffuGPT) {
		this.#model = model;
		for (const { name } of model.parameters()) this.#parameters.set(name, model.getParameter(name));
		this.keys = Array.from({ length: model.config.layers }, () => []);
		this.values = Array.from({ length: model.config.layers }, () => []);
	}

	/**
	 * Computes positions [from, to) of `tokens`, overwriting their keys and values; each attends to the cached positions below
	 * `visible` of its own. Returns the raw logits (V) of each computed row.
	 */
	forward(tokens: ArrayLike<number>, from: number, to: number, visible: (position: number) => number): number[][] {
		const { layers, heads, channels: C, vocab } = this.#model.config;
		const wte = this.#get('wte.weight');
		const wpe = this.#get('wpe.weight');
		let h = range(from, to).map((p) =>
			range(0, C).map((c) => (wte[(tokens[p] as number) * C + c] as number) + (wpe[p * C + c] as number)),
		);
		for (let l = 0; l < layers; l++) {
			const x = h.map((row) => this.#norm(row, `h.${l}.ln_1`));
			const qkv = x.map((row) => this.#linear(row, `h.${l}.attn.c_attn`));
			qkv.forEach((row, i) => {
				(this.keys[l] as number[][])[from + i] = row.slice(C, 2 * C);
				(this.values[l] as number[][])[from + i] = row.slice(2 * C);
			});
			const size = C / heads;
			h = h.map((residual, i) => {
				const out = new Array<number>(C).fill(0);
				const keys = visible(from + i);
				for (let head = 0; head < heads; head++) {
					const at = head * size;
					const scores = range(0, keys).map((k) => {
						const key = this.keys[l]?.[k] as number[];
						let sum = 0;
						for (let c = at; c < at + size; c++) sum += (qkv[i]?.[c] as number) * (key[c] as number);
						return sum / Math.sqrt(size);
					});
					const largest = Math.max(...scores);
					const weights = scores.map((s) => Math.exp(s - largest));
					const total = weights.reduce((a, b) => a + b, 0);
					for (const [k, weight] of weights.entries()) {
						const value = this.values[l]?.[k] as number[];
						for (let c = at; c < at + size; c++) out[c] = (out[c] as number) + (weight / total) * (value[c] as number);
					}
				}
				const mid = add(residual, this.#linear(out, `h.${l}.attn.c_proj`));
				const inner = this.#linear(this.#norm(mid, `h.${l}.ln_2`), `h.${l}.mlp.c_fc`).map(gelu);
				return add(mid, this.#linear(inner, `h.${l}.mlp.c_proj`));
			});
		}
		return h.map((row) => {
			const last = this.#norm(row, 'ln_f');
			return range(0, vocab).map((v) => last.reduce((sum, value, c) => sum + value * (wte[v * C + c] as number), 0));
		});
	}

	#get(name: string): Float32Array {
		return this.#parameters.get(name) as Float32Array;
	}

	#linear(x: number[], name: string): number[] {
		const weight = this.#get(`${name}.weight`);
		const bias = this.#get(`${name}.bias`);
		return Array.from(bias, (b, j) =>
			x.reduce((s, value, i) => s + value * (weight[i * bias.length + j] as number), b),
		);
	}

	#norm(x: number[], name: string): number[] {
		const mean = x.reduce((a, b) => a + b, 0) / x.length;
		const variance = x.reduce((a, b) => a + (b - mean) ** 2, 0) / x.length;
		const weight = this.#get(`${name}.weight`);
		const bias = this.#get(`${name}.bias`);
		return x.map((v, i) => ((v - mean) / Math.sqrt(variance + 1e-5)) * (weight[i] as number) + (bias[i] as number));
	}
}

function range(from: number, to: number): number[] {
	return Array.from({ length: Math.max(0, to - from) }, (_, i) => from + i);
}

function add(a: number[], b: number[]): number[] {
	return a.map((value, i) => value + (b[i] as number));
}

function gelu(x: number): number {
	return 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3)));
}
