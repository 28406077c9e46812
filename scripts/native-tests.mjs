// Builds the core with plain CMake and runs the native tests, as many processes of them as there are processors. --asan: with
// AddressSanitizer and UBSan. --isa NAME: only that instruction set. Other arguments are passed to the test program (name
// filters).
import { spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { existsSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import { join } from 'node:path';
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
/** Runs a test program's tests in as many processes as there are processors; ends this process when one fails. */
async function runTests(program) {
	const processes = availableParallelism();
	// Small shards: whoever has finished one takes the next, so that slow tests do not keep one processor waiting.
	const shards = 8 * processes;
	let shard = 0;
	let failed = false;
	const passed = new Set();
	const work = async () => {
		while (shard < shards) {
			const args = ['--shard', `${++shard}/${shards}`, ...positionals];
			const child = spawn(program, args, { cwd: root, stdio: ['inherit', 'pipe', 'inherit'], env });
			let output = '';
			child.stdout.on('data', (text) => {
				output += text;
			});
			const [status] = await once(child, 'close');
			process.stdout.write(output.replace(/^\d+ passed, \d+ failed\n/m, ''));
			for (const [, name] of output.matchAll(/^ok +(\w+)/gm)) passed.add(name);
			failed ||= status !== 0;
		}
	};
	await Promise.all(Array.from({ length: processes }, work));
	const wanted = Number(spawnSync(program, ['--count', ...positionals], { cwd: root }).stdout);
	console.log(`${passed.size} of ${wanted} tests of ${program} passed`);
	if (passed.size !== wanted || failed) process.exit(1);
}

const tests = `./${folder}/dn_tests`;
await runTests(tests);
// Kernels of AMX on tiles in plain C++, where the processor has all that they use but the tiles.
const tiles = `./${folder}/dn_amx_emulator`;
const findsAmx = (program) =>
	spawnSync(program, ['no_such_test'], { cwd: root, env: { ...env, DN_ISA: 'amx' }, stdio: 'ignore' }).status === 0;
if (!values.asan && !values.isa && existsSync(join(root, tiles)) && findsAmx(tiles) && !findsAmx(tests))
	await runTests(tiles);
// The CUDA kernels on the emulator, once: they have no instruction sets, and their fibers confuse the sanitizers.
const emulator = `./${folder}/dn_cuda_emulator`;
if (!values.asan && !values.isa && existsSync(join(root, emulator))) await runTests(emulator);
