/**
 * KL-adaptive stability sampling (KLASS, arXiv 2511.05664). A position is committed when its best token has probability
 * >= tau and its distribution has been stable: KL(p_now || p_before) < epsilon nats in each of the last n steps. When none
 * qualifies, the single most probable one is committed. Distributions are at temperature 1, guided, without the mask id.
 *
 * Needs whole distributions, not only their summaries: R * V floats per step and, because the fused head
 * keeps no logits, a second run of the network, which the result's `forwards` does not count.
 */
import { ranked, type SamplerPolicy } from './policy.js';

interface History {
	logProbs: Float64Array;
	stable: number;
}

function divergence(now: Float64Array, before: Float64Array): number {
	let sum = 0;
	for (let v = 0; v < now.length; v++) {
		const log = now[v] as number;
		if (log > Number.NEGATIVE_INFINITY) sum += Math.exp(log) * (log - (before[v] as number));
	}
	return sum;
}

export function klass(tau: number, epsilon: number, steps: number): SamplerPolicy {
	return {
		name: 'klass',
		needsLogits: true,
		decide(view) {
			view.memory['history'] ??= new Map<number, History>();
			const history = view.memory['history'] as Map<number, History>;
			const qualified: number[] = [];
			for (const [k, position] of view.positions.entries()) {
				const logProbs = view.logProbs(k);
				const before = history.get(position);
				const stable = before && divergence(logProbs, before.logProbs) < epsilon ? before.stable + 1 : 0;
				history.set(position, { logProbs, stable });
				if (stable >= steps && (view.probability[k] as number) >= tau) qualified.push(position);
			}
			const commit =
				qualified.length > 0 ? qualified : [view.positions[ranked(view.probability)[0] as number] as number];
			for (const position of commit) history.delete(position);
			return { commit };
		},
	};
}
