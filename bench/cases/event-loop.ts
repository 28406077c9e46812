/** How late a 10 ms timer fires while a 124M model generates. */
import type { BenchCase } from '../harness.js';
import { quantile } from '../harness.js';
import { load, someTokens } from '../shapes.js';

export const timerDelays: Record<string, number> = {};

export const eventLoopCase: BenchCase = {
	name: 'event-loop/gpt2',
	shape: { model: 'gpt2', T: 144 },
	dtype: 'fp32',
	repeats: 1,
	async setup() {
		const model = await load('gpt2');
		return {
			async run() {
				const delays: number[] = [];
				let last = performance.now();
				const timer = setInterval(() => {
					const now = performance.now();
					delays.push(Math.max(0, now - last - 10));
					last = now;
				}, 10);
				const { stats } = await model.generate(
					{ tokens: someTokens('gpt2', 16) },
					{ length: 128, steps: 32, sampler: 'confidence', seed: 1 },
				);
				clearInterval(timer);
				delays.sort((a, b) => a - b);
				timerDelays['p50'] = quantile(delays, 0.5);
				timerDelays['p99'] = quantile(delays, 0.99);
				timerDelays['max'] = delays.at(-1) ?? 0;
				return { tokens: stats.generatedTokens };
			},
			teardown: () => model.dispose(),
		};
	},
};
