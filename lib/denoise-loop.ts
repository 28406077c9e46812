/**
 * The state of one request between forwards: which positions to look at next, what the policy decides, how the canvas
 * changes, and the event that tells of it. Runs no network; lib/generate.ts does.
 */
import { type Canvas, type Resize, State } from './canvas.js';
import { check } from './errors.js';
import type { Look } from './evaluator.js';
import type { LengthRule } from './length/method.js';
import type { ResolvedOptions } from './options.js';
import { decodeCommitted, type TextCodec } from './prompt.js';
import { type CanvasView, type Decision, evenPlan, type StepView } from './samplers/policy.js';

/**
 * One step of a stream. Replaying `resized`, then `reopened`, then `committed` (ids in `tokens`) from the canvas of the
 * first event rebuilds every later `tokens`, and with the last event the result.
 */
export interface DenoiseStep {
	/** 1 at the first event. */
	step: number;
	/** Events this generation will have at most, as far as is known now. */
	steps: number;
	/** (T) the whole canvas, prompt included; positions still open hold the mask id. */
	tokens: Int32Array;
	/** Positions committed in this step, ascending. */
	committed: number[];
	/** (committed.length) probability of the best token at each of them when it was committed. */
	confidence: number[];
	/** Positions opened again in this step, ascending. */
	reopened: number[];
	/** (T) `tokens` with the current best guess at the open positions that were looked at; absent when there were none. */
	provisional?: Int32Array;
	/** Changes of the canvas, applied one after the other before this step's positions. */
	resized?: Resize[];
	/** The generated text so far: committed tokens up to the first end token, open ones left out, whole characters only. */
	text: string;
}

/** A part of the generated positions that is filled before the next one: counts along the generated positions. */
interface Window {
	begin: number;
	end: number;
	steps: number;
}

export interface Plan {
	view: CanvasView;
	positions: Int32Array;
	groups: readonly (readonly number[])[];
	/** The step budget of the window ends here: everything open is committed. */
	last: boolean;
}

/** Steps without progress after which a user's policy is taken to be stuck. */
const idleLimit = 256;

/** The state of one request between forwards. */
export class Loop {
	/** Positions of the largest canvas so far. */
	largest: number;

	readonly #canvas: Canvas;
	readonly #options: ResolvedOptions;
	readonly #rule: LengthRule | null;
	readonly #ends: Int32Array;
	readonly #tokenizer: TextCodec | null;
	readonly #memory: Record<string, unknown> = {};
	#windows: Window[] = [];
	#initialOpen = 0;
	#blockStep = 0;
	#step = 0;
	#events = 0;
	#stopped = false;
	#fewestOpen = Number.POSITIVE_INFINITY;
	#idle = 0;
	#resized: Resize[] = [];

	constructor(
		canvas: Canvas,
		options: ResolvedOptions,
		rule: LengthRule | null,
		ends: Int32Array,
		tokenizer: TextCodec | null,
	) {
		this.#canvas = canvas;
		this.#options = options;
		this.#rule = rule;
		this.#ends = ends;
		this.#tokenizer = tokenizer;
		this.largest = canvas.length;
		this.#plan(0);
	}

	/** What to look at next; undefined: done. */
	next(): Plan | undefined {
		for (;;) {
			if (this.#stopped) return undefined;
			const window = this.#windows[0];
			if (!window) {
				if (!this.#grow()) return undefined;
				continue;
			}
			const inside = this.#canvas.generatedPositions().subarray(window.begin, window.end);
			const open = inside.filter((i) => this.#canvas.isOpen(i));
			const tentative = inside.filter((i) => this.#canvas.tentative[i] === 1);
			if (open.length + tentative.length === 0) {
				this.#windows.shift();
				this.#blockStep = 0;
				continue;
			}
			if (this.#blockStep === 0) this.#initialOpen = open.length;
			const last = !this.#options.isPlanned && this.#blockStep + 1 >= window.steps;
			const view = this.#view(window, open, tentative);
			const { policy } = this.#options;
			const groups = last ? [] : (policy.verify?.(view) ?? []);
			const positions = last || !policy.choose ? open : this.#chosen(policy.choose(view), open);
			if (positions.length + groups.length > 0) return { view, positions, groups, last };
			if (last) {
				// Only tentative tokens are left and the budget is spent: they stand.
				this.#canvas.tentative.fill(0);
				continue;
			}
			this.#advance();
		}
	}

	/** Applies the policy's decision and describes it. */
	apply(plan: Plan, look: Look): DenoiseStep {
		const canvas = this.#canvas;
		const stepView: StepView = { ...plan.view, ...pick(look) };
		const decision = this.#checked(plan, look, this.#options.policy.decide(stepView));
		const indexOf = new Map(Array.from(look.positions, (position, k) => [position, k]));
		for (const position of decision.reopen ?? []) canvas.reopen(position);
		for (const position of decision.settle ?? []) canvas.tentative[position] = 0;
		for (const [j, position] of decision.commit.entries()) {
			const token = decision.tokens?.[j] ?? (look.drawn[indexOf.get(position) as number] as number);
			canvas.commit(position, token, decision.tentative ?? false);
		}
		if (plan.last) canvas.tentative.fill(0);
		if (decision.stop) this.#stopped = true;
		let committed = [...decision.commit].sort((a, b) => a - b);
		let reopened = [...(decision.reopen ?? [])].sort((a, b) => a - b);
		const confidence = new Map(committed.map((p) => [p, look.probability[indexOf.get(p) as number] as number]));
		let guesses: Int32Array | undefined = canvas.tokens.slice();
		let guessed = false;
		for (const [k, position] of look.positions.entries()) {
			if (!canvas.isOpen(position)) continue;
			guesses[position] = look.best[k] as number;
			guessed = true;
		}
		const cut = this.#cut();
		if (cut) {
			const gone = (position: number): boolean => position >= cut.at && position < cut.at + cut.removed;
			committed = committed.filter((position) => !gone(position));
			reopened = reopened.filter((position) => !gone(position));
			guesses = Int32Array.from([...guesses.subarray(0, cut.at), ...guesses.subarray(cut.at + cut.removed)]);
			guessed = canvas.openCount > 0 && guessed;
		}
		this.#advance();
		this.#events++;
		const resized = this.#resized;
		this.#resized = [];
		return {
			step: this.#events,
			steps: this.#events + this.#stepsLeft(),
			tokens: canvas.tokens.slice(),
			committed,
			confidence: committed.map((position) => confidence.get(position) as number),
			reopened,
			...(guessed ? { provisional: guesses } : {}),
			...(resized.length > 0 ? { resized } : {}),
			text: decodeCommitted(canvas, this.#visible(), this.#tokenizer),
		};
	}

	/** New ids, text, and whether a variable length ended at an end token. */
	finish(): { tokens: Int32Array; text: string; ended: boolean } {
		const canvas = this.#canvas;
		const visible = this.#visible();
		const positions = this.#rule ? visible : canvas.generatedPositions();
		return {
			tokens: positions.filter((i) => !canvas.isOpen(i)).map((i) => canvas.tokens[i] as number),
			text: decodeCommitted(canvas, visible, this.#tokenizer),
			ended: this.#rule !== null && this.#endPosition(false) >= 0,
		};
	}

	/** Committed new tokens before the first end token. */
	realTokens(): number {
		return this.#visible().filter((i) => !this.#canvas.isOpen(i)).length;
	}

	/** Windows over the generated positions from the `begin`-th on. */
	#plan(begin: number): void {
		const { block, steps, isPlanned } = this.#options;
		const count = this.#canvas.generatedPositions().length - begin;
		if (count <= 0) return;
		const size = Math.min(block ?? count, count);
		const blocks = Math.ceil(count / size);
		const total = steps ?? (isPlanned ? Math.max(blocks, Math.min(count, 64)) : Number.POSITIVE_INFINITY);
		for (let b = 0; b < blocks; b++) {
			this.#windows.push({
				begin: begin + b * size,
				end: Math.min(begin + (b + 1) * size, begin + count),
				steps: total === Number.POSITIVE_INFINITY ? total : Math.max(1, evenPlan(total, blocks, b)),
			});
		}
	}

	/** Adds open positions when the length rule wants more; false: finished. */
	#grow(): boolean {
		const { holeBegin, holeEnd } = this.#canvas;
		const before = holeEnd - holeBegin;
		const more = this.#rule?.grow && this.#endPosition(false) < 0 ? this.#rule.grow(before) : 0;
		if (more <= 0) return false;
		const resize = { at: holeEnd, removed: 0, inserted: more };
		this.#canvas.resize(resize);
		this.#resized.push(resize);
		this.largest = Math.max(this.largest, this.#canvas.length);
		this.#fewestOpen = Number.POSITIVE_INFINITY;
		this.#plan(before);
		return true;
	}

	/** Early cut: positions after a final end token leave the canvas. */
	#cut(): Resize | undefined {
		if (!this.#rule) return undefined;
		const end = this.#endPosition(true);
		const removed = this.#canvas.holeEnd - (end + 1);
		if (end < 0 || removed === 0) return undefined;
		const resize = { at: end + 1, removed, inserted: 0 };
		this.#canvas.resize(resize);
		this.#resized.push(resize);
		return resize;
	}

	/** First committed end token of the gap, -1: none. */
	#endPosition(final: boolean): number {
		const canvas = this.#canvas;
		for (let i = canvas.holeBegin; i >= 0 && i < canvas.holeEnd; i++) {
			if (canvas.state[i] !== State.committed || (final && canvas.tentative[i])) continue;
			if (this.#ends.includes(canvas.tokens[i] as number)) return i;
		}
		return -1;
	}

	/** Generated positions before the first committed end token; all of them when they are scattered. */
	#visible(): Int32Array {
		const end = this.#endPosition(false);
		const positions = this.#canvas.generatedPositions();
		return end < 0 ? positions : positions.filter((i) => i < end);
	}

	#view(window: Window, open: Int32Array, tentative: Int32Array): CanvasView {
		return {
			step: this.#step,
			tokens: this.#canvas.tokens.slice(),
			open,
			initialOpen: this.#initialOpen,
			blockStep: this.#blockStep,
			blockSteps: window.steps,
			tentative,
			reopened: this.#canvas.reopened.slice(),
			seed: this.#options.seed,
			memory: this.#memory,
		};
	}

	#chosen(choice: ArrayLike<number>, open: Int32Array): Int32Array {
		const positions = Int32Array.from(new Set(Array.from(choice)));
		const allowed = new Set(open);
		for (const position of positions) {
			check(
				allowed.has(position),
				`the policy '${this.#options.samplerName}' chose position ${position}, which is not open`,
			);
		}
		return positions;
	}

	#checked(plan: Plan, look: Look, decision: Decision): Decision {
		const name = `the policy '${this.#options.samplerName}'`;
		check(
			typeof decision === 'object' && decision !== null && Array.isArray(decision.commit),
			`${name} returned no { commit: number[] }`,
		);
		if (plan.last) return { commit: Array.from(look.positions) };
		const looked = new Set(look.positions);
		const tentative = new Set(plan.view.tentative);
		for (const position of decision.commit) {
			check(
				looked.delete(position),
				`${name} committed position ${position}, which is not open, was not looked at, or is named twice`,
			);
		}
		for (const position of decision.reopen ?? []) {
			check(tentative.delete(position), `${name} reopened position ${position}, which is not tentative`);
		}
		const { tokens } = decision;
		if (tokens) {
			const { maskId } = this.#canvas;
			check(
				tokens.length === decision.commit.length,
				`${name} returned ${tokens.length} tokens for ${decision.commit.length} positions`,
			);
			for (const id of tokens) {
				check(
					Number.isInteger(id) && id >= 0 && id < look.vocab && id !== maskId,
					`${name} committed the id ${id}, which is no text token`,
				);
			}
		}
		return decision;
	}

	/** Counts a step, and gives up on a user's policy that makes no progress. */
	#advance(): void {
		this.#step++;
		this.#blockStep++;
		if (this.#canvas.openCount < this.#fewestOpen) {
			this.#fewestOpen = this.#canvas.openCount;
			this.#idle = 0;
		} else {
			this.#idle++;
		}
		check(
			!this.#options.isCustom || this.#idle < idleLimit + (this.#options.steps ?? 0),
			`the policy '${this.#options.samplerName}' made no progress in ${this.#idle} steps: ${this.#canvas.openCount} positions are still open`,
		);
	}

	/** Most events still to come. */
	#stepsLeft(): number {
		let left = 0;
		let windowOpen = this.#canvas.openCount;
		for (const [b, window] of this.#windows.entries()) {
			const done = b === 0 ? this.#blockStep : 0;
			const size = Math.min(windowOpen, window.end - window.begin);
			left += window.steps === Number.POSITIVE_INFINITY ? size : Math.max(0, window.steps - done);
			windowOpen -= size;
		}
		return this.#canvas.openCount === 0 && !this.#canvas.tentative.includes(1) ? 0 : left;
	}
}

/** The fields of a look that a policy sees. */
function pick(look: Look): Omit<StepView, keyof CanvasView> {
	const { positions, best, drawn, probability, margin, entropy, drawnLogProb, verified } = look;
	return {
		positions,
		best,
		drawn,
		probability,
		margin,
		entropy,
		drawnLogProb,
		verified,
		logProbs: (k) => look.logProbs(k),
	};
}
