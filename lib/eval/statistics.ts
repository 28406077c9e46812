/**
 * Errors of means and shares.
 *
 * Share: Wilson's score interval, (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n) with z = 1.96 (Wilson 1927); it
 * stays inside [0, 1] and is sound for few records and for shares near 0 and 1.
 * Mean per token R = sum X_s / sum N_s over sequences s: the ratio estimator's error, sqrt(n/(n-1) sum (X_s - R N_s)^2) / sum N_s
 * (Cochran, Sampling Techniques, 6.4).
 */
import type { Rate, TokenMean } from './options.js';

/** [low, high]. */
export type Interval = readonly [number, number];

const z = 1.959963984540054;

/** 95 % interval of a share. */
export function wilson(correct: number, count: number): Interval {
	if (count === 0) return [0, 1];
	const p = correct / count;
	const scale = 1 + (z * z) / count;
	const centre = (p + (z * z) / (2 * count)) / scale;
	const half = (z * Math.sqrt((p * (1 - p)) / count + (z * z) / (4 * count * count))) / scale;
	return [correct === 0 ? 0 : Math.max(0, centre - half), correct === count ? 1 : Math.min(1, centre + half)];
}

export function rateOf(correct: number, count: number): Rate {
	return { count, correct, rate: count === 0 ? 0 : correct / count, interval: wilson(correct, count) };
}

/** Sums a mean per token over sequences, one at a time and in their order. */
export class TokenSums {
	records = 0;
	tokens = 0;
	nats = 0;
	#variance = 0;
	#known = true;
	#xx = 0;
	#xn = 0;
	#nn = 0;

	/** @param variance Monte Carlo variance of `nats`; null: not known. */
	add(nats: number, tokens: number, variance: number | null): void {
		this.records++;
		this.tokens += tokens;
		this.nats += nats;
		this.#xx += nats * nats;
		this.#xn += nats * tokens;
		this.#nn += tokens * tokens;
		if (variance === null) this.#known = false;
		else this.#variance += variance;
	}

	/** Monte Carlo error of `nats`. */
	get error(): number | null {
		return this.#known ? Math.sqrt(this.#variance) : null;
	}

	mean(): TokenMean {
		const { records, tokens, nats, error } = this;
		const mean = nats / tokens;
		const squares = Math.max(0, this.#xx - 2 * mean * this.#xn + mean * mean * this.#nn);
		return {
			records,
			tokens,
			mean,
			standardError: error === null ? null : error / tokens,
			populationError: records < 2 ? null : Math.sqrt((squares * records) / (records - 1)) / tokens,
		};
	}
}

/** One accumulator per kind, made when first asked for. */
export class Kinds<T> {
	readonly #make: () => T;
	readonly #kinds = new Map<string, T>();

	constructor(make: () => T) {
		this.#make = make;
	}

	of(kind: string): T {
		let found = this.#kinds.get(kind);
		if (found === undefined) {
			found = this.#make();
			this.#kinds.set(kind, found);
		}
		return found;
	}

	/** In alphabetical order. */
	results<R>(result: (value: T) => R): Record<string, R> {
		const sorted = [...this.#kinds].sort((a, b) => (a[0] < b[0] ? -1 : 1));
		return Object.fromEntries(sorted.map(([kind, value]) => [kind, result(value)]));
	}
}
