/**
 * The length files of a model directory: `length.json`, the calibrations; `length-head.json` and
 * `length-head.safetensors`, the trained heads. Read and checked whole, or refused with `ERR_DN_CHECKPOINT`.
 */
import { existsSync } from 'node:fs';
import { join } from 'node:path';

import { binding } from '../binding.js';
import { DiffusionNativeError, fromNative } from '../errors.js';
import { readJsonObject, writeSynced } from '../files.js';
import type { NativeTensorSource } from '../native-types.js';
import { Dense } from './dense.js';
import type { LengthCalibration, LengthExtras } from './extras.js';
import { LengthHead } from './head.js';

const calibrationFile = 'length.json';
const headFile = 'length-head.json';
const weightsFile = 'length-head.safetensors';

/** The files that belong to this module. */
export const lengthFiles: readonly string[] = [calibrationFile, headFile, weightsFile];

const methods = ['first-step', 'quantile', 'threshold', 'expected', 'head', 'daedal', 'constant'];
const forms = ['level', 'additive', 'multiplicative'];
const parts = ['token', 'pooled', 'quantile'] as const;

/** Writes what there is into a new directory. */
export async function writeLengthFiles(directory: string, { head, calibrations }: LengthExtras): Promise<void> {
	const json = (value: unknown): string => `${JSON.stringify(value, null, 2)}\n`;
	if (calibrations.length > 0) await writeSynced(join(directory, calibrationFile), json({ version: 1, calibrations }));
	if (!head) return;
	const { max, pairs, levels } = head;
	await writeSynced(join(directory, headFile), json({ version: 1, max, pairs, levels, units: head.token.units }));
	const tensors: NativeTensorSource[] = parts.flatMap((name) => {
		const { inputs: C, units: U, outputs: O, weights } = head[name];
		const at = [0, C * U, C * U + U, C * U + U + U * O, weights.length] as const;
		const shapes = [[C, U], [U], [U, O], [O]];
		return ['fc.weight', 'fc.bias', 'out.weight', 'out.bias'].map((part, i) => ({
			name: `${name}.${part}`,
			shape: shapes[i] as number[],
			dtype: 'F32' as const,
			source: { values: weights.slice(at[i], at[i + 1]) },
		}));
	});
	try {
		await binding().writeSafetensors(join(directory, weightsFile), tensors, {});
	} catch (error) {
		throw fromNative(error);
	}
}

/** Reads what there is. `channels`: width of the model's hidden states. */
export function readLengthFiles(directory: string, channels: number): LengthExtras {
	return { head: readHead(directory, channels), calibrations: readCalibrations(join(directory, calibrationFile)) };
}

function readCalibrations(path: string): LengthCalibration[] {
	const found = readJsonObject(path);
	if (!found) return [];
	const list = versioned(path, found)['calibrations'];
	if (!Array.isArray(list)) throw bad(path, 'calibrations is not a list');
	return list.map((entry: Partial<LengthCalibration> | null, i) => {
		const { method, max, form, settings, pairs, edges, levels } = entry ?? {};
		const valid =
			methods.includes(method as string) &&
			forms.includes(form as string) &&
			isCount(max) &&
			isCount(pairs) &&
			typeof settings === 'object' &&
			settings !== null &&
			Array.isArray(edges) &&
			edges.every((edge) => Number.isFinite(edge)) &&
			Array.isArray(levels) &&
			levels.every(
				(level) =>
					isShare(level?.coverage) &&
					Array.isArray(level.margins) &&
					level.margins.length === edges.length + 1 &&
					level.margins.every((margin: unknown) => margin === null || Number.isFinite(margin)),
			);
		if (!valid) throw bad(path, `calibration ${i} is not { method, max, form, settings, pairs, edges, levels }`);
		return entry as LengthCalibration;
	});
}

function readHead(directory: string, channels: number): LengthHead | undefined {
	const path = join(directory, headFile);
	const found = readJsonObject(path);
	if (!found) return undefined;
	const { max, pairs, levels, units } = versioned(path, found);
	if (!isCount(max) || !isCount(pairs) || !isCount(units) || !Array.isArray(levels) || !levels.every(isShare)) {
		throw bad(path, 'expected max, pairs, units and levels');
	}
	const weights = join(directory, weightsFile);
	if (!existsSync(weights)) throw bad(path, `the weights ${weightsFile} are missing`);
	try {
		const file = binding().openSafetensors(weights);
		try {
			const read = (name: (typeof parts)[number], outputs: number): Dense => {
				const values = new Float32Array(Dense.size(channels, units, outputs));
				const shapes = {
					'fc.weight': [channels, units],
					'fc.bias': [units],
					'out.weight': [units, outputs],
					'out.bias': [outputs],
				};
				let at = 0;
				for (const [part, shape] of Object.entries(shapes)) {
					const entry = file.tensors.find((tensor) => tensor.name === `${name}.${part}`);
					if (!entry || entry.shape.join() !== shape.join()) {
						throw bad(
							weights,
							`${name}.${part} is ${entry ? `(${entry.shape.join(', ')})` : 'missing'}, expected (${shape.join(', ')})`,
						);
					}
					const part_ = file.read(entry.name);
					values.set(part_, at);
					at += part_.length;
				}
				return new Dense(channels, units, outputs, values);
			};
			const dense = { token: read('token', 1), pooled: read('pooled', 1), quantile: read('quantile', levels.length) };
			return new LengthHead(dense, { levels, max, pairs });
		} finally {
			file.close();
		}
	} catch (error) {
		throw fromNative(error);
	}
}

function versioned(path: string, found: Record<string, unknown>): Record<string, unknown> {
	if (found['version'] !== 1) throw bad(path, `version is ${JSON.stringify(found['version'])}, expected 1`);
	return found;
}

function isCount(value: unknown): value is number {
	return Number.isSafeInteger(value) && (value as number) >= 1;
}

function isShare(value: unknown): value is number {
	return typeof value === 'number' && value > 0 && value < 1;
}

function bad(path: string, message: string): DiffusionNativeError {
	return new DiffusionNativeError('ERR_DN_CHECKPOINT', `${path}: ${message}`);
}
