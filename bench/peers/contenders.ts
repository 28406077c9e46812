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

/** What /proc/cpuinfo says that the processor can; empty where there is no such file. */
function cpuFlags(): Set<string> {
	try {
		return new Set(/^flags\s*:(.*)$/m.exec(readFileSync('/proc/cpuinfo', 'utf8'))?.[1]?.trim().split(' '));
	} catch {
		return new Set();
	}
}

/**
 * What tells PyTorch the processor's type: OpenBLAS and PyTorch of Debian 12 do not know newer processors and would run code for
 * much older ones. By what the processor can, whatever DN_ISA keeps ours to.
 */
export function torchCpu(flags: ReadonlySet<string> = cpuFlags()): Record<'shipped' | 'tuned', Record<string, string>> {
	const named = (blas: string, aten: string) => ({
		shipped: { OPENBLAS_CORETYPE: blas },
		tuned: { OPENBLAS_CORETYPE: blas, ATEN_CPU_CAPABILITY: aten },
	});
	if (['avx512f', 'avx512bw', 'avx512vl', 'avx512dq'].every((flag) => flags.has(flag)))
		return named('SkylakeX', 'avx512');
	return flags.has('avx2') ? named('Haswell', 'avx2') : { shipped: {}, tuned: {} };
}

/**
 * Builds a library of this folder, to be preloaded, into `folder`; undefined where there is no C compiler.
 * @throws when LD_PRELOAD cannot name it: the loader takes spaces and colons for the end of a path, and goes on without it
 */
export function preloadable(name: string, folder: string): string | undefined {
	const path = join(folder, `${name}.so`);
	if (/[ :]/.test(path))
		throw new Error(`${path} cannot be preloaded: choose a folder whose path has no space or colon (--models, TMPDIR)`);
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
	return info().cpu.isa !== 'amx' && cpuFlags().has('amx_tile');
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
			const threads = { OMP_NUM_THREADS: String(allowedCores().length), OMP_PROC_BIND: 'true' };
			const cpu = torchCpu();
			return {
				command: pythonWithTorch() ?? 'python3',
				args: [join(peersFolder, 'torch_peer.py')],
				env: { ...(tuned ? { ...threads, ...cpu.tuned } : cpu.shipped), ...env },
			};
		}
	}
}
