/** Data files, enumerated truths and rigged models for the tests of `evaluate`. */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import test from 'ava';
import { DiffuGPT, Tokenizer } from 'diffusion-native';

export const folder = mkdtempSync(join(tmpdir(), 'dn-evaluate-'));

test.after.always(() => rmSync(folder, { recursive: true, force: true }));

let names = 0;

/** Writes a file and returns its path. */
export function file(text: string, extension = 'jsonl'): string {
	const path = join(folder, `${names++}.${extension}`);
	writeFileSync(path, text);
	return path;
}

export const lines = (records: readonly object[]): string =>
	records.map((record) => `${JSON.stringify(record)}\n`).join('');

/** Everything of a result that must not change from run to run. */
export function facts(result: object): object {
	const { ms: _, tokensPerSecond: __, ...rest } = result as Record<string, unknown>;
	return rest;
}

export function logSumExp(values: ArrayLike<number>): number {
	const all = Array.from(values);
	const largest = Math.max(...all);
	return largest + Math.log(all.reduce((sum, value) => sum + Math.exp(value - largest), 0));
}

/** -log p of each target at its position, by the model's aligned logits on `input`. */
export async function crossEntropies(
	model: DiffuGPT,
	input: Int32Array,
	target: Int32Array,
	where: number[],
): Promise<number[]> {
	const V = model.config.vocab;
	const [logits] = (await model.forward(input, { output: 'aligned-logits' })) as [Float32Array];
	return where.map((i) => {
		const row = logits.subarray(i * V, (i + 1) * V);
		return logSumExp(row) - (row[target[i] as number] as number);
	});
}

export const factorial = (n: number): number => (n < 2 ? 1 : n * factorial(n - 1));

/** The NELBO of one sequence, nats: every mask, its weight from the definition. */
export async function enumerated(model: DiffuGPT, tokens: Int32Array, scorable: number[]): Promise<number> {
	const L = scorable.length;
	let sum = 0;
	for (let bits = 1; bits < 2 ** L; bits++) {
		const masked = scorable.filter((_, j) => (bits >> j) & 1);
		const input = tokens.map((id, i) => (masked.includes(i) ? model.config.maskId : id));
		const costs = await crossEntropies(model, input, tokens, masked);
		const weight = (factorial(masked.length - 1) * factorial(L - masked.length)) / factorial(L);
		sum += weight * costs.reduce((a, b) => a + b, 0);
	}
	return sum;
}

export const range = (from: number, to: number): number[] => Array.from({ length: to - from }, (_, i) => from + i);

/** Five short sequences of ids 1 .. 59, some with a prompt. */
export const short = [
	{ tokens: [5, 17, 33, 2, 9], promptLength: 1 },
	{ tokens: [8, 8, 41, 20, 7, 3], promptLength: 2 },
	{ tokens: [50, 1, 2], promptLength: 0 },
	{ tokens: [11, 12, 13, 14, 15, 16, 17], promptLength: 3 },
	{ tokens: [30, 31], promptLength: 1 },
];

export async function shortTruth(model: DiffuGPT): Promise<{ nats: number; tokens: number }> {
	let nats = 0;
	let tokens = 0;
	for (const record of short) {
		const ids = Int32Array.from(record.tokens);
		const scorable = range(Math.max(record.promptLength, model.config.shift ? 1 : 0), ids.length);
		nats += await enumerated(model, ids, scorable);
		tokens += scorable.length;
	}
	return { nats, tokens };
}

/**
 * A model that predicts `targets[i]` at position i whatever it sees. Only the embeddings are not zero: position i - 1 (the
 * row that predicts i) points to axis i, and so does the embedding of the target.
 */
export async function rigged(
	targets: Record<number, number>,
	config: Partial<Parameters<typeof DiffuGPT.fromConfig>[0]> = {},
	tokenizer?: Tokenizer,
): Promise<DiffuGPT> {
	const channels = 32;
	const model = await DiffuGPT.fromConfig(
		{ layers: 1, heads: 2, channels, vocab: 61, context: 24, maskId: 60, eosId: 0, ...config },
		{ device: 'cpu', ...(tokenizer ? { tokenizer } : {}) },
	);
	for (const { name, count } of model.parameters()) {
		if (name.startsWith('ln') || name.includes('.ln_')) continue;
		model.setParameter(name, new Float32Array(count));
	}
	const wte = new Float32Array(model.config.vocab * channels);
	const wpe = new Float32Array(model.config.context * channels);
	for (const [position, id] of Object.entries(targets)) {
		const i = Number(position);
		wpe[(i - 1) * channels + i] = 1000;
		wte[id * channels + i] = 20;
	}
	model.setParameter('wte.weight', wte);
	model.setParameter('wpe.weight', wpe);
	return model;
}

export const gpt2 = Tokenizer.gpt2();

export const gpt2Config = { vocab: 50257, maskId: 10541, eosId: 50256 };
