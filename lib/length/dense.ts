/**
 * A small multilayer perceptron on the CPU, y = gelu(x W1 + b1) W2 + b2, with its backward pass and Adam: what the length
 * heads are made of. The backbone is frozen, so its hidden states are plain inputs. Single thread, fixed order of
 * additions: the same seed gives the same weights on every machine with the same `Math`.
 */
import { Stream, uniform } from '../random.js';

/** Weights in one array: W1 (C, U), b1 (U), W2 (U, O), b2 (O). */
export class Dense {
	readonly inputs: number;
	readonly units: number;
	readonly outputs: number;
	readonly weights: Float32Array;
	#moment1: Float64Array | undefined;
	#moment2: Float64Array | undefined;
	#step = 0;

	constructor(inputs: number, units: number, outputs: number, weights?: Float32Array) {
		this.inputs = inputs;
		this.units = units;
		this.outputs = outputs;
		this.weights = weights ?? new Float32Array(inputs * units + units + units * outputs + outputs);
	}

	static size(inputs: number, units: number, outputs: number): number {
		return inputs * units + units + units * outputs + outputs;
	}

	/** Uniform in +-sqrt(3 / fan in): variance 1 / fan in; biases 0. */
	initialise(seed: bigint, stream: number): this {
		const { inputs: C, units: U, outputs: O, weights } = this;
		const second = C * U + U;
		const draw = (i: number, fan: number): number =>
			(2 * uniform(seed, Stream.init, stream, i) - 1) * Math.sqrt(3 / fan);
		for (let i = 0; i < C * U; i++) weights[i] = draw(i, C);
		for (let i = second; i < second + U * O; i++) weights[i] = draw(i, U);
		return this;
	}

	/** x: (n, C). Returns (n, O). */
	forward(x: Float32Array): Float32Array {
		return this.#forward(x).y;
	}

	/** One Adam step on the loss whose gradient by y (n, O) `gradient` returns. */
	step(x: Float32Array, gradient: (y: Float32Array) => Float32Array, learningRate: number): void {
		const { inputs: C, units: U, outputs: O, weights } = this;
		const n = x.length / C;
		const { y, a, h } = this.#forward(x);
		const dy = gradient(y);
		const d = new Float64Array(weights.length);
		const at1 = C * U;
		const at2 = at1 + U;
		const at3 = at2 + U * O;
		const da = new Float64Array(U);
		for (let r = 0; r < n; r++) {
			da.fill(0);
			for (let o = 0; o < O; o++) {
				const g = dy[r * O + o] as number;
				if (g === 0) continue;
				d[at3 + o] = (d[at3 + o] as number) + g;
				for (let u = 0; u < U; u++) {
					d[at2 + u * O + o] = (d[at2 + u * O + o] as number) + g * (h[r * U + u] as number);
					da[u] = (da[u] as number) + g * (weights[at2 + u * O + o] as number);
				}
			}
			for (let u = 0; u < U; u++) {
				da[u] = (da[u] as number) * geluSlope(a[r * U + u] as number);
				d[at1 + u] = (d[at1 + u] as number) + (da[u] as number);
			}
			for (let c = 0; c < C; c++) {
				const value = x[r * C + c] as number;
				const row = c * U;
				for (let u = 0; u < U; u++) d[row + u] = (d[row + u] as number) + value * (da[u] as number);
			}
		}
		this.#adam(d, learningRate);
	}

	#forward(x: Float32Array): { y: Float32Array; a: Float32Array; h: Float32Array } {
		const { inputs: C, units: U, outputs: O, weights } = this;
		const n = x.length / C;
		const a = new Float32Array(n * U);
		const h = new Float32Array(n * U);
		const y = new Float32Array(n * O);
		const sum = new Float64Array(U);
		const bias1 = C * U;
		const second = bias1 + U;
		const bias2 = second + U * O;
		for (let r = 0; r < n; r++) {
			for (let u = 0; u < U; u++) sum[u] = weights[bias1 + u] as number;
			for (let c = 0; c < C; c++) {
				const value = x[r * C + c] as number;
				const row = c * U;
				for (let u = 0; u < U; u++) sum[u] = (sum[u] as number) + value * (weights[row + u] as number);
			}
			for (let u = 0; u < U; u++) {
				a[r * U + u] = sum[u] as number;
				h[r * U + u] = gelu(sum[u] as number);
			}
			for (let o = 0; o < O; o++) {
				let total = weights[bias2 + o] as number;
				for (let u = 0; u < U; u++) total += (h[r * U + u] as number) * (weights[second + u * O + o] as number);
				y[r * O + o] = total;
			}
		}
		return { y, a, h };
	}

	/** Adam with betas 0.9 and 0.999, eps 1e-8, no decay. */
	#adam(d: Float64Array, learningRate: number): void {
		this.#moment1 ??= new Float64Array(d.length);
		this.#moment2 ??= new Float64Array(d.length);
		const first = this.#moment1;
		const second = this.#moment2;
		this.#step++;
		const scale1 = 1 - 0.9 ** this.#step;
		const scale2 = 1 - 0.999 ** this.#step;
		for (let i = 0; i < d.length; i++) {
			const g = d[i] as number;
			first[i] = 0.9 * (first[i] as number) + 0.1 * g;
			second[i] = 0.999 * (second[i] as number) + 0.001 * g * g;
			const update = (first[i] as number) / scale1 / (Math.sqrt((second[i] as number) / scale2) + 1e-8);
			this.weights[i] = (this.weights[i] as number) - learningRate * update;
		}
	}
}

const root = Math.sqrt(2 / Math.PI);

function gelu(a: number): number {
	return 0.5 * a * (1 + Math.tanh(root * (a + 0.044715 * a * a * a)));
}

function geluSlope(a: number): number {
	const t = Math.tanh(root * (a + 0.044715 * a * a * a));
	return 0.5 * (1 + t) + 0.5 * a * (1 - t * t) * root * (1 + 3 * 0.044715 * a * a);
}
