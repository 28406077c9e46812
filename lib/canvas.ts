/**
 * The canvas of one request: token ids and, for each position, whether it is given, open or committed. The state is
 * explicit and never inferred from an id, so a prompt may contain the mask id.
 */

/** What a canvas position is. */
export const State = { given: 0, open: 1, committed: 2 } as const;

/** The count of how often a position was reopened ends here. */
export const mostReopened = 255;

/** Positions taken out of a canvas and open positions put in at the same place, in that order. */
export interface Resize {
	/** First position concerned. */
	at: number;
	/** Positions taken out. */
	removed: number;
	/** Open positions put in. */
	inserted: number;
}

export class Canvas {
	/** (T) ids; open positions hold `maskId`. */
	tokens: Int32Array;
	/** (T) of `State`. */
	state: Uint8Array;
	/** (T) 1: committed, but its policy may still reopen it. */
	tentative: Uint8Array;
	/** (T) how often the position was reopened. */
	reopened: Uint8Array;
	readonly maskId: number;
	/** An id that is never sampled beside the mask, -1: none: the end token where the length is fixed. */
	bannedEnd = -1;
	/** Position where generated text begins when it is one run (continuation, infilling), else -1. */
	holeBegin: number;
	/** Position after that run. */
	holeEnd: number;
	/** First position that a resize moved since whoever caches by position last set this to Infinity. */
	movedFrom = Number.POSITIVE_INFINITY;
	#open: number;
	#generated: Int32Array | undefined;

	/** tokens, open: (T); `hole`: the one run of open positions, or null when they are scattered. */
	constructor(tokens: Int32Array, open: Uint8Array, hole: { begin: number; end: number } | null, maskId: number) {
		this.tokens = tokens.slice();
		this.state = new Uint8Array(tokens.length);
		this.tentative = new Uint8Array(tokens.length);
		this.reopened = new Uint8Array(tokens.length);
		this.maskId = maskId;
		this.holeBegin = hole?.begin ?? -1;
		this.holeEnd = hole?.end ?? -1;
		this.#open = 0;
		for (let i = 0; i < tokens.length; i++) {
			if (!open[i]) continue;
			this.state[i] = State.open;
			this.tokens[i] = maskId;
			this.#open++;
		}
	}

	/** Positions, T. */
	get length(): number {
		return this.tokens.length;
	}

	/** Open positions left. */
	get openCount(): number {
		return this.#open;
	}

	/** Committed positions that may still be reopened. */
	get tentativeCount(): number {
		return this.tentative.reduce((sum, one) => sum + one, 0);
	}

	isOpen(position: number): boolean {
		return this.state[position] === State.open;
	}

	/** Open positions in [begin, end), ascending. */
	openPositions(begin = 0, end = this.length): Int32Array {
		const positions: number[] = [];
		for (let i = begin; i < end; i++) if (this.state[i] === State.open) positions.push(i);
		return Int32Array.from(positions);
	}

	/** Positions that were or are open, ascending. Do not write to it: it is kept until the next resize. */
	generatedPositions(): Int32Array {
		this.#generated ??= Int32Array.from(this.state.keys()).filter((i) => this.state[i] !== State.given);
		return this.#generated;
	}

	commit(position: number, token: number, tentative: boolean): void {
		this.tokens[position] = token;
		this.state[position] = State.committed;
		this.tentative[position] = tentative ? 1 : 0;
		this.#open--;
	}

	/**
	 * Fixes the length of the text before anything is sampled: the end token `id` is never drawn. `ends`: it stands at the last
	 * position of the hole; else all of the hole is text.
	 */
	keepLength(id: number, ends: boolean): void {
		if (ends) this.commit(this.holeEnd - 1, id, false);
		this.bannedEnd = id;
	}

	reopen(position: number): void {
		this.tokens[position] = this.maskId;
		this.state[position] = State.open;
		this.tentative[position] = 0;
		this.reopened[position] = Math.min(mostReopened, (this.reopened[position] as number) + 1);
		this.#open++;
	}

	/** Takes positions out of the hole and puts open ones in. */
	resize({ at, removed, inserted }: Resize): void {
		for (let i = at; i < at + removed; i++) if (this.state[i] === State.open) this.#open--;
		this.#open += inserted;
		this.tokens = spliced(this.tokens, at, removed, inserted, this.maskId);
		this.state = spliced(this.state, at, removed, inserted, State.open);
		this.tentative = spliced(this.tentative, at, removed, inserted, 0);
		this.reopened = spliced(this.reopened, at, removed, inserted, 0);
		this.#generated = undefined;
		this.holeEnd += inserted - removed;
		this.movedFrom = Math.min(this.movedFrom, at);
	}
}

function spliced<A extends Int32Array | Uint8Array>(
	values: A,
	at: number,
	removed: number,
	inserted: number,
	fill: number,
): A {
	const result = new (values.constructor as new (length: number) => A)(values.length - removed + inserted);
	result.set(values.subarray(0, at));
	result.fill(fill, at, at + inserted);
	result.set(values.subarray(at + removed), at + inserted);
	return result;
}
