/** `diffusion-native train`: runs a configuration file, or continues a run. */
import { readFileSync, statSync } from 'node:fs';
import { join } from 'node:path';

import type { Command } from 'commander';

import { readDeclaredConfig } from '../checkpoint-config.js';
import { TokenDataset } from '../data/dataset.js';
import type { Device } from '../device.js';
import { check, DiffusionNativeError } from '../errors.js';
import { withoutMark } from '../files.js';
import { ProgressLogger } from '../loggers/progress.js';
import { TensorBoardLogger } from '../loggers/tensorboard.js';
import { DiffuGPT } from '../model.js';
import { Tokenizer } from '../tokenizer.js';
import { type ResumeOptions, Trainer } from '../trainer.js';
import { findCheckpoint, type RunState } from '../training/checkpoint.js';
import type { MetricLogger, TrainOptions } from '../training/options.js';
import { reopen } from '../training/stored-run.js';
import { showLoading } from './load-view.js';
import { exitStatus, Interrupted, number } from './terminal.js';
import { parseRunConfig, type RunConfig } from './train-config.js';
import { loadModel } from './train-model.js';

interface Flags {
	readonly config?: string;
	readonly resume?: string;
	readonly device?: string;
	readonly threads?: number;
	readonly json?: boolean;
}

export function register(program: Command): void {
	program
		.command('train')
		.description('train a model: masked diffusion, autoregressive or block diffusion')
		.option(
			'-c, --config <file>',
			'run configuration, JSON: options of Trainer and model, data, validation, scratch, tokenizer, ...',
		)
		.option('--resume <dir>', 'continue from a checkpoint, or from the newest one in a run folder')
		.option('--device <device>', 'auto, cpu, cuda or cuda:N (default: as configured, else auto)')
		.option('--threads <n>', 'CPU threads (default: as configured, else all cores)', number('threads'))
		.option('--json', 'one JSON object per step on stdout')
		.addHelpText(
			'after',
			`
The keys of the original project's config.json are accepted too; what each was mapped to is printed,
and what absent ones are taken as.
A run folder (checkpoint.dir) holds the checkpoints, each of them a model folder, and metrics.jsonl.
Ctrl-C saves a checkpoint and stops; that is status 0, or 1 when the run has no checkpoint.dir to save in. SIGTERM and a
terminal that closes (SIGHUP, also under nohup) do the same; setsid keeps a run out of its terminal's reach.

Example run.json:
  { "model": "gpt2", "config": { "maskId": 10541, "attention": "bidirectional" }, "data": "train.bin",
    "validation": "train.validation.bin", "maxSteps": 10000, "batchSize": 8, "accumulate": 4,
    "learningRate": { "kind": "cosine", "peak": 3e-4, "warmupSteps": 200 },
    "attentionAnnealing": { "steps": 1000 }, "evalEvery": 500, "checkpoint": { "dir": "runs/a", "every": 500 } }
${exitStatus}`,
		)
		.action((flags: Flags) => train(flags));
}

/** Runs to the end, or until Ctrl-C, SIGTERM, SIGHUP or an output that cannot be written, and leaves a checkpoint. */
async function train(flags: Flags): Promise<void> {
	const note = (line: string): void => {
		process.stderr.write(`${line}\n`);
	};
	check(flags.config !== undefined || flags.resume !== undefined, 'train needs --config or --resume');
	const { config, mapped } = flags.config === undefined ? { config: {}, mapped: [] } : readConfig(flags.config);
	for (const line of mapped) note(`${flags.config}: ${line}`);
	const settings: RunConfig = {
		...config,
		...(flags.resume === undefined ? {} : { resume: flags.resume }),
		...(flags.device === undefined ? {} : { device: flags.device }),
		...(flags.threads === undefined ? {} : { threads: flags.threads }),
	};
	const loggers: MetricLogger[] = [
		flags.json
			? {
					log: (metrics) => {
						process.stdout.write(`${JSON.stringify(metrics)}\n`);
					},
				}
			: new ProgressLogger(),
	];
	const runFolder = settings.checkpoint?.dir ?? settings.resume;
	if (settings.tensorboard && runFolder !== undefined)
		loggers.push(new TensorBoardLogger(join(runFolder, 'tensorboard')));
	const trainer =
		settings.resume === undefined
			? await begin(settings, loggers, flags)
			: await resume(settings, settings.resume, loggers, flags);
	const stop = new AbortController();
	const interrupted = new Error('interrupted');
	const onInterrupt = (): void => {
		if (stop.signal.aborted) return;
		stop.abort(interrupted);
		note('stopping after a checkpoint; Ctrl-C again kills');
	};
	// Only the first one is caught: the handler is gone when the second one arrives.
	process.once('SIGINT', onInterrupt);
	process.once('SIGTERM', onInterrupt);
	// A terminal that closes may send it twice, by itself and by its shell: caught to the end of the process.
	process.on('SIGHUP', onInterrupt);
	try {
		const { config: shape, device } = trainer.model;
		note(
			`${shape.layers} layers x ${shape.channels} channels on ${device}, from step ${trainer.steps} to ${trainer.options.maxSteps}`,
		);
		for await (const _ of trainer.run({ signal: stop.signal }));
	} catch (error) {
		if (error !== interrupted) throw error;
		if (trainer.options.checkpoint) note(`saved ${await trainer.checkpoint()}`);
		else throw new Interrupted('interrupted; nothing was saved: the configuration has no checkpoint.dir');
	} finally {
		process.off('SIGINT', onInterrupt);
		process.off('SIGTERM', onInterrupt);
		await trainer.dispose();
		await trainer.model.dispose();
	}
}

function readConfig(path: string): { config: RunConfig; mapped: string[] } {
	let json: unknown;
	try {
		json = JSON.parse(withoutMark(readFileSync(path, 'utf8')));
	} catch (cause) {
		const reason = cause instanceof Error ? cause.message : String(cause);
		throw new DiffusionNativeError('ERR_DN_CHECKPOINT', `${path} cannot be read as JSON: ${reason}`, { cause });
	}
	return parseRunConfig(json);
}

async function begin(config: RunConfig, loggers: readonly MetricLogger[], flags: Flags): Promise<Trainer> {
	check(config.data !== undefined, 'the configuration needs data, a token file');
	check(
		(config.model === undefined) !== (config.scratch === undefined),
		'the configuration needs either model (a folder or hub id) or scratch (sizes of a new model)',
	);
	const where = {
		...(config.device === undefined ? {} : { device: config.device as Device }),
		...(config.threads === undefined ? {} : { threads: config.threads }),
	};
	let model: DiffuGPT;
	if (config.scratch) {
		const tokenizer = config.tokenizer === undefined ? undefined : loadTokenizer(config.tokenizer);
		model = await DiffuGPT.fromConfig(config.scratch, {
			...where,
			seed: config.initSeed ?? 0,
			...(tokenizer ? { tokenizer } : {}),
		});
	} else {
		const loading = {
			...where,
			...(config.config ? { config: config.config } : {}),
			...(config.cacheDir === undefined ? {} : { cacheDir: config.cacheDir }),
		};
		model = await showLoading(
			(onProgress) => loadModel(config.model as string, config.padRow, { ...loading, onProgress }),
			flags,
		);
	}
	try {
		return new Trainer(model, { ...(await trainOptions(config, model)), loggers });
	} catch (error) {
		await model.dispose();
		throw error;
	}
}

/** The data of the configuration is cut as `begin` cuts it: where it is that of the run, the run goes on where it was. */
async function resume(
	config: RunConfig,
	from: string,
	loggers: readonly MetricLogger[],
	flags: Flags,
): Promise<Trainer> {
	const { device, threads, data: path, validation: held, epochs } = config;
	const { directory, state } = findCheckpoint(from);
	check(path !== undefined || typeof held !== 'number', 'validation is a share of data: the configuration needs data');
	const { context } = readDeclaredConfig(directory);
	let data: TokenDataset | undefined;
	let validation: TokenDataset | undefined;
	if (path !== undefined) ({ data, validation } = await openData(config, path, context));
	else {
		if (epochs !== undefined && state.data) data = await reopen(state.data);
		if (typeof held === 'string')
			validation = await TokenDataset.open(held, { context: config.context ?? (state.data?.context || context) });
	}
	const overrides: ResumeOptions = {
		...trainerKeys(config),
		...(epochs === undefined || !data
			? {}
			: { maxSteps: await stepsOf({ ...storedSizes(config, state), ...config }, data) }),
		...(data ? { data } : {}),
		...(validation ? { validation } : {}),
		...(device === undefined ? {} : { device: device as Device }),
		...(threads === undefined ? {} : { threads }),
		loggers,
	};
	return showLoading((onProgress) => Trainer.resume(from, { ...overrides, onProgress }), flags);
}

/** What a step of the run takes where the configuration does not say. */
function storedSizes({ batchSize, batchTokens }: RunConfig, state: RunState): Partial<RunConfig> {
	const { accumulate, ...sizes } = state.options as RunConfig;
	const isRenewed = batchSize !== undefined || batchTokens !== undefined;
	return {
		...(accumulate === undefined ? {} : { accumulate }),
		...(isRenewed || sizes.batchSize === undefined ? {} : { batchSize: sizes.batchSize }),
		...(isRenewed || sizes.batchTokens === undefined ? {} : { batchTokens: sizes.batchTokens }),
	};
}

async function trainOptions(config: RunConfig, model: DiffuGPT): Promise<TrainOptions> {
	const { data, validation } = await openData(config, config.data as string, model.config.context);
	return {
		...trainerKeys(config),
		...(config.epochs === undefined ? {} : { maxSteps: await stepsOf(config, data) }),
		data,
		...(validation ? { validation } : {}),
	};
}

/** The token file and what is held out of it or lies in another one; windows of packed data fit the model's context. */
async function openData(
	config: RunConfig,
	path: string,
	longest: number,
): Promise<{ data: TokenDataset; validation: TokenDataset | undefined }> {
	let data = await TokenDataset.open(path, config.context === undefined ? {} : { context: config.context });
	if (data.format === 'packed' && data.context > longest) {
		data.close();
		data = await TokenDataset.open(path, { context: longest });
	}
	const windows = windowsOf(data);
	const { validation: held } = config;
	if (typeof held === 'string') return { data, validation: await TokenDataset.open(held, windows) };
	if (held === undefined || held <= 0) return { data, validation: undefined };
	const share = held < 1 ? held : held / data.tokens;
	const count = Math.max(1, Math.round(share * data.sequences));
	check(count < data.sequences, `validation takes all of the ${data.sequences} sequences of ${path}`);
	const cut = data.sequences - count;
	const validation = await TokenDataset.open(path, { ...windows, range: [cut, data.sequences] });
	data.close();
	return { data: await TokenDataset.open(path, { ...windows, range: [0, cut] }), validation };
}

function windowsOf(data: TokenDataset): { context?: number } {
	return data.format === 'packed' ? { context: data.context } : {};
}

/** Steps of so many epochs, at most `maxSteps`. */
async function stepsOf(config: RunConfig, data: TokenDataset): Promise<number> {
	const { epochs = 1, accumulate = 1, batchTokens, batchSize = 8, maxSteps = Number.POSITIVE_INFINITY } = config;
	const whole = await TokenDataset.open(data.path, windowsOf(data));
	const tokens = (data.tokens * data.sequences) / whole.sequences;
	whole.close();
	const perEpoch =
		batchTokens === undefined ? data.sequences / (batchSize * accumulate) : tokens / (batchTokens * accumulate);
	return Math.min(maxSteps, Math.max(1, Math.ceil(epochs * perEpoch)));
}

/** The keys that are options of Trainer as they stand. */
function trainerKeys(config: RunConfig): TrainOptions {
	const {
		model,
		scratch,
		config: modelConfig,
		tokenizer,
		data,
		validation,
		context,
		epochs,
		device,
		threads,
		cacheDir,
		initSeed,
		tensorboard,
		resume: from,
		padRow,
		...options
	} = config;
	return options;
}

/** 'gpt2', a tokenizer.json, or a folder that holds tokenizer files. */
export function loadTokenizer(spec: string): Tokenizer {
	if (spec === 'gpt2') return Tokenizer.gpt2();
	let isFolder: boolean;
	try {
		isFolder = statSync(spec).isDirectory();
	} catch (cause) {
		throw new DiffusionNativeError(
			'ERR_DN_ARGUMENT',
			`tokenizer ${spec}: no such file; expected 'gpt2', a tokenizer.json or a model folder`,
			{ cause },
		);
	}
	return isFolder ? Tokenizer.fromDirectory(spec) : Tokenizer.fromFile(spec);
}
