/**
 * KL-adaptive stability sampling (KLASS, arXiv 2511.05664). A position is committed when its best token has probability
 * >= tau and its distribution has been stable: KL(p_now || p_before) < epsilon nats in each of the last n steps. When none
 * qualifies, the single most probable one is committed. Distributions are at temperature 1, guided, without the mask id.
 */
import { ranked, type SamplerPolicy } from './policy.js';

export function klass(tau: number, epsilon: number, steps: number): SamplerPolicy {
	return {
		name: 'klass',
		needsDivergence: true,
		decide(view) {
			const { positions, probability, divergence } = view;
			// Position to the latest steps in a row in which it was stable.
			const before = (view.memory['stable'] ?? new Map()) as Map<number, number>;
			const stable = new Map<number, number>();
			const commit: number[] = [];
			for (const [k, position] of positions.entries()) {
				const count = (divergence[k] as number) < epsilon ? (before.get(position) ?? 0) + 1 : 0;
				stable.set(position, count);
				if (count >= steps && (probability[k] as number) >= tau) commit.push(position);
			}
			view.memory['stable'] = stable;
			return { commit: commit.length > 0 ? commit : [positions[ranked(probability)[0] as number] as number] };
		},
	};
}
