/** A small order-1 Markov source with known entropy. */
import { uniform } from '../../lib/random.js';

const states = 8;
const stream = 99;

export class MarkovSource {
	readonly length: number;
	readonly states = states;
	/** (states, states) rows of transition probabilities. */
	readonly #transitions: number[][];
	#draws = 0;

	constructor(length: number, seed = 3n) {
		this.length = length;
		this.#transitions = Array.from({ length: states }, (_, i) => {
			// Powers make some transitions likely and some rare.
			const raw = Array.from({ length: states }, (__, j) => uniform(seed, stream, 0, i * states + j) ** 3 + 0.01);
			const sum = raw.reduce((a, b) => a + b, 0);
			return raw.map((value) => value / sum);
		});
	}

	/** Log probability of a sequence, nats; the first token is uniform. */
	logProbability(tokens: ArrayLike<number>): number {
		let sum = -Math.log(states);
		for (let i = 1; i < tokens.length; i++)
			sum += Math.log(this.probability(tokens[i - 1] as number, tokens[i] as number));
		return sum;
	}

	probability(from: number, to: number): number {
		return (this.#transitions[from] as number[])[to] as number;
	}

	/** Entropy of a whole sequence, nats: exact, by following the distribution of each position. */
	entropy(): number {
		let here = new Array<number>(states).fill(1 / states);
		let sum = Math.log(states);
		for (let i = 1; i < this.length; i++) {
			const next = new Array<number>(states).fill(0);
			for (let a = 0; a < states; a++) {
				for (let b = 0; b < states; b++) {
					const p = this.probability(a, b);
					sum -= (here[a] as number) * p * Math.log(p);
					next[b] = (next[b] as number) + (here[a] as number) * p;
				}
			}
			here = next;
		}
		return sum;
	}

	sample(seed: bigint): Int32Array {
		const tokens = new Int32Array(this.length);
		let row = new Array<number>(states).fill(1 / states);
		for (let i = 0; i < this.length; i++) {
			let u = uniform(seed, stream, 1, this.#draws++);
			let token = 0;
			while (token < states - 1 && u >= (row[token] as number)) u -= row[token++] as number;
			tokens[i] = token;
			row = this.#transitions[token] as number[];
		}
		return tokens;
	}
}
