/**
 * Where the time of a step goes: GPT-2 124M op by op, from build-core/bench_forward and bench_train. Of every op: calls in a
 * step, processor time of all threads and wall time in ms, GFLOP, GB that must move at least.
 */
import { availableParallelism } from 'node:os';

import type { BenchCase } from '../harness.js';
import { runNative } from '../native.js';
import type { WeightType } from '../shapes.js';

/** "  matmul (768, 2304)   12   15.3  22.1%   7.7   10.9   124.1   707.1   85.0%   1.2": the table of native/bench/op_timer.h. */
const opLine = /^ {2}(\S.*?) +(\d+) +([\d.]+) +[\d.]+% +([\d.]+) +([\d.]+) +([\d.]+) +[\d.]+ +[\d.]+% +[\d.]+$/;

interface Step {
	title: string;
	ops: Record<string, number>;
}

/** The steps of a native benchmark's output, each a title and the figures of its ops. */
export function parseSteps(output: string): Step[] {
	const steps: Step[] = [];
	for (const line of output.split('\n')) {
		const op = opLine.exec(line);
		if (!op) {
			if (/^\S.*:/.test(line)) steps.push({ title: line, ops: {} });
			continue;
		}
		const [, name, calls, cpu, wall, gflop, megabytes] = op as unknown as [string, string, ...string[]];
		const ops = steps.at(-1)?.ops;
		if (!ops) continue;
		ops[`${name}, calls`] = Number(calls);
		ops[`${name}, cpu ms`] = Number(cpu);
		ops[`${name}, wall ms`] = Number(wall);
		ops[`${name}, GFLOP`] = Number(gflop);
		ops[`${name}, GB`] = Number(megabytes) / 1e3;
	}
	return steps;
}

function operations(
	name: string,
	program: string,
	args: string[],
	title: RegExp,
	dtype: WeightType = 'fp32',
): BenchCase {
	return {
		name: `operations/gpt2/${name}`,
		shape: { model: 'gpt2' },
		dtype,
		repeats: 1,
		async setup() {
			let runs = 0;
			return {
				async run() {
					const step = parseSteps(outputOf(program, args, runs++)).find((found) => title.test(found.title));
					if (!step || Object.keys(step.ops).length === 0)
						throw new Error(`${program} printed no ops of ${String(title)}; is it built from these sources?`);
					const wall = Object.entries(step.ops).filter(([key]) => key.endsWith(', wall ms'));
					return { tokens: 0, ms: wall.reduce((sum, [, ms]) => sum + ms, 0), extra: step.ops };
				},
				teardown: async () => undefined,
			};
		},
	};
}

/** What each run of a program printed: the steps that it measures share it, the repeats of one step do not. */
const outputs = new Map<string, string[]>();
function outputOf(program: string, args: string[], run: number): string {
	const key = [program, ...args].join(' ');
	const printed = outputs.get(key) ?? [];
	outputs.set(key, printed);
	printed[run] ??= runNative(program, args);
	return printed[run];
}

const forward = ['124m', String(availableParallelism()), '3'];
const int8 = [...forward, 'int8'];
const training = (name: string) => [name, String(availableParallelism()), '2'];

export const operationCases: BenchCase[] = [
	operations('forward/T256/logits', 'bench_forward', forward, /^124m T = 256, all logits/),
	operations('forward/T1024/logits', 'bench_forward', forward, /^124m T = 1024, all logits/),
	operations('denoise/T256/half', 'bench_forward', forward, /^124m T = 256, denoise half/),
	operations('denoise/T256/four-rows', 'bench_forward', forward, /^124m T = 256, denoise four/),
	operations('token/after-96', 'bench_forward', int8, /^124m, a token after 96/, 'int8'),
	operations('token/after-1000', 'bench_forward', int8, /^124m, a token after 1000/, 'int8'),
	operations('train-step/2x256', 'bench_train', training('124m-2x256'), /^124m-2x256/),
];
