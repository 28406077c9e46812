/**
 * Windows: how the positions to generate are divided into blocks that are filled one after the other, and the step budget
 * among them. `steps` is a total: however a canvas grows, its windows take no more together.
 */
import type { Resize } from './canvas.js';
import type { LengthRule } from './length/method.js';
import type { ResolvedOptions } from './options.js';
import { evenPlan } from './samplers/policy.js';

/** A part of the generated positions that is filled before the next one: counts along the generated positions. */
export interface Window {
	begin: number;
	end: number;
	/** Most steps; Infinity: no bound. */
	steps: number;
}

type Blocks = Pick<ResolvedOptions, 'block' | 'blockCausal'>;

/** Steps of a planned sampler for one window, or one part that a length rule adds, where the caller gave none. */
const usualSteps = 64;

/** Where windows begin among `positions`, and their end: every `block` of them, or with the blocks of the attention. */
export function windowBounds(positions: Int32Array, { block, blockCausal }: Blocks): number[] {
	const size = Math.min(block ?? positions.length, positions.length);
	const bounds = [0];
	for (let k = 1; k < positions.length; k++) {
		const blockOf = (i: number): number => Math.floor((positions[i] as number) / (blockCausal as number));
		if (blockCausal === null ? k % size === 0 : blockOf(k) !== blockOf(k - 1)) bounds.push(k);
	}
	bounds.push(positions.length);
	return bounds;
}

/** Windows of `positions` and of all that a growing length rule may add behind them. */
export function countWindows(positions: Int32Array, blocks: Blocks, rule: LengthRule | null): number {
	let count = 0;
	let length = 0;
	let added = positions;
	while (added.length > 0) {
		count += windowBounds(added, blocks).length - 1;
		length += added.length;
		const next = (added[added.length - 1] as number) + 1;
		added = Int32Array.from({ length: Math.max(0, rule?.grow?.(length) ?? 0) }, (_, i) => next + i);
	}
	return count;
}

/** Hands the step budget out, in order, as the canvas is divided. */
export class StepBudget {
	readonly #steps: number | undefined;
	readonly #isPlanned: boolean;
	/** Windows of the whole request at most. */
	readonly #windows: number;
	#made = 0;

	/** positions: those that are generated at the start. */
	constructor(options: ResolvedOptions, positions: Int32Array, rule: LengthRule | null) {
		this.#steps = options.steps;
		this.#isPlanned = options.isPlanned;
		this.#windows = options.steps === undefined ? 0 : countWindows(positions, options, rule);
	}

	/** Windows with these bounds, moved by `begin`. */
	windows(bounds: readonly number[], begin: number): Window[] {
		const count = bounds.length - 1;
		const total = Math.max(count, Math.min(bounds[count] as number, usualSteps));
		return Array.from({ length: count }, (_, b) => ({
			begin: begin + (bounds[b] as number),
			end: begin + (bounds[b + 1] as number),
			steps:
				this.#steps !== undefined
					? evenPlan(this.#steps, this.#windows, this.#made++)
					: this.#isPlanned
						? evenPlan(total, count, b)
						: Number.POSITIVE_INFINITY,
		}));
	}

	/** Steps left when `spent` are. */
	left(spent: number): number {
		return this.#steps === undefined ? Number.POSITIVE_INFINITY : this.#steps - spent;
	}
}

/** A gap before a change of its length, and where its current window stands after the step that has just run. */
export interface GapState {
	/** Positions of the gap. */
	length: number;
	/** The current window, which may end early. */
	window: Window;
	isOnly: boolean;
	/** Steps spent in it, the last one included, and positions that were open at its beginning. */
	spent: number;
	initialOpen: number;
	/** Steps left of the whole budget. */
	left: number;
	block: number | undefined;
	/** Open positions among [begin, end) of the gap. */
	openIn(begin: number, end: number): number;
}

/**
 * The windows after a change of the gap: they go on at the rate of steps they had, or at what is left of the budget, whatever is
 * less. `isNew`: the count of steps of the first one begins again. Undefined: too few steps are left for what would be added.
 *
 * @param change its `at` counts from the beginning of the gap
 */
export function windowsAfter(change: Resize, gap: GapState): { windows: Window[]; isNew: boolean } | undefined {
	const { at, removed, inserted } = change;
	const { window, block } = gap;
	const length = gap.length + inserted - removed;
	const inside = at < window.end || gap.isOnly;
	// What is added behind a block that is full is a block of its own.
	const joins = inserted > 0 && inside && (at < gap.length || block === undefined);
	const end = Math.min(window.end, gap.length - removed);
	const current: Window = { ...window, end: joins ? end + inserted : end };
	const following: Window[] = [];
	const size = block ?? Math.max(1, length - current.end);
	for (let begin = current.end; begin < length; begin += size) {
		following.push({ begin, end: Math.min(begin + size, length), steps: 0 });
	}
	const windows = [current, ...following];
	const isNew = inside && window.steps !== Number.POSITIVE_INFINITY;
	const shared = isNew ? windows : following;
	let left = gap.left;
	if (!isNew && window.steps !== Number.POSITIVE_INFINITY) left -= window.steps - gap.spent;
	if (inserted > 0 && shared.length > left) return undefined;
	const sizes = shared.map((each) =>
		each === current ? gap.openIn(current.begin, end) + (joins ? inserted : 0) : each.end - each.begin,
	);
	const positions = sizes.reduce((sum, n) => sum + n, 0);
	const rate = Math.min(window.steps / Math.max(1, gap.initialOpen), left / Math.max(1, positions));
	for (const [i, each] of shared.entries()) {
		const most = left - (shared.length - 1 - i);
		each.steps =
			rate === Number.POSITIVE_INFINITY ? rate : Math.max(1, Math.min(most, Math.round(rate * (sizes[i] as number))));
		left -= each.steps;
	}
	return { windows, isNew };
}
