/**
 * `diffusion-native eval`: scores a model on the user's data. Results on standard output, for people or as one line of
 * JSON; progress on standard error; every record's outcome in a file when asked.
 */

import cliProgress from 'cli-progress';
import type { Command } from 'commander';

import type { Device, DType } from '../device.js';
import type { EvaluationProgress, Metric, SequenceOptions } from '../eval/options.js';
import { evaluate, metricNames } from '../evaluate.js';
import type { PretrainedOptions } from '../load.js';
import { DiffuGPT } from '../model.js';
import { showLoading } from './load-view.js';
import { checkOutputs, OutputFile } from './output-file.js';
import {
	action,
	exitStatus,
	interruptible,
	isTerminal,
	number,
	padding,
	paddingKinds,
	toJson,
	UsageError,
} from './terminal.js';

interface Flags {
	metric?: string;
	samples?: number;
	enumerate?: number;
	endToken?: boolean;
	padding?: SequenceOptions['padding'];
	stride?: number;
	form?: string;
	extract?: string;
	compat?: boolean;
	generate?: string;
	concurrency?: number;
	judge?: string;
	columns?: string;
	separator?: string;
	limit?: number;
	seed?: string;
	batchTokens?: number;
	attention?: 'bidirectional' | 'causal';
	device?: Device;
	dtype?: DType;
	threads?: number;
	output?: string;
	json?: boolean;
}

/** Metrics without a command of their own. */
const names = metricNames.filter((name) => name !== 'length');

/** Of --padding, without an amount. */
const paddings = ['none', 'context'] as const;

/** Adds the command and returns it, so that evaluations with options of their own can be its subcommands. */
export function register(program: Command): Command {
	return program
		.command('eval')
		.description('Score a model on data of your own')
		.argument('<model>', 'a model directory, a Hugging Face id, or diffusion-native/tiny')
		.argument('[data]', 'a .jsonl file; a .bin file for nelbo and perplexity; a .txt file for lambada')
		.option('-m, --metric <name>', names.join(', '))
		.option(
			'--samples <n>',
			'draws per sequence (default: nelbo 8, likelihood 128, multiple-choice 32); generative-perplexity: texts (default: 64), or texts per prompt (default: 1)',
			number('samples'),
		)
		.option(
			'--enumerate <n>',
			'nelbo, likelihood: compute sequences of at most n scored tokens exactly (default: nelbo 0, likelihood 8)',
			number('enumerate'),
		)
		.option('--end-token', 'likelihood: score the end token after the answer too')
		.option('--no-end-token', 'nelbo, perplexity: no end token behind texts and answers')
		.option('--padding <kind>', `nelbo, perplexity: ${paddingKinds(paddings)} (default: none)`, padding(paddings))
		.option(
			'--stride <n>',
			'tokens by which windows over long texts advance (default: context - 1; generative-perplexity: half the context)',
			number('stride'),
		)
		.option('--form <name>', 'multiple-choice: weighted, unweighted (default: weighted)')
		.option('--extract <what>', 'exact-match: all, after-hashes (GSM8K) (default: all)')
		.option('--compat', "multiple-choice, lambada: reproduce the upstream harness's quirks")
		.option('--generate <json>', 'options of generate as JSON, \'{"length":{"max":64},"steps":32}\'')
		.option('--concurrency <n>', 'generations in flight (default: 64)', number('concurrency'))
		.option('--judge <model>', 'generative-perplexity: the causal model that scores the texts')
		.option('--columns <json>', 'names of the fields by role, \'{"prompt":"question"}\'')
		.option('--separator <text>', "between prompt and answer (default: ' '; infilling: none)")
		.option('--limit <n>', 'only the first n records', number('limit'))
		.option('--seed <n>', 'default: 0')
		.option(
			'--batch-tokens <n>',
			'most tokens of one forward; changes no result (default: 4096)',
			number('batch-tokens'),
		)
		.option('--attention <kind>', 'bidirectional or causal, instead of what the model says')
		.option('--device <name>', 'auto, cpu, cuda, cuda:N (default: auto)')
		.option('--dtype <name>', 'auto, fp32, bf16, int8 (default: auto)')
		.option('--threads <n>', 'CPU threads (default: all cores)', number('threads'))
		.option('-o, --output <file>', "write every record's outcome as a line of JSON, in place when the run ends")
		.option('--json', 'print the result as one line of JSON')
		.addHelpText(
			'after',
			`
Fields of a record (a line of JSON), by metric:
  nelbo, perplexity       { text }, { prompt, answer } or { tokens, promptLength }; kind: reported apart
  likelihood              { prompt, answer }
  exact-match             { prompt, answer }; kind: reported apart
  multiple-choice         { context, endings: [...], label: number }
  infilling               { prefix, middle, suffix }
  lambada                 { text }, or a text file with one passage per line
  generative-perplexity   { prompt }, or no data: texts without a prompt
${exitStatus}`,
		)
		.action(action(run));
}

async function run(path: string, data: string | undefined, flags: Flags): Promise<void> {
	if (flags.metric === undefined) throw new UsageError(`--metric is needed: ${names.join(', ')}`);
	const options = toOptions(flags);
	if (data === undefined && flags.metric !== 'generative-perplexity') throw new UsageError('a data file is needed');
	checkOutputs({ '--output': flags.output }, { 'the data': data });
	const interrupt = interruptible();
	const { signal } = interrupt;
	const view = new View(flags.json === true);
	const records = flags.output === undefined ? undefined : await OutputFile.open(flags.output);
	try {
		const loading = defined({
			device: flags.device,
			dtype: flags.dtype,
			threads: flags.threads,
			signal,
			config: flags.attention === undefined ? undefined : { attention: flags.attention },
		});
		const load = (name: string, options: PretrainedOptions): Promise<DiffuGPT> =>
			showLoading((onProgress) => DiffuGPT.fromPretrained(name, { ...options, onProgress }), flags);
		await using model = await load(path, loading);
		await using judge = flags.judge === undefined ? undefined : await load(flags.judge, { ...loading, config: {} });
		// The names are checked by evaluate, which says what it expected.
		const result = await evaluate(model, data ?? null, {
			...(options as { metric: 'nelbo' }),
			...(judge === undefined ? {} : { judge }),
			signal,
			onProgress: (progress) => view.progress(progress),
			...(records === undefined ? {} : { onRecord: (record: object) => records.writeLine(record) }),
		});
		view.stop();
		process.stdout.write(flags.json ? `${toJson({ model: path, data: data ?? null, ...result })}\n` : table(result));
		await records?.keep();
	} finally {
		view.stop();
		interrupt.end();
		const partial = await records?.setAside();
		if (partial !== undefined) process.stderr.write(`the records so far are in ${partial}\n`);
	}
}

function toOptions(flags: Flags): { metric: Metric } & Record<string, unknown> {
	const { metric, samples, enumerate, endToken, stride, form, extract, compat, concurrency } = flags;
	const { separator, limit, batchTokens } = flags;
	return {
		metric: metric as Metric,
		...defined({
			...{ samples, enumerate, stride, form, extract, compat, concurrency, separator, limit, batchTokens },
			endToken,
			padding: flags.padding,
			generate: parseJson('generate', flags.generate),
			columns: parseJson('columns', flags.columns),
			seed: flags.seed === undefined ? undefined : parseSeed(flags.seed),
		}),
	};
}

function parseJson(name: string, text: string | undefined): object | undefined {
	if (text === undefined) return undefined;
	let value: unknown;
	try {
		value = JSON.parse(text);
	} catch (error) {
		throw new UsageError(`--${name} is not JSON: ${(error as Error).message}`);
	}
	if (typeof value !== 'object' || value === null || Array.isArray(value))
		throw new UsageError(`--${name} is not a JSON object`);
	return value;
}

function parseSeed(text: string): bigint {
	try {
		return BigInt(text);
	} catch {
		throw new UsageError(`--seed is ${JSON.stringify(text)}, expected a whole number`);
	}
}

/** The entries that are not undefined. */
function defined<T extends object>(values: T): { [K in keyof T]?: Exclude<T[K], undefined> } {
	return Object.fromEntries(Object.entries(values).filter(([, value]) => value !== undefined)) as {
		[K in keyof T]?: Exclude<T[K], undefined>;
	};
}

/** A result as aligned lines; objects inside it are indented. */
function table(result: object, indent = ''): string {
	const entries = Object.entries(result);
	const width = Math.max(...entries.map(([key]) => key.length));
	let text = '';
	for (const [key, value] of entries) {
		if (typeof value === 'object' && value !== null && !Array.isArray(value)) {
			if (Object.keys(value).length > 0) text += `${indent}${key}\n${table(value, `${indent}  `)}`;
			continue;
		}
		text += `${indent}${key.padEnd(width)}  ${cell(value)}\n`;
	}
	return text;
}

function cell(value: unknown): string {
	if (Array.isArray(value)) return value.map(cell).join(' .. ');
	return typeof value === 'number' && !Number.isInteger(value) ? value.toPrecision(5) : String(value ?? '-');
}

/** A bar on a terminal, a line every few seconds elsewhere. */
class View {
	readonly #json: boolean;
	#bar: cliProgress.SingleBar | undefined;
	#lastLine = performance.now();

	constructor(json: boolean) {
		this.#json = json;
	}

	progress({ records, fraction }: EvaluationProgress): void {
		if (isTerminal(process.stderr) && fraction !== undefined) {
			if (!this.#bar) {
				const format = '{bar} {percentage}%  {eta_formatted} left  {records} records';
				this.#bar = new cliProgress.SingleBar({ format, barsize: 24, hideCursor: true, clearOnComplete: true });
				this.#bar.start(1000, 0, { records });
			}
			this.#bar.update(Math.round(1000 * fraction), { records });
			return;
		}
		const now = performance.now();
		if (this.#json || now - this.#lastLine < 5000) return;
		this.#lastLine = now;
		process.stderr.write(`${records} records${fraction === undefined ? '' : `, ${Math.round(100 * fraction)} %`}\n`);
	}

	stop(): void {
		this.#bar?.stop();
		this.#bar = undefined;
	}
}
