/**
 * The look before denoising: one forward on the prompt and masks, and what it says of where the answer ends.
 *
 * Continuation: e_i = P(end token at the i-th open position), summed over the ids that end a text.
 *
 * Infilling: no end token comes before a suffix, so the suffix itself is the end: its tokens are masked too, and after i
 * tokens it would begin at open position i. By Bayes' rule with a uniform prior, P(length = i | prefix, suffix) is
 * proportional to P(suffix at i | prefix), of which the forward gives the mean-field estimate prod_j P_{i + j}(s_j). The first
 * `suffixTokens` tokens are used; e_i is their geometric mean.
 *
 * Rows go through the engine, which merges the looks of concurrent requests into one ragged batch; a row's values do not
 * depend on what else is in it.
 */
import type { ModelConfig } from '../config.js';
import type { Engine } from '../engine.js';
import { check, divergedError } from '../errors.js';
import { endIds } from '../evaluator.js';
import { makeCanvas, type ParsedPrompt } from '../prompt.js';
import { Stream, uniform } from '../random.js';
import type { LengthHead } from './head.js';
import type { LengthRule } from './method.js';
import { tailScore } from './resize.js';
import type { LengthLook } from './rules.js';

/** Suffix tokens whose place is looked for. */
const suffixTokens = 8;

/** The canvas a method begins with. */
export interface FirstCanvas {
	/** Open positions. */
	open: number;
	/** Predicted tokens of the answer; undefined: the method predicts none. */
	length: number | undefined;
	/** Of the last look; empty when there was none. */
	probabilities: Float32Array;
	forwards: number;
}

/** Throws unless the end of a text can be seen at all. */
export function checkEnds(config: ModelConfig): void {
	check(
		config.eosId !== config.maskId,
		`the model has no end token: config.eosId ${config.eosId} is the mask id, which is never predicted`,
	);
}

/** Looks as often as the rule wants and decides on the first canvas. `seed`: of a length that is drawn. */
export async function firstCanvas(
	engine: Engine,
	prompt: ParsedPrompt,
	rule: LengthRule,
	head: LengthHead | undefined,
	seed: bigint,
	signal: AbortSignal | undefined,
): Promise<FirstCanvas> {
	const none = new Float32Array(0);
	const u = uniform(seed, Stream.time, 0, 0);
	if (!rule.looks) return { open: rule.initial, length: undefined, probabilities: none, forwards: 0 };
	let open = rule.initial;
	for (let forwards = 1; ; forwards++) {
		const look = rule.infilling
			? await lookForSuffix(engine, prompt, open, signal)
			: rule.head
				? await lookWithHead(engine, prompt, open, head as LengthHead, signal)
				: await lookForEnd(engine, prompt, open, signal);
		const more = rule.extend?.(look) ?? 0;
		if (more > 0) {
			open += more;
			continue;
		}
		const end = rule.predict?.(look, u) ?? -1;
		const length = end < 0 ? rule.max : end;
		// Before a suffix there is no end token to make room for.
		if (end >= 0) open = Math.min(rule.max, rule.infilling ? end : end + 1);
		else if (rule.extend) open = rule.max;
		return { open, length, probabilities: look.e, forwards };
	}
}

/** End probabilities at `open` masked positions. */
export async function lookForEnd(
	engine: Engine,
	prompt: ParsedPrompt,
	open: number,
	signal: AbortSignal | undefined,
): Promise<LengthLook> {
	const { config } = engine;
	checkEnds(config);
	const tokens = makeCanvas(prompt, open, config).tokens;
	const ends = endIds(config);
	const { watched, best } = await watch(engine, tokens, prompt.before.length, open, ends, signal);
	const e = new Float32Array(open);
	for (let r = 0; r < open; r++) {
		for (let j = 0; j < ends.length; j++) e[r] = (e[r] as number) + (watched[r * ends.length + j] as number);
	}
	const isEnd = Uint8Array.from(best, (id) => Number(ends.includes(id)));
	return { e, tail: (window) => tailScore(e, isEnd, window) };
}

/** How well the suffix fits after 0 .. `max` masked positions. */
async function lookForSuffix(
	engine: Engine,
	prompt: ParsedPrompt,
	max: number,
	signal: AbortSignal | undefined,
): Promise<LengthLook> {
	const { config } = engine;
	const suffix = prompt.after.subarray(0, suffixTokens);
	const begin = prompt.before.length;
	const tokens = new Int32Array(begin + max + suffix.length).fill(config.maskId);
	tokens.set(prompt.before);
	const ids = Int32Array.from(new Set(suffix));
	const columns = Array.from(suffix, (id) => ids.indexOf(id));
	const { watched } = await watch(engine, tokens, begin, max + suffix.length, ids, signal);
	const logEvidence = new Float64Array(max + 1);
	for (let i = 0; i <= max; i++) {
		for (const [j, column] of columns.entries()) {
			// A probability that has run out of float range counts as the smallest there is.
			const p = Math.max(watched[(i + j) * ids.length + column] as number, 2 ** -149);
			logEvidence[i] = (logEvidence[i] as number) + Math.log(p);
		}
	}
	const e = Float32Array.from(logEvidence, (log) => Math.exp(log / suffix.length));
	return { e, logEvidence, tail: () => 0 };
}

/** The trained heads on the hidden states of `open` masked positions. */
async function lookWithHead(
	engine: Engine,
	prompt: ParsedPrompt,
	open: number,
	head: LengthHead,
	signal: AbortSignal | undefined,
): Promise<LengthLook> {
	const tokens = makeCanvas(prompt, open, engine.config).tokens;
	const hidden = await hiddenAt(engine, [tokens], [prompt.before.length], open, signal);
	const states = hidden[0] as Float32Array;
	const e = head.endProbabilities(states);
	if (e.some(Number.isNaN)) throw divergedError('the length head says NaN');
	return { e, tail: () => 0, regressed: head.regress(states) };
}

/**
 * Hidden states after the final layer norm that speak of `open` positions from `begin` on, (open, C) per sequence: under
 * the shift those of the rows before them.
 */
export async function hiddenAt(
	engine: Engine,
	sequences: readonly Int32Array[],
	begins: readonly number[],
	open: number,
	signal: AbortSignal | undefined,
): Promise<Float32Array[]> {
	const { shift, channels } = engine.config;
	const total = sequences.reduce((sum, tokens) => sum + tokens.length, 0);
	const ids = new Int32Array(total);
	const positions = new Int32Array(total);
	const offsets = new Int32Array(sequences.length + 1);
	const rows = new Int32Array(sequences.length * open);
	for (const [s, tokens] of sequences.entries()) {
		const at = offsets[s] as number;
		ids.set(tokens, at);
		for (let i = 0; i < tokens.length; i++) positions[at + i] = i;
		for (let r = 0; r < open; r++) rows[s * open + r] = at + (begins[s] as number) + r - (shift ? 1 : 0);
		offsets[s + 1] = at + tokens.length;
	}
	const batch = {
		ids,
		positions,
		offsets,
		keyLengths: Int32Array.from(sequences, (tokens) => tokens.length),
		caches: sequences.map(() => null),
		masks: sequences.map(() => ({ kind: 'full' as const })),
		rows,
	};
	const all = await engine.run((native) => native.forward(batch, 'hidden'), signal);
	const size = open * channels;
	return sequences.map((_, s) => all.subarray(s * size, (s + 1) * size));
}

/** One forward; probabilities of `ids` at `open` positions from `begin` on. */
async function watch(
	engine: Engine,
	tokens: Int32Array,
	begin: number,
	open: number,
	ids: Int32Array,
	signal: AbortSignal | undefined,
): Promise<{ watched: Float32Array; best: Int32Array }> {
	const { maskId, shift } = engine.config;
	const rowPosition = Int32Array.from({ length: open }, (_, r) => begin + r);
	const stats = await engine.denoise(
		{
			sequences: [tokens],
			positions: Int32Array.from(tokens, (_, i) => i),
			keyLength: tokens.length,
			caches: null,
			mask: { kind: 'full' },
			rowSequence: null,
			row: rowPosition.map((position) => position - (shift ? 1 : 0)),
			rowGuide: null,
			rowPosition,
			step: 0,
			seed: 0n,
			guidance: 0,
			temperature: 0,
			topK: 0,
			topP: 1,
			banned: maskId,
			bannedEnd: -1,
			watch: ids,
		},
		signal,
	);
	return { watched: stats.watched, best: stats.best };
}
