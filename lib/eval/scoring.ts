/**
 * Cross-entropies of chosen tokens, -log softmax(L[i])[x0[i]], for a stream of sequences. Sequences are packed into ragged
 * batches of a bounded number of tokens; a row's loss does not depend on what else is in its batch, so neither does any
 * result. Only the rows that are asked for go through the head.
 */
import { toNativeNoise, toNativeTrainBatch } from '../batch.js';
import { divergedError } from '../errors.js';
import type { DiffuGPT } from '../model.js';

/** One forward of one sequence. */
export interface ScoringJob<K> {
	readonly tokens: Int32Array;
	/** (T) of 0/1: 'diffusion', the tokens that are masked and scored; 'autoregressive', the tokens that are scored. */
	readonly scored: Uint8Array;
	readonly key: K;
}

/** Yields the sum of the cross-entropies of each job, nats, in the order of the jobs. @throws `ERR_DN_DIVERGED` */
export async function* score<K>(
	model: DiffuGPT,
	objective: 'diffusion' | 'autoregressive',
	jobs: Iterable<ScoringJob<K>> | AsyncIterable<ScoringJob<K>>,
	{ batchTokens, signal }: { batchTokens: number; signal: AbortSignal | undefined },
): AsyncGenerator<{ key: K; nats: number }, void> {
	const noise = toNativeNoise(model.config, { objective, weight: 'none' });
	let held: ScoringJob<K>[] = [];
	let tokens = 0;
	const flush = async (): Promise<{ key: K; nats: number }[]> => {
		const batch = held;
		held = [];
		tokens = 0;
		const flags = batch.map((job) => job.scored);
		const packed = toNativeTrainBatch(
			{
				tokens: batch.map((job) => job.tokens),
				// A given t keeps the noise process from deriving one; unweighted sums do not use it.
				...(objective === 'diffusion' ? { mask: flags, t: batch.map(() => 1) } : { maskable: flags }),
			},
			model.config,
		);
		const { rows, losses } = await model.engine.run(
			(native) => native.trainBatch(packed, noise, { recompute: false, precision: 'fp32', backward: false }),
			signal,
		);
		const sums = new Float64Array(batch.length);
		let s = 0;
		for (let r = 0; r < rows.length; r++) {
			while ((rows[r] as number) >= (packed.offsets[s + 1] as number)) s++;
			sums[s] = (sums[s] as number) + (losses[r] as number);
		}
		return batch.map(({ key }, i) => {
			const nats = sums[i] as number;
			if (!Number.isFinite(nats)) throw divergedError(`the cross-entropies of a sequence sum to ${nats}`);
			return { key, nats };
		});
	};
	for await (const job of jobs) {
		if (held.length > 0 && tokens + job.tokens.length > batchTokens) yield* await flush();
		held.push(job);
		tokens += job.tokens.length;
	}
	if (held.length > 0) yield* await flush();
}
