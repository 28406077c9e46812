/** The tokens every contender computes on. peers/torch_peer.py has the same formulas. */

/** (T) ids that differ, all inside the vocabulary; `sequence` tells the sequences of a batch apart. */
export function tokensOf(vocab: number, T: number, sequence = 0): Int32Array {
	return Int32Array.from({ length: T }, (_, i) => ((i + sequence * 1021) * 7919 + 13) % vocab);
}

/** A copy whose odd positions hold the mask id. */
export function maskOdd(tokens: Int32Array, maskId: number): Int32Array {
	return tokens.map((id, i) => (i % 2 === 1 ? maskId : id));
}
