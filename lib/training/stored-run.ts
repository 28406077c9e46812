/**
 * What a checkpoint remembers of a run besides tensors: its progress, its options as JSON, and its data by place and facts;
 * and options and data back.
 */
import { basename, dirname, resolve } from 'node:path';

import { TokenDataset } from '../data/dataset.js';
import { check, DiffusionNativeError } from '../errors.js';
import type { DataReference, RunState } from './checkpoint.js';
import type { ResolvedTrainOptions, TrainOptions } from './options.js';
import type { DataPosition } from './order.js';
import type { Progress } from './progress.js';

/** Facts by which data is found again. */
export function reference(data: TokenDataset): DataReference {
	const { format, context, range, tokens, fingerprint } = data;
	return { path: resolve(data.path), format, context, range, tokens, fingerprint };
}

/** Everything but the place: a moved file is the same data. */
export function isSame(a: DataReference, b: DataReference): boolean {
	return (
		a.format === b.format &&
		a.context === b.context &&
		a.range[0] === b.range[0] &&
		a.range[1] === b.range[1] &&
		a.tokens === b.tokens &&
		a.fingerprint === b.fingerprint
	);
}

/** Opens the data of a run again. @throws `ERR_DN_CHECKPOINT` when it is not there, or not the same. */
export async function reopen(stored: DataReference): Promise<TokenDataset> {
	let data: TokenDataset;
	try {
		const { path, context, range } = stored;
		data = await TokenDataset.open(path, { range, ...(context > 0 ? { context } : {}) });
	} catch (cause) {
		const reason = cause instanceof Error ? cause.message : String(cause);
		throw new DiffusionNativeError('ERR_DN_CHECKPOINT', `the data of this run: ${reason}; pass it as data`, { cause });
	}
	if (isSame(reference(data), stored)) return data;
	data.close();
	throw new DiffusionNativeError(
		'ERR_DN_CHECKPOINT',
		`${stored.path} is not the data this run used (${stored.tokens} tokens): ` +
			'the run cannot continue as it was; pass other data as data to go on with that',
	);
}

/** The state of a run as a checkpoint stores it. */
export function storeRun(options: ResolvedTrainOptions, progress: Progress, position: DataPosition): RunState {
	const { data, validation, seed } = options;
	return {
		...progress,
		position,
		seed: String(seed),
		options: storeOptions(options),
		data: data ? reference(data) : null,
		validation: validation ? reference(validation) : null,
	};
}

/** Options as JSON. A learning rate function becomes null. */
function storeOptions(options: ResolvedTrainOptions): Record<string, unknown> {
	const { data, validation, loggers, seed, learningRate, spindle, checkpoint, ...plain } = options;
	return {
		...plain,
		learningRate: typeof learningRate === 'function' ? null : learningRate,
		...(checkpoint ? { checkpoint: { ...checkpoint, dir: resolve(checkpoint.dir) } } : {}),
		...(spindle
			? { spindle: spindle.information ? { ...spindle, information: [...spindle.information] } : spindle }
			: {}),
	};
}

/** Options of a stored run. @param directory the checkpoint they come from. */
export function reviveOptions(state: RunState, directory: string, overrides: TrainOptions): TrainOptions {
	const { checkpoint, spindle, learningRate, batchSize, batchTokens, ...plain } = state.options as TrainOptions;
	check(
		learningRate !== null || overrides.learningRate !== undefined,
		'the learning rate of this run was a function, which a checkpoint does not hold: pass learningRate again',
	);
	const renewed = overrides.batchSize !== undefined || overrides.batchTokens !== undefined;
	return {
		...plain,
		seed: BigInt(state.seed),
		...(learningRate === undefined || learningRate === null ? {} : { learningRate }),
		...(renewed || batchSize === undefined ? {} : { batchSize }),
		...(renewed || batchTokens === undefined ? {} : { batchTokens }),
		...(spindle
			? {
					spindle: spindle.information
						? { lambda: spindle.lambda, information: Float32Array.from(spindle.information) }
						: { lambda: spindle.lambda },
				}
			: {}),
		// The run may have been moved: its folder is the one the checkpoint lies in.
		...(checkpoint
			? {
					checkpoint: {
						...checkpoint,
						dir: basename(directory).startsWith('step-') ? dirname(resolve(directory)) : checkpoint.dir,
					},
				}
			: {}),
	};
}
