/** The model class of the public API: loading, inspection, generation, lifecycle. It holds an Engine and a tokenizer. */
import {
	checkMatrix,
	checkUnread,
	type DiffusionBatch,
	type LossOptions,
	lossOptionNames,
	toNativeNoise,
	toNativeTrainBatch,
	toSeed,
} from './batch.js';
import { saveCheckpoint } from './checkpoint-save.js';
import { type ModelConfig, type ModelConfigInput, resolveConfig } from './config.js';
import type { DenoiseStep } from './denoise-loop.js';
import { type Device, type DType, openEngine } from './device.js';
import type { Engine } from './engine.js';
import { check, divergedError } from './errors.js';
import { type ForwardOptions, forward } from './forward.js';
import {
	canvasSize,
	denoise,
	type GenerateResult,
	type GenerationRequest,
	type PredictOptions,
	predictLength,
	prepareRequest,
	usualStepsPerCall,
} from './generate.js';
import { forgetLengths, lengthExtras } from './length/extras.js';
import type { LengthOptions, LengthPrediction } from './length/method.js';
import { loadPretrained, type PretrainedOptions } from './load.js';
import type { NativeParameter } from './native-types.js';
import { checkOptions, show } from './option-checks.js';
import type { GenerateOptions } from './options.js';
import type { Prompt } from './prompt.js';
import { Tokenizer } from './tokenizer.js';

/** Options of `DiffuGPT.fromConfig`. */
export interface FromConfigOptions {
	/** @default 'auto' */
	readonly device?: Device;
	/** @default 'auto' */
	readonly dtype?: DType;
	/** Of the random weights; 0 .. 2^64 - 1. @default 0 */
	readonly seed?: number | bigint;
	/** CPU threads; 0: all cores. @default 0 */
	readonly threads?: number;
	/** A tokenizer whose ids fit the vocabulary. @default none: prompts are ids */
	readonly tokenizer?: Tokenizer;
}

/** Options of `save`. */
export interface SaveOptions {
	/**
	 * Type of the stored weights. 'fp32' is exact; 'int8' is what a model of dtype 'int8' holds, and only this package loads it.
	 * @default 'int8' for a model of dtype 'int8', else 'fp32'
	 */
	readonly dtype?: 'fp32' | 'fp16' | 'bf16' | 'int8';
}

const storedTypes = { fp32: 'F32', fp16: 'F16', bf16: 'BF16', int8: 'I8' } as const;

/** What `loss` returns. */
export interface LossResult {
	/** The objective: weighted and normalised. 0 when nothing was masked. */
	loss: number;
	/** Mean cross-entropy of the masked tokens, nats. */
	unweighted: number;
	/** Masked tokens that a row predicts. */
	masked: number;
	/** Maskable tokens that a row predicts. */
	tokens: number;
}

/** Most requests of one `generateBatch` that run at once, however small; the rest follow as these finish. */
const batchWidth = 128;

/**
 * A GPT-2 shaped language model: a masked diffusion model (bidirectional), or a plain GPT-2 (causal). Methods may be called
 * concurrently; they share the device fairly, step by step. After `dispose` everything but `dispose` fails with
 * `ERR_DN_DISPOSED`; where too many calls wait, a further one fails with `ERR_DN_BUSY`.
 */
export class DiffuGPT {
	/** @internal */
	readonly engine: Engine;
	/** What the model is. */
	readonly config: ModelConfig;
	/** 'cpu', or 'cuda:N'. */
	readonly device: string;
	/**
	 * On CUDA, of activations: 'bf16' or 'fp32', with fp32 parameters. On the CPU, of the matrices that products read, with
	 * fp32 activations: 'fp32'; 'bf16', rounded to the nearest when they are set; 'int8' with a scale per output column,
	 * activations quantised a row at a time for products (docs/numerics.md). The last two are for inference.
	 */
	readonly dtype: Exclude<DType, 'auto'>;
	/** Why device 'auto' did not choose a GPU; undefined when it was not asked or did. */
	readonly deviceNote: string | undefined;
	/** Null for a model made from a configuration without one. */
	readonly tokenizer: Tokenizer | null;

	private constructor(opened: Awaited<ReturnType<typeof openEngine>>, tokenizer: Tokenizer | null) {
		this.engine = opened.engine;
		this.config = opened.engine.config;
		this.device = opened.device;
		this.dtype = opened.dtype;
		this.deviceNote = opened.note;
		this.tokenizer = tokenizer;
	}

	/**
	 * Loads a model.
	 * @param pathOrHubId a directory (wins when it exists), a Hugging Face id, or 'diffusion-native/tiny'.
	 * @throws `ERR_DN_CHECKPOINT` naming the file; `ERR_DN_DEVICE` with the reason; `ERR_DN_HUB`; `ERR_DN_ARGUMENT`;
	 * `ERR_DN_OUT_OF_MEMORY`; `ERR_DN_NO_BINARY`; `signal.reason`
	 */
	static async fromPretrained(pathOrHubId: string, options: PretrainedOptions = {}): Promise<DiffuGPT> {
		const { opened, tokenizer } = await loadPretrained(pathOrHubId, options);
		return new DiffuGPT(opened, tokenizer);
	}

	/**
	 * A model with GPT-2's random initialisation.
	 * @throws `ERR_DN_ARGUMENT` naming the field or option; `ERR_DN_DEVICE` with the reason; `ERR_DN_OUT_OF_MEMORY`;
	 * `ERR_DN_NO_BINARY`
	 */
	static async fromConfig(input: ModelConfigInput, options: FromConfigOptions = {}): Promise<DiffuGPT> {
		checkOptions('fromConfig', options, ['device', 'dtype', 'seed', 'threads', 'tokenizer']);
		const config = resolveConfig(input);
		const seed = toSeed(options.seed ?? 0);
		const { tokenizer } = options;
		check(!tokenizer || tokenizer instanceof Tokenizer, 'option tokenizer is not a Tokenizer');
		check(
			!tokenizer || tokenizer.vocabSize <= config.vocab,
			`the tokenizer has ${tokenizer?.vocabSize} ids, more than config.vocab ${config.vocab}`,
		);
		const opened = openEngine(config, options);
		await opened.engine.run((native) => native.initialise(seed));
		return new DiffuGPT(opened, tokenizer ?? null);
	}

	/**
	 * Logits or hidden states, one array per sequence: (rows, V) or (rows, C). The arrays of several sequences are views of
	 * one buffer.
	 * @throws `ERR_DN_ARGUMENT`, also when they do not fit one buffer; `ERR_DN_BUSY`; `ERR_DN_OUT_OF_MEMORY`; `signal.reason`
	 */
	forward(sequences: Int32Array | readonly Int32Array[], options: ForwardOptions = {}): Promise<Float32Array[]> {
		return forward(this.engine, sequences, options);
	}

	/**
	 * The training objective on a batch, without gradients.
	 * @throws `ERR_DN_ARGUMENT`, also for an option that the objective does not read; `ERR_DN_BUSY`; `ERR_DN_OUT_OF_MEMORY`;
	 * `ERR_DN_DIVERGED` when the loss is not a finite number; `signal.reason`
	 */
	async loss(batch: DiffusionBatch, options: LossOptions = {}): Promise<LossResult> {
		this.engine.check();
		checkOptions('loss', options, lossOptionNames);
		const noise = toNativeNoise(this.config, options);
		checkUnread(options);
		const packed = toNativeTrainBatch(batch, this.config);
		checkMatrix(noise.attention, batch.tokens);
		const result = await this.engine.run(
			(native) => native.trainBatch(packed, noise, { recompute: false, precision: 'fp32', backward: false }),
			options.signal,
		);
		const loss = result.denominator > 0 ? result.weighted / result.denominator : 0;
		const unweighted = result.masked > 0 ? result.unweighted / result.masked : 0;
		if (!Number.isFinite(loss) || !Number.isFinite(unweighted)) {
			throw divergedError(`the loss is ${loss} (unweighted ${unweighted})`);
		}
		return {
			loss,
			unweighted,
			masked: result.masked,
			tokens: result.predictable,
		};
	}

	/**
	 * Generates text; the last value of `stream`.
	 * @throws `ERR_DN_ARGUMENT`; `ERR_DN_BUSY`; `ERR_DN_OUT_OF_MEMORY`; `ERR_DN_DIVERGED` where a logit is not a finite number;
	 * `signal.reason`
	 */
	async generate(prompt: Prompt, options: GenerateOptions = {}): Promise<GenerateResult> {
		const request = prepareRequest(this.engine, this.tokenizer, prompt, options, usualStepsPerCall);
		const steps = denoise(this.engine, this.tokenizer, request);
		for (;;) {
			const { done, value } = await steps.next();
			if (done) return value;
		}
	}

	/**
	 * Generates step by step. Nothing happens before the first `next()`, where options are checked. Leaving the loop stops
	 * after the current step.
	 * @throws from `next()`, what `generate` does
	 */
	async *stream(prompt: Prompt, options: GenerateOptions = {}): AsyncGenerator<DenoiseStep, GenerateResult> {
		return yield* denoise(this.engine, this.tokenizer, prepareRequest(this.engine, this.tokenizer, prompt, options));
	}

	/**
	 * Generates for many prompts in ragged batches. Each result equals its own solo run, bit for bit on the CPU. All
	 * arguments are checked before anything runs; when one request fails, the others stop and the call rejects.
	 * @throws what `generate` does
	 */
	async generateBatch(
		prompts: readonly Prompt[],
		options: GenerateOptions | readonly GenerateOptions[] = {},
	): Promise<GenerateResult[]> {
		check(Array.isArray(prompts), 'generateBatch needs a list of prompts');
		const each = Array.isArray(options)
			? (options as readonly GenerateOptions[])
			: prompts.map(() => options as GenerateOptions);
		check(each.length === prompts.length, `there are ${prompts.length} prompts but ${each.length} options`);
		const requests = prompts.map((prompt, i) =>
			prepareRequest(this.engine, this.tokenizer, prompt, each[i], usualStepsPerCall),
		);
		const results: GenerateResult[] = new Array(requests.length);
		// As many at once as fill a merged batch: more would only wait, and hold caches meanwhile.
		const sizes = requests.map(canvasSize);
		const running = new Set<Promise<void>>();
		let wake = (): void => {};
		let tokens = 0;
		let failure: { reason: unknown } | undefined;
		const serve = async (i: number): Promise<void> => {
			const stream = denoise(this.engine, this.tokenizer, requests[i] as GenerationRequest);
			try {
				for (;;) {
					const { done, value } = await stream.next();
					if (done) {
						results[i] = value;
						return;
					}
					if (failure) await stream.return(undefined as never);
				}
			} catch (reason) {
				failure ??= { reason };
			}
		};
		for (const [i, size] of sizes.entries()) {
			while (running.size > 0 && (running.size >= batchWidth || tokens + size > this.engine.batchTokens)) {
				await new Promise<void>((resolve) => {
					wake = resolve;
				});
			}
			if (failure) break;
			tokens += size;
			const served: Promise<void> = serve(i).then(() => {
				tokens -= size;
				running.delete(served);
				wake();
			});
			running.add(served);
		}
		await Promise.all(running);
		if (failure) throw failure.reason;
		return results;
	}

	/**
	 * How long the answer would be, from one forward; 'daedal' takes one per growth.
	 * @throws `ERR_DN_ARGUMENT`; `ERR_DN_BUSY`; `ERR_DN_OUT_OF_MEMORY`; `ERR_DN_DIVERGED` where a probability is not a number;
	 * `signal.reason`
	 */
	predictLength(prompt: Prompt, options: LengthOptions & PredictOptions): Promise<LengthPrediction> {
		return predictLength(this.engine, this.tokenizer, prompt, options);
	}

	/** Names (GPT-2's, without prefix), shapes and element counts. @throws `ERR_DN_DISPOSED` */
	parameters(): NativeParameter[] {
		this.engine.check();
		return this.#parameters().map(({ name, shape, count }) => ({ name, shape: [...shape], count }));
	}

	/** A copy of one parameter. @throws `ERR_DN_ARGUMENT` for an unknown name, `ERR_DN_BUSY` while the model is computing */
	getParameter(name: string): Float32Array {
		this.#parameter(name);
		return this.engine.immediately('getParameter', (native) => native.getParameter(name));
	}

	/** Replaces one parameter; length heads and calibrations are dropped. @throws `ERR_DN_ARGUMENT` for an unknown name or a wrong count, `ERR_DN_BUSY` while computing */
	setParameter(name: string, values: Float32Array): void {
		const { count, shape } = this.#parameter(name);
		check(values instanceof Float32Array, `setParameter('${name}'): values is not a Float32Array`);
		check(
			values.length === count,
			`setParameter('${name}'): ${values.length} values given, the shape ${JSON.stringify(shape)} has ${count}`,
		);
		this.engine.immediately('setParameter', (native) => native.setParameter(name, values));
		forgetLengths(this.engine);
	}

	/**
	 * Writes a directory that `fromPretrained` and, unless it is int8, Hugging Face's GPT-2 loader accept; complete, or not at
	 * all. Other files that it holds stay. A directory that cannot be renamed (a mount point, the working directory, one in a
	 * directory without the right to write) is filled in place: from the first file moved to the last it has no `config.json`.
	 * @throws `ERR_DN_CHECKPOINT` with the path and the system's reason; `ERR_DN_ARGUMENT`; `ERR_DN_BUSY`
	 */
	async save(directory: string, options: SaveOptions = {}): Promise<void> {
		this.engine.check();
		check(typeof directory === 'string' && directory !== '', 'save needs the path of a directory');
		checkOptions('save', options, ['dtype']);
		const { dtype = this.dtype === 'int8' ? 'int8' : 'fp32' } = options;
		check(
			Object.hasOwn(storedTypes, dtype),
			`option dtype is ${show(dtype)}, expected 'fp32', 'fp16', 'bf16' or 'int8'`,
		);
		const { config, tokenizer } = this;
		const length = lengthExtras(this.engine);
		await this.engine.run((native) =>
			saveCheckpoint(directory, {
				native,
				config,
				tokenizer: tokenizer ?? undefined,
				length,
				dtype: storedTypes[dtype],
			}),
		);
	}

	/** Waits for the call in flight, rejects what waits with `ERR_DN_DISPOSED` and frees the memory. Idempotent. */
	dispose(): Promise<void> {
		return this.engine.dispose();
	}

	/** `dispose`, for `await using`. */
	[Symbol.asyncDispose](): Promise<void> {
		return this.dispose();
	}

	#parameters(): readonly NativeParameter[] {
		return this.engine.parameters;
	}

	#parameter(name: string): NativeParameter {
		this.engine.check();
		const found = this.#parameters().find((parameter) => parameter.name === name);
		check(found, `the model has no parameter ${show(name)}; parameters() lists them`);
		return found;
	}
}
