/** `prepare` and `train` as commands: runs, signals, resuming, wrong use. */
import { execFileSync, spawn } from 'node:child_process';
import { once } from 'node:events';
import { createWriteStream, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

import test from 'ava';
import { prepare, TokenDataset, Tokenizer } from 'diffusion-native';

const root = mkdtempSync(join(tmpdir(), 'dn-train-cli-'));
test.after.always(() => rmSync(root, { recursive: true, force: true }));
const program = fileURLToPath(new URL('./helpers/train-cli.js', import.meta.url));

interface Ended {
	code: number | null;
	stdout: string;
	stderr: string;
}

/** Runs a command; `onOutput` may send it a signal. */
function run(
	args: string[],
	onOutput?: (stdout: string, interrupt: () => void) => void,
	onStart?: (interrupt: () => void) => void,
): Promise<Ended> {
	return new Promise((resolve, reject) => {
		const child = spawn(process.execPath, [program, ...args], { cwd: root, stdio: ['ignore', 'pipe', 'pipe'] });
		onStart?.(() => child.kill('SIGINT'));
		let stdout = '';
		let stderr = '';
		child.stdout.setEncoding('utf8').on('data', (chunk: string) => {
			stdout += chunk;
			onOutput?.(stdout, () => child.kill('SIGINT'));
		});
		child.stderr.setEncoding('utf8').on('data', (chunk: string) => {
			stderr += chunk;
		});
		child.on('error', reject);
		child.on('close', (code) => resolve({ code, stdout, stderr }));
	});
}

test.serial('prepare with a tokenizer of its own, train, Ctrl-C, resume', async (t) => {
	const words = ['red', 'green', 'blue', 'one', 'two', 'three'];
	const rows = Array.from({ length: 120 }, (_, i) => ({
		prompt: `${words[i % 6]} ${i}:`,
		answer: `${words[(i + 1) % 6]} then ${words[(i + 2) % 6]}`,
	}));
	writeFileSync(join(root, 'pairs.jsonl'), rows.map((row) => JSON.stringify(row)).join('\n'));
	const prepared = await run([
		'prepare',
		'pairs.jsonl',
		'--out',
		'train.bin',
		'--format',
		'pairs',
		'--context',
		'32',
		'--tokenizer',
		'tok.json',
		'--train-tokenizer',
		'290',
		'--validation',
		'0.2',
		'--padding',
		'random:4',
		'--json',
	]);
	t.is(prepared.code, 0, prepared.stderr);
	t.is(Tokenizer.fromFile(join(root, 'tok.json')).vocabSize, 290);
	t.true(prepared.stdout.includes('"format":"pairs"'));
	const config = {
		scratch: { layers: 1, heads: 2, channels: 32, vocab: 290, context: 32, eosId: 288, maskId: 289 },
		tokenizer: 'tok.json',
		data: 'train.bin',
		validation: 'train.validation.bin',
		maxSteps: 100000,
		batchSize: 4,
		device: 'cpu',
		threads: 1,
		checkpoint: { dir: 'run', every: 50000 },
		tensorboard: true,
	};
	writeFileSync(join(root, 'run.json'), JSON.stringify(config));
	let sent = false;
	const stopped = await run(['train', '--config', 'run.json', '--json'], (stdout, interrupt) => {
		if (sent || stdout.split('\n').length < 4) return;
		sent = true;
		interrupt();
	});
	t.is(stopped.code, 0, stopped.stderr);
	t.regex(stopped.stderr, /saved run\/step-\d+/);
	const lines = stopped.stdout
		.trim()
		.split('\n')
		.map((line) => JSON.parse(line) as { step: number; loss: number });
	const last = lines.at(-1)?.step as number;
	t.true(last >= 3 && last < 100000);
	t.deepEqual(readdirSync(join(root, 'run')).sort(), [
		'metrics.jsonl',
		`step-${String(last).padStart(8, '0')}`,
		'tensorboard',
	]);
	config.maxSteps = last + 2;
	writeFileSync(join(root, 'run.json'), JSON.stringify({ maxSteps: last + 2, device: 'cpu' }));
	const resumed = await run(['train', '--config', 'run.json', '--resume', 'run']);
	t.is(resumed.code, 0, resumed.stderr);
	t.regex(resumed.stderr, new RegExp(`step ${last + 2}/${last + 2} .*validation`));
	t.is(
		readFileSync(join(root, 'run', 'metrics.jsonl'), 'utf8')
			.trim()
			.split('\n').length,
		last + 2,
	);
});

test.serial("the original project's configuration file runs, and what it was mapped to is printed", async (t) => {
	const text = Array.from({ length: 200 }, (_, i) => `Sentence number ${i} of the corpus says nothing new.\n`).join('');
	const tokens = {
		tokenizer: Tokenizer.gpt2(),
		out: join(root, 'owt.bin'),
		container: 'nanogpt',
		context: 16,
	} as const;
	(await prepare([{ text }], tokens)).close();
	const config = {
		pipeline: 'diffusion',
		init_from: '',
		memmap_path: 'owt.bin',
		mask_id: 10541,
		eos_token_id: 50256,
		pad_token_id: 50257,
		attn_annealing_steps: 2,
		context_length: 16,
		n_embd: 8,
		n_layer: 1,
		n_head: 2,
		n_epochs: 1,
		n_steps: 3,
		batch_size: 2,
		accumulate_grad: 2,
		betas: [0.9, 0.95],
		max_lr: 1e-3,
		val_test_perc: 0.1,
		val_check_interval: 4,
		save_dir: 'original',
		wandb: true,
		device: 'cpu',
		seed: 7,
	};
	writeFileSync(join(root, 'original.json'), JSON.stringify(config));
	const ended = await run(['train', '--config', 'original.json', '--json']);
	t.is(ended.code, 0, ended.stderr);
	for (const key of Object.keys(config)) t.true(ended.stderr.includes(`original.json: ${key}: `), key);
	const steps = ended.stdout
		.trim()
		.split('\n')
		.map((line) => JSON.parse(line) as { step: number; tokens: number; validation?: number });
	t.deepEqual(
		steps.map(({ step, tokens, validation }) => [step, tokens, validation !== undefined]),
		[
			[1, 64, false],
			[2, 64, true],
			[3, 64, true],
		],
	);
	const stored = readFileSync(join(root, 'original', 'step-00000003', 'config.json'), 'utf8');
	t.like(JSON.parse(stored), { vocab_size: 50258, pad_token_id: 50257 });
	t.deepEqual(readdirSync(join(root, 'original')).sort(), [
		'metrics.jsonl',
		'step-00000002',
		'step-00000003',
		'tensorboard',
	]);
});

test.serial('a run by epochs, with a share held out, continues to where it would have ended', async (t) => {
	const text = Array.from({ length: 150 }, (_, i) => `Sentence ${i} follows sentence ${i - 1}.\n`).join('');
	const prepared = { tokenizer: Tokenizer.gpt2(), out: join(root, 'epochs.bin'), context: 64 } as const;
	const data = await prepare([{ text }], prepared);
	const { tokens } = data;
	data.close();
	const config = {
		scratch: { layers: 1, heads: 2, channels: 8, vocab: 50258, context: 16, maskId: 50257 },
		data: 'epochs.bin',
		validation: 0.25,
		epochs: 2,
		maxSteps: 5000,
		batchTokens: 160,
		device: 'cpu',
		threads: 1,
		seed: 3,
		checkpoint: { dir: 'epochs', every: 1, keep: 100 },
	};
	writeFileSync(join(root, 'epochs.json'), JSON.stringify(config));
	const whole = await run(['train', '--config', 'epochs.json', '--json']);
	t.is(whole.code, 0, whole.stderr);
	const folders = (): string[] => readdirSync(join(root, 'epochs')).filter((name) => name.startsWith('step-'));
	const windows = Math.floor(tokens / 16);
	const kept = windows - Math.round(0.25 * windows);
	t.is(folders().length, Math.ceil((2 * tokens * kept) / windows / 160), 'epochs of what is not held out');
	const last = folders().at(-1) as string;
	const weights = (): Buffer => readFileSync(join(root, 'epochs', last, 'model.safetensors'));
	const expected = weights();
	for (const name of folders().slice(2)) rmSync(join(root, 'epochs', name), { recursive: true });
	const resumed = await run(['train', '--config', 'epochs.json', '--resume', 'epochs', '--json']);
	t.is(resumed.code, 0, resumed.stderr);
	t.is(folders().at(-1), last);
	t.true(weights().equals(expected), 'bit for bit the run that was not interrupted');
	// More of them, with the sizes that the run has.
	writeFileSync(join(root, 'more.json'), JSON.stringify({ epochs: 3, device: 'cpu' }));
	const longer = await run(['train', '--config', 'more.json', '--resume', 'epochs', '--json']);
	t.is(longer.code, 0, longer.stderr);
	t.is(folders().length, 2 + Math.ceil((3 * tokens * kept) / windows / 160) - 2);
});

test.serial('when nobody reads what a run prints, it stops with a checkpoint', async (t) => {
	const config = {
		scratch: { layers: 1, heads: 2, channels: 8, vocab: 50258, context: 16, maskId: 50257 },
		data: 'epochs.bin',
		maxSteps: 100000,
		batchSize: 1,
		device: 'cpu',
		threads: 1,
		checkpoint: { dir: 'unread' },
	};
	writeFileSync(join(root, 'unread.json'), JSON.stringify(config));
	const parameters = [program, 'train', '--config', 'unread.json', '--json'];
	const child = spawn(process.execPath, parameters, { cwd: root, stdio: ['ignore', 'pipe', 'pipe'] });
	child.stdout.destroy();
	child.stderr.destroy();
	const [code] = (await once(child, 'close')) as [number];
	t.is(code, 0);
	t.is(readdirSync(join(root, 'unread')).filter((name) => name.startsWith('step-')).length, 1);
});

test.serial('wrong use is told', async (t) => {
	writeFileSync(join(root, 'typo.json'), '{"maxStep":3}');
	const typo = await run(['train', '--config', 'typo.json']);
	t.is(typo.code, 1);
	t.regex(typo.stderr, /did you mean 'maxSteps'/);
	for (const [command, name] of [
		[['prepare', 'a.txt', '--out', 'x.bin'], '--context'],
		[['prepare', 'a.txt', '--out', 'x.bin'], '--validation'],
		[['train'], '--threads'],
	] as const) {
		const { stderr } = await run([...command, name, 'foo']);
		t.is(stderr, `${name} is "foo", expected a number\n`);
	}
	t.regex((await run(['train'])).stderr, /needs --config or --resume/);
	t.regex((await run(['train', '--resume', 'nothing'])).stderr, /nothing holds no checkpoint/);
	t.regex((await run(['prepare', 'missing.txt', '--out', 'x.bin'])).stderr, /missing\.txt cannot be read/);
});

test.serial('prepare takes its ids, split and limits from flags', async (t) => {
	writeFileSync(join(root, 'lines.txt'), Array.from({ length: 40 }, (_, i) => `line ${i}\n`).join(''));
	const common = ['prepare', 'lines.txt', '--format', 'documents', '--split-text', 'line', '--validation', '0.4'];
	const ids = ['--eos-id', '7', '--bos-id', 'none', '--pad-id', '9', '--padding', 'log-uniform:6'];
	const outputs = ['--out', 'ids.bin', '--validation-out', 'held.bin', '--split-seed', '3'];
	const made = await run([...common, ...ids, ...outputs]);
	t.is(made.code, 0, made.stderr);
	using data = await TokenDataset.open(join(root, 'ids.bin'));
	t.is(data.eosId, 7);
	t.is(data.padId, 9);
	t.deepEqual(data.padding, { logUniform: 6 });
	const { tokens } = data.get(0);
	t.is(tokens[0], Tokenizer.gpt2().encode('line')[0]);
	t.is(tokens.at(-1), 7);
	using held = await TokenDataset.open(join(root, 'held.bin'));
	t.is(data.sequences + held.sequences, 40);
	// Another seed holds out other lines.
	const other = await run([...common, '--out', 'other.bin', '--split-seed', '4', '--bos-id', '5']);
	t.is(other.code, 0, other.stderr);
	using shuffled = await TokenDataset.open(join(root, 'other.validation.bin'));
	const texts = (set: TokenDataset, skip: number): string[] =>
		Array.from({ length: set.sequences }, (_, i) => Tokenizer.gpt2().decode(set.get(i).tokens.slice(skip, -1)));
	t.is(shuffled.get(0).tokens[0], 5);
	t.notDeepEqual(texts(shuffled, 1), texts(held, 0));
	const short = await run([...common, '--out', 'short.bin', '--max-line', '3']);
	t.is(short.code, 1);
	t.regex(short.stderr, /longer than 3 characters/);
	t.regex(
		(await run([...common, '--out', 'x.bin', '--padding', 'log:3'])).stderr,
		/--padding is "log:3", expected none, context, batch, .* log-uniform:N/,
	);
});

const withSignals = process.platform === 'win32' ? test.skip : test.serial;

withSignals(
	'an interrupted prepare writes nothing, and a run without a checkpoint folder says that nothing was saved',
	async (t) => {
		// A pipe without end: whoever opens it for reading is at work, and is still at work when the signal comes.
		execFileSync('mkfifo', [join(root, 'much.txt')]);
		const reading = run(
			['prepare', 'much.txt', '--split-text', 'line', '--out', 'much.bin'],
			undefined,
			(interrupt) => {
				const endless = createWriteStream(join(root, 'much.txt'));
				endless.on('error', () => {});
				const more = (): boolean =>
					endless.write('some words of a long text\n'.repeat(4000), (error) => error ?? more());
				endless.on('open', () => {
					more();
					setTimeout(interrupt, 100);
				});
			},
		);
		const prepared = await reading;
		t.is(prepared.code, 1);
		// A slow machine reports progress before it hears the signal.
		t.regex(prepared.stderr, /^(\d+ documents, .*\n)*interrupted; nothing was written\n$/);
		t.deepEqual(
			readdirSync(root).filter((name) => name.startsWith('much.bin')),
			[],
		);
		const data = await prepare(
			Array.from({ length: 8 }, (_, i) => Int32Array.of(1, 2, 3, i)),
			{
				tokenizer: { encode: () => new Int32Array(0), vocabSize: 20 },
				out: join(root, 'few.bin'),
				format: 'documents',
				eosId: 0,
			},
		);
		data.close();
		const scratch = { layers: 1, heads: 1, channels: 8, vocab: 20, context: 16, maskId: 19 };
		writeFileSync(
			join(root, 'bare.json'),
			JSON.stringify({ scratch, data: 'few.bin', maxSteps: 1e6, device: 'cpu', threads: 1 }),
		);
		let sent = false;
		const trained = await run(['train', '--config', 'bare.json', '--json'], (_, interrupt) => {
			if (sent) return;
			sent = true;
			interrupt();
		});
		t.is(trained.code, 1);
		t.regex(trained.stderr, /interrupted; nothing was saved: the configuration has no checkpoint\.dir/);
	},
);
