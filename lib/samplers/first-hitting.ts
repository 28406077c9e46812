/**
 * First-hitting sampler (arXiv 2409.02908): exact simulation of the reverse process in continuous time.
 * From n open positions the time of the next reveal is t * u^(1/n); the position revealed is uniform among them and its
 * token is drawn from the model. A model without time input, such as this one, never sees t, so only the order remains:
 * one uniformly chosen position per forward, as many forwards as open positions.
 */
import { Stream, uniform } from '../random.js';
import type { SamplerPolicy } from './policy.js';

export function firstHitting(): SamplerPolicy {
	return {
		name: 'first-hitting',
		choose: ({ open, seed, step }) => [open[Math.floor(uniform(seed, Stream.order, step, 0) * open.length)] as number],
		decide: ({ positions }) => ({ commit: Array.from(positions) }),
	};
}
