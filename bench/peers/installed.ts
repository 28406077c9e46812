/** Where the peers are installed, beside their package.json in the sources, and what is missing. */
import { execFileSync } from 'node:child_process';
import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath, pathToFileURL } from 'node:url';

/** The checkout; this file runs from dist/bench/peers. */
export const root = fileURLToPath(new URL('../../../', import.meta.url));
export const peersFolder = join(root, 'bench', 'peers');

interface Manifest {
	version: string;
	main?: string;
	exports?: string | Record<string, string | { import?: string; node?: { import?: string } }>;
}

function manifest(name: string): { folder: string; json: Manifest } {
	const folder = join(peersFolder, 'node_modules', name);
	return { folder, json: JSON.parse(readFileSync(join(folder, 'package.json'), 'utf8')) as Manifest };
}

export function peerVersion(name: string): string {
	return manifest(name).json.version;
}

/** Imports a package from bench/peers/node_modules, whatever the importing file's own place. */
export async function importPeer<T>(name: string): Promise<T> {
	const { folder, json } = manifest(name);
	const entry = typeof json.exports === 'object' ? json.exports['.'] : json.exports;
	const conditional = typeof entry === 'object' ? (entry.import ?? entry.node?.import) : entry;
	return (await import(pathToFileURL(join(folder, conditional ?? json.main ?? 'index.js')).href)) as T;
}

export type Engine = 'ours' | 'onnxruntime' | 'llama' | 'torch';

const packages = { onnxruntime: 'onnxruntime-node', llama: 'node-llama-cpp' } as const;

/** A python3 that has torch and numpy. Debian's is the system's own, whatever comes first in PATH. */
export function pythonWithTorch(): string | undefined {
	for (const python of [process.env['PYTHON'], '/usr/bin/python3', 'python3']) {
		if (python === undefined) continue;
		try {
			execFileSync(python, ['-c', 'import torch, numpy'], { stdio: 'ignore' });
			return python;
		} catch {
			// This one has not: the next.
		}
	}
	return undefined;
}

/** What to do about an engine that is not there; undefined when it is. */
export function missing(engine: Engine): string | undefined {
	if (engine === 'ours') return undefined;
	if (engine === 'torch') {
		return pythonWithTorch() === undefined
			? 'PyTorch is not installed: apt-get install python3-torch python3-numpy libopenblas0-openmp'
			: undefined;
	}
	const name = packages[engine];
	return existsSync(join(peersFolder, 'node_modules', name, 'package.json'))
		? undefined
		: `${name} is not installed: npm install --prefix bench/peers`;
}
