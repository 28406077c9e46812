/** The command line, run as a child process: output, files, exit status, interruption. */
import { spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import test from 'ava';
import { DiffuGPT, type Info, info, Tokenizer } from 'diffusion-native';

import { padding } from '../lib/cli/terminal.js';
import { lengthMethods } from '../lib/length/method.js';
import { root } from './helpers/fixtures.js';
import { patience } from './helpers/fork.js';

const folder = mkdtempSync(join(tmpdir(), 'diffusion-native-cli-'));
const modelPath = join(folder, 'model');
const options = ['--length', '8', '--sampler', 'ancestral', '--steps', '4', '--seed', '7'];

interface Ended {
	code: number | null;
	stdout: string;
	stderr: string;
}

/** Runs a command; `onOutput` sees standard output as it grows. */
function run(
	parameters: string[],
	onOutput?: (text: string, kill: (signal: NodeJS.Signals) => void) => void,
	variables: Record<string, string> = {},
): Promise<Ended> {
	return new Promise((resolve, reject) => {
		const child = spawn(process.execPath, [join(root, 'dist', 'lib', 'cli', 'main.js'), ...parameters], {
			stdio: ['ignore', 'pipe', 'pipe'],
			env: { ...process.env, ...variables },
		});
		let stdout = '';
		let stderr = '';
		child.stdout.setEncoding('utf8').on('data', (chunk: string) => {
			stdout += chunk;
			onOutput?.(stdout, (signal) => child.kill(signal));
		});
		child.stderr.setEncoding('utf8').on('data', (chunk: string) => {
			stderr += chunk;
		});
		const timer = setTimeout(() => {
			stderr += `\nkilled after ${patience} ms`;
			child.kill('SIGKILL');
		}, patience);
		child.on('error', reject);
		child.on('close', (code) => {
			clearTimeout(timer);
			resolve({ code, stdout, stderr });
		});
	});
}

test.before(async () => {
	const model = await DiffuGPT.fromConfig(
		{ layers: 1, heads: 2, channels: 16, vocab: 50257, context: 512 },
		{ seed: 1, tokenizer: Tokenizer.gpt2(), device: 'cpu' },
	);
	await model.save(modelPath);
	await model.dispose();
});

test.after.always(() => rmSync(folder, { recursive: true, force: true }));

test('info describes the installation, for people and as JSON', async (t) => {
	const plain = await run(['info']);
	t.is(plain.code, 0, plain.stderr);
	const expected = info();
	t.true(plain.stdout.includes(expected.version) && plain.stdout.includes(expected.cpu.isa));
	const json = await run(['info', '--json']);
	t.deepEqual(JSON.parse(json.stdout), JSON.parse(JSON.stringify(expected)));
});

test('info says which products fp32 has, and refuses what the environment variables cannot mean', async (t) => {
	t.regex(info().cpu.fp32, /^(portable|avx2|avx512|avx512-pairs|amx-bf16x3)$/);
	const without = await run(['info', '--json'], undefined, { DN_PAIRS: '0' });
	t.not((JSON.parse(without.stdout) as Info).cpu.fp32, 'avx512-pairs');
	const portable = await run(['info', '--json'], undefined, { DN_ISA: 'portable' });
	t.is((JSON.parse(portable.stdout) as Info).cpu.fp32, 'portable');
	for (const [name, expected] of [
		['DN_ISA', 'portable, avx2, avx512 or amx'],
		['DN_PAIRS', '0 or 1'],
	] as const) {
		const refused = await run(['info'], undefined, { DN_ISA: '', [name]: 'yes' });
		t.is(refused.code, 2);
		t.is(refused.stderr, `error ERR_DN_ARGUMENT: ${name} is 'yes', expected ${expected}\n`);
	}
});

test('generate prints what the library generates', async (t) => {
	const model = await DiffuGPT.fromPretrained(modelPath, { device: 'cpu' });
	const expected = await model.generate('Hello there', { length: 8, sampler: 'ancestral', steps: 4, seed: 7 });
	await model.dispose();
	const plain = await run(['generate', modelPath, 'Hello there', ...options]);
	t.is(plain.code, 0, plain.stderr);
	t.is(plain.stdout, `${expected.text}\n`);
	const trace = join(folder, 'trace.jsonl');
	const json = await run(['generate', modelPath, 'Hello there', ...options, '--json', '--trace', trace]);
	t.is(json.code, 0, json.stderr);
	t.is(readFileSync(trace, 'utf8'), json.stdout);
	const lines = json.stdout
		.trimEnd()
		.split('\n')
		.map((line) => JSON.parse(line) as Record<string, unknown>);
	// One line for every step that reveals anything.
	t.true(expected.stats.forwards > 1);
	t.deepEqual(
		lines.map(({ type }) => type),
		[...new Array<string>(expected.stats.forwards).fill('step'), 'result'],
	);
	const last = lines.at(-1) as Record<string, unknown>;
	t.is(last['text'], expected.text);
	t.is(last['seed'], '7');
	t.deepEqual(last['tokens'], Array.from(expected.tokens));
});

test('generate writes a page that plays the denoising back, and takes the options of caches', async (t) => {
	const page = join(folder, 'page.html');
	const cached = ['--length', '8', '--sampler', 'threshold', '--threshold', '0', '--block', '4', '--cache', 'dual'];
	const { code, stderr, stdout } = await run([
		'generate',
		modelPath,
		'<b>Hello</b>',
		...cached,
		'--measure-drift',
		'--seed',
		'7',
		'--json',
		'--html',
		page,
	]);
	t.is(code, 0, stderr);
	const result = JSON.parse(stdout.trimEnd().split('\n').at(-1) as string) as {
		stats: { forwards: number; drift: { rows: number } };
	};
	t.is(result.stats.forwards, 2);
	t.is(result.stats.drift.rows, 0, 'each block was filled by its first, exact forward');
	const html = readFileSync(page, 'utf8');
	t.true(html.startsWith('<!doctype html>') && html.includes('2 forwards') && !html.includes('<b>'));
	const blocks = await run(['generate', modelPath, 'A', '--length', '6', '--block-causal', '4', '--cache', 'prefix']);
	t.is(blocks.code, 0, blocks.stderr);
	const unwritable = await run(['generate', modelPath, 'A', '--html', join(folder, 'no', 'page')]);
	t.is(unwritable.code, 1);
	t.regex(unwritable.stderr, /page: cannot write/);
});

test('generate fills a gap and finds a length', async (t) => {
	const filled = await run(['generate', modelPath, '--prefix', 'A', '--suffix', ' B', '--length', '3', '--json']);
	t.is(filled.code, 0, filled.stderr);
	const { sequence } = JSON.parse(filled.stdout.trimEnd().split('\n').at(-1) as string) as { sequence: number[] };
	t.is(sequence.length, 5);
	const variable = await run([
		'generate',
		modelPath,
		'A',
		'--max-length',
		'9',
		'--length-method',
		'block',
		'--length-block',
		'4',
	]);
	t.is(variable.code, 0, variable.stderr);
});

test('wrong usage ends with 2 and names what is wrong', async (t) => {
	for (const [parameters, message] of [
		[[], /Usage/],
		[['generate'], /model/],
		[['generate', modelPath], /prompt/],
		[['generate', modelPath, 'A', '--suffix', 'B'], /--suffix/],
		[['generate', modelPath, 'A', '--lenght', '3'], /--lenght/],
		[['generate', modelPath, 'A', '--length', 'x'], /--length/],
		[['generate', modelPath, 'A', '--length', '-1'], /length is -1/],
		[['generate', modelPath, 'A', '--length', '3', '--max-length', '4'], /--max-length/],
		[['generate', modelPath, 'A', '--sampler', 'greedy'], /greedy/],
		[['generate', modelPath, 'A', '--cache', 'dual'], /cache needs option block/],
		[['generate', modelPath, ''], /empty/],
		[['fly'], /fly/],
	] as [string[], RegExp][]) {
		const { code, stderr, stdout } = await run(parameters);
		t.is(code, 2, parameters.join(' '));
		t.regex(stderr, message);
		t.is(stdout, '');
	}
});

test('a failure ends with 1 and its code', async (t) => {
	const { code, stderr } = await run(['generate', join(folder, 'nowhere'), 'A']);
	t.is(code, 1);
	t.regex(stderr, /ERR_DN_/);
	const unwritable = await run(['generate', modelPath, 'A', '--trace', join(folder, 'no', 'trace')]);
	t.is(unwritable.code, 1);
	t.regex(unwritable.stderr, /trace/);
	const broken = join(folder, 'broken.jsonl');
	writeFileSync(broken, '{"text":"a"}\n{"text":\n');
	const prepared = await run(['prepare', broken, '--out', join(folder, 'broken.bin')]);
	t.is(prepared.code, 1, 'bad data are no wrong usage');
	t.regex(prepared.stderr, /^error ERR_DN_ARGUMENT: .*line 2: not JSON/m);
	t.is((await run(['prepare', broken, '--out', join(folder, 'broken.bin'), '--context', '0'])).code, 2);
});

test('an output that is an input or another output is refused before anything is read', async (t) => {
	const data = join(folder, 'data.jsonl');
	writeFileSync(data, '{"text":"Hello"}\n');
	const twice = join(folder, 'twice');
	for (const [parameters, message] of [
		[
			['eval', modelPath, data, '-m', 'nelbo', '-o', data],
			/--output .*data\.jsonl is the same file as the data .*data\.jsonl/,
		],
		[['eval', 'length', modelPath, data, '--html', data], /--html .*data\.jsonl is the same file as the pairs/],
		[['generate', modelPath, 'A', '--trace', twice, '--html', join(folder, '.', 'twice')], /--html .* as --trace/],
	] as [string[], RegExp][]) {
		const { code, stderr } = await run(parameters);
		t.is(code, 2, stderr);
		t.regex(stderr, message);
	}
	t.is(readFileSync(data, 'utf8'), '{"text":"Hello"}\n');
	t.false(existsSync(twice));
});

test('a trace may go to standard output', (t) => {
	// A pipe of a shell: those of Node are sockets, which cannot be opened by a path.
	const command = '"$0" "$@" --trace /dev/stdout | cat';
	const parameters = [join(root, 'dist', 'lib', 'cli', 'main.js'), 'generate', modelPath, 'A', ...options];
	const { stdout } = spawnSync('sh', ['-c', command, process.execPath, ...parameters], { encoding: 'utf8' });
	t.regex(stdout, /^\{"type":"step"/m);
	t.regex(stdout, /^\{"type":"result"/m);
});

test('a file that fills the disk ends with 1 and says which, without a stack trace', async (t) => {
	if (!existsSync('/dev/full')) return t.pass('there is no /dev/full here');
	const { code, stderr, stdout } = await run(['generate', modelPath, 'A', ...options, '--trace', '/dev/full']);
	t.is(code, 1, stdout);
	t.regex(stderr, /^error ERR_DN_CHECKPOINT: \/dev\/full: cannot write: .*ENOSPC/m);
	t.notRegex(stderr, /\n\s+at /);
});

test('a reader of stdout that leaves interrupts the command', async (t) => {
	const long = ['--length', '256', '--sampler', 'ancestral', '--steps', '256'];
	const parameters = [join(root, 'dist', 'lib', 'cli', 'main.js'), 'generate', modelPath, 'A', ...long, '--json'];
	const child = spawn(process.execPath, parameters, { stdio: ['ignore', 'pipe', 'pipe'] });
	let stderr = '';
	child.stderr.setEncoding('utf8').on('data', (chunk: string) => {
		stderr += chunk;
	});
	child.stdout.destroy();
	const [code] = (await once(child, 'close')) as [number];
	t.is(code, 1, stderr);
	t.is(stderr, 'interrupted\n');
});

test('--help and --version end with 0 and say everything', async (t) => {
	const help = await run(['generate', '--help']);
	t.is(help.code, 0);
	for (const word of ['--sampler', '--temperature', '--cache', '--json', '--trace', '--html', 'Ctrl-C'])
		t.true(help.stdout.includes(word), word);
	const version = await run(['--version']);
	t.is(version.stdout.trim(), info().version);
});

test('--help of every command tells the exit statuses and what Ctrl-C does', async (t) => {
	const commands = [['generate'], ['prepare'], ['train'], ['eval'], ['eval', 'length'], ['info']];
	const helps = await Promise.all(commands.map((command) => run([...command, '--help'])));
	for (const [i, { code, stdout }] of helps.entries()) {
		const label = commands[i]?.join(' ') as string;
		t.is(code, 0, label);
		t.regex(stdout, /Exit status: 0 done, 1 failed or interrupted, 2 wrong usage\. Ctrl-C/, label);
		t.notRegex(stdout, /130/, label);
	}
	for (const flag of [
		'--eos-id',
		'--bos-id',
		'--pad-id',
		'--validation-out',
		'--split-seed',
		'--max-line',
		'log-uniform:N',
	])
		t.true(helps[1]?.stdout.includes(flag), flag);
	// On one line each, whatever the width of the terminal.
	const [generate, prepare, train, score, length] = helps.map(({ stdout }) => stdout.replace(/\s+/g, ' '));
	for (const method of lengthMethods)
		t.regex(generate as string, new RegExp(`--length-method <name> [^<]*\\b${method}\\b`));
	t.regex(generate as string, /rho-eos[^(]*\(default: constant\)/);
	t.regex(prepare as string, /split, truncate, drop or error \(default: split; pairs: error\)/);
	t.regex(train as string, /cuda:N \(default: as configured, else auto\)/);
	t.regex(score as string, /random:N or log-uniform:N \(default: none\)/);
	t.regex(score as string, /draws per sequence \(default: nelbo 8/);
	t.is(length?.match(/\(default: 256\)/g)?.length, 2);
});

test('--padding is spelt alike everywhere, and as the library spells it', (t) => {
	const parse = padding(['none', 'context']);
	t.is(parse('context'), 'context');
	t.deepEqual(parse('multiple:8'), { multiple: 8 });
	t.deepEqual(parse('random:3'), { random: 3 });
	t.deepEqual(parse('log-uniform:6'), { logUniform: 6 });
	t.deepEqual(parse('logUniform:6'), { logUniform: 6 });
	for (const wrong of ['batch', 'log:3', 'random', 'random:x', ''])
		t.throws(() => parse(wrong), {
			message: /^--padding is ".*", expected none, context, multiple:N, random:N or log-uniform:N$/,
		});
});

test('a second Ctrl-C kills', async (t) => {
	const source = `
		import { interruptible } from ${JSON.stringify(join(root, 'dist', 'lib', 'cli', 'terminal.js'))};
		const { signal } = interruptible();
		signal.addEventListener('abort', () => console.log('again'));
		console.log('ready');
		setInterval(() => {}, 1000);
	`;
	const child = spawn(process.execPath, ['--input-type=module', '--eval', source], {
		stdio: ['ignore', 'pipe', 'inherit'],
	});
	child.stdout.on('data', () => child.kill('SIGINT'));
	const killed = await new Promise((resolve) => child.on('exit', (_, signal) => resolve(signal)));
	t.is(killed, 'SIGINT');
});

test('Ctrl-C stops after the current step and leaves the old files', async (t) => {
	let sent = false;
	const place = mkdtempSync(join(folder, 'old-'));
	const files = ['trace', 'html'].map((name) => join(place, name)) as [string, string];
	for (const path of files) writeFileSync(path, 'old');
	const { code, stdout, stderr } = await run(
		[
			...['generate', modelPath, 'Hello', '--length', '500', '--steps', '500', '--json'],
			...['--trace', files[0], '--html', files[1]],
		],
		(text, kill) => {
			if (sent || text.split('\n').length < 3) return;
			sent = true;
			kill('SIGINT');
		},
	);
	t.is(code, 1);
	t.is(stderr, 'interrupted\n');
	t.false(stdout.includes('"result"'));
	for (const path of files) t.is(readFileSync(path, 'utf8'), 'old');
	t.deepEqual(readdirSync(place).sort(), ['html', 'trace']);
});

(process.platform === 'win32' ? test.skip : test)(
	'an interrupted evaluation leaves the old output and its records so far beside it',
	async (t) => {
		const folder = mkdtempSync(join(tmpdir(), 'dn-cli-partial-'));
		t.teardown(() => rmSync(folder, { recursive: true, force: true }));
		const data = join(folder, 'data.jsonl');
		const output = join(folder, 'out.jsonl');
		// Far more records than are scored before the signal.
		writeFileSync(data, '{"prompt":"one two","answer":"three"}\n'.repeat(50_000));
		writeFileSync(output, 'old');
		const main = join(root, 'dist', 'lib', 'cli', 'main.js');
		const args = ['eval', modelPath, data, '-m', 'likelihood', '-o', output, '--device', 'cpu'];
		const child = spawn(process.execPath, [main, ...args], { stdio: ['ignore', 'ignore', 'pipe'] });
		let stderr = '';
		child.stderr.setEncoding('utf8').on('data', (chunk: string) => {
			stderr += chunk;
		});
		const hasRecords = (): boolean =>
			readdirSync(folder).some((name) => name.endsWith('.tmp') && statSync(join(folder, name)).size > 0);
		const watching = setInterval(() => {
			if (!hasRecords()) return;
			clearInterval(watching); // a second signal would kill
			child.kill('SIGINT');
		}, 20);
		const [code] = (await once(child, 'close')) as [number | null];
		clearInterval(watching);
		t.is(code, 1, stderr);
		t.is(readFileSync(output, 'utf8'), 'old');
		t.true(stderr.includes(`the records so far are in ${output}.partial`), stderr);
		const [first] = readFileSync(`${output}.partial`, 'utf8').split('\n');
		t.is(typeof JSON.parse(first as string), 'object');
	},
);
