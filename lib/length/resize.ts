/**
 * Length methods that change the canvas while it is denoised: DAEDAL's second stage (arXiv 2508.00819) and rho-EOS (arXiv
 * 2601.22527). An adapter sees what one forward said of every open position and answers with at most one change. It is
 * asked only while no end token is committed.
 */
import type { Resize } from '../canvas.js';

/** The gap after a step. Entry k of the arrays speaks of `positions[k]`, which was open when the forward ran. */
export interface GapView {
	/** (R) canvas positions, ascending. */
	readonly positions: Int32Array;
	/** (R) 1 where the position is still open. */
	readonly open: Uint8Array;
	/** (R) 1 where the most probable id is an end token. */
	readonly isEnd: Uint8Array;
	/** (R) probability of an end token. */
	readonly end: Float32Array;
	/** (R) probability of the most probable id. */
	readonly probability: Float32Array;
	/** First canvas position of the gap, and the one after its last. */
	readonly begin: number;
	readonly stop: number;
	/** The part of the gap that is being filled: the current block. */
	readonly blockBegin: number;
	readonly blockEnd: number;
}

export type Adapter = (view: GapView) => Resize | undefined;

/** Mean end probability over the last `window` positions whose most probable id is an end; absent ones count as 0. */
export function tailScore(end: Float32Array, isEnd: Uint8Array, window: number): number {
	let sum = 0;
	let found = 0;
	for (let k = end.length - 1; k >= 0 && found < window; k--) {
		if (!isEnd[k]) continue;
		sum += end[k] as number;
		found++;
	}
	return sum / window;
}

/**
 * DAEDAL, second stage: while the end is not sure (tail score below `high`), the least confident open position, if its
 * confidence is below 0.1, becomes `grow` open positions; one per step, in the block that is being filled. Before a suffix no end is awaited, and only
 * confidence counts.
 */
export function daedalAdapter(options: {
	window: number;
	high: number;
	grow: number;
	max: number;
	infilling: boolean;
}): Adapter {
	const { window, high, grow, max, infilling } = options;
	return ({ positions, open, isEnd, end, probability, begin, stop, blockBegin, blockEnd }) => {
		if (!infilling && tailScore(end, isEnd, window) >= high) return undefined;
		let least = -1;
		for (let k = 0; k < positions.length; k++) {
			const position = positions[k] as number;
			if (!open[k] || position < blockBegin || position >= blockEnd || (probability[k] as number) >= 0.1) continue;
			if (least < 0 || (probability[k] as number) < (probability[least] as number)) least = k;
		}
		const inserted = Math.min(grow - 1, max - (stop - begin));
		return least < 0 || inserted <= 0 ? undefined : { at: positions[least] as number, removed: 0, inserted };
	};
}

/**
 * rho-EOS: rho is the share of the open positions whose most probable id is an end. Above `high` up to `grow` open
 * positions leave at the tail, one stays; below `low` up to `grow` are added there. Both comparisons are strict.
 */
export function rhoAdapter(options: { low: number; high: number; grow: number; max: number }): Adapter {
	const { low, high, grow, max } = options;
	return ({ positions, open, isEnd, begin, stop }) => {
		if (positions.length === 0) return undefined;
		const rho = isEnd.reduce((sum, is) => sum + is, 0) / positions.length;
		if (rho < low) {
			const inserted = Math.min(grow, max - (stop - begin));
			return inserted > 0 ? { at: stop, removed: 0, inserted } : undefined;
		}
		if (rho <= high) return undefined;
		let removed = 0;
		let k = positions.length - 1;
		const left = open.reduce((sum, is) => sum + is, 0);
		while (removed < Math.min(grow, left - 1) && k >= 0 && open[k] && positions[k] === stop - 1 - removed) {
			removed++;
			k--;
		}
		return removed > 0 ? { at: stop - removed, removed, inserted: 0 } : undefined;
	};
}
