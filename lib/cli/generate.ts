/**
 * `diffusion-native generate`: text from a model. On a terminal it appears as it is denoised: committed text plain, guesses
 * dim, positions opened again marked; elsewhere only the final text, or with --json every step as a line.
 */

import type { Command } from 'commander';
import type { DenoiseStep } from '../denoise-loop.js';
import type { Device, DType } from '../device.js';
import type { GenerateResult } from '../generate.js';
import { type LengthMethod, type LengthOptions, lengthMethods } from '../length/method.js';
import { DiffuGPT } from '../model.js';
import { type GenerateOptions, type SamplerName, samplerNames } from '../options.js';
import { decodeDrawn } from '../prompt.js';
import { traceHtml } from '../trace-html.js';
import { printable, Redraw, renderStep, style, type ViewOptions } from './denoise-view.js';
import { showLoading } from './load-view.js';
import { checkOutputs, OutputFile } from './output-file.js';
import { action, exitStatus, interruptible, isTerminal, number, toJson, UsageError } from './terminal.js';

interface Flags {
	prefix?: string;
	suffix?: string;
	length?: number;
	maxLength?: number;
	lengthMethod?: LengthMethod;
	lengthQuantile?: number;
	lengthProbability?: number;
	lengthCoverage?: number | 'draw';
	lengthBlock?: number;
	sampler?: SamplerName;
	score?: GenerateOptions['score'];
	plan?: GenerateOptions['plan'];
	steps?: number;
	block?: number;
	blockCausal?: number;
	cache?: GenerateOptions['cache'];
	measureDrift?: boolean;
	threshold?: number;
	factor?: number;
	entropyBound?: number;
	divergence?: number;
	stableSteps?: number;
	verify?: number;
	attempts?: number;
	temperature?: number;
	topK?: number;
	topP?: number;
	guidance?: number;
	stepsPerCall?: number;
	seed?: bigint;
	device?: Device;
	dtype?: DType;
	threads?: number;
	revision?: string;
	cacheDir?: string;
	localFilesOnly?: boolean;
	refresh?: boolean;
	json?: boolean;
	trace?: string;
	html?: string;
}

export function register(program: Command): void {
	program
		.command('generate')
		.description('Generate text')
		.argument('<model>', 'a model directory, a Hugging Face id, or diffusion-native/tiny')
		.argument('[prompt]', 'text to continue')
		.option('--prefix <text>', 'text before the gap to fill (instead of a prompt)')
		.option('--suffix <text>', 'text after the gap to fill')
		.option('--length <n>', 'exactly so many new tokens (default: 64, or what fits)', number('length'))
		.option('--max-length <n>', 'variable length: at most so many new tokens', number('max-length'))
		.option('--length-method <name>', `with --max-length: ${lengthMethods.join(', ')} (default: constant)`)
		.option('--length-quantile <q>', 'of the method quantile (default: 0.5)', number('length-quantile'))
		.option('--length-probability <p>', 'of the method threshold (default: 0.5)', number('length-probability'))
		.option(
			'--length-coverage <c>',
			"share of answers that fit, or 'draw': a drawn length (default of expected: 0.95)",
			(text) => (text === 'draw' ? text : number('length-coverage')(text)),
		)
		.option('--length-block <n>', 'of the method block (default: 32)', number('length-block'))
		.option('--sampler <name>', `${samplerNames.join(', ')} (default: confidence; autoregressive for a causal model)`)
		.option('--score <name>', 'of confidence: probability, margin, entropy, random (default: probability)')
		.option('--plan <name>', 'of confidence: even, linear (default: even)')
		.option(
			'--steps <n>',
			'forwards (default: one per token, at most 64; adaptive samplers: no bound)',
			number('steps'),
		)
		.option('--block <n>', 'tokens per semi-autoregressive block', number('block'))
		.option('--block-causal <n>', 'for a model trained block by block: block-causal attention', number('block-causal'))
		.option('--cache <kind>', 'with --block or --block-causal: keep keys and values, prefix or dual')
		.option('--measure-drift', 'with --cache: compare with exact forwards, at their cost')
		.option('--threshold <p>', 'of threshold, klass (default: 0.9) and revocable (default: 0.6)', number('threshold'))
		.option('--factor <f>', 'of factor (default: 1)', number('factor'))
		.option('--entropy-bound <nats>', 'of entropy-bound (default: 0.1)', number('entropy-bound'))
		.option('--divergence <nats>', 'of klass (default: 0.01)', number('divergence'))
		.option('--stable-steps <n>', 'of klass (default: 2)', number('stable-steps'))
		.option('--verify <p>', 'of revocable (default: 0.9)', number('verify'))
		.option('--attempts <n>', 'of revocable (default: 2)', number('attempts'))
		.option(
			'--temperature <t>',
			'default: 1 for ancestral, first-hitting, autoregressive; else 0',
			number('temperature'),
		)
		.option('--top-k <k>', 'draw among the k most probable tokens', number('top-k'))
		.option('--top-p <p>', 'draw among the most probable tokens up to this mass', number('top-p'))
		.option('--guidance <w>', 'classifier-free guidance', number('guidance'))
		.option(
			'--steps-per-call <n>',
			'steps the GPU takes by itself, shown in groups (default: 1)',
			number('steps-per-call'),
		)
		.option('--seed <n>', 'default: random', seed)
		.option('--device <name>', 'auto, cpu, cuda, cuda:N (default: auto)')
		.option('--dtype <name>', 'auto, fp32, bf16, int8 (default: auto)')
		.option('--threads <n>', 'CPU threads (default: all cores)', number('threads'))
		.option('--revision <name>', 'branch, tag or commit of a hub model')
		.option('--cache-dir <path>', 'hub cache')
		.option('--local-files-only', 'never ask the network')
		.option('--refresh', 'ask the hub whether the branch or tag has moved since it was fetched')
		.option('--json', 'print every step and then the result as a line of JSON')
		.option('--trace <file>', 'save every step and then the result as lines of JSON, in place when the run ends')
		.option('--html <file>', 'save a page that plays the denoising back')
		.addHelpText('after', exitStatus)
		.action(action(generate));
}

async function generate(path: string, text: string | undefined, flags: Flags): Promise<void> {
	const prompt = toPrompt(text, flags);
	const options = toOptions(flags);
	const { device, dtype, threads, revision, cacheDir, localFilesOnly, refresh } = flags;
	checkOutputs({ '--trace': flags.trace, '--html': flags.html }, {});
	const interrupt = interruptible();
	const { signal } = interrupt;
	try {
		const loading = given({ device, dtype, threads, revision, cacheDir, localFilesOnly, refresh, signal });
		const model = await showLoading((onProgress) => DiffuGPT.fromPretrained(path, { ...loading, onProgress }), flags);
		try {
			await show(model, prompt, { ...options, signal }, flags);
		} finally {
			await model.dispose();
		}
	} finally {
		interrupt.end();
	}
}

async function show(model: DiffuGPT, prompt: string | Gap, options: GenerateOptions, flags: Flags): Promise<void> {
	const out = process.stdout;
	const live = !flags.json && isTerminal(out);
	// Opened at the beginning, where a wrong path should be noticed.
	const trace = flags.trace === undefined ? undefined : await OutputFile.open(flags.trace);
	const html =
		flags.html === undefined
			? undefined
			: await OutputFile.open(flags.html).catch(async (error) => {
					await trace?.discard();
					throw error;
				});
	const events: DenoiseStep[] = [];
	const gap = typeof prompt === 'string' ? { prefix: prompt } : prompt;
	const shown = viewOptions(model, gap);
	const view = live ? new Redraw(out) : undefined;
	const stream = model.stream(prompt, options);
	let result: GenerateResult;
	try {
		for (;;) {
			const { done, value } = await stream.next();
			if (done) {
				result = value;
				break;
			}
			if (flags.json) out.write(`${toJson({ type: 'step', ...value })}\n`);
			trace?.writeLine({ type: 'step', ...value });
			if (html) events.push(value);
			view?.draw(`${renderStep(value, shown)}\n${style.dim(`step ${value.step} of at most ${value.steps}`)}`);
		}
		if (flags.json) out.write(`${toJson({ type: 'result', ...result })}\n`);
		trace?.writeLine({ type: 'result', ...result });
		html?.write(page(model, events, result));
		if (view) {
			const { forwards, tokensPerSecond, tokensPerForward, generatedTokens, drift } = result.stats;
			const measured = drift ? `, drift ${drift.mean.toPrecision(3)} nats (max ${drift.max.toPrecision(3)})` : '';
			const last = `${generatedTokens} tokens, ${forwards} forwards, ${tokensPerForward.toFixed(2)} tokens per forward, ${tokensPerSecond.toFixed(1)} tokens/s, seed ${result.seed}${measured}`;
			const { prefix = '', suffix = '' } = gap;
			view.finish(`${printable(prefix + result.text + suffix)}\n${style.dim(last)}`);
		} else if (!flags.json) {
			out.write(`${result.text}\n`);
		}
		await trace?.keep();
		await html?.keep();
	} finally {
		view?.end();
		await html?.discard();
		await trace?.discard();
	}
}

/** What stands before and after the text to generate. */
interface Gap {
	prefix?: string;
	suffix?: string;
}

function viewOptions({ tokenizer, config: { maskId } }: DiffuGPT, { prefix = '', suffix = '' }: Gap): ViewOptions {
	const count = (text: string): number => (text === '' || !tokenizer ? 0 : tokenizer.encode(text).length);
	return {
		maskId,
		decode: (ids) => (tokenizer ? decodeDrawn(tokenizer, ids) : ''),
		before: count(prefix),
		after: count(suffix),
	};
}

/** The playback as a page. */
function page({ config, tokenizer }: DiffuGPT, events: DenoiseStep[], result: GenerateResult): string {
	return traceHtml(events, result, config.maskId, tokenizer ? (ids) => decodeDrawn(tokenizer, ids) : null);
}

function toPrompt(text: string | undefined, { prefix, suffix }: Flags): string | Gap {
	if (prefix === undefined && suffix === undefined) {
		if (text === undefined) throw new UsageError('a prompt, --prefix or --suffix is needed');
		return text;
	}
	if (text !== undefined) throw new UsageError('a prompt cannot be combined with --prefix or --suffix');
	return given({ prefix, suffix });
}

function toOptions(flags: Flags): GenerateOptions {
	const { length, maxLength, lengthMethod, lengthQuantile, lengthProbability, lengthCoverage, lengthBlock } = flags;
	const details = given({
		method: lengthMethod,
		quantile: lengthQuantile,
		probability: lengthProbability,
		coverage: lengthCoverage,
		block: lengthBlock,
	});
	if (maxLength === undefined && Object.keys(details).length > 0)
		throw new UsageError('--length-method and its options need --max-length');
	if (maxLength !== undefined && length !== undefined)
		throw new UsageError('--length cannot be combined with --max-length');
	const variable: LengthOptions | undefined = maxLength === undefined ? undefined : { max: maxLength, ...details };
	const { blockCausal, cache, measureDrift } = flags;
	const { sampler, score, plan, steps, block, threshold, factor, entropyBound, divergence, stableSteps } = flags;
	const { verify, attempts, temperature, topK, topP, guidance, stepsPerCall, seed: chosen } = flags;
	return given({
		length: variable ?? length,
		...{ sampler, score, plan, steps, block, threshold, factor, entropyBound, divergence, stableSteps },
		...{ attention: blockCausal === undefined ? undefined : { blockCausal }, cache, measureDrift },
		...{ verify, attempts, temperature, topK, topP, guidance, stepsPerCall, seed: chosen },
	});
}

/** The entries that are not undefined. */
function given<T extends object>(values: T): { [K in keyof T]?: Exclude<T[K], undefined> } {
	return Object.fromEntries(Object.entries(values).filter(([, value]) => value !== undefined)) as {
		[K in keyof T]?: Exclude<T[K], undefined>;
	};
}

function seed(text: string): bigint {
	try {
		return BigInt(text);
	} catch {
		throw new UsageError(`--seed is ${JSON.stringify(text)}, expected a whole number`);
	}
}
