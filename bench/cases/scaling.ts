/** One thread against all on the same forward, turn by turn: `speedup` is the ratio of the medians. */
import type { BenchCase } from '../harness.js';
import { quantile } from '../harness.js';
import { forwardFlops, load, someTokens } from '../shapes.js';

const T = 256;

export const scalingCases: BenchCase[] = [
	{
		name: `scaling/gpt2/T${T}/logits`,
		shape: { model: 'gpt2', T },
		dtype: 'fp32',
		repeats: 5,
		async setup() {
			const one = await load('gpt2', 'fp32', 1);
			const all = await load('gpt2');
			const tokens = someTokens('gpt2', T);
			const times: { one: number[]; all: number[] } = { one: [], all: [] };
			const timed = async (model: typeof one, list: number[]): Promise<number> => {
				const started = performance.now();
				await model.forward(tokens);
				const ms = performance.now() - started;
				list.push(ms);
				return ms;
			};
			// The first turn is the untimed one.
			const median = ([, ...timed]: readonly number[]) =>
				quantile(
					timed.toSorted((a, b) => a - b),
					0.5,
				);
			return {
				async run() {
					await timed(one, times.one);
					const ms = await timed(all, times.all);
					const oneThreadMs = median(times.one);
					const extra = { oneThreadMs, speedup: oneThreadMs / median(times.all) };
					return { tokens: T, flops: forwardFlops('gpt2', T, T), ms, extra };
				},
				async teardown() {
					await one.dispose();
					await all.dispose();
				},
			};
		},
	},
];
