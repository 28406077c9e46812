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
const program = `./${folder}/dn_tests`;
const shards = availableParallelism();
const seen = new Set();
const statuses = await Promise.all(
	Array.from({ length: shards }, async (_, i) => {
		const args = ['--shard', `${i + 1}/${shards}`, ...positionals];
		const child = spawn(program, args, { cwd: root, stdio: ['inherit', 'pipe', 'inherit'], env });
		let output = '';
		child.stdout.on('data', (text) => {
			output += text;
			process.stdout.write(text);
		});
		const [status] = await once(child, 'close');
		for (const [, name] of output.matchAll(/^(?:ok|FAIL) +(\w+)$/gm)) seen.add(name);
		return status ?? 1;
	}),
);
const wanted = Number(spawnSync(program, ['--count', ...positionals], { cwd: root }).stdout);
console.log(`${seen.size} of ${wanted} tests ran, in ${shards} processes`);
if (seen.size !== wanted || statuses.some((status) => status !== 0)) process.exit(1);
// The CUDA kernels on the emulator, once: they have no instruction sets, and their fibers confuse the sanitizers.
if (!values.asan && !values.isa && existsSync(`${root}/${folder}/dn_cuda_emulator`)) {
	run(`./${folder}/dn_cuda_emulator`, positionals);
}
