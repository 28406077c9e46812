/**
 * Draft and verify, after WINO (arXiv 2507.18578). Each step drafts generously: every open position whose best token has
 * probability >= `draft` is committed tentatively, the best one always. In the next step's forward the drafts are
 * verified: a draft whose token then has probability >= `verify` given the rest is final, any other is opened again.
 *
 * WINO verifies through shadow mask tokens that share one forward with the canvas; their attention still reaches the
 * verified token through its neighbours. Here the drafts are dealt out in turn to two copies of the canvas, in each of which
 * its half is masked again: no copy contains what it verifies, at the price of up to two more sequences in that forward.
 * A position is opened again at most `attempts` times, after which its draft is final, so the sampler always ends.
 */
import { type CanvasView, ranked, type SamplerPolicy } from './policy.js';

export function revocable(draft: number, verify: number, attempts: number): SamplerPolicy {
	return {
		name: 'revocable',
		verify(view: CanvasView) {
			const halves: number[][] = [[], []];
			for (const [k, position] of view.tentative.entries()) (halves[k % 2] as number[]).push(position);
			return halves.filter((half) => half.length > 0);
		},
		decide(view) {
			const settle: number[] = [];
			const reopen: number[] = [];
			for (const [position, probability] of view.verified) {
				const final = probability >= verify || (view.reopened[position] as number) >= attempts;
				(final ? settle : reopen).push(position);
			}
			const commit = ranked(view.probability)
				.filter((k, rank) => rank === 0 || (view.probability[k] as number) >= draft)
				.map((k) => view.positions[k] as number);
			return { commit, reopen, settle, tentative: true };
		},
	};
}
