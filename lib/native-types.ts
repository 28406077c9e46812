/**
 * The native addon as TypeScript sees it: the plain data that goes in and out, and the objects that it makes. Types only;
 * lib/binding.ts loads the addon. It is dumb: it takes numbers, strings and typed arrays, trusts lengths that this side
 * computed, and throws errors with a `code`.
 */

/** The sizes of a model; see `ModelConfig` (lib/config.ts). */
export interface NativeConfig {
	layers: number;
	heads: number;
	channels: number;
	context: number;
	vocab: number;
}

/** One tensor of a model. */
export interface NativeParameter {
	/** GPT-2's name, without prefix. */
	name: string;
	/** Sizes of its dimensions, outermost first. */
	shape: number[];
	/** Elements: the product of `shape`. */
	count: number;
}

/** Who attends to whom inside one sequence; see native/core/attention_mask.h. */
export type NativeMask =
	| { kind: 'full' }
	| { kind: 'causal' }
	| { kind: 'annealed'; ratio: number; seed: bigint; step: number }
	| { kind: 'block-causal'; block: number }
	| { kind: 'block-diffusion'; block: number; half: number }
	| { kind: 'matrix'; matrix: Uint8Array; width: number };

/** Packed sequences of one forward. */
export interface NativeBatch {
	/** (N) token ids, sequences laid end to end. */
	ids: Int32Array;
	/** (N) rows of wpe; the tokens of a sequence without a cache are 0..T-1. */
	positions: Int32Array;
	/** (S + 1) packed row where each sequence begins. */
	offsets: Int32Array;
	/** (S) keys each sequence attends to: its own length, or rows of its cache after this call's rows are written. */
	keyLengths: Int32Array;
	/** (S) */
	caches: (NativeCache | null)[];
	/** (S) */
	masks: NativeMask[];
	/** Packed rows whose hidden state is wanted, in this order; null: all. */
	rows: Int32Array | null;
}

/** How D rows are sampled, each one of those that `NativeBatch.rows` lists; see DenoiseRow in native/core/backend.h. */
export interface NativeDenoise {
	/** (D) index into the listed rows: the row this statistic is of. */
	row: Int32Array;
	/** (D) index of the unconditional twin, -1: none. */
	guideRow: Int32Array;
	/** (D, 3): guidance, temperature, topP. */
	scales: Float32Array;
	/** (D, 3): topK, and the two ids that are banned (-1: none). */
	limits: Int32Array;
	/** (D) */
	seeds: BigUint64Array;
	/** (D, 2): step, position: the counter of the draw. */
	counters: Uint32Array;
	/** Ids whose probability is reported for every row. */
	watch: Int32Array;
	/** (K) indices into the listed rows whose raw logits are returned too; null: none. K * V floats are held. */
	logitRows: Int32Array | null;
	/**
	 * (D) where each row's (V) log probabilities are left for the next step, or null; null as a whole: none are kept. No two
	 * rows share an array, and nobody else touches one while the call runs. A call that fails may have written them.
	 */
	keep: (Float32Array | null)[] | null;
	/** (D) those of the step before, or null; read with `keep` only. */
	before: (Float32Array | null)[];
	/**
	 * Of one sequence with a cache and one row, without guide, logits and `keep`: up to `most` steps in all, each fed the id that
	 * the one before drew, fewer after one of `stops` or when they take long. D of the statistics is their number.
	 */
	ahead: { most: number; stops: Int32Array } | null;
}

/** What the head says of every row, one entry each. */
export interface NativeRowStats {
	/** Most probable id. */
	best: Int32Array;
	/** Sampled id. */
	drawn: Int32Array;
	/** Probability of `best` at temperature 1. */
	probability: Float32Array;
	/** Probability of `best` minus that of the runner-up. */
	margin: Float32Array;
	/** Nats. */
	entropy: Float32Array;
	/** Log probability of `drawn` at temperature 1. */
	drawnLogProb: Float32Array;
}

/** That of the D rows of a {@link NativeDenoise}, and what else it asked for. */
export interface NativeStats extends NativeRowStats {
	/** (D) KL(now || before), nats; Infinity where there is none, 0 without `keep`. */
	divergence: Float32Array;
	/** (D, watch.length) */
	watched: Float32Array;
	/** (K, V) raw logits of `logitRows`; empty when none were asked for. */
	logits: Float32Array;
}

/** A sampler that a device can run by itself; see native/core/denoise_loop.h. */
export interface NativeSampler {
	sampler: 'ancestral' | 'confidence' | 'threshold' | 'factor' | 'entropy-bound';
	/** Of 'confidence'. */
	score: 'probability' | 'margin' | 'entropy' | 'random';
	/** Of 'confidence'. */
	plan: 'even' | 'linear';
	/** tau of 'threshold', f of 'factor', gamma of 'entropy-bound'; else 0. */
	parameter: number;
}

/** One sequence of {@link NativeLoop}: its state before the next forward. */
export interface NativeLoopSequence extends NativeSampler {
	mask: NativeMask;
	temperature: number;
	topP: number;
	topK: number;
	/** Ids whose probability is zero, -1: none: the mask, and an end token that must not come. */
	banned: number;
	bannedEnd: number;
	seed: bigint;
	/** Row i - shift predicts position i. */
	shift: number;
	/** Counter of the next forward. */
	step: number;
	/** Steps spent in the first window, and positions that were open at its beginning. */
	blockStep: number;
	initialOpen: number;
	/** Its windows, [windowBegin, windowEnd) of the list. */
	windowBegin: number;
	windowEnd: number;
}

/** Denoising steps that a device takes by itself, over packed whole canvases at positions 0, 1, ... */
export interface NativeLoop {
	/** (N) */
	ids: Int32Array;
	/** (N) 1: open. */
	open: Uint8Array;
	/** (S + 1) packed row where each sequence begins. */
	offsets: Int32Array;
	/** (S) */
	sequences: NativeLoopSequence[];
	/** (W, 3): begin, end and steps (0: no bound) of each window, positions of its sequence. */
	windows: Int32Array;
	/** 1 to 64. */
	steps: number;
}

/** What each step looked at and did. L: rows of all steps, each with its statistics. */
export interface NativeLoopLog extends NativeRowStats {
	/** (steps, S, 3): step counter, and its rows [begin, end); none: the sequence was finished. */
	events: Int32Array;
	/** (L) */
	position: Int32Array;
	/** (L) 1: the drawn id was written there. */
	committed: Uint8Array;
}

/** Clean sequences of one micro-batch and how they are corrupted; see native/core/noise.h. */
export interface NativeTrainBatch {
	ids: Int32Array;
	/** (S + 1) */
	offsets: Int32Array;
	/** (N) of 0/1, or null: every token may be masked. */
	maskable: Uint8Array | null;
	/** (N) of 0/1, or null: drawn. */
	mask: Uint8Array | null;
	/** (S), or null: drawn. */
	t: Float64Array | null;
	firstSequence: number;
	stepSequences: number;
}

/** How a batch is corrupted and what its loss is; see `LossOptions` (lib/batch.ts). */
export interface NativeNoise {
	objective: 'diffusion' | 'autoregressive' | 'block-diffusion';
	timeSampler: 'uniform' | 'stratified' | 'exact-count';
	normalise: 'tokens' | 'masked' | 'answer';
	weighted: boolean;
	shift: boolean;
	maskId: number;
	tMin: number;
	tMax: number;
	/** Tokens per block of 'block-diffusion', else 0. */
	block: number;
	seed: bigint;
	step: number;
	attention: NativeMask;
	/** (V) information of each id in nats, or null. */
	spindleInformation: Float32Array | null;
	spindleLambda: number;
}

/** How one micro-batch is computed. */
export interface NativeTrainOptions {
	recompute: boolean;
	precision: 'fp32' | 'bf16';
	/** Accumulate gradients (needs beginTraining). */
	backward: boolean;
}

/** What one micro-batch adds to the loss of its step. */
export interface NativeLoss {
	/** Sum over loss rows of weight * cross-entropy. */
	weighted: number;
	/** Sum over loss rows of cross-entropy, nats. */
	unweighted: number;
	/** Loss rows: masked tokens that some row predicts. */
	masked: number;
	/** Maskable tokens that some row predicts. */
	predictable: number;
	/** What this micro-batch adds to the divisor, by `normalise`. */
	denominator: number;
}

/** What a batch without gradients tells besides. */
export interface NativeRowLosses extends NativeLoss {
	/** (R) packed row of every loss row. */
	rows: Int32Array;
	/** (R) its cross-entropy, nats. */
	losses: Float32Array;
}

/** One AdamW update of all parameters. */
export interface NativeAdamW {
	learningRate: number;
	beta1: number;
	beta2: number;
	eps: number;
	weightDecay: number;
	gradientScale: number;
	/** 1-based. */
	step: number;
}

/** Keys and values of one sequence. */
export interface NativeCache {
	readonly capacity: number;
	readonly bytes: number;
	/** Frees the memory; idempotent. A disposed cache in a batch is an error. */
	dispose(): void;
}

/** One tensor to write: a parameter of a model, its gradient moment, or values given here. */
export interface NativeTensorSource {
	/** Name in the file. */
	name: string;
	shape: number[];
	/** I8 goes with kind 'int8': the values of a matrix as int8; its scales, kind 'scale', are the next tensor. */
	dtype: 'F32' | 'F16' | 'BF16' | 'I8';
	source:
		| { model: NativeModel; parameter: string; kind: 'value' | 'moment1' | 'moment2' | 'int8' | 'scale' }
		| { values: Float32Array };
}

/** One tensor of an open file. */
export interface NativeTensorEntry {
	name: string;
	dtype: string;
	shape: number[];
	count: number;
}

/** An open safetensors file. */
export interface NativeSafetensors {
	readonly path: string;
	readonly tensors: NativeTensorEntry[];
	readonly metadata: Record<string, string>;
	/** The whole tensor as fp32. For small ones; large ones go through NativeModel.loadParameter. */
	read(name: string): Float32Array;
	/** Closes the file; idempotent. */
	close(): void;
}

/** At most one asynchronous call may be in flight per model: lib/engine.ts sees to it. */
export interface NativeModel {
	/** "cpu/avx512" */
	readonly backend: string;
	/** Whether `denoiseSteps` works: the device can take several steps by itself. */
	readonly deviceLoop: boolean;
	readonly parameters: NativeParameter[];
	/**
	 * Bytes held: parameters, training state, workspace with the memory of results that nobody uses now. Must not be called
	 * while a call is in flight.
	 */
	memory(): { parameters: number; training: number; workspace: number };
	initialise(seed: bigint): Promise<void>;
	getParameter(name: string): Float32Array;
	setParameter(name: string, values: Float32Array): void;
	/** Converts a tensor of an open file into a parameter; the counts must agree. scales: of an I8 tensor, in the same file. */
	loadParameter(name: string, file: NativeSafetensors, tensor: string, scales?: string): Promise<void>;
	/** Restores an AdamW moment from an open file. */
	loadMoment(name: string, which: 'moment1' | 'moment2', file: NativeSafetensors, tensor: string): Promise<void>;
	createCache(capacity: number): NativeCache;

	/** Forward, then statistics of the asked rows. */
	denoise(batch: NativeBatch, denoise: NativeDenoise): Promise<NativeStats>;
	/** Several steps, decided on the device. */
	denoiseSteps(batch: NativeLoop): Promise<NativeLoopLog>;
	/**
	 * Forward, then raw logits (R, V) or hidden states (R, C). `into`: the buffer of an earlier result of the same model to
	 * write to, if it has the room.
	 */
	forward(batch: NativeBatch, output: 'logits' | 'hidden', into?: ArrayBuffer): Promise<Float32Array>;

	/** Unpacks the weights in place and allocates gradients and moments; all of them are zero then. */
	beginTraining(): Promise<void>;
	/** Frees gradients and moments. */
	endTraining(): Promise<void>;
	trainBatch(
		batch: NativeTrainBatch,
		noise: NativeNoise,
		options: NativeTrainOptions & { backward: false },
	): Promise<NativeRowLosses>;
	trainBatch(batch: NativeTrainBatch, noise: NativeNoise, options: NativeTrainOptions): Promise<NativeLoss>;
	zeroGradients(): Promise<void>;
	gradientSumOfSquares(): Promise<number>;
	adamw(step: NativeAdamW): Promise<void>;
	getGradient(name: string): Float32Array;
	getMoment(name: string, which: 'moment1' | 'moment2'): Float32Array;
	/** Frees everything; idempotent. Must not be called while a call is in flight. */
	dispose(): void;
}

/** See `Info` (lib/info.ts). */
export interface NativeCudaInfo {
	compiled: boolean;
	devices: { name: string; memory: number; capability: string }[];
	products?: string;
	reason?: string;
}

/** What the addon exports. */
export interface Binding {
	/**
	 * device: 'cpu' or 'cuda:N'. threads 0: all cores. dtype: on CUDA of activations, 'fp32' or 'bf16'; on the CPU of the
	 * weights.
	 */
	createModel(
		config: NativeConfig,
		options: { device: string; threads: number; dtype: 'fp32' | 'bf16' | 'int8' },
	): NativeModel;
	openSafetensors(path: string): NativeSafetensors;
	/** Writes, fsyncs and renames one file. */
	writeSafetensors(path: string, tensors: NativeTensorSource[], metadata: Record<string, string>): Promise<void>;
	/** Four 32-bit words of (seed, stream, step, index). */
	philox(seed: bigint, stream: number, step: number, index: bigint): Uint32Array;
	cpuInfo(): { isa: string; detected: string; fp32: string; bf16: string; int8: string; threads: number };
	cudaInfo(): NativeCudaInfo;
	/** Bytes reported to V8 with AdjustExternalMemory by live objects. */
	externalMemory(): number;
	/** Empties a buffer now, whose memory would else be freed with the garbage. */
	detach(buffer: ArrayBuffer): void;
}
