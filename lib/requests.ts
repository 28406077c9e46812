/**
 * What a generation asks of an engine and what it is told: one denoising step, or several that the device takes by itself.
 * A request knows of no other; lib/merge.ts and lib/merge-steps.ts pack those that wait together.
 */
import type { NativeCache, NativeMask, NativeRowStats, NativeSampler } from './native-types.js';
import type { KeptRows } from './row-history.js';

/** One denoising step of one caller: one canvas, or several variants of it (an unconditional twin, verification copies). */
export interface DenoiseRequest {
	/** One array of ids per sequence, all of the same length T. */
	sequences: readonly Int32Array[];
	/** (T) rows of wpe, shared by the sequences. */
	positions: Int32Array;
	/** Keys each sequence attends to: T, or the rows of its cache that are in use after this step. */
	keyLength: number;
	/** One per sequence, or null: no caches. */
	caches: readonly NativeCache[] | null;
	mask: NativeMask;
	/** (R) the sequence of each wanted row; null: all of the first. */
	rowSequence: Int32Array | null;
	/** (R) network row inside that sequence, 0 .. T - 1. */
	row: Int32Array;
	/** (R) the sequence whose same row is the unconditional twin; null: there are none. */
	rowGuide: Int32Array | null;
	/** (R) canvas position that the row speaks of: the counter of its draw. */
	rowPosition: Int32Array;
	/** Counter of the draw, together with the position. */
	step: number;
	seed: bigint;
	guidance: number;
	temperature: number;
	topK: number;
	topP: number;
	/** Ids whose probability is zero, -1: none: the mask, and an end token that must not come. */
	banned: number;
	bannedEnd: number;
	/** Ids whose probability is wanted for every row. */
	watch: Int32Array;
	/** Also return the raw network logits of the rows (and of their twins): R * V floats. */
	logits?: boolean;
	/** (R) also compare the rows' distributions with those of the step before. */
	history?: KeptRows | undefined;
	/**
	 * Of one sequence with a cache and one row: up to `most` steps, each fed the id that the one before drew, fewer after one of
	 * `stops`. Only while nobody else waits: single steps are merged.
	 */
	ahead?: { most: number; stops: Int32Array } | undefined;
}

/** What the head says of each wanted row. R = row.length of the request. */
export interface RowStatistics extends NativeRowStats {
	/** (R, watch.length) */
	watched: Float32Array;
	/** (R) nats, with a history; Infinity where it holds nothing. */
	divergence?: Float32Array;
	/** (R, V) raw logits, when asked for. */
	logits?: Float32Array;
	/** (R, V) those of the twins, when asked for and there are twins. */
	guideLogits?: Float32Array;
	/** Those of the steps that followed this one in the same call (`ahead`), in order. */
	following?: RowStatistics[];
}

/** Several denoising steps of one canvas that the device takes by itself; see NativeLoop. */
export interface StepsRequest {
	/** (T) */
	tokens: Int32Array;
	/** (T) 1: open. */
	open: Uint8Array;
	mask: NativeMask;
	sampler: NativeSampler;
	/** Canvas positions [begin, end) that are filled one after the other; steps 0: no bound. */
	windows: readonly { begin: number; end: number; steps: number }[];
	/** Counter of the next forward. */
	step: number;
	/** Steps spent in the first window, and positions that were open at its beginning. */
	blockStep: number;
	initialOpen: number;
	/** Most steps of this call. */
	steps: number;
	seed: bigint;
	temperature: number;
	topP: number;
	topK: number;
	banned: number;
	bannedEnd: number;
	/** Row i - shift predicts position i. */
	shift: number;
}

/** What one of those steps looked at and did. */
export interface StepRecord {
	/** Counter of the forward. */
	step: number;
	/** (R) ascending. */
	positions: Int32Array;
	/** (R) 1: the drawn id was committed. */
	committed: Uint8Array;
	/** Of the positions; nothing is watched. */
	stats: RowStatistics;
}
