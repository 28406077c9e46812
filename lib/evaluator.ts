/**
 * From canvas positions to network rows and back: which row predicts which token (the shift), the unconditional twin of
 * guidance, verification copies, the key-value cache of left-to-right decoding. With lib/block-cache.ts, which does the same
 * for cached blocks, the one place that knows the shift in generation.
 */
import { type Canvas, State } from './canvas.js';
import type { ModelConfig } from './config.js';
import type { Engine } from './engine.js';
import { check } from './errors.js';
import type { NativeCache, NativeMask } from './native-types.js';
import type { ResolvedOptions } from './options.js';
import type { RowStatistics } from './requests.js';
import type { KeptRows } from './row-history.js';

/** Statistics of the positions looked at; entry k speaks of `positions[k]`. */
export interface Look extends RowStatistics {
	positions: Int32Array;
	/** V. */
	vocab: number;
	/** (R) aligned probability of an end token. */
	end: Float32Array;
	/** (R) KL(now || the forward before), nats; empty unless the request has a history. */
	divergence: Float32Array;
	/** Probability of the tentative token at each verified position. */
	verified: Map<number, number>;
	/** Log probabilities (V) of row k, guided, without the ids that are banned; needs logits. */
	logProbs(k: number): Float64Array;
	/** How far the rows are from an exact forward's, when that was measured. */
	drift?: Drift;
}

/** KL(exact || cached) of the rows that one forward computed from a cache, nats. */
export interface Drift {
	/** Mean over the rows; 0 when there are none. */
	mean: number;
	/** Largest of the rows; 0 when there are none. */
	max: number;
	/** Rows compared; 0 when the forward was an exact one. */
	rows: number;
}

/** What is wanted of one forward. */
export interface LookRequest {
	/** (R) open positions whose statistics are wanted. */
	positions: Int32Array;
	/** Tentative positions to verify, one more sequence per group. */
	groups: readonly (readonly number[])[];
	/** Canvas positions [begin, end) of the block being filled. */
	begin: number;
	end: number;
	step: number;
	/** `logProbs` will be called. */
	logits: boolean;
	/** Of the rows of `positions`: `divergence` is wanted. */
	history?: KeptRows | undefined;
}

export interface Evaluator {
	/** One forward: statistics of `positions`, and verification of the tentative tokens of each group. */
	look(request: LookRequest): Promise<Look>;
	/** Frees what the evaluator holds. No `look` may be in flight. */
	release(): void;
}

export type Sampling = Pick<ResolvedOptions, 'temperature' | 'topK' | 'topP' | 'guidance' | 'seed' | 'signal'>;

/** Ids that end a text. */
export function endIds(config: ModelConfig): Int32Array {
	return config.padId === config.eosId ? Int32Array.of(config.eosId) : Int32Array.of(config.eosId, config.padId);
}

/** A canvas with everything masked that the caller gave. `pinned`: position 0 was put there by us and stays visible. */
export function twinOf(tokens: Int32Array, canvas: Canvas, pinned: boolean): Int32Array {
	return tokens.map((id, i) => (canvas.state[i] === State.given && !(pinned && i === 0) ? canvas.maskId : id));
}

/** The whole canvas at once, nothing cached. `mask`: full attention, or block-causal for a model trained that way. */
export function fullEvaluator(
	engine: Engine,
	canvas: Canvas,
	sampling: Sampling,
	pinned: boolean,
	mask: NativeMask = { kind: 'full' },
): Evaluator {
	const { config } = engine;
	const { maskId } = config;
	const shift = config.shift ? 1 : 0;
	const ends = endIds(config);
	const { seed, guidance, temperature, topK, topP, signal } = sampling;
	let indices = new Int32Array(0);
	return {
		async look({ positions, groups, step, logits, history }) {
			const guided = guidance !== 0;
			const T = canvas.length;
			if (indices.length !== T) indices = Int32Array.from({ length: T }, (_, i) => i);
			const variants = [canvas.tokens];
			for (const group of groups) {
				const copy = canvas.tokens.slice();
				for (const position of group) copy[position] = maskId;
				variants.push(copy);
			}
			const sequences = guided ? variants.flatMap((tokens) => [tokens, twinOf(tokens, canvas, pinned)]) : variants;
			const stride = guided ? 2 : 1;
			const verifying = groups.length === 0 ? [] : groups.flat();
			const R = positions.length + verifying.length;
			let rowPosition = positions;
			let rowSequence: Int32Array | null = null;
			let watch = ends;
			if (verifying.length > 0) {
				rowPosition = Int32Array.of(...positions, ...verifying);
				rowSequence = new Int32Array(R);
				watch = Int32Array.from(new Set([...ends, ...verifying.map((position) => canvas.tokens[position] as number)]));
				let next = positions.length;
				for (const [g, group] of groups.entries()) {
					rowSequence.fill((g + 1) * stride, next, next + group.length);
					next += group.length;
				}
			}
			const row = new Int32Array(R);
			for (let r = 0; r < R; r++) row[r] = (rowPosition[r] as number) - shift;
			let rowGuide: Int32Array | null = null;
			if (guided) rowGuide = rowSequence ? rowSequence.map((sequence) => sequence + 1) : new Int32Array(R).fill(1);
			// Written out: a spread here would make every step's request, and its garbage, several times dearer.
			const stats = await engine.denoise(
				{
					seed,
					guidance,
					temperature,
					topK,
					topP,
					banned: canvas.maskId,
					bannedEnd: canvas.bannedEnd,
					sequences,
					positions: indices,
					keyLength: T,
					caches: null,
					mask,
					rowSequence,
					row,
					rowGuide,
					rowPosition,
					step,
					watch,
					logits,
					history,
				},
				signal,
			);
			const verified = new Map<number, number>();
			for (let r = positions.length; r < R; r++) {
				const position = rowPosition[r] as number;
				const column = watch.indexOf(canvas.tokens[position] as number);
				verified.set(position, stats.watched[r * watch.length + column] as number);
			}
			return makeLook(positions, stats, watch.length, ends.length, verified, config, guidance, canvas.bannedEnd);
		},
		release() {},
	};
}

/**
 * Causal attention with an exact cache: each forward feeds the tokens from the last one cached up to the one before the
 * position asked for, which must be the first open one. Guidance keeps a second cache.
 *
 * @param stops ids after which nothing more is asked for
 */
export function cachedEvaluator(
	engine: Engine,
	canvas: Canvas,
	sampling: Sampling & Pick<ResolvedOptions, 'stepsPerCall'>,
	pinned: boolean,
	capacity: number,
	stops: Int32Array,
): Evaluator {
	const { config } = engine;
	const ends = endIds(config);
	const { seed, guidance, temperature, topK, topP, signal, stepsPerCall = 1 } = sampling;
	const guided = guidance !== 0;
	const caches: NativeCache[] = [];
	let cached = 0;
	// Steps that a call has already taken, from (position, step) on if `token` is what was committed before it.
	let following: RowStatistics[] = [];
	let next = { position: -1, step: -1, token: -1 };
	const serve = (positions: Int32Array, step: number, stats: RowStatistics): Look => {
		cached = positions[0] as number;
		next = { position: cached + 1, step: step + 1, token: stats.drawn[0] as number };
		return makeLook(positions, stats, ends.length, ends.length, new Map(), config, guidance, canvas.bannedEnd);
	};
	return {
		async look({ positions, step, logits, history }) {
			const ahead = following.shift();
			const isNext = positions[0] === next.position && step === next.step;
			if (ahead && isNext && canvas.tokens[next.position - 1] === next.token) return serve(positions, step, ahead);
			following = [];
			while (caches.length < (guided ? 2 : 1)) caches.push(await engine.createCache(capacity, signal));
			const position = positions[0] as number;
			const tokens = canvas.tokens.slice(cached, position);
			const from = cached;
			const twin = twinOf(canvas.tokens, canvas, pinned).subarray(from, position);
			const stats = await engine.denoise(
				{
					seed,
					guidance,
					temperature,
					topK,
					topP,
					banned: canvas.maskId,
					bannedEnd: canvas.bannedEnd,
					sequences: guided ? [tokens, twin] : [tokens],
					positions: Int32Array.from(tokens, (_, i) => from + i),
					keyLength: position,
					caches,
					mask: { kind: 'causal' },
					rowSequence: null,
					row: Int32Array.of(tokens.length - 1),
					rowGuide: guided ? Int32Array.of(1) : null,
					rowPosition: Int32Array.of(position),
					step,
					watch: ends,
					logits,
					history,
					ahead:
						guided || logits || history ? undefined : { most: Math.min(stepsPerCall, canvas.length - position), stops },
				},
				signal,
			);
			following = stats.following ?? [];
			return serve(positions, step, stats);
		},
		release() {
			for (const cache of caches.splice(0)) engine.releaseCache(cache);
		},
	};
}

/**
 * Cuts the verification rows off and turns watched columns into end probabilities (the first `E` columns).
 * @param bannedEnd as in the request, -1: none
 */
export function makeLook(
	positions: Int32Array,
	stats: RowStatistics,
	W: number,
	E: number,
	verified: Map<number, number>,
	config: ModelConfig,
	guidance: number,
	bannedEnd: number,
): Look {
	const R = positions.length;
	const { vocab: V, maskId } = config;
	const end = new Float32Array(R);
	for (let r = 0; r < R; r++) {
		for (let e = 0; e < E; e++) end[r] = (end[r] as number) + (stats.watched[r * W + e] as number);
	}
	return {
		positions,
		vocab: V,
		best: firstOf(stats.best, R),
		drawn: firstOf(stats.drawn, R),
		probability: firstOf(stats.probability, R),
		margin: firstOf(stats.margin, R),
		entropy: firstOf(stats.entropy, R),
		drawnLogProb: firstOf(stats.drawnLogProb, R),
		watched: stats.watched,
		divergence: stats.divergence ? firstOf(stats.divergence, R) : new Float32Array(0),
		end,
		verified,
		logProbs(k) {
			const { logits, guideLogits } = stats;
			check(logits, 'view.logProbs needs a policy with needsLogits: true');
			check(Number.isInteger(k) && k >= 0 && k < R, `view.logProbs(${k}): expected the index of one of ${R} positions`);
			const values = new Float64Array(V);
			let largest = Number.NEGATIVE_INFINITY;
			for (let v = 0; v < V; v++) {
				const l = logits[k * V + v] as number;
				const u = guideLogits ? (guideLogits[k * V + v] as number) : 0;
				const banned = v === maskId || v === bannedEnd;
				const value = banned ? Number.NEGATIVE_INFINITY : guideLogits ? u + (guidance + 1) * (l - u) : l;
				if (value > largest) largest = value;
				values[v] = value;
			}
			let sum = 0;
			for (let v = 0; v < V; v++) sum += Math.exp((values[v] as number) - largest);
			const logSum = largest + Math.log(sum);
			for (let v = 0; v < V; v++) values[v] = (values[v] as number) - logSum;
			return values;
		},
	};
}

/** The rows of a look that speak of `positions`, all of which were looked at. */
export function restrict(look: Look, positions: Int32Array): Look {
	if (look.positions.length === positions.length) return look;
	const indexOf = new Map(Array.from(look.positions, (position, k) => [position, k]));
	const rows = Array.from(positions, (position) => indexOf.get(position) as number);
	const ints = (values: Int32Array): Int32Array => Int32Array.from(rows, (k) => values[k] as number);
	const floats = (values: Float32Array): Float32Array => Float32Array.from(rows, (k) => values[k] as number);
	return {
		...look,
		positions,
		best: ints(look.best),
		drawn: ints(look.drawn),
		probability: floats(look.probability),
		margin: floats(look.margin),
		entropy: floats(look.entropy),
		drawnLogProb: floats(look.drawnLogProb),
		divergence: look.divergence.length > 0 ? floats(look.divergence) : look.divergence,
		end: floats(look.end),
		logProbs: (k) => look.logProbs(rows[k] as number),
	};
}

function firstOf<A extends Int32Array | Float32Array>(values: A, count: number): A {
	return (values.length === count ? values : values.slice(0, count)) as A;
}
