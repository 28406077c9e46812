/** The model class of the public API: loading, inspection, generation, lifecycle. It holds an Engine and a tokenizer. */
import { constants } from 'node:buffer';

import {
	type AttentionOption,
	checkMatrix,
	checkUnread,
	type DiffusionBatch,
	type LossOptions,
	lossOptionNames,
	toNativeMask,
	toNativeNoise,
	toNativeTrainBatch,
	toSeed,
} from './batch.js';
import { binding } from './binding.js';
import { saveCheckpoint } from './checkpoint-save.js';
import { type ModelConfig, type ModelConfigInput, resolveConfig } from './config.js';
import type { DenoiseStep } from './denoise-loop.js';
import { type Device, type DType, openEngine } from './device.js';
import type { Engine } from './engine.js';
import { check, divergedError } from './errors.js';
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
import type { NativeBatch, NativeParameter } from './native-types.js';
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

/** Options of `forward`. */
export interface ForwardOptions {
	/** @default 'full' for a bidirectional model, 'causal' for a causal one */
	readonly attention?: AttentionOption;
	/**
	 * 'logits': (rows, V), network rows as they are. 'aligned-logits': (rows, V), entry i speaks of token i; under the shift
	 * nothing predicts token 0 and its row is NaN. 'hidden': (rows, C), after the final layer norm.
	 * @default 'logits'
	 */
	readonly output?: 'logits' | 'aligned-logits' | 'hidden';
	/** Only these rows of each sequence, in this order. @default all */
	readonly rows?: readonly Int32Array[];
	/**
	 * Results of earlier calls that are no longer needed, so that a loop over large ones, logits for instance, neither waits
	 * for fresh memory nor keeps the garbage collector busy. The first of a fitting size (up to a quarter larger) takes the new
	 * results in its memory: every array on its buffer then shows those, or remains of both after an error. The others are
	 * emptied (length 0). @default none
	 */
	readonly reuse?: readonly Float32Array[];
	/** Aborting rejects with `signal.reason`. @default none */
	readonly signal?: AbortSignal;
}

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
	 * Of activations: 'fp32', or 'bf16' on CUDA, with fp32 parameters. 'int8': matrices are int8 with a scale per output
	 * column, activations fp32, quantised a row at a time for products; inference on the CPU only.
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
	async forward(sequences: Int32Array | readonly Int32Array[], options: ForwardOptions = {}): Promise<Float32Array[]> {
		this.engine.check();
		checkOptions('forward', options, ['attention', 'output', 'rows', 'reuse', 'signal']);
		const { config } = this;
		const { output = 'logits', reuse = [], signal } = options;
		const list = sequences instanceof Int32Array ? [sequences] : sequences;
		check(Array.isArray(list) && list.length > 0, 'forward needs an Int32Array or a list of at least one');
		check(
			output === 'logits' || output === 'aligned-logits' || output === 'hidden',
			`option output is ${show(output)}, expected 'logits', 'aligned-logits' or 'hidden'`,
		);
		const { batch, rows } = packForward(list, options, config);
		// Under the shift, token i is spoken of by row i - 1, and token 0 by none: it borrows a row, which is overwritten.
		const shift = output === 'aligned-logits' && config.shift ? 1 : 0;
		const wanted = rows.flatMap((list_, s) =>
			Array.from(list_, (row) => (batch.offsets[s] as number) + Math.max(0, row - shift)),
		);
		const width = output === 'hidden' ? config.channels : config.vocab;
		const bytes = wanted.length * width * Float32Array.BYTES_PER_ELEMENT;
		check(
			bytes <= constants.MAX_LENGTH,
			() =>
				`forward: ${wanted.length} rows of ${width} numbers are ${bytes} bytes, expected at most the ${constants.MAX_LENGTH} ` +
				'that this Node.js holds in one buffer: pass fewer sequences at a time, or list rows',
		);
		const into = takeResults(reuse, bytes, signal);
		let all: Float32Array = new Float32Array(0);
		try {
			const request = { ...batch, rows: Int32Array.from(wanted) };
			if (wanted.length > 0)
				all = await this.engine.run(
					(native) => native.forward(request, output === 'hidden' ? 'hidden' : 'logits', into),
					signal,
				);
		} finally {
			if (into) resultBuffers.add(into);
		}
		resultBuffers.add(all.buffer);
		if (into && all.buffer !== into) binding().detach(into);
		let next = 0;
		return rows.map((list_) => {
			const begin = next * width;
			for (const row of list_) {
				if (row < shift) all.fill(Number.NaN, next * width, (next + 1) * width);
				next++;
			}
			return all.subarray(begin, next * width);
		});
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

/** Buffers of what `forward` returned: nobody else's may be emptied. */
const resultBuffers = new WeakSet<ArrayBufferLike>();

/**
 * Empties results, unless the call is aborted already, but for one of `bytes` or little more: the caller has that for
 * itself until it adds it to `resultBuffers` again.
 */
function takeResults(
	results: readonly Float32Array[],
	bytes: number,
	signal: AbortSignal | undefined,
): ArrayBuffer | undefined {
	check(
		Array.isArray(results) && results.every((values) => values instanceof Float32Array),
		'option reuse is not a list of Float32Array, such as forward returns',
	);
	const buffers = results.map(({ buffer }) => buffer as ArrayBuffer);
	check(
		buffers.every((buffer) => resultBuffers.has(buffer)),
		'option reuse has an array that forward did not return, or that another call is using again',
	);
	signal?.throwIfAborted();
	const taken = buffers.find(({ byteLength }) => byteLength >= bytes && byteLength <= 1.25 * bytes);
	if (taken) resultBuffers.delete(taken);
	for (const buffer of buffers) if (buffer !== taken) binding().detach(buffer);
	return taken;
}

/** Packs the sequences of a forward and checks ids, lengths and rows. */
function packForward(
	list: readonly Int32Array[],
	options: ForwardOptions,
	config: ModelConfig,
): { batch: NativeBatch; rows: Int32Array[] } {
	const attention = options.attention ?? (config.attention === 'causal' ? 'causal' : 'full');
	const mask = toNativeMask(attention);
	const offsets = new Int32Array(list.length + 1);
	for (const [s, ids] of list.entries()) {
		check(ids instanceof Int32Array, `sequence ${s} is not an Int32Array`);
		check(
			ids.length > 0 && ids.length <= config.context,
			`sequence ${s} has ${ids.length} tokens, expected 1 to the model's context of ${config.context}`,
		);
		for (const [i, id] of ids.entries()) {
			check(
				id >= 0 && id < config.vocab,
				`sequence ${s}: token ${i} is ${id}, outside the vocabulary of ${config.vocab}`,
			);
		}
		offsets[s + 1] = (offsets[s] as number) + ids.length;
	}
	checkMatrix(mask, list);
	const given = options.rows;
	check(
		given === undefined || (Array.isArray(given) && given.length === list.length),
		'option rows needs one Int32Array per sequence',
	);
	const rows = list.map((ids, s) => {
		const wanted = given?.[s];
		if (!given) return Int32Array.from({ length: ids.length }, (_, i) => i);
		check(wanted instanceof Int32Array, `option rows[${s}] is not an Int32Array`);
		for (const row of wanted)
			check(row >= 0 && row < ids.length, `option rows[${s}]: row ${row} is outside the sequence's ${ids.length}`);
		return wanted;
	});
	const total = offsets[list.length] as number;
	const ids = new Int32Array(total);
	const positions = new Int32Array(total);
	for (const [s, sequence] of list.entries()) {
		const begin = offsets[s] as number;
		ids.set(sequence, begin);
		for (let i = 0; i < sequence.length; i++) positions[begin + i] = i;
	}
	return {
		batch: {
			ids,
			positions,
			offsets,
			keyLengths: Int32Array.from(list, (sequence) => sequence.length),
			caches: list.map(() => null),
			masks: list.map(() => mask),
			rows: null,
		},
		rows,
	};
}
