/** The native benchmarks, which plain CMake builds: they need no Node and measure what a call from JavaScript cannot. */
import { execFileSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = fileURLToPath(new URL('../../', import.meta.url));

/** Standard output of a native benchmark. @throws when it is not built, saying how to, or fails, with what it said */
export function runNative(name: string, args: readonly string[]): string {
	const folder = process.env['DN_BENCH_FOLDER'] ?? join(root, 'build-core');
	const path = join(folder, name);
	if (!existsSync(path)) {
		throw new Error(
			`${name} is not built: cmake -S . -B build-core -DDN_CUDA=OFF && cmake --build build-core --target ${name}`,
		);
	}
	return execFileSync(path, args, { encoding: 'utf8', stdio: ['ignore', 'pipe', 'pipe'] });
}
