/**
 * Confidence-aware parallel decoding of Fast-dLLM (arXiv 2505.22618). Positions are sorted by the
 * probability of their best token, c_1 >= c_2 >= ...
 *
 * `threshold`: commit the best, and every other with c >= tau. tau = 0 fills a block in one forward, tau > 1 commits one
 * token per forward.
 * `factor`: commit the largest n with c_j >= 1 - f / (j + 1) for all j <= n; j = 1 always. f = 0 commits one per forward.
 */
import { ranked, type SamplerPolicy } from './policy.js';

export function threshold(tau: number): SamplerPolicy {
	return {
		name: 'threshold',
		decide: ({ positions, probability }) => ({
			commit: ranked(probability)
				.filter((k, rank) => rank === 0 || (probability[k] as number) >= tau)
				.map((k) => positions[k] as number),
		}),
	};
}

export function factor(f: number): SamplerPolicy {
	return {
		name: 'factor',
		decide({ positions, probability }) {
			const order = ranked(probability);
			let n = 1;
			while (n < order.length && (probability[order[n] as number] as number) >= 1 - f / (n + 2)) n++;
			return { commit: order.slice(0, n).map((k) => positions[k] as number) };
		},
	};
}
