/** Directories with small models, and what the library reads from them, for the tests of checkpoints. */
import { mkdirSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import test from 'ava';
import type { ModelConfig } from 'diffusion-native';

import { binding } from '../../lib/binding.js';
import { openCheckpoint } from '../../lib/checkpoint.js';
import type { NativeModel } from '../../lib/native-types.js';
import { gpt2Tensors, gpt2Values, safetensorsBytes, type Tensors, tinyConfig, writeModel } from './safetensors.js';

const scratch = mkdtempSync(join(tmpdir(), 'dn-checkpoint-'));
let count = 0;
/** A path in a directory of its own, which does not exist yet. */
export const fresh = (): string => {
	const parent = join(scratch, String(count++));
	mkdirSync(parent);
	return join(parent, 'model');
};
test.after.always(() => rmSync(scratch, { recursive: true, force: true }));

export function model(
	tensors: Tensors = gpt2Tensors(),
	config: object = tinyConfig,
	extra: Record<string, string | object> = {},
): string {
	return writeModel(fresh(), { 'config.json': config, 'model.safetensors': safetensorsBytes(tensors), ...extra });
}

export function make(config: ModelConfig): NativeModel {
	const { layers, heads, channels, context, vocab } = config;
	return binding().createModel(
		{ layers, heads, channels, context, vocab },
		{ device: 'cpu', threads: 1, dtype: 'fp32' },
	);
}

/** Loads a directory and returns every parameter. */
export async function parameters(directory: string): Promise<Record<string, Float32Array>> {
	const checkpoint = openCheckpoint(directory);
	const native = make(checkpoint.config);
	await checkpoint.load(native);
	const values = Object.fromEntries(native.parameters.map(({ name }) => [name, native.getParameter(name)]));
	native.dispose();
	return values;
}

export const expected = Object.fromEntries(gpt2Values());
export const transformer = (name: string): string => `transformer.${name}`;
export const denoise = (name: string): string =>
	name === 'wte.weight' ? 'embed_tokens.weight' : `denoise_model.${name}`;
