/**
 * Confidence order: per step commit the planned number of positions with the highest score, among those still open.
 * Plan 'even' is LLaDA's (arXiv 2502.09992): n div S per step, the remainder first; inside blocks it is
 * LLaDA's semi-autoregressive sampler. Plan 'linear' is DiffuGPT's (arXiv 2410.17891, with its ranking corrected):
 * floor(n (T - j) / T) stay open after pass j. Steps that would commit nothing are skipped and cost no forward.
 *
 * Scores: 'probability' of the best token, 'margin' to the runner-up, 'entropy' (negated), or 'random', whose order does not
 * depend on the logits, so that only the rows to commit are projected.
 */
import { Stream, uniform } from '../random.js';
import { type CanvasView, evenPlan, linearPlan, ranked, type SamplerPolicy, type StepView } from './policy.js';

/** What 'confidence' ranks open positions by: the best token's probability, its lead over the runner-up, low entropy, or chance. */
export type Score = 'probability' | 'margin' | 'entropy' | 'random';
/** How many tokens 'confidence' commits per step: LLaDA's n div steps, the remainder first, or DiffuGPT's straight line. */
export type Plan = 'even' | 'linear';

export function confidence(score: Score, plan: Plan): SamplerPolicy {
	const planned = (view: CanvasView): number =>
		Math.min(
			view.open.length,
			(plan === 'even' ? evenPlan : linearPlan)(view.initialOpen, view.blockSteps, view.blockStep),
		);
	const scores = (view: StepView): ArrayLike<number> =>
		score === 'entropy' ? view.entropy.map((h) => -h) : score === 'margin' ? view.margin : view.probability;
	return {
		name: 'confidence',
		choose(view) {
			const count = planned(view);
			if (count === 0) return [];
			if (score !== 'random') return view.open;
			const order = ranked(Array.from(view.open, (i) => uniform(view.seed, Stream.order, view.step, i)));
			return order
				.slice(0, count)
				.map((k) => view.open[k] as number)
				.sort((a, b) => a - b);
		},
		decide(view) {
			const order = score === 'random' ? Array.from(view.positions.keys()) : ranked(scores(view));
			return { commit: order.slice(0, planned(view)).map((k) => view.positions[k] as number) };
		},
	};
}
