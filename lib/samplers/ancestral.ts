/**
 * Ancestral sampling in random order: the reverse process of masked diffusion on the uniform grid of T steps
 * (DiffuGPT / DiffuLLaMA, arXiv 2410.17891; algorithms.md 3.1). With k = T - 1 - step forwards still to come, each open
 * position is revealed with probability (alpha_s - alpha_t) / (1 - alpha_t) = 1 / (k + 1), with a fresh draw from the
 * model; the last forward reveals the rest.
 *
 * The reference reveals, before forward j + 1, the proposal of forward j, and fills what is left from the last one. That is
 * the same process as revealing right after forward j, which is how it is written here: T forwards reveal T times. Which
 * positions are revealed does not depend on the logits, so only their rows are projected. A step that reveals nothing
 * still runs its forward, looking at everything open; nothing runs once nothing is open.
 */
import { Stream, uniform } from '../random.js';
import type { CanvasView, SamplerPolicy } from './policy.js';

function revealed(view: CanvasView): number[] {
	const probability = 1 / (view.blockSteps - view.blockStep);
	return Array.from(view.open).filter((i) => uniform(view.seed, Stream.order, view.step, i) < probability);
}

export function ancestral(): SamplerPolicy {
	return {
		name: 'ancestral',
		choose(view) {
			const chosen = revealed(view);
			view.memory['reveal'] = chosen;
			return chosen.length > 0 ? chosen : view.open;
		},
		decide: (view) => ({ commit: view.memory['reveal'] as number[] }),
	};
}
