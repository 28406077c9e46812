import { execFile, spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import test, { type ExecutionContext } from 'ava';
import { DiffuGPT } from 'diffusion-native';

import { generateCases } from '../bench/cases/generate.js';
import { operationCases, parseSteps } from '../bench/cases/operations.js';
import { type BenchCase, type BenchResult, measure, named } from '../bench/harness.js';
import { ContenderProcess, type Opening } from '../bench/peers/channel.js';
import type { ComparisonResult } from '../bench/peers/compare.js';
import { difference } from '../bench/peers/compare.js';
import { commandOf, preloadable, torchCpu } from '../bench/peers/contenders.js';
import { toBfloat, toHalf } from '../bench/peers/gguf.js';
import { byteLength, integer, message, string } from '../bench/peers/protobuf.js';
import { fill, merge, type Results } from '../bench/tables.js';
import { root } from './helpers/fixtures.js';

function temporary(t: ExecutionContext): string {
	const folder = mkdtempSync(join(tmpdir(), 'dn-bench-'));
	t.teardown(() => rmSync(folder, { recursive: true }));
	return folder;
}

test('a part of a name chooses all that have it, a whole name that one alone', (t) => {
	const cases = ['forward/B1', 'forward/B16', 'load'].map((name) => ({ name }));
	const names = (...parts: string[]): string[] => named(cases, parts).map(({ name }) => name);
	t.deepEqual(names('forward/B1'), ['forward/B1']);
	t.deepEqual(names('forward/B'), ['forward/B1', 'forward/B16']);
	t.deepEqual(names('load', 'B16'), ['forward/B16', 'load']);
	t.deepEqual(names('nothing'), []);
});

test('cases of several repeats warm up, whatever repeats are asked for, and only a process of its own has a peak', async (t) => {
	let runs = 0;
	const bench = (repeats: number): BenchCase => ({
		name: 'counting',
		shape: {},
		dtype: '-',
		repeats,
		setup: async () => ({ run: async () => ({ tokens: 1, ms: ++runs }), teardown: async () => undefined }),
	});
	for (const [own, asked, first, last] of [
		[3, undefined, 2, 4],
		[3, 1, 2, 2],
		[1, undefined, 1, 1],
		[1, 2, 2, 3],
	] as const) {
		runs = 0;
		const { ms, repeats, peakRssBytes } = await measure(bench(own), asked);
		t.deepEqual([runs, repeats, ms.median], [last, last - first + 1, (first + last) / 2]);
		t.is(peakRssBytes, null);
	}
});

test('half precision rounds to nearest even, subnormals included', (t) => {
	const cases: [number, number][] = [
		[0, 0],
		[-0, 0x8000],
		[1, 0x3c00],
		[-2, 0xc000],
		[65504, 0x7bff],
		[65520, 0x7c00],
		[1 + 2 ** -11, 0x3c00],
		[1 + 3 * 2 ** -11, 0x3c02],
		[2 - 2 ** -11, 0x4000],
		[2 ** -14, 0x0400],
		[2 ** -15, 0x0200],
		[2 ** -24, 0x0001],
		[2 ** -25, 0],
		[3 * 2 ** -25, 0x0002],
		[2 ** -14 - 2 ** -25, 0x0400],
		[2 ** -30, 0],
	];
	for (const [value, expected] of cases) t.is(toHalf(value), expected, String(value));
});

test('bfloat16 rounds to nearest even', (t) => {
	t.is(toBfloat(1), 0x3f80);
	t.is(toBfloat(1 + 2 ** -8), 0x3f80);
	t.is(toBfloat(1 + 3 * 2 ** -8), 0x3f82);
	t.is(toBfloat(-1 - 2 ** -7), 0xbf81);
});

test('protobuf messages', (t) => {
	const bytes = message(1, [...integer(1, 300), ...string(2, 'ab'), ...integer(3, -1)]);
	const expected = [0x0a, 18, 0x08, 0xac, 0x02, 0x12, 2, 0x61, 0x62, 0x18, ...new Array<number>(9).fill(255), 1];
	t.deepEqual([...Buffer.concat(bytes)], expected);
	t.is(byteLength(bytes), expected.length);
});

test('a contender that computes something else differs', (t) => {
	t.is(difference([3, 4], [3, 4]).largest, 0);
	t.true(Math.abs(difference([1, -1, 1, -1], [1, -1, 1, -0.5]).largest - 0.5) < 1e-12);
	t.true(Number.isNaN(difference([1, 2], [1, Number.NaN]).largest));
	t.true(Number.isNaN(difference([1, 2, 3], [1, Number.NaN, 3]).largest));
	t.throws(() => difference([1, 2], [1]));
	t.throws(() => difference([], []));
});

const output = `124m T = 256, all logits: cpu/avx512, 2 threads, fp32 peak of a core 175 GFLOP/s; 418.2 ms cpu, 211.3 ms wall
  op                        calls    cpu ms  share   wall ms     GFLOP        MB  GFLOP/s of peak    GB/s
  head_logits                   1    115.13  27.5%     58.34     19.76    207.20    171.7   69.0%     1.8
  matmul (768, 3072)           12     85.35  20.4%     43.11     14.50    162.01    169.8   68.3%     1.9
  layernorm_forward            25      4.00   1.0%      2.00      0.00     39.90      0.0    0.0%    10.0
  outside ops                          1.15   0.3%
  all                                418.24                      65.66              157.0   63.1%
`;

test('the native benchmark is read op by op, and the tables follow from it', (t) => {
	const [step] = parseSteps(output);
	t.is(step?.ops['matmul (768, 3072), calls'], 12);
	t.is(step?.ops['matmul (768, 3072), wall ms'], 43.11);
	t.is(step?.ops['head_logits, GFLOP'], 19.76);
	t.is(step?.ops['head_logits, GB'], 0.2072);
	t.is(Object.keys(step?.ops ?? {}).length, 15);

	const result = (name: string, extra: Record<string, number>) => ({
		name,
		device: 'avx512',
		dtype: 'fp32',
		shape: {},
		tokensPerSecond: 0,
		ms: { median: 1, p10: 1, p90: 1 },
		gflops: null,
		peakRssBytes: 0,
		repeats: 1,
		extra,
	});
	const results: Results = {
		machine: {},
		results: [
			result('machine', {
				'fp32 peak, t1, GFLOP/s': 175,
				'fp32 peak, t2, GFLOP/s': 350,
				'memory read, t2, GB/s': 24,
				'memory copy, t2, GB/s': 30,
			}),
			result('operations/gpt2/forward/T256/logits', step?.ops ?? {}),
		],
	};
	const text = fill(
		'a\n<!-- table: roofline forward T = 256 -->\nold\n<!-- end -->\n<!-- table: peers --><!-- end -->',
		results,
	);
	// 19.76 GFLOP at 350 GFLOP/s are 56.46 ms, of 58.34; 40 MB at 30 GB/s are 1.33 ms, of 2.
	t.regex(text, /\| head_logits \| 1 \| 19\.76 \| 207 \| 56\.46 \| compute \| 58\.34 \| 97 \|/);
	t.regex(text, /\| layernorm_forward \| 25 \| 0\.00 \| 40 \| 1\.33 \| memory \| 2\.00 \| 67 \|/);
	t.false(text.includes('old'));
	const {
		results: [, operations],
	} = results;
	const bare = fill('<!-- table: roofline forward T = 256 -->\n<!-- end -->', {
		...results,
		results: [operations as BenchResult],
	});
	t.regex(bare, /\| head_logits \| 1 \| 19\.76 \| 207 \| not measured \| not measured \| 58\.34 \| not measured \|/);
	t.throws(() => fill('<!-- table: nonsense -->\n<!-- end -->', results));
	t.true(fill('<!-- table: peers -->\n<!-- end -->', { machine: {}, results: [] }).includes('Not measured yet.'));
});

test.serial(
	'the steps of one native run share it, every repeat is a run of its own, and a failure says why',
	async (t) => {
		const folder = temporary(t);
		const title = (step: string): string => `124m T = 256, ${step}: cpu/avx512\n`;
		const op = '  zero  1  1.00  1.0%  $n.00  0.00  1.00  0.0  0.0%  1.0\n';
		const text = `${title('all logits')}${op}${title('denoise half the rows')}${op}`;
		writeFileSync(
			join(folder, 'bench_forward'),
			`#!/bin/sh\ncd "$(dirname "$0")"\necho run >> runs\nn=$(wc -l < runs)\ncat << END\n${text}END\n`,
			{ mode: 0o755 },
		);
		writeFileSync(join(folder, 'bench_train'), '#!/bin/sh\necho no memory >&2\nexit 1\n', { mode: 0o755 });
		process.env['DN_BENCH_FOLDER'] = folder;
		t.teardown(() => delete process.env['DN_BENCH_FOLDER']);
		const times = async (part: string): Promise<(number | undefined)[]> => {
			const [bench] = named(operationCases, [part]) as [BenchCase];
			const { run } = await bench.setup();
			return [(await run()).ms, (await run()).ms];
		};
		t.deepEqual(await times('forward/T256'), [1, 2]);
		t.deepEqual(await times('denoise/T256/half'), [1, 2]);
		await t.throwsAsync(times('forward/T1024'), { message: /printed no ops/ });
		await t.throwsAsync(times('train-step'), { message: /no memory/ });
	},
);

test('every batch size of the trained model answers the same questions, its twin too', async (t) => {
	for (const sampler of ['confidence-16', 'autoregressive']) {
		const work = [];
		for (const batch of [1, 4]) {
			const [bench] = named(generateCases, [`generate/trained/${sampler}/B${batch}`]) as [BenchCase];
			const { run, teardown } = await bench.setup();
			work.push(await run());
			await teardown();
		}
		const [alone, together] = work;
		t.is(alone?.tokens, together?.tokens, sampler);
		t.is(alone?.extra?.['forwards'], together?.extra?.['forwards'], sampler);
	}
});

test('of several results files the later one counts, row by row, and they must be of one machine', (t) => {
	const row = (name: string, engine: string, median: number) =>
		({ name, dtype: 'fp32', peer: { engine, dtype: 'fp32' }, ours: { ms: { median } } }) as unknown as ComparisonResult;
	const file = (commit: string, comparisons: ComparisonResult[], cpu = 'one'): Results => ({
		machine: { cpu, commit },
		results: [],
		comparisons,
	});
	const early = file('a', [row('forward', 'torch', 1), row('forward', 'llama', 2)]);
	const merged = merge([early, file('b', [row('forward', 'llama', 3), row('decode', 'llama', 4)])]);
	t.deepEqual(merged.comparisons, [row('forward', 'torch', 1), row('forward', 'llama', 3), row('decode', 'llama', 4)]);
	t.is(merged.machine['commit'], 'a and b');
	t.throws(() => merge([early, file('b', [], 'another')]), { message: /different machines/ });
	const bound = file('b', []);
	bound.machine['peers'] = 'without AMX';
	t.throws(() => merge([early, bound]), { message: /different machines: peers is without AMX/ });
});

const canPreload =
	process.platform === 'linux' && process.arch === 'x64' && spawnSync('cc', ['--version']).status === 0;

(canPreload ? test : test.skip)('peers are kept from AMX by refusing them its tiles, and from nothing else', (t) => {
	const folder = temporary(t);
	// arch_prctl(ARCH_REQ_XCOMP_PERM, tile data): 0 or, where there is no AMX, an error that is not EPERM.
	const script = `import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
refused = libc.syscall(ctypes.c_long(158), ctypes.c_long(0x1023), ctypes.c_long(18), *[ctypes.c_long(0)] * 4)
error = ctypes.get_errno()
print(refused, error == 1, libc.syscall(ctypes.c_long(39), *[ctypes.c_long(0)] * 6) == os.getpid())`;
	const ask = (env: NodeJS.ProcessEnv): string =>
		spawnSync('python3', ['-c', script], { encoding: 'utf8', env: { ...process.env, ...env } }).stdout.trim();
	const library = preloadable('without_amx', folder);
	t.is(ask({ LD_PRELOAD: library }), '-1 True True');
	t.regex(ask({}), /^(0|-1) False True$/);
});

test('PyTorch is told what the processor can, not what DN_ISA keeps ours to', (t) => {
	const avx512 = ['avx2', 'avx512f', 'avx512bw', 'avx512vl', 'avx512dq', 'amx_tile'];
	t.deepEqual(torchCpu(new Set(avx512)).tuned, { OPENBLAS_CORETYPE: 'SkylakeX', ATEN_CPU_CAPABILITY: 'avx512' });
	t.deepEqual(torchCpu(new Set(['avx2', 'avx512f'])).shipped, { OPENBLAS_CORETYPE: 'Haswell' });
	t.deepEqual(torchCpu(new Set(['sse2'])), { shipped: {}, tuned: {} });
});

test('a folder that LD_PRELOAD cannot name is refused', (t) => {
	for (const folder of ['with space', 'a:b'])
		t.throws(() => preloadable('without_amx', folder), { message: /cannot be preloaded.*no space or colon/ });
});

test('a temporary folder is gone after Ctrl-C', async (t) => {
	const module = JSON.stringify(new URL('../bench/temporary.js', import.meta.url).href);
	const script = `
		const { temporaryFolder } = await import(${module});
		console.log(temporaryFolder('dn-bench-test-').path);
		setInterval(() => {}, 1000);`;
	const child = spawn(process.execPath, ['--input-type=module', '--eval', script], {
		stdio: ['ignore', 'pipe', 'inherit'],
	});
	const [output] = (await once(child.stdout, 'data')) as [Buffer];
	const path = output.toString().trim();
	t.true(existsSync(path));
	child.kill('SIGINT');
	t.deepEqual(await once(child, 'exit'), [130, null]);
	t.false(existsSync(path));
});

test('the answer to a request that was given up is not taken for the next one', async (t) => {
	const script = `
		const { createInterface } = await import('node:readline');
		for await (const line of createInterface({ input: process.stdin })) {
			const { id } = JSON.parse(line);
			const reply = (id, version) => console.log('@' + JSON.stringify({ id, value: { version } }));
			reply(id - 1, 'late');
			reply(id, 'asked for');
		}`;
	const args = ['--input-type=module', '--eval', script];
	const contender = new ContenderProcess({ command: process.execPath, args, env: {} });
	try {
		t.deepEqual(await contender.open({} as Opening), { version: 'asked for' });
	} finally {
		await contender.close();
	}
});

test('ours as a contender generates all tokens it is asked for', async (t) => {
	const folder = temporary(t);
	const config = { layers: 1, heads: 2, channels: 16, vocab: 64, context: 64, maskId: 1, eosId: 0 };
	await using model = await DiffuGPT.fromConfig(config, { device: 'cpu', seed: 1 });
	await model.save(join(folder, 'model'));
	const contender = new ContenderProcess(commandOf('ours', false, folder));
	try {
		const path = join(folder, 'model');
		await contender.open({ path, dtype: 'fp32', config, tuned: false, threads: 1, cores: [0] });
		await contender.prepare({ kind: 'decode', prompt: 4, tokens: 40 });
		t.is((await contender.run(2)).timings.length, 2);
		const sampling = { kind: 'sample', T: 32, steps: 8, topP: 0.9, temperature: 0.95 } as const;
		t.is((await contender.prepare(sampling)).length, 256);
		t.is((await contender.run(1)).timings.length, 1);
	} finally {
		await contender.close();
	}
});

test('the GPU script logs its build into the build folder, and names its usage', (t) => {
	const folder = temporary(t);
	for (const [name, script] of [
		['nvidia-smi', 'echo 9.0'],
		['cmake', 'echo no such compiler; exit 1'],
	] as const)
		writeFileSync(join(folder, name), `#!/bin/sh\n${script}\n`, { mode: 0o755 });
	const env = { ...process.env, PATH: `${folder}:${process.env['PATH']}` };
	const script = (...args: string[]) =>
		spawnSync('bash', [join(root, 'bench', 'gpu.sh'), ...args], { encoding: 'utf8', env });
	const { status, stdout } = script('--build', join(folder, 'build'));
	t.is(status, 1);
	t.regex(stdout, /no such compiler/);
	t.deepEqual(readdirSync(join(folder, 'build')), ['build.log']);
	t.deepEqual(readdirSync(folder).sort(), ['build', 'cmake', 'nvidia-smi']);
	for (const args of [['--build'], ['--bogus']]) {
		const { status: wrong, stderr } = script(...args);
		t.is(wrong, 64);
		t.regex(stderr, /^usage: bench\/gpu\.sh/);
	}
});

/** The benchmark's command with these arguments. */
function bench(...args: string[]): Promise<{ code: number; stdout: string; stderr: string }> {
	return new Promise((resolve) => {
		execFile(process.execPath, [join(root, 'dist', 'bench', 'run.js'), ...args], (error, stdout, stderr) =>
			resolve({ code: Number(error?.code ?? 0), stdout, stderr }),
		);
	});
}

test('the command lists what names choose', async (t) => {
	t.is((await bench('--list', 'forward/tiny')).stdout, 'forward/tiny/T256/logits\n');
	const comparing = await bench('--list', '--peers', 'machine', 'decode');
	t.is(comparing.stdout, 'machine\ndecode/gpt2/128/int8\ndecode/gpt2/128/fp32\ndecode/gpt2/128/bf16\n');
	t.regex((await bench('--help')).stdout, /--repeats <n>/);
});

test('the command names a wrong option, or what nothing matches, and writes nothing then', async (t) => {
	const file = join(temporary(t), 'results.json');
	writeFileSync(file, 'kept');
	const wrong: [string[], RegExp][] = [
		[['--repeats', '0'], /--repeats <n>.*'0'.*whole number >= 1/],
		[['--rounds', 'two', '--peers'], /--rounds <n>.*'two'.*whole number >= 1/],
		[['--bogus'], /unknown option '--bogus'/],
		[['no such case'], /no case matches no such case; there are\nmachine\n/],
		[['--list', 'forward', 'nonsense'], /no case matches nonsense/],
		[
			['--peers', 'TYPO', '--json', file],
			/no case or comparison matches TYPO; there are\n(.+\n)*decode\/gpt2\/128\/int8\n/,
		],
		[['--peers', '--quick', 'train-step/gpt2/2x256'], /no case or comparison of a quick run matches/],
		[['forward/tiny', '--rounds', '3'], /option '--rounds' needs '--peers'/],
		[['forward/tiny', '--quick'], /option '--quick' needs '--peers'/],
	];
	await Promise.all(
		wrong.map(async ([args, message]) => {
			const { code, stdout, stderr } = await bench(...args);
			t.is(code, 1, args.join(' '));
			t.is(stdout, '');
			t.regex(stderr, message);
		}),
	);
	t.is(readFileSync(file, 'utf8'), 'kept');
});
