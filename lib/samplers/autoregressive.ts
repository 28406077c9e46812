/**
 * Left to right, one token per forward, under causal attention with an exact key-value cache: ordinary GPT-2 decoding. The
 * cache is the evaluator's business (lib/evaluator.ts); what is left here is the order.
 */
import type { SamplerPolicy } from './policy.js';

export function autoregressive(): SamplerPolicy {
	return {
		name: 'autoregressive',
		choose: ({ open }) => open.slice(0, 1),
		decide: ({ positions }) => ({ commit: Array.from(positions) }),
	};
}
