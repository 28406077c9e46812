/**
 * `diffusion-native eval length`: every length method on held-out pairs. The table (or one line of JSON) on standard output,
 * progress on standard error, the report as one HTML file and the plots as SVG when asked for. `--train-head` and
 * `--calibrate` with `--save` write a model that keeps its heads and margins.
 */
import { mkdir } from 'node:fs/promises';
import { join } from 'node:path';
import type { Command } from 'commander';

import type { Device, DType } from '../device.js';
import { writeFileAtomic } from '../files.js';
import { type EvaluateLengthOptions, evaluateLength, type LengthProgress } from '../length/evaluate.js';
import { trainLengthHead } from '../length/head.js';
import { type LengthMethod, lengthMethods } from '../length/method.js';
import { coverageChart, htmlReport, speedChart, textReport } from '../length/report.js';
import type { PretrainedOptions } from '../load.js';
import { DiffuGPT } from '../model.js';
import { showLoading } from './load-view.js';
import { checkOutputs } from './output-file.js';
import { action, exitStatus, interruptible, isTerminal, number, toJson, UsageError } from './terminal.js';

interface Flags {
	max: number;
	methods?: string;
	coverage?: string;
	calibrate?: string;
	trainHead?: string;
	save?: string;
	generations?: number;
	generate?: string;
	seeds?: string;
	batch?: number;
	judge?: string;
	likelihoods?: number;
	samples?: number;
	limit?: number;
	columns?: string;
	separator?: string;
	html?: string;
	svg?: string;
	device?: Device;
	dtype?: DType;
	threads?: number;
	json?: boolean;
}

/** Adds `length` to the command `eval`. */
export function register(parent: Command): void {
	parent
		// Options of the same name belong to the command that they follow.
		.enablePositionalOptions()
		.command('length')
		.description('How well each length method bounds and finds the length of answers')
		.argument('<model>', 'a model directory, a Hugging Face id, or diffusion-native/tiny')
		.argument('<pairs>', 'a .jsonl file of { prompt, answer, kind? }, or a .bin file of pairs')
		.option('--max <n>', 'the whole canvas: most new tokens', number('max'), 256)
		.option(
			'--methods <list>',
			`comma-separated: ${lengthMethods.join(', ')}, head:pooled, head:quantile (default: all)`,
		)
		.option('--coverage <list>', 'target shares of answers that fit (default: 0.8,0.9,0.95)')
		.option(
			'--calibrate <pairs>',
			'fit the margins on these pairs (default: those stored with the model, else a split)',
		)
		.option('--train-head <pairs>', 'train the length heads on these pairs first')
		.option('--save <dir>', 'write the model with the new heads and calibrations')
		.option('--generations <n>', 'pairs to generate for; 0: bounds only (default: 256)', number('generations'))
		.option('--generate <json>', 'sampler and its options as JSON, \'{"sampler":"threshold"}\'')
		.option('--seeds <list>', 'seeds of the generations (default: 1,2,3)')
		.option('--batch <n>', 'prompts in one timed batch (default: 32)', number('batch'))
		.option('--judge <model>', 'an autoregressive twin that scores the answers')
		.option('--likelihoods <n>', 'references scored under the cropped canvas (default: 64)', number('likelihoods'))
		.option('--samples <n>', 'masks per reference (default: 8)', number('samples'))
		.option('--limit <n>', 'only the first n pairs', number('limit'))
		.option('--columns <json>', 'names of the fields by role, \'{"prompt":"question"}\'')
		.option('--separator <text>', "between prompt and answer (default: ' ')")
		.option('--html <file>', 'write the report as one HTML file')
		.option('--svg <dir>', 'write coverage.svg and speed.svg')
		.option('--device <name>', 'auto, cpu, cuda, cuda:N (default: auto)')
		.option('--dtype <name>', 'auto, fp32, bf16, int8 (default: auto)')
		.option('--threads <n>', 'CPU threads (default: all cores)', number('threads'))
		.option('--json', 'print the result as one line of JSON')
		.addHelpText('after', exitStatus)
		.action(action(run));
}

async function run(path: string, pairs: string, flags: Flags): Promise<void> {
	if (flags.save !== undefined && flags.calibrate === undefined && flags.trainHead === undefined) {
		throw new UsageError('--save has nothing new to write: it goes with --calibrate or --train-head');
	}
	checkOutputs(
		{ '--html': flags.html },
		{ 'the pairs': pairs, '--calibrate': flags.calibrate, '--train-head': flags.trainHead },
	);
	const { max, limit } = flags;
	const options = toOptions(flags);
	const interrupt = interruptible();
	const { signal } = interrupt;
	const say = progressLine(flags.json === true);
	try {
		const loading = defined({ device: flags.device, dtype: flags.dtype, threads: flags.threads, signal });
		const load = (name: string, options: PretrainedOptions): Promise<DiffuGPT> =>
			showLoading((onProgress) => DiffuGPT.fromPretrained(name, { ...options, onProgress }), flags);
		await using model = await load(path, loading);
		await using judge =
			flags.judge === undefined ? undefined : await load(flags.judge, { ...loading, config: { attention: 'causal' } });
		const reading = defined({ columns: options.columns, separator: options.separator, signal });
		if (flags.trainHead !== undefined) {
			const onProgress = ({ stage, fraction }: { stage: string; fraction: number }): void =>
				say(`head: ${stage}`, fraction);
			await trainLengthHead(model, flags.trainHead, { ...reading, max, onProgress });
		}
		const found = await evaluateLength(model, pairs, {
			...options,
			...defined({ max, limit, calibration: flags.calibrate, judge, signal }),
			max,
			keep: flags.save !== undefined && flags.calibrate !== undefined,
			onProgress: ({ stage, fraction }: LengthProgress) => say(stage, fraction),
		});
		if (flags.save !== undefined) await model.save(flags.save);
		say('', 1);
		if (flags.html !== undefined) await writeFileAtomic(flags.html, htmlReport(found, `Length methods: ${path}`));
		if (flags.svg !== undefined) {
			await mkdir(flags.svg, { recursive: true });
			await writeFileAtomic(join(flags.svg, 'coverage.svg'), coverageChart(found));
			const speed = speedChart(found);
			if (speed) await writeFileAtomic(join(flags.svg, 'speed.svg'), speed);
		}
		process.stdout.write(flags.json ? `${toJson({ model: path, data: pairs, ...found })}\n` : textReport(found));
	} finally {
		say('', 1);
		interrupt.end();
	}
}

function toOptions(flags: Flags): Omit<EvaluateLengthOptions, 'max'> {
	const { generations, batch, likelihoods, samples, separator } = flags;
	return defined({
		...{ generations, batch, likelihoods, samples, separator },
		methods: flags.methods?.split(',').map((text) => {
			const [method, head] = text.trim().split(':') as [LengthMethod, string | undefined];
			return head === undefined ? method : { method, head: head as 'token' };
		}),
		coverage: flags.coverage?.split(',').map((text) => number('coverage')(text)),
		seeds: flags.seeds?.split(',').map((text) => parseSeed(text)),
		generate: parseJson('generate', flags.generate),
		columns: parseJson('columns', flags.columns) as Record<string, string> | undefined,
	});
}

function parseSeed(text: string): bigint {
	try {
		return BigInt(text);
	} catch {
		throw new UsageError(`--seeds: ${JSON.stringify(text)} is not a whole number`);
	}
}

function parseJson(name: string, text: string | undefined): object | undefined {
	if (text === undefined) return undefined;
	try {
		const value: unknown = JSON.parse(text);
		if (typeof value === 'object' && value !== null && !Array.isArray(value)) return value;
	} catch (error) {
		throw new UsageError(`--${name} is not JSON: ${(error as Error).message}`);
	}
	throw new UsageError(`--${name} is not a JSON object`);
}

/** The entries that are not undefined. */
function defined<T extends object>(values: T): { [K in keyof T]?: Exclude<T[K], undefined> } {
	return Object.fromEntries(Object.entries(values).filter(([, value]) => value !== undefined)) as {
		[K in keyof T]?: Exclude<T[K], undefined>;
	};
}

/** One line that is drawn over on a terminal; elsewhere a line every few seconds. */
function progressLine(json: boolean): (stage: string, fraction: number) => void {
	let last = performance.now();
	let drawn = false;
	return (stage, fraction) => {
		const terminal = isTerminal(process.stderr);
		if (stage === '') {
			if (drawn && terminal) process.stderr.write('\r\u001b[K');
			drawn = false;
			return;
		}
		const now = performance.now();
		if ((json && !terminal) || now - last < (terminal ? 100 : 5000)) return;
		last = now;
		drawn = true;
		const text = `${stage} ${Math.round(100 * fraction)} %`;
		process.stderr.write(terminal ? `\r\u001b[K${text}` : `${text}\n`);
	};
}
