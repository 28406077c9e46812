/**
 * What a request remembers of its last forward: the log probabilities (V) of every position it looked at, which the next
 * forward compares its own with. Two arrays of V numbers a position, which take turns: a merged native call that fails is
 * made again for each request alone, so what it reads must not be what it writes.
 */

/** Where the rows of one forward find and leave their log probabilities; entry k speaks of the k-th position. */
export interface KeptRows {
	/** (R) arrays of V numbers. */
	keep: Float32Array[];
	/** (R) null: the forward before did not look at the position. */
	before: (Float32Array | null)[];
}

export class RowHistory {
	#rows = new Map<number, { last: Float32Array; spare: Float32Array | null }>();

	/** For the forward that follows; the one before has succeeded. What is not among the positions is forgotten. */
	next(positions: Int32Array, vocab: number): KeptRows {
		const rows = new Map<number, { last: Float32Array; spare: Float32Array | null }>();
		const kept: KeptRows = { keep: [], before: [] };
		for (const position of positions) {
			const known = this.#rows.get(position);
			const before = known?.last ?? null;
			const last = known?.spare ?? new Float32Array(vocab);
			rows.set(position, { last, spare: before });
			kept.keep.push(last);
			kept.before.push(before);
		}
		this.#rows = rows;
		return kept;
	}

	/** Forgets everything: positions have moved. */
	clear(): void {
		this.#rows.clear();
	}
}
