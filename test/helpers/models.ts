/** Small models with decided opinions: random weights, scaled up so that no two probabilities are close. */
import { DiffuGPT, type ModelConfigInput } from 'diffusion-native';

import { uniform } from '../../lib/random.js';

/** 61 ids, of which 60 is the mask and 0 the end of text. */
export const smallConfig = {
	layers: 2,
	heads: 2,
	channels: 32,
	vocab: 61,
	context: 64,
	maskId: 60,
	eosId: 0,
} as const satisfies ModelConfigInput;

/**
 * A random model whose weights are `scale` times GPT-2's initialisation and whose biases are random too.
 * @param threads 0: all cores
 */
export async function sharpModel(
	config: Partial<ModelConfigInput> = {},
	seed = 1,
	scale = 32,
	threads = 0,
): Promise<DiffuGPT> {
	const model = await DiffuGPT.fromConfig({ ...smallConfig, ...config }, { seed, device: 'cpu', threads });
	let index = 0;
	for (const { name, shape } of model.parameters()) {
		const values = model.getParameter(name);
		if (shape.length > 1)
			model.setParameter(
				name,
				values.map((value) => value * scale),
			);
		else
			model.setParameter(
				name,
				values.map((value) => value + 0.5 * (uniform(7n, 99, 0, index++) - 0.5)),
			);
	}
	return model;
}

/** Log probabilities (V, double) from one row of raw logits, without the mask id. */
export function logSoftmax(logits: ArrayLike<number>, maskId: number): number[] {
	const values = Array.from(logits, (value, id) => (id === maskId ? Number.NEGATIVE_INFINITY : value));
	const largest = Math.max(...values);
	const logSum = largest + Math.log(values.reduce((sum, value) => sum + Math.exp(value - largest), 0));
	return values.map((value) => value - logSum);
}
