/**
 * Loading a GPT-2 124M checkpoint and what it needs, each in a process of its own: load time with the file in the page cache,
 * peak resident memory of a forward over 1024 tokens, and of training on 4 sequences of 256 with recomputed activations. RSS is of the whole process, Node's own 45 MB included; logits at
 * all positions are 206 MB of it.
 */
import { execFileSync } from 'node:child_process';
import { fileURLToPath } from 'node:url';

import type { BenchCase } from '../harness.js';
import { load, trainingFlops, type WeightType } from '../shapes.js';
import { temporaryFolder } from '../temporary.js';

interface Report {
	loadMs: number;
	forwardMs: number;
	loadedRssBytes: number;
	peakRssBytes: number;
}

/** A checkpoint of random weights, made by the first case that needs it and removed at the end of the process. */
let checkpoint: Promise<string> | undefined;
function makeCheckpoint(): Promise<string> {
	checkpoint ??= (async () => {
		const { path } = temporaryFolder('diffusion-native-memory-');
		const model = await load('gpt2');
		await model.save(path);
		await model.dispose();
		return path;
	})();
	return checkpoint;
}

function measured<Result extends object>(...parameters: string[]): Result {
	const child = fileURLToPath(new URL('../memory-child.js', import.meta.url));
	const text = execFileSync(process.execPath, [child, ...parameters], { encoding: 'utf8' });
	const report = JSON.parse(text) as Result | { error: string };
	if ('error' in report) throw new Error(report.error);
	return report;
}

function memory(dtype: WeightType, T: number, output: 'logits' | 'hidden', repeats: number): BenchCase {
	return {
		name: T === 0 ? `load/gpt2/${dtype}` : `memory/gpt2/T${T}/${output}/${dtype}`,
		shape: { model: 'gpt2', T },
		dtype,
		repeats,
		async setup() {
			const folder = await makeCheckpoint();
			return {
				async run() {
					const report = measured<Report>(folder, dtype, String(T), output);
					const loadedMB = report.loadedRssBytes / 2 ** 20;
					const { loadMs, forwardMs, peakRssBytes } = report;
					return { tokens: T, ms: T === 0 ? loadMs : forwardMs, peakRssBytes, extra: { loadMs, loadedMB } };
				},
				teardown: async () => undefined,
			};
		},
	};
}

function trainingMemory(B: number, T: number): BenchCase {
	return {
		name: `memory/gpt2/train-step/${B}x${T}/recompute`,
		shape: { model: 'gpt2', B, T },
		dtype: 'fp32',
		repeats: 1,
		setup: async () => ({
			async run() {
				const { stepMs, peakRssBytes } = measured<{ stepMs: number; peakRssBytes: number }>(
					'train',
					String(B),
					String(T),
				);
				return { tokens: B * T, flops: B * trainingFlops('gpt2', T, T / 2), ms: stepMs, peakRssBytes };
			},
			teardown: async () => undefined,
		}),
	};
}

export const memoryCases: BenchCase[] = [
	memory('fp32', 0, 'hidden', 5),
	memory('fp32', 1024, 'hidden', 1),
	memory('fp32', 1024, 'logits', 1),
	memory('bf16', 0, 'hidden', 5),
	memory('bf16', 1024, 'hidden', 1),
	memory('int8', 0, 'hidden', 5),
	memory('int8', 1024, 'hidden', 1),
	memory('int8', 1024, 'logits', 1),
	trainingMemory(4, 256),
];
