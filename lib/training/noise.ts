/** The noise of a training run: what its options say of the loss, and what each step changes of it. */
import { type SpindleSchedule, toNativeNoise } from '../batch.js';
import type { ModelConfig } from '../config.js';
import type { TokenDataset } from '../data/dataset.js';
import { check } from '../errors.js';
import type { NativeNoise } from '../native-types.js';
import type { ResolvedTrainOptions } from './options.js';
import { annealedMask } from './schedules.js';

/** The noise of every step of a run, from its options. @throws `ERR_DN_ARGUMENT` naming the option */
export function runNoise(options: ResolvedTrainOptions, config: ModelConfig): NativeNoise {
	// A run has the options of a loss under the same names; only its spindle may lack something.
	const { spindle, ...loss } = options;
	return toNativeNoise(config, spindle ? { ...loss, spindle: informed(spindle, options.data, config.vocab) } : loss);
}

/** The noise of one step, from 0: its draws are its own, and its attention where that is annealed. */
export function noiseAt(noise: NativeNoise, options: ResolvedTrainOptions, step: number): NativeNoise {
	const { attentionAnnealing, seed } = options;
	if (!attentionAnnealing) return { ...noise, step };
	return { ...noise, step, attention: annealedMask(attentionAnnealing, step, seed) };
}

/** A spindle schedule that, where it is given none, takes the information of the tokens from their frequencies in `data`. */
function informed(
	{ lambda, information }: NonNullable<ResolvedTrainOptions['spindle']>,
	data: TokenDataset | undefined,
	vocab: number,
): SpindleSchedule {
	if (information) return { lambda, information };
	check(data, 'spindle needs data to count tokens in, or information');
	const counts = data.counts(vocab);
	// Half a count for every id, so that one that never occurs has finite information.
	const total = data.tokens + counts.length / 2;
	return { lambda, information: Float32Array.from(counts, (count) => -Math.log((count + 0.5) / total)) };
}
