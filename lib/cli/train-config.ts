/**
 * The configuration file of `train`: this library's keys, and those of the original project's config.json
 * (original-config.ts). A name that is neither is an error.
 */
import type { ModelConfig, ModelConfigInput } from '../config.js';
import { check } from '../errors.js';
import { suggest } from '../option-checks.js';
import { type TrainOptions, trainOptionNames } from '../training/options.js';
import { type Draft, originalConfigKeys, readOriginal } from './original-config.js';

/** What `train` runs. Paths are relative to the working directory. */
export interface RunConfig extends Omit<TrainOptions, 'data' | 'validation' | 'loggers' | 'maxSteps'> {
	/** Model to start from: a directory, a hub id. Or `scratch`. */
	model?: string;
	/** Sizes of a model with random weights. */
	scratch?: ModelConfigInput;
	/** Overrides of the configuration of `model`. */
	config?: Partial<ModelConfig>;
	/** tokenizer.json, or a folder that holds one, or 'gpt2'; for `scratch`. */
	tokenizer?: string;
	/** Token file. */
	data?: string;
	/** Token file; or the share of `data` at its end, cut off by windows. */
	validation?: string | number;
	/** Window of packed data, tokens. */
	context?: number;
	maxSteps?: number;
	/** Stop after so many passes over the data, if that comes before `maxSteps`. */
	epochs?: number;
	device?: string;
	threads?: number;
	cacheDir?: string;
	/** Seed of the random weights of `scratch`. */
	initSeed?: number;
	/** Write TensorBoard files into the run folder. */
	tensorboard?: boolean;
	/** Continue from this checkpoint or run folder. */
	resume?: string;
	/** No key of the file: give `model` one row more where `config.padId` is its vocabulary size (the original's pad_token_id). */
	padRow?: boolean;
}

const kinds: Record<string, string> = {
	model: 'string',
	scratch: 'object',
	config: 'object',
	tokenizer: 'string',
	data: 'string',
	context: 'number',
	maxSteps: 'number',
	epochs: 'number',
	device: 'string',
	threads: 'number',
	cacheDir: 'string',
	initSeed: 'number',
	tensorboard: 'boolean',
	resume: 'string',
	checkpoint: 'object',
	earlyStop: 'object',
	attentionAnnealing: 'object',
	spindle: 'object',
	batchSize: 'number',
	batchTokens: 'number',
	accumulate: 'number',
	weightDecay: 'number',
	betas: 'object',
	eps: 'number',
	gradClip: 'number',
	evalEvery: 'number',
	evalSequences: 'number',
	maskEnds: 'boolean',
	recompute: 'boolean',
	objective: 'string',
	normalise: 'string',
	weight: 'string',
	timeSampler: 'string',
	precision: 'string',
};

/** Keys of this library's configuration file. */
export const runConfigKeys: readonly string[] = [
	...new Set([...Object.keys(kinds), 'validation', ...trainOptionNames.filter((name) => name !== 'loggers')]),
];

const subKeys: Record<string, readonly string[]> = {
	checkpoint: ['dir', 'every', 'keep', 'keepBest'],
	earlyStop: ['patience', 'minDelta'],
	attentionAnnealing: ['steps', 'kind'],
	spindle: ['lambda'],
	scratch: [
		'family',
		'layers',
		'heads',
		'channels',
		'context',
		'vocab',
		'maskId',
		'bosId',
		'eosId',
		'padId',
		'shift',
		'attention',
	],
	config: ['maskId', 'bosId', 'eosId', 'padId', 'shift', 'attention', 'context'],
};

/** Original names that are also ours with the same meaning, and so tell nothing about the file. */
const shared: ReadonlySet<string> = new Set(runConfigKeys.filter((key) => originalConfigKeys.includes(key)));

/**
 * Reads a configuration. Own keys win over original ones.
 * @returns the configuration, and what each original key was mapped to, one sentence each.
 * @throws `ERR_DN_ARGUMENT` for an unknown key, with the nearest known one, and for a value of the wrong kind.
 */
export function parseRunConfig(json: unknown): { config: RunConfig; mapped: string[] } {
	check(typeof json === 'object' && json !== null && !Array.isArray(json), 'the configuration is not a JSON object');
	const values = json as Record<string, unknown>;
	const isOriginal = Object.keys(values).some((key) => originalConfigKeys.includes(key) && !shared.has(key));
	const known = [...new Set([...runConfigKeys, ...originalConfigKeys])];
	for (const key of Object.keys(values)) {
		check(known.includes(key), () => `${key} is not a key of the configuration${suggest(key, known)}`);
	}
	const { draft, mapped } = isOriginal ? readOriginal(values) : { draft: {} as Draft, mapped: [] };
	for (const key of runConfigKeys) {
		const value = values[key];
		if (value === undefined || (isOriginal && key === 'device')) continue;
		const kind = kinds[key];
		check(
			kind === undefined || (typeof value === kind && value !== null),
			`${key} is ${JSON.stringify(value)}, expected a ${kind === 'object' ? 'JSON object or array' : kind}`,
		);
		const inner = subKeys[key];
		if (inner) {
			for (const name of Object.keys(value as object)) {
				check(inner.includes(name), () => `${key}.${name} is not a key of the configuration${suggest(name, inner)}`);
			}
		}
		(draft as Record<string, unknown>)[key] = value;
	}
	checkValidation(draft.validation);
	checkTogether(draft);
	return { config: draft, mapped };
}

function checkValidation(value: unknown): void {
	check(
		value === undefined || typeof value === 'string' || (typeof value === 'number' && value >= 0),
		`validation is ${JSON.stringify(value)}, expected a token file, or the share (below 1) or number of tokens of data`,
	);
}

/** Throws where a key says nothing beside another one. */
function checkTogether({ model, scratch, config, tokenizer, initSeed, epochs }: RunConfig): void {
	check(epochs === undefined || epochs > 0, `epochs is ${epochs}, expected a number above 0`);
	check(
		scratch === undefined || config === undefined,
		'config overrides the configuration of model, and has no meaning beside scratch: put its keys into scratch',
	);
	check(
		model === undefined || tokenizer === undefined,
		'tokenizer is that of scratch, and has no meaning beside model, which has its own',
	);
	check(
		model === undefined || initSeed === undefined,
		'initSeed draws the weights of scratch, and has no meaning beside model, which has its own',
	);
}
