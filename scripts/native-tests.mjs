// Builds the core with plain CMake and runs the native tests. --asan: with AddressSanitizer and UBSan. --isa NAME: only
// that instruction set. Other arguments are passed to the test program (name filters).
import { spawnSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';

const { values, positionals } = parseArgs({
	options: { asan: { type: 'boolean', default: false }, isa: { type: 'string' } },
	allowPositionals: true,
});
const root = fileURLToPath(new URL('..', import.meta.url));
const folder = values.asan ? 'build-asan' : 'build-core';

function run(command, args, env = {}) {
	const { status, error } = spawnSync(command, args, { cwd: root, stdio: 'inherit', env: { ...process.env, ...env } });
	if (error) throw error;
	if (status !== 0) process.exit(status ?? 1);
}

run('cmake', [
	'-S',
	'.',
	'-B',
	folder,
	'-DDN_CUDA=OFF',
	'-DDN_WERROR=ON',
	`-DDN_SANITIZE=${values.asan ? 'ON' : 'OFF'}`,
]);
// The benchmarks are built too, but for the sanitizers, which nobody times.
const targets = values.asan ? ['--target', 'dn_tests'] : [];
run('cmake', ['--build', folder, ...targets, '--parallel', String(availableParallelism())]);
run(`./${folder}/dn_tests`, positionals, {
	...(values.isa ? { DN_ISA: values.isa } : {}),
	UBSAN_OPTIONS: 'print_stacktrace=1',
});
// The CUDA kernels on the emulator, once: they have no instruction sets, and their fibers confuse the sanitizers.
if (!values.asan && !values.isa && existsSync(`${root}/${folder}/dn_cuda_emulator`)) {
	run(`./${folder}/dn_cuda_emulator`, positionals);
}
