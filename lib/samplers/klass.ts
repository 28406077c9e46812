/**
 * KL-adaptive stability sampling (KLASS, arXiv 2511.05664). A position is committed when its best token has probability
 * >= tau and its distribution has been stable: KL(p_now || p_before) < epsilon nats in each of the last n steps. When none
 * qualifies, the single most probable one is committed. Distributions are at temperature 1, guided, without the mask id.
 *
 * Needs whole distributions, not only their summaries: the rows' logits come back with every step, and those of the last
 * n + 1 steps are kept, (n + 1) * R * V floats. Divergences are computed only where the probability qualifies.
 */
import { divergence, ranked, type SamplerPolicy } from './policy.js';

/** One position in one step. */
interface Snapshot {
	logProbs(): Float64Array;
	/** From the step before; undefined: not computed yet. */
	divergence?: number;
}

/** Whether the newest n divergences lie below epsilon; `rows` are n + 1 snapshots, oldest first. */
function isStable(rows: Snapshot[], epsilon: number): boolean {
	for (let i = rows.length - 1; i > 0; i--) {
		const now = rows[i] as Snapshot;
		now.divergence ??= divergence(now.logProbs(), (rows[i - 1] as Snapshot).logProbs());
		if (!(now.divergence < epsilon)) return false;
	}
	return true;
}

export function klass(tau: number, epsilon: number, steps: number): SamplerPolicy {
	return {
		name: 'klass',
		needsLogits: true,
		decide(view) {
			view.memory['history'] ??= new Map<number, Snapshot[]>();
			const history = view.memory['history'] as Map<number, Snapshot[]>;
			const { logProbs, positions, probability } = view;
			const qualified: number[] = [];
			for (const [k, position] of positions.entries()) {
				const rows = history.get(position) ?? [];
				rows.push({ logProbs: () => logProbs(k) });
				if (rows.length > steps + 1) rows.shift();
				history.set(position, rows);
				if (rows.length > steps && (probability[k] as number) >= tau && isStable(rows, epsilon))
					qualified.push(position);
			}
			const commit = qualified.length > 0 ? qualified : [positions[ranked(probability)[0] as number] as number];
			for (const position of commit) history.delete(position);
			return { commit };
		},
	};
}
