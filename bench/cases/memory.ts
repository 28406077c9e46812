/**
 * Loading a GPT-2 124M checkpoint and what it needs, each in a process of its own: load time with the file in the page cache,
 * and peak resident memory of a forward over 1024 tokens. RSS is of the whole process, Node's own 45 MB included; logits at
 * all positions are 206 MB of it.
 */
import { execFileSync } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

import type { BenchCase } from '../harness.js';
import { load } from '../shapes.js';

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
		const folder = mkdtempSync(join(tmpdir(), 'diffusion-native-memory-'));
		process.once('exit', () => rmSync(folder, { recursive: true, force: true }));
		const model = await load('gpt2');
		await model.save(folder);
		await model.dispose();
		return folder;
	})();
	return checkpoint;
}

function measured(dtype: string, T: number, output: string, folder: string): Report {
	const child = fileURLToPath(new URL('../memory-child.js', import.meta.url));
	const args = [child, folder, dtype, String(T), output];
	const report = JSON.parse(execFileSync(process.execPath, args, { encoding: 'utf8' })) as Report | { error: string };
	if ('error' in report) throw new Error(report.error);
	return report;
}

function memory(dtype: 'fp32' | 'int8', T: number, output: 'logits' | 'hidden', repeats: number): BenchCase {
	return {
		name: T === 0 ? `load/gpt2/${dtype}` : `memory/gpt2/T${T}/${output}/${dtype}`,
		shape: { model: 'gpt2', T },
		dtype,
		repeats,
		async setup() {
			const folder = await makeCheckpoint();
			return {
				async run() {
					const report = measured(dtype, T, output, folder);
					const loadedMB = report.loadedRssBytes / 2 ** 20;
					const { loadMs, forwardMs, peakRssBytes } = report;
					return { tokens: T, ms: T === 0 ? loadMs : forwardMs, peakRssBytes, extra: { loadMs, loadedMB } };
				},
				teardown: async () => undefined,
			};
		},
	};
}

export const memoryCases: BenchCase[] = [
	memory('fp32', 0, 'hidden', 5),
	memory('fp32', 1024, 'hidden', 1),
	memory('fp32', 1024, 'logits', 1),
	memory('int8', 0, 'hidden', 5),
	memory('int8', 1024, 'hidden', 1),
	memory('int8', 1024, 'logits', 1),
];
