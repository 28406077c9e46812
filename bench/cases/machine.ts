/** The machine's own figures, from build-core/bench_machine: peaks, memory bandwidth, what starting a parallel region costs. */
import type { BenchCase } from '../harness.js';
import { runNative } from '../native.js';

interface Figure {
	name: string;
	threads: number;
	value: number;
	unit: string;
}

export const machineCases: BenchCase[] = [
	{
		name: 'machine',
		shape: {},
		dtype: '-',
		repeats: 1,
		async setup() {
			return {
				async run() {
					const lines = runNative('bench_machine', []).trim().split('\n');
					const figures = lines.map((line) => JSON.parse(line) as Figure);
					const named = figures.map(({ name, threads, value, unit }) => [`${name}, t${threads}, ${unit}`, value]);
					return { tokens: 0, extra: Object.fromEntries(named) as Record<string, number> };
				},
				teardown: async () => undefined,
			};
		},
	},
];
