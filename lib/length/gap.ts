/**
 * The gap of one request while its canvas is denoised: where an end token closes the text, and how the length rule changes
 * the number of positions. Which steps fill them, and whether enough are left for more, lib/denoise-loop.ts decides.
 */
import { type Canvas, type Resize, State } from '../canvas.js';
import type { Look } from '../evaluator.js';
import type { LengthRule } from './method.js';

/** The gap of a canvas. A text of fixed length has one that never changes; scattered open positions have none. */
export class Gap {
	/** Positions of the largest canvas so far. */
	largest: number;

	readonly #canvas: Canvas;
	readonly #rule: LengthRule | null;
	readonly #ends: Int32Array;
	#resized: Resize[] = [];

	/** rule: null where the length is fixed; ends: ids that end a text. */
	constructor(canvas: Canvas, rule: LengthRule | null, ends: Int32Array) {
		this.#canvas = canvas;
		this.#rule = rule;
		this.#ends = ends;
		this.largest = canvas.length;
	}

	/** Whether a text of variable length has its end token, which may still be tentative. */
	get ended(): boolean {
		return this.#rule !== null && this.#endPosition(false) >= 0;
	}

	/** Generated positions before the first committed end token; all of them when they are scattered. */
	visible(): Int32Array {
		const end = this.#endPosition(false);
		const positions = this.#canvas.generatedPositions();
		return end < 0 ? positions : positions.filter((i) => i < end);
	}

	/** Open positions that the length rule adds to a gap that is full; 0: none. */
	growth(): number {
		const { holeBegin, holeEnd } = this.#canvas;
		return this.#rule?.grow && !this.ended ? Math.max(0, this.#rule.grow(holeEnd - holeBegin)) : 0;
	}

	/** Early cut: positions after a final end token leave the canvas, or the tail that the length rule rejects. */
	cut(): Resize | undefined {
		if (!this.#rule) return undefined;
		const end = this.#endPosition(true);
		const { tokens, holeBegin, holeEnd, openCount, tentative } = this.#canvas;
		let removed = end < 0 ? 0 : holeEnd - (end + 1);
		if (end < 0 && openCount === 0 && !tentative.includes(1)) {
			removed = this.#rule.drop?.(tokens.subarray(holeBegin, holeEnd)) ?? 0;
		}
		if (removed === 0) return undefined;
		const change = { at: holeEnd - removed, removed, inserted: 0 };
		this.resize(change);
		return change;
	}

	/** The change that the length rule wants after a look at every open position. `block`: the part that is being filled. */
	wanted(look: Look, block: { begin: number; end: number }): Resize | undefined {
		if (!this.#rule?.adapt || this.ended) return undefined;
		const { positions, best, end, probability } = look;
		const canvas = this.#canvas;
		return this.#rule.adapt({
			positions,
			open: Uint8Array.from(positions, (position) => Number(canvas.isOpen(position))),
			isEnd: Uint8Array.from(best, (id) => Number(this.#ends.includes(id))),
			end,
			probability,
			begin: canvas.holeBegin,
			stop: canvas.holeEnd,
			blockBegin: block.begin,
			blockEnd: block.end,
		});
	}

	/** Changes the canvas. */
	resize(change: Resize): void {
		this.#canvas.resize(change);
		this.#resized.push(change);
		this.largest = Math.max(this.largest, this.#canvas.length);
	}

	/** The changes since this was last called, in order. */
	takeResized(): Resize[] {
		const resized = this.#resized;
		this.#resized = [];
		return resized;
	}

	/** Committed end token of the gap that closes the text, -1: none. */
	#endPosition(final: boolean): number {
		const canvas = this.#canvas;
		let missing = this.#rule?.ends ?? 1;
		for (let i = canvas.holeBegin; i >= 0 && i < canvas.holeEnd; i++) {
			if (canvas.state[i] !== State.committed || (final && canvas.tentative[i])) continue;
			if (this.#ends.includes(canvas.tokens[i] as number) && --missing === 0) return i;
		}
		return -1;
	}
}
