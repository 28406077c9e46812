/**
 * How each contender is started, as shipped and tuned. Tuned means threads pinned one to a core, freed memory kept by the
 * allocator, and the engine's own best settings; as shipped means what its user gets.
 */
import { execFileSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

import { info } from 'diffusion-native';

import type { Command } from './channel.js';
import { type Engine, peersFolder, pythonWithTorch } from './installed.js';

/** glibc gives large blocks back and faults them in again each time; these settings make it keep them. */
const keepMemory = {
	MALLOC_MMAP_MAX_: '0',
	MALLOC_TRIM_THRESHOLD_: '100000000000',
	MALLOC_TOP_PAD_: '1000000000',
};

/** Cores this process may use. */
export function allowedCores(): number[] {
	try {
		const list = /^Cpus_allowed_list:\s*(.+)$/m.exec(readFileSync('/proc/self/status', 'utf8'))?.[1] ?? '';
		return list.split(',').flatMap((range) => {
			const [first = 0, last = first] = range.split('-').map(Number);
			return Array.from({ length: last - first + 1 }, (_, i) => first + i);
		});
	} catch {
		return Array.from({ length: availableParallelism() }, (_, i) => i);
	}
}

/** OpenBLAS and PyTorch of Debian 12 do not know newer processors and would run code for much older ones. */
function torchCpu(): { blas: string; aten: string } {
	const { isa } = info().cpu;
	return isa === 'avx2' ? { blas: 'Haswell', aten: 'avx2' } : { blas: 'SkylakeX', aten: 'avx512' };
}

/** Builds a library of this folder, to be preloaded, into `folder`; undefined where there is no C compiler. */
export function preloadable(name: string, folder: string): string | undefined {
	const path = join(folder, `${name}.so`);
	try {
		const source = join(peersFolder, `${name}.c`);
		execFileSync('cc', ['-O2', '-shared', '-fPIC', source, '-o', path, '-ldl'], { stdio: 'ignore' });
		return path;
	} catch {
		return undefined;
	}
}

/** Whether the peers must do without AMX: the machine has it, and DN_ISA keeps ours from it. */
export function peersLackAmx(): boolean {
	if (info().cpu.isa === 'amx') return false;
	try {
		return / amx_tile( |$)/m.test(readFileSync('/proc/cpuinfo', 'utf8'));
	} catch {
		return false;
	}
}

/** What is preloaded into a peer. Throws where AMX cannot be kept from it. */
function preloads(engine: Engine, tuned: boolean, folder: string): Record<string, string> {
	const pins = engine === 'llama' && tuned ? preloadable('pin_threads', folder) : undefined;
	const hides = peersLackAmx() ? preloadable('without_amx', folder) : undefined;
	if (peersLackAmx() && hides === undefined)
		throw new Error('keeping AMX from the peers, as DN_ISA does from ours, needs a C compiler (cc)');
	const libraries = [pins, hides].filter((library) => library !== undefined);
	return libraries.length > 0 ? { LD_PRELOAD: libraries.join(':') } : {};
}

/** The command of an engine. folder: for what it needs to be built. */
export function commandOf(engine: Engine, tuned: boolean, folder: string): Command {
	const script = (name: string) => fileURLToPath(new URL(name, import.meta.url));
	const node = (name: string, env: Record<string, string> = {}): Command => ({
		command: process.execPath,
		args: [script(name)],
		env,
	});
	if (engine === 'ours') return node('./ours.js');
	const env = { ...(tuned ? keepMemory : {}), ...preloads(engine, tuned, folder) };
	switch (engine) {
		case 'onnxruntime': {
			const plain = node('./onnxruntime.js', env);
			// It computes on the calling thread too, which is pinned from outside; its own threads it pins itself.
			const first = String(allowedCores()[0] ?? 0);
			return tuned ? { ...plain, command: 'taskset', args: ['-c', first, plain.command, ...plain.args] } : plain;
		}
		case 'llama':
			return node('./llama.js', env);
		case 'torch': {
			const { blas, aten } = torchCpu();
			const threads = String(allowedCores().length);
			const best = { OMP_NUM_THREADS: threads, OMP_PROC_BIND: 'true', ATEN_CPU_CAPABILITY: aten };
			return {
				command: pythonWithTorch() ?? 'python3',
				args: [join(peersFolder, 'torch_peer.py')],
				env: { OPENBLAS_CORETYPE: blas, ...(tuned ? best : {}), ...env },
			};
		}
	}
}
