/** A tiny model, data it can learn, and runs, for the tests of training. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import test from 'ava';
import { DiffuGPT, prepare, type TokenDataset, type Trainer, type TrainMetrics } from 'diffusion-native';

import { MarkovSource } from './markov.js';

const root = mkdtempSync(join(tmpdir(), 'dn-trainer-'));

test.after.always(() => rmSync(root, { recursive: true, force: true }));

let names = 0;

export const fresh = (): string => join(root, String(names++));

/** Ids 0-7 are the source's, 8 ends text, 9 is the mask. */
export const ids = { encode: () => new Int32Array(0), vocabSize: 9 };

export const shape = { layers: 2, heads: 2, channels: 32, context: 16, vocab: 10, eosId: 8, maskId: 9 };

export const tiny = (seed = 1): Promise<DiffuGPT> => DiffuGPT.fromConfig(shape, { device: 'cpu', seed });

export async function documents(count: number, length = 7, seed = 1n): Promise<TokenDataset> {
	const source = new MarkovSource(length);
	const records = Array.from({ length: count }, () => source.sample(seed));
	return prepare(records, { tokenizer: ids, out: `${fresh()}.bin`, format: 'documents', context: 16, eosId: 8 });
}

export async function collect(trainer: Trainer, steps = Number.POSITIVE_INFINITY): Promise<TrainMetrics[]> {
	const seen: TrainMetrics[] = [];
	for await (const metrics of trainer.run()) {
		seen.push(metrics);
		if (seen.length >= steps) break;
	}
	return seen;
}

export const weights = (model: DiffuGPT): Float32Array[] =>
	model.parameters().map(({ name }) => model.getParameter(name));

/** Largest difference; NaN where only one of the two is NaN. */
export function nearly(a: Float32Array[], b: Float32Array[]): number {
	let worst = 0;
	for (const [i, values] of a.entries()) {
		for (const [j, value] of values.entries()) {
			const other = (b[i] as Float32Array)[j] as number;
			if (Object.is(value, other)) continue;
			const difference = Math.abs(value - other);
			if (!(difference <= worst)) worst = difference;
		}
	}
	return worst;
}
