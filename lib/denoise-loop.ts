/**
 * The state of one request between forwards: which positions to look at next, what the policy decides, how the canvas
 * changes, and the event that tells of it. Runs no network; lib/generate.ts does.
 */
import { type Canvas, type Resize, State } from './canvas.js';
import { check } from './errors.js';
import { type Drift, type Look, restrict } from './evaluator.js';
import { Gap } from './length/gap.js';
import type { LengthRule } from './length/method.js';
import type { ResolvedOptions } from './options.js';
import { checkedDecision, chosenPositions, stepView, verifiedGroups } from './policy-gate.js';
import { decodeCommitted, type TextCodec } from './prompt.js';
import { RowHistory } from './row-history.js';
import type { CanvasView, Decision } from './samplers/policy.js';
import { StepBudget, type Window, windowBounds, windowsAfter } from './windows.js';

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
	/** With `measureDrift`: how far this step's rows are from an exact forward's. */
	drift?: Drift;
	/** The text so far, as `GenerateResult.text`: of committed tokens, open ones left out, whole characters only. */
	text: string;
}

export interface Plan {
	view: CanvasView;
	/** What the policy wants to see. */
	positions: Int32Array;
	/** What is looked at: `positions`, or every open position when the length method follows them all. */
	looked: Int32Array;
	groups: readonly (readonly number[])[];
	/** Canvas positions [begin, end) that the window spans. */
	begin: number;
	end: number;
	/** The step budget of the window ends here: everything open is committed. */
	last: boolean;
}

/** Where a request stands before a forward. */
export interface LoopState {
	/** Counter of the forward. */
	step: number;
	/** Steps spent in the first window, and positions that were open at its beginning. */
	blockStep: number;
	initialOpen: number;
	/** Canvas positions [begin, end) that are filled one after the other; steps 0: no bound. */
	windows: { begin: number; end: number; steps: number }[];
	/** Most forwards still to come. */
	stepsLeft: number;
}

/** Steps without progress after which a user's policy is taken to be stuck. */
const idleLimit = 256;

/** The state of one request between forwards. */
export class Loop {
	/** Of policies that compare a forward with the one before. */
	readonly history = new RowHistory();

	readonly #canvas: Canvas;
	readonly #options: ResolvedOptions;
	readonly #rule: LengthRule | null;
	readonly #gap: Gap;
	readonly #tokenizer: TextCodec | null;
	readonly #memory: Record<string, unknown> = {};
	readonly #budget: StepBudget;
	#windows: Window[] = [];
	#initialOpen = 0;
	#blockStep = 0;
	#step = 0;
	#events = 0;
	#stopped = false;
	#fewestOpen = Number.POSITIVE_INFINITY;
	#idle = 0;

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
		this.#gap = new Gap(canvas, rule, ends);
		this.#tokenizer = tokenizer;
		this.#budget = new StepBudget(options, canvas.generatedPositions(), rule);
		this.#plan(0);
	}

	/** Positions of the largest canvas so far. */
	get largest(): number {
		return this.#gap.largest;
	}

	/** What to look at next; undefined: done. */
	next(): Plan | undefined {
		while (!this.#stopped) {
			const window = this.#windows[0];
			if (!window) {
				if (!this.#grow()) return undefined;
				continue;
			}
			const inside = part(this.#canvas.generatedPositions(), window.begin, window.end);
			const { state, tentative: isTentative } = this.#canvas;
			const open = inside.filter((i) => state[i] === State.open);
			const tentative = inside.filter((i) => isTentative[i] === 1);
			if (open.length + tentative.length === 0) {
				this.#windows.shift();
				this.#blockStep = 0;
				continue;
			}
			if (this.#blockStep === 0) this.#initialOpen = open.length;
			const plan = this.#planIn(window, inside, open, tentative);
			if (plan) return plan;
		}
		return undefined;
	}

	/** The next step of a window that looks at anything; undefined: the budget is spent and what is tentative stands. */
	#planIn(window: Window, inside: Int32Array, open: Int32Array, tentative: Int32Array): Plan | undefined {
		const { seed } = this.#options;
		// Steps that look at nothing leave the canvas as it is: one copy serves them all.
		const tokens = this.#canvas.tokens.slice();
		const reopened = this.#canvas.reopened.slice();
		for (;;) {
			const last = this.#isLast(window, this.#blockStep);
			const view: CanvasView = {
				step: this.#step,
				tokens,
				open,
				initialOpen: this.#initialOpen,
				blockStep: this.#blockStep,
				blockSteps: window.steps,
				tentative,
				reopened,
				seed,
				memory: this.#memory,
			};
			const groups = last ? [] : verifiedGroups(this.#options, view);
			const positions = last ? open : chosenPositions(this.#options, view);
			if (positions.length + groups.length > 0) {
				const begin = inside[0] as number;
				const end = (inside[inside.length - 1] as number) + 1;
				const looked = this.#rule?.adapt ? this.#canvas.openPositions() : positions;
				return { view, positions, looked, groups, begin, end, last };
			}
			if (last) {
				this.#canvas.tentative.fill(0);
				return undefined;
			}
			this.#advance();
		}
	}

	/** Whether everything open is committed in this step of a window: its budget ends. */
	#isLast(window: Window, blockStep: number): boolean {
		return !this.#options.isPlanned && blockStep + 1 >= window.steps;
	}

	/** Whether what is tentative will not be looked at again: nothing is open in the window, and nothing verifies. */
	#isSettled({ begin, end }: Plan): boolean {
		const { policy } = this.#options;
		if (this.#canvas.tentativeCount === 0 || this.#canvas.openPositions(begin, end).length > 0) return false;
		return !policy.verify || this.#isLast(this.#windows[0] as Window, this.#blockStep + 1);
	}

	/** What a device needs to go on by itself from the plan that `next` has just returned. */
	state(): LoopState {
		const positions = this.#canvas.generatedPositions();
		const windows = this.#windows.flatMap(({ begin, end, steps }) => {
			const inside = part(positions, begin, end);
			if (inside.length === 0) return [];
			const last = inside[inside.length - 1] as number;
			return [{ begin: inside[0] as number, end: last + 1, steps: steps === Number.POSITIVE_INFINITY ? 0 : steps }];
		});
		return {
			step: this.#step,
			blockStep: this.#blockStep,
			initialOpen: this.#initialOpen,
			windows,
			stepsLeft: this.#stepsLeft(),
		};
	}

	/** Applies the policy's decision and describes it. `all` speaks of `plan.looked`. */
	apply(plan: Plan, all: Look): DenoiseStep {
		const canvas = this.#canvas;
		const look = restrict(all, plan.positions);
		const indexOf = new Map<number, number>();
		for (let k = 0; k < look.positions.length; k++) indexOf.set(look.positions[k] as number, k);
		const decision = this.#decide(plan, look);
		for (const position of decision.reopen ?? []) canvas.reopen(position);
		for (const position of decision.settle ?? []) canvas.tentative[position] = 0;
		for (let j = 0; j < decision.commit.length; j++) {
			const position = decision.commit[j] as number;
			const token = decision.tokens?.[j] ?? (look.drawn[indexOf.get(position) as number] as number);
			canvas.commit(position, token, decision.tentative ?? false);
		}
		if (decision.stop) this.#stopped = true;
		if (plan.last || this.#stopped || this.#isSettled(plan)) canvas.tentative.fill(0);
		let committed = [...decision.commit].sort((a, b) => a - b);
		let reopened = [...(decision.reopen ?? [])].sort((a, b) => a - b);
		let guesses = canvas.tokens.slice();
		let guessed = false;
		for (let k = 0; k < all.positions.length; k++) {
			const position = all.positions[k] as number;
			if (!canvas.isOpen(position)) continue;
			guesses[position] = all.best[k] as number;
			guessed = true;
		}
		const cut = this.#gap.cut();
		if (cut) {
			// Without an end token it is the length rule that ends the text here.
			if (!this.#gap.ended) this.#stopped = true;
			const gone = (position: number): boolean => position >= cut.at && position < cut.at + cut.removed;
			committed = committed.filter((position) => !gone(position));
			reopened = reopened.filter((position) => !gone(position));
			guesses = Int32Array.from([...guesses.subarray(0, cut.at), ...guesses.subarray(cut.at + cut.removed)]);
			guessed = canvas.openCount > 0 && guessed;
		}
		const confidence = committed.map((position) => look.probability[indexOf.get(position) as number] as number);
		const change = cut ? undefined : this.#adapt(plan, all);
		if (change) {
			const { at, removed, inserted } = change;
			const moved = (position: number): number => (position < at ? position : position + inserted - removed);
			committed = committed.map(moved);
			reopened = reopened.map(moved);
			const fresh = new Array<number>(inserted).fill(canvas.maskId);
			guesses = Int32Array.from([...guesses.subarray(0, at), ...fresh, ...guesses.subarray(at + removed)]);
		}
		this.#advance();
		this.#events++;
		const resized = this.#gap.takeResized();
		const event: DenoiseStep = {
			step: this.#events,
			steps: this.#events + this.#stepsLeft(),
			tokens: canvas.tokens.slice(),
			committed,
			confidence,
			reopened,
			text: this.#tokenizer
				? decodeCommitted(canvas, this.#gap.visible(), this.#tokenizer, this.#gap.growth() > 0)
				: '',
		};
		if (guessed) event.provisional = guesses;
		if (resized.length > 0) event.resized = resized;
		if (look.drift) event.drift = look.drift;
		return event;
	}

	/** New ids, text, and whether a variable length ended at an end token. */
	finish(): { tokens: Int32Array; text: string; ended: boolean } {
		const canvas = this.#canvas;
		const visible = this.#gap.visible();
		const positions = this.#rule ? visible : canvas.generatedPositions();
		return {
			tokens: positions.filter((i) => !canvas.isOpen(i)).map((i) => canvas.tokens[i] as number),
			text: decodeCommitted(canvas, visible, this.#tokenizer),
			ended: this.#gap.ended,
		};
	}

	/** Committed new tokens before the first end token. */
	realTokens(): number {
		return this.#gap.visible().filter((i) => !this.#canvas.isOpen(i)).length;
	}

	/** Windows over the generated positions from the `begin`-th on. */
	#plan(begin: number): void {
		const positions = part(this.#canvas.generatedPositions(), begin);
		if (positions.length === 0) return;
		this.#windows.push(...this.#budget.windows(windowBounds(positions, this.#options), begin));
	}

	/** Adds open positions when the length rule wants more; false: finished. */
	#grow(): boolean {
		const { holeBegin, holeEnd } = this.#canvas;
		const more = this.#gap.growth();
		if (more === 0) return false;
		this.#gap.resize({ at: holeEnd, removed: 0, inserted: more });
		this.#fewestOpen = Number.POSITIVE_INFINITY;
		this.#plan(holeEnd - holeBegin);
		return true;
	}

	/** Lets the length rule change the canvas, as far as the step budget allows. */
	#adapt(plan: Plan, look: Look): Resize | undefined {
		const canvas = this.#canvas;
		const { holeBegin, holeEnd } = canvas;
		const change = this.#gap.wanted(look, plan);
		if (!change) return undefined;
		const after = windowsAfter(
			{ ...change, at: change.at - holeBegin },
			{
				length: holeEnd - holeBegin,
				window: this.#windows[0] as Window,
				isOnly: this.#windows.length === 1,
				spent: this.#blockStep + 1,
				initialOpen: this.#initialOpen,
				left: this.#budget.left(this.#step + 1),
				block: this.#options.block,
				openIn: (from, to) => canvas.openPositions(holeBegin + from, holeBegin + to).length,
			},
		);
		if (!after) return undefined;
		this.#gap.resize(change);
		this.#fewestOpen = Number.POSITIVE_INFINITY;
		// What a policy remembers is by position, and positions have moved.
		for (const key of Object.keys(this.#memory)) delete this.#memory[key];
		this.history.clear();
		this.#windows = after.windows;
		if (after.isNew) this.#blockStep = -1; // counted up to 0 when this step is
		return change;
	}

	#decide({ view, last }: Plan, look: Look): Decision {
		const { policy, samplerName, isCustom } = this.#options;
		const decision = policy.decide(stepView(view, look, isCustom));
		if (last) return { commit: Array.from(look.positions) };
		return checkedDecision(decision, samplerName, view, look, this.#canvas);
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
		if (!this.#options.isCustom || this.#idle < idleLimit + (this.#options.steps ?? 0)) return;
		const { openCount, tentativeCount } = this.#canvas;
		check(
			false,
			`the policy '${this.#options.samplerName}' made no progress in ${this.#idle} steps: ${openCount} positions are still open, ${tentativeCount} tentative`,
		);
	}

	/** Most events still to come: without a bound one for each position that is open, or may be opened again. */
	#stepsLeft(): number {
		const { openCount, tentativeCount } = this.#canvas;
		let unsettled = openCount + tentativeCount;
		if (unsettled === 0) return 0;
		let left = 0;
		for (const [b, window] of this.#windows.entries()) {
			const done = b === 0 ? this.#blockStep : 0;
			const size = Math.min(unsettled, window.end - window.begin);
			left += window.steps === Number.POSITIVE_INFINITY ? size : Math.max(0, window.steps - done);
			unsettled -= size;
		}
		return left;
	}
}

/** Entries [begin, end) of an array, itself when these are all. */
function part(values: Int32Array, begin: number, end = values.length): Int32Array {
	return begin === 0 && end >= values.length ? values : values.slice(begin, end);
}
