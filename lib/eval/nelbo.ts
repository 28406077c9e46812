/**
 * 'nelbo': the negative evidence lower bound per token in nats, an upper bound on -log p (docs/numerics.md, Objective):
 * E_t [(1/t) sum over masked i of -log p(x0_i | x_t)] with t ~ U(0, 1], estimated per sequence by exact counts
 * (lib/eval/likelihood.ts), summed over the sequences and divided by all scored tokens. Uniform predictions give ln V
 * exactly. exp of it bounds the perplexity from above.
 */
import { checkData } from '../errors.js';
import { type EvaluationContext, wholeNumber } from './context.js';
import { bounds, mostEnumerated } from './likelihood.js';
import type { EvaluationData, NelboOptions, NelboResult } from './options.js';
import { sequences } from './sequences.js';
import { Kinds, TokenSums } from './statistics.js';

export async function nelbo(
	context: EvaluationContext,
	data: EvaluationData,
	options: NelboOptions,
): Promise<Omit<NelboResult, 'seed' | 'ms' | 'seesFuture'>> {
	context.needDiffusion();
	const samples = wholeNumber('samples', options.samples ?? 8, 1);
	const enumerate = wholeNumber('enumerate', options.enumerate ?? 0, 0, mostEnumerated);
	const all = new TokenSums();
	const kinds = new Kinds(() => new TokenSums());
	let draws = 0;
	for await (const found of bounds(context, sequences(context, data, options), { samples, enumerate })) {
		const { sequence, nats, variance } = found;
		const tokens = sequence.scorable.length;
		all.add(nats, tokens, variance);
		if (sequence.kind !== '') kinds.of(sequence.kind).add(nats, tokens, variance);
		draws += found.draws;
		context.report(() => ({
			index: sequence.index,
			nelbo: nats / tokens,
			standardError: variance === null ? null : Math.sqrt(variance) / tokens,
			tokens,
			...(sequence.kind === '' ? {} : { kind: sequence.kind }),
		}));
	}
	checkData(all.tokens > 0, 'the data has no token to score: no sequence has a token that a network row predicts');
	const { mean, standardError, populationError, records, tokens } = all.mean();
	return {
		metric: 'nelbo',
		nelbo: mean,
		standardError,
		populationError,
		perplexityBound: Math.exp(mean),
		records,
		tokens,
		draws,
		kinds: kinds.results((sums) => sums.mean()),
	};
}
