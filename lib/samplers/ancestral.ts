/**
 * Ancestral sampling in random order: the reverse process of masked diffusion on the uniform grid of T steps
 * (DiffuGPT / DiffuLLaMA, arXiv 2410.17891). With k = T - 1 - step forwards still to come, each open
 * position is revealed with probability (alpha_s - alpha_t) / (1 - alpha_t) = 1 / (k + 1), with a fresh draw from the
 * model; the last forward reveals the rest.
 *
 * That makes the step at which a position is revealed uniform on 0 .. T - 1, independently of the others and of the model, and
 * so it is drawn when the block begins. Only the rows to reveal are projected, and a step that reveals nothing leaves the
 * canvas, and with it the model's answer, as it was: it costs no forward.
 *
 * The reference reveals, before forward j + 1, the proposal of forward j, and fills what is left from the last one. That is
 * the same process as revealing right after forward j, which is how it is written here.
 */
import { Stream, uniform } from '../random.js';
import type { CanvasView, SamplerPolicy } from './policy.js';

/** Open positions by the step of the block at which they are revealed. */
function schedule({ open, seed, step, blockStep, blockSteps }: CanvasView): Map<number, number[]> {
	const revealed = new Map<number, number[]>();
	const left = Math.max(1, blockSteps - blockStep);
	for (const position of open) {
		const at = blockStep + Math.floor(uniform(seed, Stream.order, step, position) * left);
		revealed.set(at, [...(revealed.get(at) ?? []), position]);
	}
	return revealed;
}

export function ancestral(): SamplerPolicy {
	return {
		name: 'ancestral',
		choose(view) {
			// What was remembered is gone when a length method has moved positions.
			if (view.blockStep === 0 || !view.memory['revealed']) view.memory['revealed'] = schedule(view);
			const due = (view.memory['revealed'] as Map<number, number[]>).get(view.blockStep);
			if (!due) return [];
			// An end token may have cut positions off the canvas.
			return due.filter((position) => view.open.includes(position));
		},
		decide: ({ positions }) => ({ commit: Array.from(positions) }),
	};
}
