import { spawn } from 'node:child_process';
import { mkdtempSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

import test from 'ava';
import { DiffuGPT, prepare, type TokenDataset, Trainer } from 'diffusion-native';

import { MarkovSource } from './helpers/markov.js';

const child = fileURLToPath(new URL('./helpers/kill-child.js', import.meta.url));

/**
 * Runs the child and kills it at a random moment of one of its first steps. The steps it reported, and what it said when it
 * failed.
 */
function runAndKill(dir: string, data: string): Promise<{ steps: number[]; error: string; signal: string | null }> {
	return new Promise((resolve, reject) => {
		const running = spawn(process.execPath, [child, dir, data], { stdio: ['ignore', 'pipe', 'pipe'] });
		const patience = Math.floor(Math.random() * 3);
		let output = '';
		let error = '';
		let lines = 0;
		let before = 0;
		running.stdout.setEncoding('utf8').on('data', (chunk: string) => {
			output += chunk;
			const now = performance.now();
			// A step and its checkpoint take about as long as the last one did.
			const step = lines > 0 ? now - before : 30;
			before = now;
			lines += chunk.split('\n').length - 1;
			if (lines > patience) setTimeout(() => running.kill('SIGKILL'), Math.random() * step);
		});
		running.stderr.setEncoding('utf8').on('data', (chunk: string) => {
			error += chunk;
		});
		running.on('error', reject);
		running.on('close', (_code, signal) => {
			resolve({ steps: [...output.matchAll(/at (\d+)\n/g)].map((match) => Number(match[1])), error, signal });
		});
	});
}

const root = mkdtempSync(join(tmpdir(), 'dn-kill-'));
test.after.always(() => rmSync(root, { recursive: true, force: true }));
const dir = join(root, 'run');
let data: TokenDataset;
let last = 0;

test.before(async () => {
	const source = new MarkovSource(7);
	const records = Array.from({ length: 40 }, () => source.sample(1n));
	const ids = { encode: () => new Int32Array(0), vocabSize: 9 };
	data = await prepare(records, {
		tokenizer: ids,
		out: join(root, 'data.bin'),
		format: 'documents',
		context: 16,
		eosId: 8,
	});
});

for (let tens = 0; tens < 5; tens++) {
	test.serial(
		`killed at random moments, the newest checkpoint loads: kills ${10 * tens + 1} to ${10 * tens + 10}`,
		async (t) => {
			t.timeout(170_000);
			const begun = last;
			for (let kill = 0; kill < 10; kill++) {
				const { steps, error, signal } = await runAndKill(dir, data.path);
				t.is(signal, 'SIGKILL', error);
				const first = steps[0] as number;
				// A step is reported after its checkpoint has its name; a kill may come between the two.
				t.true(first >= last, `went on from ${first}, ${last} was saved`);
				last = steps.at(-1) as number;
			}
			t.true(last > begun, 'the run moves on from life to life');
		},
	);
}

test.serial('the run of fifty lives is the run never killed, bit for bit', async (t) => {
	const resumed = await Trainer.resume(dir, { device: 'cpu', threads: 1 });
	t.log(`${resumed.steps} steps in 50 lives`);
	const stale = readdirSync(dir).filter((name) => name.startsWith('.'));
	t.true(stale.length <= 2, `what the kills left is cleaned up: ${stale.join(', ')}`);
	const shape = { layers: 1, heads: 2, channels: 32, context: 16, vocab: 10, eosId: 8, maskId: 9 };
	const model = await DiffuGPT.fromConfig(shape, { device: 'cpu', threads: 1, seed: 1 });
	const straight = new Trainer(model, { data, maxSteps: resumed.steps, batchSize: 4, learningRate: 1e-3 });
	for await (const _ of straight.run());
	for (const { name } of model.parameters()) {
		const [a, b] = [model.getParameter(name), resumed.model.getParameter(name)];
		t.true(
			a.every((value, i) => Object.is(value, b[i])),
			`${name} is that of the run never killed`,
		);
	}
	await model.dispose();
	await resumed.model.dispose();
});
