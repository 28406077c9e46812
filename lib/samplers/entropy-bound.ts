/**
 * Entropy-bounded decoding (EB-Sampler, arXiv 2505.24857). Positions sorted by the probability of their
 * best token; commit the largest prefix whose entropies satisfy sum - max <= gamma (nats), at least one. The sum less the
 * largest bounds the error of drawing the tokens independently of each other.
 */
import { ranked, type SamplerPolicy } from './policy.js';

export function entropyBound(gamma: number): SamplerPolicy {
	return {
		name: 'entropy-bound',
		decide({ positions, probability, entropy }) {
			const order = ranked(probability);
			let sum = 0;
			let largest = 0;
			let n = 0;
			for (const k of order) {
				const h = entropy[k] as number;
				sum += h;
				largest = Math.max(largest, h);
				if (n > 0 && sum - largest > gamma) break;
				n++;
			}
			return { commit: order.slice(0, n).map((k) => positions[k] as number) };
		},
	};
}
