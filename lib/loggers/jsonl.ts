/** One JSON object per line and step. Survives a kill: a half-written last line is dropped when a run continues. */
import { appendFileSync, readFileSync } from 'node:fs';
import { dirname } from 'node:path';

import { fileError, isMissing, makeDirectories, writeFileAtomic } from '../files.js';
import type { MetricLogger, TrainMetrics } from '../training/options.js';

/** Appends metrics to a file. A run that continues from an earlier step first drops the lines beyond it. */
export class JsonlLogger implements MetricLogger {
	/** The file. */
	readonly path: string;

	/** `path`: the file; its folder is made when a run starts. */
	constructor(path: string) {
		this.path = path;
	}

	/** Makes the folder and drops lines beyond `step`. @throws `ERR_DN_CHECKPOINT` with the system's reason */
	async start({ step }: { readonly step: number }): Promise<void> {
		const folder = dirname(this.path);
		await makeDirectories(folder).catch((error) => {
			throw fileError('make the directory', folder, error);
		});
		let text: string;
		try {
			text = readFileSync(this.path, 'utf8');
		} catch (error) {
			if (isMissing(error)) return;
			throw fileError('read', this.path, error);
		}
		const kept = text.split('\n').filter((line) => {
			try {
				return (JSON.parse(line) as { step: number }).step <= step;
			} catch {
				return false;
			}
		});
		const wanted = kept.map((line) => `${line}\n`).join('');
		if (wanted !== text) await writeFileAtomic(this.path, wanted);
	}

	/** Appends a line. @throws `ERR_DN_CHECKPOINT` with the system's reason, a full disk for instance. */
	log(metrics: TrainMetrics): void {
		try {
			appendFileSync(this.path, `${JSON.stringify(metrics)}\n`);
		} catch (error) {
			throw fileError('write', this.path, error);
		}
	}
}
