/**
 * Blocks with key-value caches: a forward computes only the rows near the block that is being filled and reads the keys and
 * values of all others from a cache (docs/sampling.md, Caches).
 *
 * Bidirectional attention (Fast-dLLM, arXiv 2505.22618): the first forward of a block computes the whole canvas and stores it.
 * Later ones compute the rows from the block on (`prefix`) or of the block alone (`dual`), overwrite their keys and values and
 * attend to everything. What is not computed is stale: it was computed before the block's tokens were known. An approximation,
 * rebuilt at every block and whenever the canvas changes its length.
 *
 * Block-causal attention: no position sees a later block, so what is cached of finished blocks is exact. The last forward of a
 * block still saw masks; the first forward of the next one therefore computes the finished block's rows again.
 *
 * Under the shift row p - 1 predicts token p: the block's first token needs the row before the block, which is computed too.
 */
import type { Canvas } from './canvas.js';
import type { Engine } from './engine.js';
import {
	type Drift,
	type Evaluator,
	endIds,
	fullEvaluator,
	type Look,
	type LookRequest,
	makeLook,
	type Sampling,
	twinOf,
} from './evaluator.js';
import type { NativeCache, NativeMask } from './native-types.js';
import type { DenoiseRequest } from './requests.js';
import { divergence } from './samplers/policy.js';

/** What a cached forward computes: from the block to the end ('prefix'), or the block alone ('dual'). */
export type CacheKind = 'prefix' | 'dual';

export interface BlockCacheOptions {
	kind: CacheKind;
	/** Tokens per block of block-causal attention, counted from position 0; null: full attention. */
	blockCausal: number | null;
	/** Compare the rows of every cached forward with those of an exact one. */
	measureDrift: boolean;
	/** Positions of the longest canvas that is expected. */
	capacity: number;
}

/** Rows to compute: canvas positions [from, to), against keys [0, keys). */
interface Range {
	from: number;
	to: number;
	keys: number;
	/** The whole canvas is computed. */
	whole: boolean;
}

/** The attention of a canvas. */
export function maskOf(blockCausal: number | null): NativeMask {
	return blockCausal === null ? { kind: 'full' } : { kind: 'block-causal', block: blockCausal };
}

/** `pinned`: position 0 was put there by us and stays visible to the unconditional twin, which has a cache of its own. */
export function blockEvaluator(
	engine: Engine,
	canvas: Canvas,
	sampling: Sampling,
	pinned: boolean,
	options: BlockCacheOptions,
): Evaluator {
	const { config } = engine;
	const { blockCausal, kind } = options;
	const shift = config.shift ? 1 : 0;
	const ends = endIds(config);
	const { seed, guidance, temperature, topK, topP, signal } = sampling;
	const guided = guidance !== 0;
	const mask = maskOf(blockCausal);
	const exact = fullEvaluator(engine, canvas, sampling, pinned, mask);
	const caches: NativeCache[] = [];
	// Full attention: the block the cache was built at, -1: none, and the canvas's length then. Block-causal: positions below
	// `final` are cached exactly.
	let builtAt = -1;
	let builtLength = 0;
	let final = 0;

	const release = (): void => {
		for (const cache of caches.splice(0)) engine.releaseCache(cache);
	};

	/** Makes room for the canvas; what was cached is lost when it must grow. */
	const reserve = async (): Promise<void> => {
		if (caches.length > 0 && (caches[0] as NativeCache).capacity >= canvas.length) return;
		release();
		builtAt = -1;
		final = 0;
		const capacity = Math.max(canvas.length, options.capacity);
		for (let i = 0; i < (guided ? 2 : 1); i++) caches.push(await engine.createCache(capacity, signal));
	};

	const rangeOf = ({ positions, begin, end }: LookRequest): Range => {
		const T = canvas.length;
		const moved = canvas.movedFrom;
		canvas.movedFrom = Number.POSITIVE_INFINITY;
		if (blockCausal !== null) {
			const first = begin - (begin % blockCausal);
			const unmoved = Number.isFinite(moved) ? moved - (moved % blockCausal) : final;
			final = Math.min(final, first, unmoved);
			const from = Math.max(0, Math.min(final, first - shift));
			const to = Math.min(T, Math.ceil(end / blockCausal) * blockCausal);
			final = first;
			return { from, to, keys: to, whole: false };
		}
		const from = begin - shift;
		const to = kind === 'prefix' ? T : Math.min(end, T);
		const inside = positions.every((position) => position - shift >= from && position - shift < to);
		if (builtAt !== begin || builtLength !== T || !inside) {
			builtAt = begin;
			builtLength = T;
			return { from: 0, to: T, keys: T, whole: true };
		}
		return { from, to, keys: T, whole: false };
	};

	const requestOf = ({ from, to, keys }: Range, request: LookRequest, logits: boolean): DenoiseRequest => {
		const { positions, step } = request;
		const sequences = [canvas.tokens.slice(from, to)];
		if (guided) sequences.push(twinOf(canvas.tokens, canvas, pinned).slice(from, to));
		return {
			seed,
			guidance,
			temperature,
			topK,
			topP,
			banned: canvas.maskId,
			bannedEnd: canvas.bannedEnd,
			sequences,
			positions: Int32Array.from({ length: to - from }, (_, i) => from + i),
			keyLength: keys,
			caches: [...caches],
			mask,
			rowSequence: null,
			row: positions.map((position) => position - shift - from),
			rowGuide: guided ? new Int32Array(positions.length).fill(1) : null,
			rowPosition: positions,
			step,
			watch: ends,
			logits,
			history: request.history,
		};
	};

	return {
		async look(request) {
			await reserve();
			const range = rangeOf(request);
			const measured = options.measureDrift && !range.whole;
			const denoised = engine.denoise(requestOf(range, request, request.logits || measured), signal);
			if (!measured) {
				const look = toLook(request.positions, await denoised);
				if (options.measureDrift) look.drift = { mean: 0, max: 0, rows: 0 };
				return look;
			}
			// Both wait for the same native call. Neither may be left in flight when the other fails.
			const [cached, whole] = await Promise.allSettled([
				denoised,
				exact.look({ ...request, groups: [], logits: true, history: undefined }),
			]);
			if (cached.status === 'rejected') throw cached.reason;
			if (whole.status === 'rejected') throw whole.reason;
			const look = toLook(request.positions, cached.value);
			look.drift = driftOf(whole.value, look);
			return look;
		},
		release,
	};

	function toLook(positions: Int32Array, stats: Awaited<ReturnType<Engine['denoise']>>): Look {
		return makeLook(positions, stats, ends.length, ends.length, new Map(), config, guidance, canvas.bannedEnd);
	}
}

function driftOf(exact: Look, cached: Look): Drift {
	const rows = cached.positions.length;
	let sum = 0;
	let max = 0;
	for (let k = 0; k < rows; k++) {
		// Rounding may leave a tiny negative sum.
		const value = Math.max(0, divergence(exact.logProbs(k), cached.logProbs(k)));
		sum += value;
		max = Math.max(max, value);
	}
	return { mean: sum / rows, max, rows };
}
