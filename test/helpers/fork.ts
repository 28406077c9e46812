/** Runs a script in a child process that can import the package by name, and reports how it ended. */
import { spawn } from 'node:child_process';

import { root } from './fixtures.js';

export interface Ended {
	code: number | null;
	signal: NodeJS.Signals | null;
	stdout: string;
	stderr: string;
	ms: number;
}

/** A child process is killed after this, ms: beyond what a busy machine takes, below the time that ava waits. */
export const patience = 150_000;

/** Runs `source` as an ES module; kills it after `timeoutMs`, and says so at the end of `stderr`. */
export function runScript(
	source: string,
	options: { nodeArguments?: string[]; timeoutMs?: number } = {},
): Promise<Ended> {
	return new Promise((resolve, reject) => {
		const started = performance.now();
		const child = spawn(process.execPath, [...(options.nodeArguments ?? []), '--input-type=module', '--eval', source], {
			cwd: root,
			stdio: ['ignore', 'pipe', 'pipe'],
			env: { ...process.env, NODE_OPTIONS: '' },
		});
		let stdout = '';
		let stderr = '';
		const limit = options.timeoutMs ?? patience;
		const timer = setTimeout(() => {
			stderr += `\nkilled after ${limit} ms`;
			child.kill('SIGKILL');
		}, limit);
		child.stdout.setEncoding('utf8').on('data', (chunk: string) => {
			stdout += chunk;
		});
		child.stderr.setEncoding('utf8').on('data', (chunk: string) => {
			stderr += chunk;
		});
		child.on('error', reject);
		child.on('close', (code, signal) => {
			clearTimeout(timer);
			resolve({ code, signal, stdout, stderr, ms: performance.now() - started });
		});
	});
}
