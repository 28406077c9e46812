/**
 * In which order a run sees its data: a permutation per epoch, a function of the seed alone. The position (epoch and place
 * in it) is all that a checkpoint needs to go on exactly.
 */
import type { DiffusionBatch } from '../batch.js';
import type { ModelConfig } from '../config.js';
import type { TokenDataset } from '../data/dataset.js';
import type { Padding } from '../data/format.js';
import { hide, padIdOf, padSequence, padTogether, type TrainingSequence, tokensTogether } from '../data/pack.js';
import { permutation, Stream } from '../random.js';
import type { ResolvedTrainOptions } from './options.js';

/** Where a run stands in its data. */
export interface DataPosition {
	readonly epoch: number;
	/** Sequences of this epoch already used. */
	readonly index: number;
}

/** Where a run begins in its data. */
export const dataBeginning: DataPosition = { epoch: 0, index: 0 };

/** What the order depends on, and how it is cut into micro-batches. */
export interface OrderOptions {
	readonly data: TokenDataset;
	readonly seed: bigint;
	readonly padding: Padding;
	readonly padId: number;
	/** Ids that are always masked where they may be masked. */
	readonly hidden: readonly number[];
	readonly context: number;
	/** Sequences per micro-batch, or undefined: as many as fit `batchTokens`. */
	readonly batchSize: number | undefined;
	readonly batchTokens: number | undefined;
}

/** The micro-batches of a run, one after the other, without an end. */
export class DataOrder {
	readonly #options: OrderOptions;
	#epoch: number;
	#index: number;
	#permutation: { epoch: number; order: Uint32Array } | undefined;
	/** A sequence that did not fit the last micro-batch; it opens the next one. */
	#held: TrainingSequence | undefined;

	constructor(options: OrderOptions, position: DataPosition) {
		this.#options = options;
		this.#epoch = position.epoch;
		this.#index = position.index;
	}

	/** The sequence that comes next is the first one not yet in a batch. */
	get position(): DataPosition {
		return { epoch: this.#epoch, index: this.#index };
	}

	/** The next micro-batch. Never empty: a sequence longer than `batchTokens` stands alone. */
	next(): DiffusionBatch {
		const { batchSize, batchTokens, padding } = this.#options;
		const sequences: TrainingSequence[] = [];
		if (batchTokens === undefined) {
			while (sequences.length < (batchSize ?? 1)) {
				sequences.push(this.#peek());
				this.#advance();
			}
			return this.#batch(sequences);
		}
		for (let total = 0, longest = 0; ; ) {
			const sequence = this.#peek();
			const { length } = sequence.tokens;
			total += length;
			longest = Math.max(longest, length);
			const tokens = tokensTogether(padding, sequences.length + 1, longest, total);
			if (sequences.length > 0 && tokens > batchTokens) break;
			sequences.push(sequence);
			this.#advance();
		}
		return this.#batch(sequences);
	}

	#batch(sequences: readonly TrainingSequence[]): DiffusionBatch {
		const { hidden } = this.#options;
		const padded = padTogether(sequences, this.#options);
		return toBatch(hidden.length > 0 ? padded.map((sequence) => hide(sequence, hidden)) : padded);
	}

	#peek(): TrainingSequence {
		this.#held ??= this.#read();
		return this.#held;
	}

	#read(): TrainingSequence {
		const { data, seed, padding, padId, context } = this.#options;
		if (this.#permutation?.epoch !== this.#epoch) {
			this.#permutation = { epoch: this.#epoch, order: permutation(data.sequences, seed, Stream.data, this.#epoch) };
		}
		const sequence = this.#permutation.order[this.#index] as number;
		return padSequence(data.get(sequence), { padding, padId, context }, { seed, epoch: this.#epoch, sequence });
	}

	#advance(): void {
		this.#held = undefined;
		this.#index++;
		if (this.#index < this.#options.data.sequences) return;
		this.#index = 0;
		this.#epoch++;
	}
}

/** The data of a run from a position on; undefined without data. */
export function orderAt(
	position: DataPosition,
	options: ResolvedTrainOptions,
	config: ModelConfig,
): DataOrder | undefined {
	const { data, seed, padding, maskEnds, batchSize, batchTokens } = options;
	if (!data) return undefined;
	const { context, eosId } = config;
	const padId = padIdOf(data, config);
	const hidden = maskEnds ? [eosId, padId] : [];
	return new DataOrder({ data, seed, padding, padId, hidden, context, batchSize, batchTokens }, position);
}

/** Sequences as a batch; those without a prompt are maskable everywhere. */
export function toBatch(sequences: readonly TrainingSequence[]): DiffusionBatch {
	const tokens = sequences.map((sequence) => sequence.tokens);
	if (sequences.every((sequence) => sequence.maskable === undefined)) return { tokens };
	return {
		tokens,
		maskable: sequences.map((sequence) => sequence.maskable ?? new Uint8Array(sequence.tokens.length).fill(1)),
	};
}
