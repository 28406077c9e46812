/**
 * Checkpoints of a run: a folder per checkpoint that is also a model folder, with the moments of AdamW and the state of
 * the run beside the weights. A folder gets its name only when it is complete and on the disk, so whatever carries the name
 * of a checkpoint can be loaded; the newest is found by looking, not by a pointer.
 */
import { readdirSync, statSync } from 'node:fs';
import { readdir, rename, rm, rmdir, stat } from 'node:fs/promises';
import { basename, dirname, join, resolve } from 'node:path';

import { binding } from '../binding.js';
import { isModelFile } from '../checkpoint-save.js';
import type { Engine } from '../engine.js';
import { check, DiffusionNativeError } from '../errors.js';
import {
	isAlive,
	isMissing,
	makeDirectories,
	readJsonObject,
	renamedError,
	replaceDirectory,
	temporaryName,
	writeSynced,
} from '../files.js';
import type { LoadProgress } from '../hub.js';
import type { NativeTensorSource } from '../native-types.js';
import type { DataPosition } from './order.js';
import type { Progress } from './progress.js';

/** Facts about a data set, to find it again and to see that it is the same. */
export interface DataReference {
	readonly path: string;
	readonly format: string;
	readonly context: number;
	readonly range: readonly [number, number];
	readonly tokens: number;
	readonly fingerprint: string;
}

/** Everything of a run that is not a tensor. */
export interface RunState extends Progress {
	readonly position: DataPosition;
	readonly seed: string;
	/** Options as JSON; data, loggers and functions are not among them. */
	readonly options: Record<string, unknown>;
	readonly data: DataReference | null;
	readonly validation: DataReference | null;
}

const stateFile = 'trainer.json';
const momentsFile = 'optimizer.safetensors';
const formatName = 'diffusion-native-run';
const formatVersion = 1;
const stepName = /^step-(\d{8,})$/;
/** Temporary names of checkpoints and of metrics.jsonl, with the process that made them. */
const staleName = /^\.(?:step-\d+|metrics\.jsonl)\.(\d+)-[0-9a-f]+\.tmp$/;

/** Folder name of the checkpoint after `step` steps. */
export function checkpointName(step: number): string {
	return `step-${String(step).padStart(8, '0')}`;
}

/**
 * Writes a checkpoint folder: whole or not at all. Other files that `target` holds stay.
 * @param saveModel writes a model folder.
 * @throws `ERR_DN_CHECKPOINT` with the system's reason; earlier checkpoints stay as they were.
 */
export async function writeCheckpoint(
	target: string,
	engine: Engine,
	saveModel: (directory: string) => Promise<void>,
	state: RunState,
): Promise<void> {
	await replaceDirectory(
		target,
		async (directory) => {
			// A model is saved through a temporary folder beside its target: here, inside this one.
			const model = join(directory, 'model');
			try {
				await saveModel(model);
			} catch (error) {
				throw renamedError(error, model, directory);
			}
			for (const name of await readdir(model)) await rename(join(model, name), join(directory, name));
			await rmdir(model);
			await engine.run((native) => {
				const tensors: NativeTensorSource[] = [];
				for (const kind of ['moment1', 'moment2'] as const) {
					for (const { name, shape } of native.parameters) {
						const source = { model: native, parameter: name, kind };
						tensors.push({ name: `${kind}.${name}`, shape, dtype: 'F32', source });
					}
				}
				return binding().writeSafetensors(join(directory, momentsFile), tensors, { step: String(state.step) });
			});
			const files: Record<string, number> = {};
			for (const name of await readdir(directory)) files[name] = (await stat(join(directory, name))).size;
			const json = { format: formatName, version: formatVersion, ...state, files };
			await writeSynced(join(directory, stateFile), `${JSON.stringify(json, undefined, '\t')}\n`);
		},
		(name) => name === stateFile || name === momentsFile || isModelFile(name),
		'config.json',
	);
}

/** `onProgress` for the weights of a checkpoint, a third of it: the moments follow. */
export function withMomentsToCome(onProgress: (progress: LoadProgress) => void): (progress: LoadProgress) => void {
	return (progress) => onProgress(progress.status === 'load' ? { ...progress, total: 3 * progress.total } : progress);
}

/**
 * Restores the moments of AdamW; `onProgress` counts on from the weights.
 * @throws `signal.reason`, with some moments read
 */
export async function readMoments(
	directory: string,
	engine: Engine,
	onProgress: ((progress: LoadProgress) => void) | undefined,
	signal: AbortSignal | undefined,
): Promise<void> {
	await engine.run(async (native) => {
		const file = binding().openSafetensors(join(directory, momentsFile));
		const weights = native.parameters.reduce((sum, { count }) => sum + 4 * count, 0);
		let loaded = weights;
		try {
			for (const kind of ['moment1', 'moment2'] as const) {
				for (const { name, count } of native.parameters) {
					signal?.throwIfAborted();
					await native.loadMoment(name, kind, file, `${kind}.${name}`);
					loaded += 4 * count;
					onProgress?.({ status: 'load', loaded, total: 3 * weights });
				}
			}
		} finally {
			file.close();
		}
	});
}

/**
 * The checkpoint that `path` means: itself when it is one, else the newest valid one inside it.
 * @throws `ERR_DN_CHECKPOINT` saying what was found and why it was refused.
 */
export function findCheckpoint(path: string): { directory: string; state: RunState } {
	const reasons: string[] = [];
	const attempt = (directory: string): { directory: string; state: RunState } | undefined => {
		const state = readState(directory);
		if (typeof state === 'string') {
			reasons.push(`${directory}: ${state}`);
			return undefined;
		}
		return { directory, state };
	};
	const itself = readState(path);
	if (typeof itself !== 'string') return { directory: path, state: itself };
	const names = list(path).filter((name) => stepName.test(name));
	for (const name of names.sort(byStep).reverse()) {
		const found = attempt(join(path, name));
		if (found) return found;
	}
	// A kill between the two renames that replace a checkpoint leaves both under temporary names beside it.
	const prefix = `.${basename(path)}.`;
	const asides = list(dirname(resolve(path)))
		.filter((name) => name.startsWith(prefix) && name.endsWith('.tmp'))
		.map((name) => attempt(join(dirname(resolve(path)), name)))
		.filter((found) => found !== undefined)
		.sort((a, b) => b.state.step - a.state.step);
	if (asides[0]) return asides[0];
	throw new DiffusionNativeError(
		'ERR_DN_CHECKPOINT',
		`${path} holds no checkpoint that can be loaded (${reasons.length > 0 ? reasons.join('; ') : itself})`,
	);
}

/** Removes checkpoints beyond the newest `keep` and the `keepBest` with the least validation loss. */
export async function prune(runDirectory: string, keep: number, keepBest: number): Promise<void> {
	const names = list(runDirectory)
		.filter((name) => stepName.test(name))
		.sort(byStep);
	const stay = new Set(names.slice(-keep));
	const judged: { name: string; loss: number }[] = [];
	for (const name of names) {
		const state = readState(join(runDirectory, name));
		if (typeof state !== 'string' && state.validationLoss !== null) judged.push({ name, loss: state.validationLoss });
	}
	judged.sort((a, b) => a.loss - b.loss);
	for (const { name } of judged.slice(0, keepBest)) stay.add(name);
	for (const name of names) {
		if (stay.has(name)) continue;
		const aside = temporaryName(join(runDirectory, name));
		await rename(join(runDirectory, name), aside);
		await rm(aside, { recursive: true, force: true });
	}
}

/**
 * Makes the folder of a run and removes what killed processes left half-written in it.
 * @throws `ERR_DN_ARGUMENT` when it holds checkpoints beyond `step`: those of another run, which would be taken for this one's.
 */
export async function prepareRunDirectory(runDirectory: string, step: number): Promise<void> {
	try {
		await makeDirectories(runDirectory);
	} catch (cause) {
		const reason = cause instanceof Error ? cause.message : String(cause);
		throw new DiffusionNativeError('ERR_DN_CHECKPOINT', `${runDirectory} cannot be made: ${reason}`, { cause });
	}
	for (const name of list(runDirectory)) {
		check(
			!(Number(stepName.exec(name)?.[1]) > step),
			`${runDirectory} holds ${name}, beyond step ${step} of this run: resume from there, or choose another folder`,
		);
		const owner = staleName.exec(name)?.[1];
		if (owner !== undefined && !isAlive(Number(owner))) {
			await rm(join(runDirectory, name), { recursive: true, force: true });
		}
	}
}

/** The state in a checkpoint folder, or why it is none. */
function readState(directory: string): RunState | string {
	let json: Record<string, unknown> | undefined;
	try {
		json = readJsonObject(join(directory, stateFile));
	} catch (error) {
		return error instanceof Error ? error.message : String(error);
	}
	if (!json) return `no ${stateFile}`;
	if (json['format'] !== formatName) return `${stateFile} is not the state of a training run`;
	if (json['version'] !== formatVersion) {
		return `${stateFile} is version ${String(json['version'])}, this library reads version ${formatVersion}`;
	}
	const { files, ...stored } = json as unknown as RunState & { files?: Record<string, number> | null };
	if (typeof files !== 'object' || files === null) return `${stateFile} lacks files, the sizes of the other files`;
	// Before `updates` was stored, AdamW counted the steps that masked nothing, too.
	const state: RunState = { ...stored, updates: stored.updates ?? stored.step };
	for (const [name, bytes] of Object.entries(files)) {
		let size: number;
		try {
			size = statSync(join(directory, name)).size;
		} catch {
			return `${name} is missing`;
		}
		if (size !== bytes) return `${name} has ${size} bytes, expected ${bytes}`;
	}
	return state;
}

function byStep(a: string, b: string): number {
	return Number(stepName.exec(a)?.[1]) - Number(stepName.exec(b)?.[1]);
}

function list(directory: string): string[] {
	try {
		return readdirSync(directory);
	} catch (error) {
		if (isMissing(error)) return [];
		throw error;
	}
}
