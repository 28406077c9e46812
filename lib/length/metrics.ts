/**
 * How good length bounds are (docs/length.md, Measuring). A bound is the number of answer tokens a canvas has room for; it is right
 * when it is at least the true length. Means are over all rows unless a field says otherwise.
 */
import { Stream, uniform } from '../random.js';
import { Turns } from '../turns.js';

/** Of the bounds of one method on one set of pairs. */
export interface BoundMetrics {
	/** Pairs. */
	readonly pairs: number;
	/** Share of bounds that are right: above + exact. */
	readonly correct: number;
	/** Share of bounds below the length. */
	readonly below: number;
	/** Share of bounds above the length. */
	readonly above: number;
	/** Share of bounds equal to the length. */
	readonly exact: number;
	/** Mean of bound - length over the rows above; null when there are none. */
	readonly tightness: number | null;
	/** Mean of bound - length over the rows where the bound is right (0 where exact); null when there are none. */
	readonly looseness: number | null;
	/** Mean of length - bound over the rows below; null when there are none. */
	readonly shortfall: number | null;
	/** Mean bound. */
	readonly bound: number;
	/** Mean of max - bound: tokens saved of the whole canvas. */
	readonly saved: number;
	/** Root of the mean of (bound - length)^2. */
	readonly rmse: number;
}

export function boundMetrics(bounds: readonly number[], lengths: readonly number[], max: number): BoundMetrics {
	const n = bounds.length;
	let below = 0;
	let above = 0;
	let slack = 0;
	let short = 0;
	let sum = 0;
	let squares = 0;
	for (const [i, bound] of bounds.entries()) {
		const gap = bound - (lengths[i] as number);
		if (gap < 0) {
			below++;
			short -= gap;
		} else if (gap > 0) {
			above++;
			slack += gap;
		}
		sum += bound;
		squares += gap * gap;
	}
	const right = n - below;
	return {
		pairs: n,
		correct: right / n,
		below: below / n,
		above: above / n,
		exact: (right - above) / n,
		tightness: above > 0 ? slack / above : null,
		looseness: right > 0 ? slack / right : null,
		shortfall: below > 0 ? short / below : null,
		bound: sum / n,
		saved: max - sum / n,
		rmse: Math.sqrt(squares / n),
	};
}

/** Pinball loss of each bound as the `coverage` quantile of its length: c (L - b) below, (1 - c)(b - L) above. */
export function pinballLosses(bounds: readonly number[], lengths: readonly number[], coverage: number): number[] {
	return bounds.map((bound, i) => {
		const gap = (lengths[i] as number) - bound;
		return gap > 0 ? coverage * gap : (coverage - 1) * gap;
	});
}

/** The constant with the least mean pinball loss on these very lengths: their ceil(n c)-th smallest. */
export function bestConstant(lengths: readonly number[], coverage: number): number {
	const sorted = [...lengths].sort((a, b) => a - b);
	return sorted[Math.max(0, Math.ceil(sorted.length * coverage - 1e-9) - 1)] as number;
}

/** Mean difference of two figures a and b of the same rows. */
export interface Difference {
	/** Mean of a - b. */
	readonly mean: number;
	/** 95 % percentile bootstrap interval, rows resampled in pairs. */
	readonly interval: readonly [number, number];
}

/** Mean difference of two losses of the same rows. @throws `signal.reason` */
export async function bootstrapDifference(
	a: readonly number[],
	b: readonly number[],
	{ samples = 1000, seed = 0n, signal }: { samples?: number; seed?: bigint; signal?: AbortSignal | undefined } = {},
): Promise<Difference> {
	const n = a.length;
	const gaps = a.map((value, i) => value - (b[i] as number));
	const means = new Float64Array(samples);
	const turns = new Turns();
	for (let s = 0; s < samples; s++) {
		await turns.next();
		signal?.throwIfAborted();
		let sum = 0;
		for (let i = 0; i < n; i++) sum += gaps[Math.floor(uniform(seed, Stream.data, s, i) * n)] as number;
		means[s] = sum / n;
	}
	means.sort();
	const at = (q: number): number => means[Math.min(samples - 1, Math.floor(q * samples))] as number;
	return { mean: gaps.reduce((x, y) => x + y, 0) / n, interval: [at(0.025), at(0.975)] };
}

/** Wasserstein-1 distance of two samples: the area between their distribution functions. */
export function wasserstein(a: readonly number[], b: readonly number[]): number {
	const x = [...a].sort((p, q) => p - q);
	const y = [...b].sort((p, q) => p - q);
	const points = [...x, ...y].sort((p, q) => p - q);
	let i = 0;
	let j = 0;
	let area = 0;
	for (let k = 0; k + 1 < points.length; k++) {
		const at = points[k] as number;
		while (i < x.length && (x[i] as number) <= at) i++;
		while (j < y.length && (y[j] as number) <= at) j++;
		area += Math.abs(i / x.length - j / y.length) * ((points[k + 1] as number) - at);
	}
	return area;
}

/** Mean over seeds, and the least and largest. */
export interface Spread {
	/** Mean over seeds. */
	readonly mean: number;
	/** Least of the seeds. */
	readonly min: number;
	/** Largest of the seeds. */
	readonly max: number;
}

export function spreadOf(values: readonly number[]): Spread {
	return {
		mean: values.reduce((a, b) => a + b, 0) / values.length,
		min: Math.min(...values),
		max: Math.max(...values),
	};
}
