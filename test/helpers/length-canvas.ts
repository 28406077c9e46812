/** A prompt of ids, its masks, and logits and looks on it, for the tests of length methods. */
import type { DiffuGPT } from 'diffusion-native';

import type { LengthLook } from '../../lib/length/rules.js';
import { logSoftmax } from './models.js';

export const maskId = 60;

export const eosId = 43;

export const given = [5, 17, 33, 2];

export const prompt = { tokens: Int32Array.from(given) };

/** Log probabilities (T, V) of every position of a canvas, from full logits; position 0 has none. */
export async function rows(model: DiffuGPT, tokens: number[]): Promise<number[][]> {
	const { vocab, shift, maskId: mask } = model.config;
	const [logits] = (await model.forward(Int32Array.from(tokens))) as [Float32Array];
	return tokens.map((_, i) => {
		const row = shift ? i - 1 : i;
		return row < 0 ? [] : logSoftmax(logits.subarray(row * vocab, (row + 1) * vocab), mask);
	});
}

export function masks(n: number): number[] {
	return new Array<number>(n).fill(maskId);
}

export function lookWith(e: readonly number[]): LengthLook {
	return { e: Float32Array.from(e), tail: () => 0 };
}
