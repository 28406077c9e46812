/** What ends `train` from outside, and that it leaves a checkpoint: signals, a terminal that is gone, a full disk. */
import { type ChildProcess, type StdioOptions, spawn } from 'node:child_process';
import { once } from 'node:events';
import { closeSync, existsSync, mkdtempSync, openSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

import test from 'ava';
import { prepare } from 'diffusion-native';

const root = mkdtempSync(join(tmpdir(), 'dn-train-signals-'));
test.after.always(() => rmSync(root, { recursive: true, force: true }));
const program = fileURLToPath(new URL('./helpers/train-cli.js', import.meta.url));

test.before(async () => {
	const data = await prepare(
		Array.from({ length: 8 }, (_, i) => Int32Array.of(1, 2, 3, i)),
		{
			tokenizer: { encode: () => new Int32Array(0), vocabSize: 20 },
			out: join(root, 'data.bin'),
			format: 'documents',
			eosId: 0,
		},
	);
	data.close();
});

/** Starts a run that would never end, with a checkpoint folder of its own, from a configuration with a byte order mark. */
function start(name: string, stdio: StdioOptions): ChildProcess {
	const scratch = { layers: 1, heads: 1, channels: 8, vocab: 20, context: 16, maskId: 19 };
	const config = { scratch, data: 'data.bin', maxSteps: 1e9, device: 'cpu', threads: 1, checkpoint: { dir: name } };
	writeFileSync(join(root, `${name}.json`), `\uFEFF${JSON.stringify(config)}`);
	return spawn(process.execPath, [program, 'train', '--config', `${name}.json`, '--json'], { cwd: root, stdio });
}

const checkpoints = (name: string): string[] =>
	readdirSync(join(root, name)).filter((file) => file.startsWith('step-'));

for (const signal of ['SIGHUP', 'SIGTERM'] as const) {
	test(`${signal} saves a checkpoint and ends with 0`, async (t) => {
		const child = start(signal, ['ignore', 'pipe', 'pipe']);
		child.stdout?.once('data', () => child.kill(signal));
		child.stdout?.resume();
		let stderr = '';
		child.stderr?.setEncoding('utf8').on('data', (chunk: string) => {
			stderr += chunk;
			// A closing terminal and its shell both send one.
			if (signal === 'SIGHUP' && chunk.includes('stopping')) child.kill(signal);
		});
		const [code, killed] = (await once(child, 'close')) as [number | null, string | null];
		t.is(killed, null);
		t.is(code, 0, stderr);
		t.regex(stderr, /saved SIG\w+\/step-\d+/);
		t.is(checkpoints(signal).length, 1);
	});
}

(existsSync('/dev/full') ? test : test.skip)(
	'output that cannot be written saves a checkpoint and ends with 1',
	async (t) => {
		const full = openSync('/dev/full', 'w');
		const child = start('full', ['ignore', full, full]);
		closeSync(full);
		const [code, killed] = (await once(child, 'close')) as [number | null, string | null];
		t.is(killed, null);
		t.is(code, 1);
		t.is(checkpoints('full').length, 1);
	},
);
