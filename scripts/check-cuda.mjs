// Compiles every CUDA kernel and compares what the compiler reports with cuda/budget.json: registers, stack and shared
// memory per kernel and architecture (a register count may grow by 5 %, any spill fails), and the instructions that must be
// there: tensor-core products, their loads and asynchronous copies. Needs nvcc and c++filt, no GPU.
// --arch 80,90a: the architectures (default: both of these). --update: writes the file instead.
import { spawn, spawnSync } from 'node:child_process';
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { availableParallelism, tmpdir } from 'node:os';
import { basename, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';

const { values } = parseArgs({
	options: { arch: { type: 'string', default: '80,90a' }, update: { type: 'boolean', default: false } },
});
const root = fileURLToPath(new URL('..', import.meta.url));
const budgetFile = join(root, 'cuda/budget.json');
const architectures = values.arch.split(',');
const nvcc = process.env.CUDACXX ?? 'nvcc';
if (spawnSync(nvcc, ['--version']).status !== 0) {
	console.log('check-cuda: there is no nvcc here, nothing was checked');
	process.exit(0);
}
if (spawnSync('c++filt', ['--version']).status !== 0) {
	console.error('check-cuda: there is no c++filt here, which reads the names of kernels; it comes with binutils');
	process.exit(1);
}

const sources = JSON.parse(readFileSync(join(root, 'native/sources.gypi'), 'utf8')).variables.cuda_sources.filter(
	(file) => readFileSync(join(root, file), 'utf8').includes('DN_KERNEL('),
);
// Low 12 bits of an instruction's first word, the same on sm_80 to sm_90.
const opcodes = { HMMA: 0x23c, LDSM: 0x83b, LDGSTS: 0xfae, LDL: 0x983, STL: 0x387 };

/** 'gemm_kernel<float, 128, false, true>' for each mangled name. */
function readable(names) {
	const { stdout } = spawnSync('c++filt', { input: names.join('\n'), encoding: 'utf8' });
	return stdout
		.trim()
		.split('\n')
		.map((name) =>
			name
				.replace(/^void /, '')
				.replaceAll('(anonymous namespace)::', '')
				.replaceAll('dn::cuda::', '')
				.replace(/\([^()]*\)$/, ''),
		);
}

/** Instruction counts per function of a cubin, which is an ELF file: 16 bytes an instruction in sections .text.NAME. */
function countInstructions(file) {
	const data = readFileSync(file);
	const sections = Number(data.readBigUInt64LE(0x28));
	const size = data.readUInt16LE(0x3a);
	const section = (i) => sections + i * size;
	const offset = (i) => Number(data.readBigUInt64LE(section(i) + 24));
	const names = offset(data.readUInt16LE(0x3e));
	const counts = new Map();
	for (let i = 0; i < data.readUInt16LE(0x3c); i++) {
		const start = names + data.readUInt32LE(section(i));
		const name = data.toString('latin1', start, data.indexOf(0, start));
		if (!name.startsWith('.text.')) continue;
		const count = Object.fromEntries(Object.keys(opcodes).map((op) => [op, 0]));
		const end = offset(i) + Number(data.readBigUInt64LE(section(i) + 32));
		for (let at = offset(i); at < end; at += 16) {
			const code = data.readUInt16LE(at) & 0xfff;
			for (const [op, value] of Object.entries(opcodes)) if (code === value) count[op]++;
		}
		counts.set(name.slice('.text.'.length), count);
	}
	return counts;
}

/** Kernels of one source on one architecture: name -> registers, stack, shared, spills and instruction counts. */
function compile(source, arch, folder) {
	const cubin = join(folder, `${basename(source)}.${arch}.cubin`);
	const args = [
		'-std=c++17',
		'-O3',
		`-arch=sm_${arch}`,
		'-cubin',
		'-Xptxas=-v',
		'-Inative',
		'-I.',
		'-o',
		cubin,
		source,
	];
	return new Promise((resolve, reject) => {
		const child = spawn(nvcc, args, { cwd: root });
		let log = '';
		child.stderr.on('data', (chunk) => {
			log += chunk;
		});
		child.on('error', reject);
		child.on('close', (status) => {
			if (status !== 0) return reject(new Error(`${source} does not compile for sm_${arch}:\n${log}`));
			const counts = countInstructions(cubin);
			const pattern =
				/Compiling entry function '(\S+)'[\s\S]*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads[\s\S]*?Used (\d+) registers([^\n]*)/g;
			const found = [...log.matchAll(pattern)];
			const names = readable(found.map((match) => match[1]));
			resolve(
				found.map((match, i) => {
					const [, mangled, stack, stores, loads, registers, rest] = match;
					const { HMMA, LDSM, LDGSTS, LDL, STL } = counts.get(mangled);
					return {
						name: names[i],
						registers: Number(registers),
						stack: Number(stack),
						shared: Number(/(\d+) bytes smem/.exec(rest)?.[1] ?? 0),
						spills: Number(stores) + Number(loads),
						instructions: { HMMA, LDSM, LDGSTS },
						local: LDL + STL,
					};
				}),
			);
		});
	});
}

const folder = mkdtempSync(join(tmpdir(), 'check-cuda-'));
const jobs = architectures.flatMap((arch) => sources.map((source) => ({ source, arch })));
const measured = Object.fromEntries(architectures.map((arch) => [`sm_${arch}`, {}]));
const problems = [];
async function work() {
	for (let job = jobs.shift(); job !== undefined; job = jobs.shift()) {
		for (const kernel of await compile(job.source, job.arch, folder)) {
			const { name, spills, local, ...rest } = kernel;
			measured[`sm_${job.arch}`][name] = rest;
			const where = `${job.source}: ${name} on sm_${job.arch}`;
			if (spills > 0) problems.push(`${where} spills ${spills} bytes of registers`);
			if (local > 0 && rest.stack === 0) problems.push(`${where} has ${local} instructions on local memory`);
		}
	}
}
try {
	await Promise.all(Array.from({ length: Math.min(2, availableParallelism()) }, work));
} catch (error) {
	console.error(error.message);
	process.exit(1);
} finally {
	rmSync(folder, { recursive: true });
}

const budget = existsSync(budgetFile) ? JSON.parse(readFileSync(budgetFile, 'utf8')) : {};
let kernels = 0;
for (const [arch, list] of Object.entries(measured)) {
	kernels += Object.keys(list).length;
	if (values.update) {
		budget[arch] = Object.fromEntries(Object.entries(list).sort(([a], [b]) => (a < b ? -1 : 1)));
		continue;
	}
	for (const name of Object.keys(budget[arch] ?? {})) {
		if (!(name in list)) problems.push(`${arch}: ${name} is in the budget but not in the sources`);
	}
	for (const [name, { registers, stack, shared, instructions }] of Object.entries(list)) {
		const allowed = budget[arch]?.[name];
		if (allowed === undefined) {
			problems.push(`${arch}: ${name} has no budget; node scripts/check-cuda.mjs --update makes one`);
			continue;
		}
		const grown = (what, value, limit) => {
			if (value > limit) problems.push(`${arch}: ${name} uses ${value} ${what}, the budget is ${Math.floor(limit)}`);
		};
		grown('registers', registers, allowed.registers * 1.05);
		grown('bytes of stack', stack, allowed.stack);
		grown('bytes of shared memory', shared, allowed.shared);
		for (const [op, count] of Object.entries(allowed.instructions)) {
			if (count > 0 && instructions[op] < count / 2)
				problems.push(`${arch}: ${name} has ${instructions[op]} ${op} instructions, ${count} were expected`);
		}
	}
}
if (values.update && problems.length === 0) writeFileSync(budgetFile, `${JSON.stringify(budget, null, '\t')}\n`);
for (const problem of problems) console.error(problem);
console.log(`check-cuda: ${kernels} kernels, ${problems.length} problems`);
process.exit(problems.length === 0 ? 0 : 1);
