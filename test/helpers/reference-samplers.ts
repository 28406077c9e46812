/**
 * The deterministic decoders once more, slowly and plainly: full logits of every step from `model.forward`, double
 * precision, straight from the formulas of docs/sampling.md. Shares no code with lib/samplers.
 */
import type { DiffuGPT } from 'diffusion-native';

import { logSoftmax } from './models.js';

/** What each step did, and the final canvas. */
export interface Trace {
	committed: number[][];
	reopened: number[][];
	/** The canvas after each step. */
	canvases: Int32Array[];
	tokens: Int32Array;
	forwards: number;
	/** Smallest lead, in log probability, of a committed token over its runner-up: what rounding must stay below. */
	lead: number;
}

function emptyTrace(tokens: Int32Array): Trace {
	return { committed: [], reopened: [], canvases: [], tokens, forwards: 0, lead: Number.POSITIVE_INFINITY };
}

interface Row {
	position: number;
	best: number;
	probability: number;
	margin: number;
	/** Log probability of the best token minus that of the runner-up. */
	lead: number;
	entropy: number;
	logProbs: number[];
}

/** Log probabilities of every open position of a canvas; guidance w > 0 mixes in the canvas with `given` masked. */
async function rowsOf(model: DiffuGPT, tokens: Int32Array, open: number[], given: number[], w: number): Promise<Row[]> {
	const { maskId, vocab, shift } = model.config;
	const twin = tokens.slice();
	for (const i of given) twin[i] = maskId;
	const [l, u] = (await model.forward([tokens, twin])) as [Float32Array, Float32Array];
	return open.map((position) => {
		const row = shift ? position - 1 : position;
		const logits = Array.from({ length: vocab }, (_, v) => {
			const a = l[row * vocab + v] as number;
			const b = u[row * vocab + v] as number;
			return w === 0 ? a : b + (w + 1) * (a - b);
		});
		const logProbs = logSoftmax(logits, maskId);
		const byProbability = logProbs.map((_, v) => v).sort((a, b) => (logProbs[b] as number) - (logProbs[a] as number));
		const [first, second] = byProbability as [number, number];
		const probability = Math.exp(logProbs[first] as number);
		return {
			position,
			best: first,
			probability,
			margin: probability - Math.exp(logProbs[second] as number),
			lead: (logProbs[first] as number) - (logProbs[second] as number),
			entropy: -logProbs.reduce((sum, log) => sum + (log === Number.NEGATIVE_INFINITY ? 0 : Math.exp(log) * log), 0),
			logProbs,
		};
	});
}

/** Which of the open rows to commit; step j of the block, n open at the block's start. */
type Rule = (rows: Row[], j: number, n: number, block: number) => Row[];

export interface Setup {
	prompt: number[];
	length: number;
	block?: number;
	guidance?: number;
}

/** Blocks from left to right; in each, forwards until nothing is open. A rule's -1 (`null`) means: skip this step. */
export async function decode(
	model: DiffuGPT,
	setup: Setup,
	rule: (j: number, n: number, block: number) => Rule | null,
): Promise<Trace> {
	const { prompt, length, block = length, guidance = 0 } = setup;
	const { maskId } = model.config;
	const tokens = Int32Array.from([...prompt, ...new Array<number>(length).fill(maskId)]);
	const isOpen = Array.from(tokens, (_, i) => i >= prompt.length);
	const trace = emptyTrace(tokens);
	for (let b = 0; b * block < length; b++) {
		const from = prompt.length + b * block;
		const to = Math.min(from + block, prompt.length + length);
		const n = to - from;
		for (let j = 0; isOpen.slice(from, to).includes(true); j++) {
			const chosen = rule(j, n, b);
			if (!chosen) continue;
			const open = Array.from({ length: n }, (_, i) => from + i).filter((i) => isOpen[i]);
			const rows = await rowsOf(
				model,
				tokens,
				open,
				prompt.map((_, i) => i),
				guidance,
			);
			trace.forwards++;
			const commit = chosen(rows, j, n, b);
			for (const row of commit) {
				tokens[row.position] = row.best;
				isOpen[row.position] = false;
				trace.lead = Math.min(trace.lead, row.lead);
			}
			trace.committed.push(commit.map((row) => row.position).sort((p, q) => p - q));
			trace.canvases.push(tokens.slice());
		}
	}
	return trace;
}

const by = (rows: Row[], score: (row: Row) => number): Row[] => [...rows].sort((a, b) => score(b) - score(a));

/** LLaDA: S' steps per block, n div S' each, the remainder first. */
export function even(score: (row: Row) => number, stepsOf: (block: number) => number) {
	return (j: number, n: number, block: number): Rule | null => {
		const steps = stepsOf(block);
		const count = Math.floor(n / steps) + (j < n % steps ? 1 : 0);
		return count === 0 ? null : (rows) => by(rows, score).slice(0, count);
	};
}

/** DiffuGPT: floor(n (T - j) / T) stay open after pass j = 1 .. T. */
export function linear(score: (row: Row) => number, T: number) {
	return (j: number, n: number): Rule | null => {
		const stay = (pass: number): number => Math.floor((n * (T - pass)) / T);
		if (stay(j) === stay(j + 1)) return null;
		return (rows) => by(rows, score).slice(0, rows.length - stay(j + 1));
	};
}

export function threshold(tau: number) {
	return (): Rule => (rows) => {
		const sorted = by(rows, (row) => row.probability);
		return sorted.filter((row, i) => i === 0 || row.probability >= tau);
	};
}

/** The largest n with c_j >= 1 - f / (j + 1) for all 2 <= j <= n. */
export function factor(f: number) {
	return (): Rule => (rows) => {
		const sorted = by(rows, (row) => row.probability);
		let n = 0;
		for (let j = 1; j <= sorted.length; j++) {
			if (j > 1 && (sorted[j - 1] as Row).probability < 1 - f / (j + 1)) break;
			n = j;
		}
		return sorted.slice(0, n);
	};
}

/** The largest prefix with sum - max <= gamma. */
export function entropyBound(gamma: number) {
	return (): Rule => (rows) => {
		const sorted = by(rows, (row) => row.probability);
		for (let n = sorted.length; n > 1; n--) {
			const h = sorted.slice(0, n).map((row) => row.entropy);
			if (h.reduce((a, b) => a + b, 0) - Math.max(...h) <= gamma) return sorted.slice(0, n);
		}
		return sorted.slice(0, 1);
	};
}

/** Probability >= tau, and KL(now || before) < epsilon in each of the last `steps` steps; else the best one. */
export function klass(tau: number, epsilon: number, steps: number) {
	const seen = new Map<number, { logProbs: number[]; divergences: number[] }>();
	return (): Rule => (rows) => {
		const ready: Row[] = [];
		for (const row of rows) {
			const before = seen.get(row.position);
			const divergences = before ? [...before.divergences] : [];
			if (before) {
				divergences.push(
					row.logProbs.reduce(
						(sum, log, v) =>
							log === Number.NEGATIVE_INFINITY ? sum : sum + Math.exp(log) * (log - (before.logProbs[v] as number)),
						0,
					),
				);
			}
			seen.set(row.position, { logProbs: row.logProbs, divergences });
			const recent = divergences.slice(-steps);
			if (row.probability >= tau && recent.length === steps && recent.every((d) => d < epsilon)) ready.push(row);
		}
		return ready.length > 0 ? ready : by(rows, (row) => row.probability).slice(0, 1);
	};
}

/** Draft at >= `draft`, verify the drafts of earlier steps in two interleaved halves, reopen below `verify`. */
export async function revocable(
	model: DiffuGPT,
	setup: Setup,
	draft: number,
	verify: number,
	attempts: number,
): Promise<Trace> {
	const { prompt, length, guidance = 0 } = setup;
	const { maskId } = model.config;
	const given = prompt.map((_, i) => i);
	const tokens = Int32Array.from([...prompt, ...new Array<number>(length).fill(maskId)]);
	const all = Array.from({ length }, (_, i) => prompt.length + i);
	const open = new Set(all);
	const drafts = new Set<number>();
	const reopenings = new Map<number, number>();
	const trace = emptyTrace(tokens);
	while (open.size + drafts.size > 0) {
		const rows =
			open.size > 0
				? await rowsOf(
						model,
						tokens,
						all.filter((i) => open.has(i)),
						given,
						guidance,
					)
				: [];
		const reopened: number[] = [];
		const tentative = all.filter((i) => drafts.has(i));
		for (const half of [0, 1]) {
			const group = tentative.filter((_, k) => k % 2 === half);
			if (group.length === 0) continue;
			const copy = tokens.slice();
			for (const i of group) copy[i] = maskId;
			for (const row of await rowsOf(model, copy, group, given, guidance)) {
				const probability = Math.exp(row.logProbs[tokens[row.position] as number] as number);
				drafts.delete(row.position);
				if (probability >= verify || (reopenings.get(row.position) ?? 0) >= attempts) continue;
				reopened.push(row.position);
			}
		}
		trace.forwards++;
		const commit = by(rows, (row) => row.probability).filter((row, i) => i === 0 || row.probability >= draft);
		for (const i of reopened) {
			tokens[i] = maskId;
			open.add(i);
			reopenings.set(i, (reopenings.get(i) ?? 0) + 1);
		}
		for (const row of commit) {
			tokens[row.position] = row.best;
			open.delete(row.position);
			drafts.add(row.position);
			trace.lead = Math.min(trace.lead, row.lead);
		}
		trace.canvases.push(tokens.slice());
		trace.committed.push(commit.map((row) => row.position).sort((a, b) => a - b));
		trace.reopened.push(reopened.sort((a, b) => a - b));
	}
	return trace;
}
