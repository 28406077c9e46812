/**
 * A tiny model that knows where answers end, and its pairs: a prompt [1, 2 + k] fixes the length k + 1 ('sharp'); the prompt
 * [1, 12] leaves it open, 1 to 8 alike ('loose'). Answers are of token 14, ends of token 0, the mask is 15.
 */
import { DiffuGPT, Trainer } from 'diffusion-native';

import { uniform } from '../../lib/random.js';

export interface ToyPair {
	prompt: number[];
	answer: number[];
	kind: string;
}

export function toyPairs(count: number, seed: bigint): ToyPair[] {
	return Array.from({ length: count }, (_, i) => {
		const k = Math.floor(8 * uniform(seed, 70, 0, i));
		const isLoose = uniform(seed, 70, 1, i) < 0.5;
		const answer = new Array<number>(k + 1).fill(14);
		return { prompt: [1, isLoose ? 12 : 2 + k], answer, kind: isLoose ? 'loose' : 'sharp' };
	});
}

/** Trains for a few seconds, with a rate that falls: at a constant one, the last step decides which prompts are known. */
export async function toyLengthModel(steps = 800): Promise<DiffuGPT> {
	const model = await DiffuGPT.fromConfig(
		{ layers: 2, heads: 2, channels: 32, vocab: 16, context: 24, maskId: 15, eosId: 0 },
		{ seed: 4, device: 'cpu' },
	);
	const learningRate = { kind: 'cosine', peak: 4e-3, steps } as const;
	await using trainer = new Trainer(model, { learningRate, weightDecay: 0, seed: 1 });
	for (let step = 0; step < steps; step++) {
		const pairs = toyPairs(32, BigInt(1000 + step));
		const tokens = pairs.map(({ prompt, answer }, i) => {
			// Padding of every amount: a model that always sees one size of canvas learns the canvas, not the end.
			const most = 17 - 2 - answer.length - 1;
			const padding = uniform(9n, 72, step, i) < 0.5 ? most : Math.floor((most + 1) * uniform(9n, 71, step, i));
			const row = new Int32Array(2 + answer.length + 1 + padding);
			row.set([...prompt, ...answer]);
			return row;
		});
		await trainer.step({ tokens, maskable: tokens.map((row) => Uint8Array.from(row, (_, i) => Number(i >= 2))) });
	}
	return model;
}
