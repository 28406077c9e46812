/**
 * From canvas positions to network rows and back: which row predicts which token (the shift), the unconditional twin of
 * guidance, verification copies, the key-value cache of left-to-right decoding. The one place that knows the shift in
 * generation.
 */
import type { NativeCache } from './binding.js';
import { type Canvas, State } from './canvas.js';
import type { ModelConfig } from './config.js';
import type { DenoiseRequest, Engine, RowStatistics } from './engine.js';
import type { ResolvedOptions } from './options.js';

/** Statistics of the positions looked at; entry k speaks of `positions[k]`. */
export interface Look extends RowStatistics {
	positions: Int32Array;
	/** V. */
	vocab: number;
	/** (R) aligned probability of an end token. */
	end: Float32Array;
	/** Probability of the tentative token at each verified position. */
	verified: Map<number, number>;
	logProbs(k: number): Float64Array;
}

export interface Evaluator {
	/** One forward: statistics of `positions`, and verification of the tentative tokens of each group. */
	look(positions: Int32Array, groups: readonly (readonly number[])[], step: number, logits: boolean): Promise<Look>;
	/** Frees what the evaluator holds. No `look` may be in flight. */
	release(): void;
}

type Sampling = Pick<ResolvedOptions, 'temperature' | 'topK' | 'topP' | 'guidance' | 'seed' | 'signal'>;

/** Ids that end a text. */
export function endIds(config: ModelConfig): Int32Array {
	return config.padId === config.eosId ? Int32Array.of(config.eosId) : Int32Array.of(config.eosId, config.padId);
}

/** Full attention over the whole canvas. `pinned`: position 0 was put there by us and stays visible to the twin. */
export function fullEvaluator(engine: Engine, canvas: Canvas, sampling: Sampling, pinned: boolean): Evaluator {
	const { config } = engine;
	const { maskId } = config;
	const shift = config.shift ? 1 : 0;
	const ends = endIds(config);
	const twinOf = (tokens: Int32Array): Int32Array =>
		tokens.map((id, i) => (canvas.state[i] === State.given && !(pinned && i === 0) ? maskId : id));
	return {
		async look(positions, groups, step, logits) {
			const guided = sampling.guidance !== 0;
			const variants = [canvas.tokens.slice()];
			for (const group of groups) {
				const copy = canvas.tokens.slice();
				for (const position of group) copy[position] = maskId;
				variants.push(copy);
			}
			const sequences = guided ? variants.flatMap((tokens) => [tokens, twinOf(tokens)]) : variants;
			const stride = guided ? 2 : 1;
			const where: { position: number; sequence: number }[] = Array.from(positions, (position) => ({
				position,
				sequence: 0,
			}));
			for (const [g, group] of groups.entries()) {
				for (const position of group) where.push({ position, sequence: (g + 1) * stride });
			}
			const watch = [...new Set([...ends, ...groups.flat().map((position) => canvas.tokens[position] as number)])];
			const stats = await engine.denoise(
				{
					...fixed(sampling, config),
					sequences,
					positions: Int32Array.from({ length: canvas.length }, (_, i) => i),
					keyLength: canvas.length,
					caches: null,
					mask: { kind: 'full' },
					rowSequence: Int32Array.from(where, (row) => row.sequence),
					row: Int32Array.from(where, (row) => row.position - shift),
					rowGuide: Int32Array.from(where, (row) => (guided ? row.sequence + 1 : -1)),
					rowPosition: Int32Array.from(where, (row) => row.position),
					step,
					watch: Int32Array.from(watch),
					logits,
				},
				sampling.signal,
			);
			const verified = new Map<number, number>();
			for (let r = positions.length; r < where.length; r++) {
				const { position } = where[r] as { position: number };
				const column = watch.indexOf(canvas.tokens[position] as number);
				verified.set(position, stats.watched[r * watch.length + column] as number);
			}
			return makeLook(positions, stats, watch.length, ends.length, verified, config, sampling.guidance);
		},
		release() {},
	};
}

/**
 * Causal attention with an exact cache: each forward feeds the tokens from the last one cached up to the one before the
 * position asked for, which must be the first open one. Guidance keeps a second cache.
 */
export async function cachedEvaluator(
	engine: Engine,
	canvas: Canvas,
	sampling: Sampling,
	pinned: boolean,
	capacity: number,
): Promise<Evaluator> {
	const { config } = engine;
	const ends = endIds(config);
	const guided = sampling.guidance !== 0;
	const caches: NativeCache[] = [];
	let cached = 0;
	for (let i = 0; i < (guided ? 2 : 1); i++) caches.push(await engine.createCache(capacity));
	return {
		async look(positions, _groups, step, logits) {
			const position = positions[0] as number;
			const tokens = canvas.tokens.slice(cached, position);
			const twin = tokens.map((id, i) =>
				canvas.state[cached + i] === State.given && !(pinned && cached + i === 0) ? config.maskId : id,
			);
			const from = cached;
			const stats = await engine.denoise(
				{
					...fixed(sampling, config),
					sequences: guided ? [tokens, twin] : [tokens],
					positions: Int32Array.from(tokens, (_, i) => from + i),
					keyLength: position,
					caches,
					mask: { kind: 'causal' },
					rowSequence: Int32Array.of(0),
					row: Int32Array.of(tokens.length - 1),
					rowGuide: Int32Array.of(guided ? 1 : -1),
					rowPosition: Int32Array.of(position),
					step,
					watch: ends,
					logits,
				},
				sampling.signal,
			);
			cached = position;
			return makeLook(positions, stats, ends.length, ends.length, new Map(), config, sampling.guidance);
		},
		release() {
			for (const cache of caches) engine.releaseCache(cache);
		},
	};
}

type Fixed = Pick<DenoiseRequest, 'seed' | 'guidance' | 'temperature' | 'topK' | 'topP' | 'banned'>;

function fixed(sampling: Sampling, config: ModelConfig): Fixed {
	const { seed, guidance, temperature, topK, topP } = sampling;
	return { seed, guidance, temperature, topK, topP, banned: config.maskId };
}

/** Cuts the verification rows off and turns watched columns into end probabilities (the first `E` columns). */
function makeLook(
	positions: Int32Array,
	stats: RowStatistics,
	W: number,
	E: number,
	verified: Map<number, number>,
	config: ModelConfig,
	guidance: number,
): Look {
	const R = positions.length;
	const V = config.vocab;
	const end = new Float32Array(R);
	for (let r = 0; r < R; r++) {
		for (let e = 0; e < E; e++) end[r] = (end[r] as number) + (stats.watched[r * W + e] as number);
	}
	return {
		positions,
		vocab: V,
		best: stats.best.subarray(0, R),
		drawn: stats.drawn.subarray(0, R),
		probability: stats.probability.subarray(0, R),
		margin: stats.margin.subarray(0, R),
		entropy: stats.entropy.subarray(0, R),
		drawnLogProb: stats.drawnLogProb.subarray(0, R),
		watched: stats.watched,
		end,
		verified,
		logProbs(k) {
			const { logits, guideLogits } = stats;
			if (!logits || !guideLogits) throw new TypeError('view.logProbs needs a policy with needsLogits: true');
			const values = Float64Array.from(logits.subarray(k * V, (k + 1) * V), (l, v) => {
				if (v === config.maskId) return Number.NEGATIVE_INFINITY;
				const u = guideLogits[k * V + v] as number;
				return guidance === 0 ? l : u + (guidance + 1) * (l - u);
			});
			const largest = values.reduce((a, b) => Math.max(a, b), Number.NEGATIVE_INFINITY);
			const logSum = largest + Math.log(values.reduce((sum, value) => sum + Math.exp(value - largest), 0));
			return values.map((value) => value - logSum);
		},
	};
}
