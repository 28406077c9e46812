// Builds the core with plain CMake and runs the native tests, as many processes of them as there are processors. --asan: with
// AddressSanitizer and UBSan. --isa NAME: only that instruction set. Other arguments are passed to the test program (name
// filters).
import { spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
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

function run(command, args) {
	const { status, error } = spawnSync(command, args, { cwd: root, stdio: 'inherit' });
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
const env = {
	...process.env,
	...(values.isa ? { DN_ISA: values.isa } : {}),
	UBSAN_OPTIONS: 'print_stacktrace=1',
};
const shards = availableParallelism();
const ended = await Promise.all(
	Array.from({ length: shards }, async (_, i) => {
		const args = ['--shard', `${i + 1}/${shards}`, ...positionals];
		const [status] = await once(spawn(`./${folder}/dn_tests`, args, { cwd: root, stdio: 'inherit', env }), 'exit');
		return status ?? 1;
	}),
);
if (ended.some((status) => status !== 0)) process.exit(1);
// The CUDA kernels on the emulator, once: they have no instruction sets, and their fibers confuse the sanitizers.
if (!values.asan && !values.isa && existsSync(`${root}/${folder}/dn_cuda_emulator`)) {
	run(`./${folder}/dn_cuda_emulator`, positionals);
}
