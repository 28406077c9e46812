/** What a benchmark case is, how it is timed, and the machine it ran on. */
import { cpus, totalmem } from 'node:os';

import { info } from 'diffusion-native';

/** The work of one repeat, for rates: tokens and floating-point operations. */
export interface Work {
	/** Real tokens computed or generated. */
	tokens: number;
	/** Floating-point operations (two per multiply-add), when the case can count them. */
	flops?: number;
	/** Further figures of the last repeat. */
	extra?: Record<string, number>;
	/** Time of this repeat, when the call also did other things. */
	ms?: number;
	/** Peak memory of the process that did this repeat alone. */
	peakRssBytes?: number;
}

export interface BenchCase {
	/** 'forward/gpt2/T256/logits' */
	name: string;
	shape: Record<string, number | string>;
	dtype: string;
	/** Prepares once; `run` is one timed repeat and says what it did. */
	setup(): Promise<{ run(): Promise<Work>; teardown(): Promise<void> }>;
	/** Timed repeats, after an untimed one when there are several; a case with one warms up in `setup` where that matters. */
	repeats: number;
	/** Takes minutes: runs only when an argument names it. */
	onlyIfNamed?: boolean;
}

export interface BenchResult {
	name: string;
	device: string;
	dtype: string;
	shape: Record<string, number | string>;
	tokensPerSecond: number;
	ms: { median: number; p10: number; p90: number };
	gflops: number | null;
	/** Null where the case has no process of its own: the benchmark's peak is that of all cases so far. */
	peakRssBytes: number | null;
	repeats: number;
	/** Further figures of the case (forwards, tokens per forward, timer delays). */
	extra?: Record<string, number>;
}

/** The cases that one of the parts names: a whole name means that case alone, for '.../B1' also begins '.../B16'. */
export function named<C extends { name: string }>(cases: readonly C[], parts: readonly string[]): C[] {
	const matches = (name: string, part: string): boolean =>
		cases.some((one) => one.name === part) ? name === part : name.includes(part);
	return cases.filter(({ name }) => parts.some((part) => matches(name, part)));
}

/** The q-quantile of sorted values, linearly interpolated. */
export function quantile(sorted: readonly number[], q: number): number {
	const position = (sorted.length - 1) * q;
	const low = Math.floor(position);
	const high = Math.min(low + 1, sorted.length - 1);
	return (sorted[low] as number) + ((sorted[high] as number) - (sorted[low] as number)) * (position - low);
}

/** Runs one case: a warm-up when there are several repeats or the case has several of its own, then the timed ones. */
export async function measure(bench: BenchCase, repeats = bench.repeats): Promise<BenchResult> {
	const { run, teardown } = await bench.setup();
	try {
		if (repeats > 1 || bench.repeats > 1) await run();
		const times: number[] = [];
		let work: Work = { tokens: 0 };
		for (let i = 0; i < repeats; i++) {
			const started = performance.now();
			work = await run();
			times.push(work.ms ?? performance.now() - started);
		}
		times.sort((a, b) => a - b);
		const median = quantile(times, 0.5);
		return {
			name: bench.name,
			device: info().cpu.isa,
			dtype: bench.dtype,
			shape: bench.shape,
			tokensPerSecond: (work.tokens * 1000) / median,
			ms: { median, p10: quantile(times, 0.1), p90: quantile(times, 0.9) },
			gflops: work.flops === undefined ? null : work.flops / median / 1e6,
			peakRssBytes: work.peakRssBytes ?? null,
			repeats,
			...(work.extra ? { extra: work.extra } : {}),
		};
	} finally {
		await teardown();
	}
}

/** What a results file says about where it was measured. */
export function machine(): Record<string, string | number> {
	const { cpu, version } = info();
	return {
		cpu: cpus()[0]?.model ?? 'unknown',
		cores: cpus().length,
		threads: cpu.threads,
		isa: cpu.isa,
		memoryBytes: totalmem(),
		node: process.version,
		platform: `${process.platform}-${process.arch}`,
		version,
	};
}
