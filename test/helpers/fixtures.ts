/** Finds the package's folders and reads committed fixture files (safetensors, fp32) without the library under test. */
import { readFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

/** The repository root, seen from dist/test/helpers. */
export const root = join(dirname(fileURLToPath(import.meta.url)), '..', '..', '..');

/** A path under test/fixtures. */
export function fixture(...parts: string[]): string {
	return join(root, 'test', 'fixtures', ...parts);
}

/** Every tensor of a safetensors file of fp32 values. */
export function readTensors(path: string): Map<string, Float32Array> {
	const bytes = readFileSync(path);
	const headerLength = Number(bytes.readBigUInt64LE(0));
	const header = JSON.parse(bytes.toString('utf8', 8, 8 + headerLength)) as Record<
		string,
		{ dtype: string; data_offsets: [number, number] }
	>;
	const tensors = new Map<string, Float32Array>();
	for (const [name, entry] of Object.entries(header)) {
		if (name === '__metadata__') continue;
		if (entry.dtype !== 'F32') throw new Error(`${path}: ${name} is ${entry.dtype}`);
		const [begin, end] = entry.data_offsets;
		const start = bytes.byteOffset + 8 + headerLength;
		tensors.set(name, new Float32Array(bytes.buffer.slice(start + begin, start + end)));
	}
	return tensors;
}
