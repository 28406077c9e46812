/**
 * 'perplexity': exp of the mean negative log-likelihood per token of a causal model, -(1/N) sum log p(x_i | x_0 .. x_{i-1}).
 * The same tokens count as for 'nelbo' (prompts do not, the end token does), so the two compare.
 */
import { check } from '../errors.js';
import type { EvaluationContext } from './context.js';
import { autoregressive } from './likelihood.js';
import type { EvaluationData, PerplexityOptions, PerplexityResult } from './options.js';
import { sequences } from './sequences.js';
import { Kinds, TokenSums } from './statistics.js';

export async function perplexity(
	context: EvaluationContext,
	data: EvaluationData,
	options: PerplexityOptions,
): Promise<Omit<PerplexityResult, 'seed' | 'ms' | 'seesFuture'>> {
	context.needCausal();
	const all = new TokenSums();
	const kinds = new Kinds(() => new TokenSums());
	for await (const { sequence, nats } of autoregressive(context, sequences(context, data, options))) {
		const tokens = sequence.scorable.length;
		all.add(nats, tokens, 0);
		if (sequence.kind !== '') kinds.of(sequence.kind).add(nats, tokens, 0);
		context.report(() => ({
			index: sequence.index,
			nll: nats / tokens,
			tokens,
			...(sequence.kind === '' ? {} : { kind: sequence.kind }),
		}));
	}
	check(all.tokens > 0, 'the data has no token to score: no sequence has a token that a network row predicts');
	const { mean, populationError, records, tokens } = all.mean();
	return {
		metric: 'perplexity',
		nll: mean,
		perplexity: Math.exp(mean),
		populationError,
		records,
		tokens,
		kinds: kinds.results((sums) => sums.mean()),
	};
}
