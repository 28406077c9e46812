/**
 * The weights that every contender gets: a random GPT-2 of a benchmark's shape, written once as a checkpoint of ours, as ONNX and
 * as GGUF. Biases and layer norms are random too, so that a file that lost one does not compute the same.
 */
import { existsSync, mkdirSync, renameSync } from 'node:fs';
import { join } from 'node:path';

import { DiffuGPT, type ModelConfig } from 'diffusion-native';

import { type ShapeName, shapes } from '../shapes.js';
import { type GgufType, writeGguf } from './gguf.js';
import { writeOnnx } from './onnx.js';

export interface Weights {
	readonly config: ModelConfig;
	/** fp32, by GPT-2's name; linear layers are (in, out). */
	get(name: string): Float32Array;
}

/** A file or folder that a contender loads. */
export type ModelFile =
	| 'checkpoint'
	| 'fp32-logits.onnx'
	| 'fp32-hidden.onnx'
	| 'int8-logits.onnx'
	| 'int8-hidden.onnx'
	| `${GgufType}.gguf`;

async function create(shape: ShapeName): Promise<DiffuGPT> {
	const config = { ...shapes[shape], attention: 'bidirectional' as const };
	const model = await DiffuGPT.fromConfig(config, { device: 'cpu', seed: 1 });
	let state = 12345;
	const random = (): number => {
		state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
		return state / 2 ** 32 - 0.5;
	};
	for (const { name, count } of model.parameters()) {
		const isNorm = name.includes('ln_');
		if (!isNorm && !name.endsWith('.bias')) continue;
		const around = isNorm && name.endsWith('.weight') ? 1 : 0;
		model.setParameter(
			name,
			Float32Array.from({ length: count }, () => around + 0.2 * random()),
		);
	}
	return model;
}

/** Writes what `folder/shape` lacks of the files named; a file there is complete. Paths, in the order asked. */
export async function modelFiles(folder: string, shape: ShapeName, files: readonly ModelFile[]): Promise<string[]> {
	const directory = join(folder, shape);
	mkdirSync(directory, { recursive: true });
	const paths = files.map((file) => join(directory, file));
	const missing = files.filter((_, i) => !existsSync(paths[i] as string));
	if (missing.length === 0) return paths;
	await using model = await create(shape);
	const weights: Weights = { config: model.config, get: (name) => model.getParameter(name) };
	for (const file of missing) {
		const path = join(directory, file);
		const partial = `${path}.partial`;
		if (file === 'checkpoint') {
			await model.save(partial);
		} else if (file.endsWith('.gguf')) {
			writeGguf(partial, weights, file.slice(0, -'.gguf'.length) as GgufType);
		} else {
			const [dtype, output] = file.slice(0, -'.onnx'.length).split('-') as ['fp32' | 'int8', 'logits' | 'hidden'];
			writeOnnx(partial, weights, { dtype, output });
		}
		renameSync(partial, path);
	}
	return paths;
}
