/**
 * What a sampler is: a policy that looks at the statistics of one forward and says which positions to commit. The loop
 * (lib/generate.ts) runs the network, keeps the canvas and sends the events; a policy is about a page. `SamplerPolicy` is
 * public: a user's own sampler is a plain object with one method, `decide`.
 */

/** The canvas before a forward. */
export interface CanvasView {
	/** Steps so far, 0 at the first. */
	readonly step: number;
	/** (T) ids; open positions hold the mask id. A copy. */
	readonly tokens: Int32Array;
	/** Open positions of the current block (of the canvas, when there are no blocks), ascending. */
	readonly open: Int32Array;
	/** Positions that were open when the current block began. */
	readonly initialOpen: number;
	/** Steps spent in the current block, 0 at its first. */
	readonly blockStep: number;
	/** Steps planned for the current block; Infinity when the caller gave none. */
	readonly blockSteps: number;
	/** Committed positions that may still be reopened (committed by a decision with `tentative`). */
	readonly tentative: Int32Array;
	/** (T) how often each position was reopened. */
	readonly reopened: Uint8Array;
	/** The request's seed. */
	readonly seed: bigint;
	/** Whatever the policy wants to remember within one request; empty at first. */
	readonly memory: Record<string, unknown>;
}

/** The canvas after a forward. Entry k of each array speaks of canvas position `positions[k]`. */
export interface StepView extends CanvasView {
	/** (R) positions looked at, all open. */
	readonly positions: Int32Array;
	/** (R) most probable id. */
	readonly best: Int32Array;
	/** (R) id sampled with the request's temperature, top-k and top-p; equals `best` at temperature 0. */
	readonly drawn: Int32Array;
	/** (R) probability of `best` at temperature 1, without the mask id. */
	readonly probability: Float32Array;
	/** (R) probability of `best` minus that of the runner-up. */
	readonly margin: Float32Array;
	/** (R) entropy, nats. */
	readonly entropy: Float32Array;
	/** (R) log probability of `drawn` at temperature 1. */
	readonly drawnLogProb: Float32Array;
	/**
	 * (R) KL(now || then) of the distributions at temperature 1 in this forward and the request's last one, nats; Infinity
	 * where that one did not look at the position. Empty without `needsDivergence`.
	 */
	readonly divergence: Float32Array;
	/**
	 * Log probabilities (V) of the k-th row, guided, without the mask id, and without the end token where the length is drawn.
	 * Needs `needsLogits`.
	 */
	logProbs(k: number): Float64Array;
	/** Position to probability of its tentative token given the rest, for the positions `verify` asked for. */
	readonly verified: ReadonlyMap<number, number>;
}

/** What a policy decides. */
export interface Decision {
	/** Positions to commit: open, and looked at in this step. */
	commit: readonly number[];
	/** The ids to commit, one per entry of `commit`. @default the drawn ones */
	tokens?: readonly number[];
	/** Tentative positions to open again. @default none */
	reopen?: readonly number[];
	/** Tentative positions that are now final. @default none */
	settle?: readonly number[];
	/**
	 * What is committed now may be reopened later, while positions of the block are open or `verify` asks for it; then it is
	 * final. @default false
	 */
	tentative?: boolean;
	/** End here; open positions are left out of the result. @default false */
	stop?: boolean;
}

/**
 * A sampler. Only `decide` is needed:
 *
 * ```ts
 * const leftToRight: SamplerPolicy = { decide: ({ positions }) => ({ commit: [positions[0]!] }) };
 * ```
 *
 * One object may serve many requests at once: keep state in `view.memory`, not in the object. A policy under which the
 * number of open positions does not fall for a long time is stopped with `ERR_DN_ARGUMENT`.
 */
export interface SamplerPolicy {
	/** For error messages. @default 'custom' */
	name?: string;
	/** Decides after a forward. */
	decide(view: StepView): Decision;
	/**
	 * Positions to look at, a part of `view.open`; only their rows are projected onto the vocabulary. None: this step runs
	 * no forward. @default all of `view.open`
	 */
	choose?(view: CanvasView): ArrayLike<number>;
	/**
	 * Groups of tentative positions to verify in the same forward. Each group costs one more sequence: a copy of the
	 * canvas in which the group is masked again. @default none
	 */
	verify?(view: CanvasView): readonly (readonly number[])[];
	/** `view.logProbs` will be called. Costs R * V floats a step. @default false */
	needsLogits?: boolean;
	/** `view.divergence` is wanted. Keeps 2 * V floats for every position looked at. @default false */
	needsDivergence?: boolean;
}

/** Indices 0 .. scores.length - 1 by falling score; equal scores in ascending order. */
export function ranked(scores: ArrayLike<number>): number[] {
	return Array.from({ length: scores.length }, (_, k) => k).sort(
		(a, b) => (scores[b] as number) - (scores[a] as number) || a - b,
	);
}

/** KL(p || q) of two rows of log probabilities (V), nats; where p is 0 nothing is added. */
export function divergence(p: Float64Array, q: Float64Array): number {
	let sum = 0;
	for (let v = 0; v < p.length; v++) {
		const log = p[v] as number;
		if (log > Number.NEGATIVE_INFINITY) sum += Math.exp(log) * (log - (q[v] as number));
	}
	return sum;
}

/** LLaDA's plan: n tokens over `steps` steps, n div steps each, the remainder first (docs/sampling.md, Samplers). */
export function evenPlan(n: number, steps: number, step: number): number {
	return Math.floor(n / steps) + (step < n % steps ? 1 : 0);
}

/** DiffuGPT's plan: after pass `step` (0-based), floor(n (steps - step - 1) / steps) stay open (docs/sampling.md, Samplers). */
export function linearPlan(n: number, steps: number, step: number): number {
	const openAfter = (passes: number): number => Math.floor((n * (steps - passes)) / steps);
	return openAfter(step) - openAfter(step + 1);
}
