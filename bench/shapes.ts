/** The model shapes that are measured, with random weights, and their operation counts. */
import { fileURLToPath } from 'node:url';

import { DiffuGPT, type ModelConfigInput } from 'diffusion-native';

export const shapes = {
	/** GPT-2 124M. */
	gpt2: { layers: 12, heads: 12, channels: 768, vocab: 50257, context: 1024, maskId: 10541, eosId: 50256 },
	/** The size used for comparison with other engines. */
	small: { layers: 6, heads: 6, channels: 384, vocab: 8192, context: 1024, maskId: 1, eosId: 0 },
	/** The shape of the model that ships. */
	tiny: { layers: 6, heads: 4, channels: 256, vocab: 8192, context: 320, maskId: 1, eosId: 0 },
} as const satisfies Record<string, ModelConfigInput>;

export type ShapeName = keyof typeof shapes;

/** The model that ships, trained: where it matters what a model is sure of. */
export function loadShipped(): Promise<DiffuGPT> {
	return DiffuGPT.fromPretrained('diffusion-native/tiny', { device: 'cpu', dtype: 'fp32' });
}

/** Its twin: the causal model it was adapted from. */
export function loadTwin(): Promise<DiffuGPT> {
	const folder = fileURLToPath(new URL('../../models/tiny-autoregressive', import.meta.url));
	return DiffuGPT.fromPretrained(folder, { device: 'cpu', dtype: 'fp32' });
}

/** How the weights of a model on the CPU are held. */
export type WeightType = 'fp32' | 'bf16' | 'int8';

/** Random weights; bf16 and int8 are the same ones, rounded. threads: all cores when left out. */
export function load(shape: ShapeName, dtype: WeightType = 'fp32', threads = 0): Promise<DiffuGPT> {
	return DiffuGPT.fromConfig(
		{ ...shapes[shape], attention: 'bidirectional' },
		{ device: 'cpu', dtype, seed: 1, threads },
	);
}

/** Floating-point operations of one forward over T tokens with `rows` rows through the head. */
export function forwardFlops(shape: ShapeName, T: number, rows: number): number {
	const { layers, channels: C, vocab } = shapes[shape];
	const blocks = layers * (24 * C * C * T + 4 * T * T * C);
	return blocks + 2 * C * vocab * rows;
}

/**
 * Those of a training step's forward and backward over T tokens with a loss at `rows` of them: every product comes
 * three times, and beyond attention the last block is computed for these rows alone.
 */
export function trainingFlops(shape: ShapeName, T: number, rows: number): number {
	const C = shapes[shape].channels;
	return 3 * (forwardFlops(shape, T, rows) - 18 * C * C * (T - rows));
}

/** T ids that differ, all inside the vocabulary. */
export function someTokens(shape: ShapeName, T: number): Int32Array {
	return Int32Array.from({ length: T }, (_, i) => (i * 7919 + 13) % shapes[shape].vocab);
}
