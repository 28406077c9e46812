/**
 * The loss on held-out data. The sequences, their masks and their times are the same at every evaluation and in every run
 * on the same data, so curves compare; times are stratified over all of them, which lowers the noise.
 */
import { type DiffusionBatch, toNativeNoise } from '../batch.js';
import type { ModelConfig } from '../config.js';
import type { TokenDataset } from '../data/dataset.js';
import { padIdOf, padSequence, padTogether, type TrainingSequence, tokensTogether } from '../data/pack.js';
import { DiffusionNativeError } from '../errors.js';
import { permutationInTurns, Stream } from '../random.js';
import type { ResolvedTrainOptions } from './options.js';
import { toBatch } from './order.js';
import { accumulate, lossOf, packStep, type Runner } from './step.js';

/** Options of a run that its validation reads: `evalSequences` of the data, in batches like those of a step. */
export type ValidationOptions = Pick<
	ResolvedTrainOptions,
	'objective' | 'block' | 'evalSequences' | 'batchSize' | 'batchTokens' | 'padding' | 'precision'
>;

const validationSeed = 0n;

/** The first sequences of the permutation, which a run asks for at every evaluation. */
const chosen = new WeakMap<TokenDataset, Uint32Array>();

/** Numbers of the `count` sequences that are evaluated: the first of a permutation of all. */
async function choose(data: TokenDataset, count: number, signal: AbortSignal | undefined): Promise<Uint32Array> {
	const known = chosen.get(data);
	if (known && known.length >= count) return known;
	const order = await permutationInTurns(data.sequences, validationSeed, Stream.data, 0, signal);
	const first = order.slice(0, count);
	chosen.set(data, first);
	return first;
}

/**
 * Weighted loss per predictable token (the NELBO), and the mean cross-entropy of masked tokens; nats.
 * @throws `ERR_DN_DIVERGED` when one of them is not finite; `signal.reason`; what the engine refuses a call with
 */
export async function validate(
	engine: Runner,
	config: ModelConfig,
	data: TokenDataset,
	options: ValidationOptions,
	signal: AbortSignal | undefined,
): Promise<{ loss: number; unweighted: number }> {
	const count = Math.min(options.evalSequences, data.sequences);
	const order = await choose(data, count, signal);
	const batches: DiffusionBatch[] = [];
	const { padding, batchSize, batchTokens } = options;
	const padId = padIdOf(data, config);
	let open: TrainingSequence[] = [];
	const close = (): void => {
		batches.push(toBatch(padTogether(open, { padding, padId })));
		open = [];
	};
	let longest = 0;
	let total = 0;
	for (let i = 0; i < count; i++) {
		const index = order[i] as number;
		const sequence = padSequence(
			data.get(index),
			{ padding, padId, context: config.context },
			{ seed: validationSeed, epoch: 0, sequence: index },
		);
		const { length } = sequence.tokens;
		const full =
			batchTokens === undefined
				? open.length === (batchSize ?? 1)
				: tokensTogether(padding, open.length + 1, Math.max(longest, length), total + length) > batchTokens;
		if (full && open.length > 0) {
			close();
			longest = 0;
			total = 0;
		}
		open.push(sequence);
		longest = Math.max(longest, length);
		total += length;
	}
	if (open.length > 0) close();
	const { objective, block } = options;
	const noise = toNativeNoise(config, {
		objective,
		timeSampler: 'stratified',
		seed: validationSeed,
		...(block === undefined ? {} : { block }),
	});
	const sums = await accumulate(
		engine,
		packStep(batches, config),
		noise,
		{ backward: false, recompute: false, precision: options.precision },
		signal,
	);
	const found = lossOf(sums);
	if (!Number.isFinite(found.loss) || !Number.isFinite(found.unweighted)) {
		throw new DiffusionNativeError(
			'ERR_DN_DIVERGED',
			`the loss on the validation data ${data.path} is ${found.loss}: training diverged, or the weights are damaged; ` +
				'go back to the last good checkpoint',
		);
	}
	return found;
}
