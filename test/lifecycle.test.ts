/** Each stage of a model's life in a child process, which must end as its script says: no signal, no abort, no hang. */
import { constants } from 'node:buffer';
import { execFile } from 'node:child_process';
import { promisify } from 'node:util';

import test from 'ava';
import { root } from './helpers/fixtures.js';
import { runScript } from './helpers/fork.js';

/** A model whose forward takes long enough to be interrupted (hundreds of milliseconds). */
const slowModel = `
	import { DiffuGPT } from 'diffusion-native';
	const config = { layers: 6, heads: 8, channels: 512, vocab: 4096, context: 1024, maskId: 1, eosId: 0 };
	const model = await DiffuGPT.fromConfig(config, { seed: 1 });
	const long = new Int32Array(1024).fill(2);
`;
const smallModel = `
	import { DiffuGPT } from 'diffusion-native';
	const config = { layers: 1, heads: 2, channels: 16, vocab: 20, context: 32, maskId: 1, eosId: 0 };
`;

test('process.exit during a native call ends the process with its code', async (t) => {
	const ended = await runScript(`${slowModel}
		model.forward([long, long, long], { output: 'hidden' }).catch(() => {});
		setTimeout(() => process.exit(7), 20);
	`);
	t.is(ended.signal, null, ended.stderr);
	t.is(ended.code, 7, ended.stderr);
});

test('an uncaught throw during a native call ends the process with code 1 and the error', async (t) => {
	const ended = await runScript(`${slowModel}
		model.forward([long, long, long], { output: 'hidden' }).catch(() => {});
		setTimeout(() => { throw new Error('planned'); }, 20);
	`);
	t.is(ended.signal, null, ended.stderr);
	t.is(ended.code, 1);
	t.regex(ended.stderr, /planned/);
});

test('worker.terminate during a native call leaves the process alive and well', async (t) => {
	const ended = await runScript(`
		import { Worker } from 'node:worker_threads';
		const source = \`
			import('diffusion-native').then(async ({ DiffuGPT }) => {
				const { parentPort } = await import('node:worker_threads');
				const model = await DiffuGPT.fromConfig({ layers: 6, heads: 8, channels: 512, vocab: 4096, context: 1024, maskId: 1, eosId: 0 }, { seed: 1 });
				model.forward([new Int32Array(1024).fill(2), new Int32Array(1024).fill(3)], { output: 'hidden' }).catch(() => {});
				parentPort.postMessage('started');
			});
		\`;
		const worker = new Worker(source, { eval: true });
		await new Promise((resolve) => worker.once('message', resolve));
		await new Promise((resolve) => setTimeout(resolve, 20));
		await worker.terminate();
		const { info } = await import('diffusion-native');
		console.log(info().cpu.threads > 0);
	`);
	t.is(ended.signal, null, ended.stderr);
	t.is(ended.code, 0, ended.stderr);
	t.regex(ended.stdout, /true/);
});

test('models that are never disposed are freed by garbage collection', async (t) => {
	const ended = await runScript(
		`${smallModel}
		async function one(i) {
			const model = await DiffuGPT.fromConfig({ ...config, channels: 256, vocab: 8192, context: 512 }, { seed: i });
			await model.forward(Int32Array.of(2, 3), { output: 'hidden' });
		}
		for (let i = 0; i < 10; i++) await one(i);
		for (let i = 0; i < 5; i++) { gc(); await new Promise((resolve) => setTimeout(resolve, 20)); }
		const before = process.memoryUsage().rss;
		for (let i = 0; i < 24; i++) { await one(i); if (i % 5 === 4) { gc(); await new Promise((resolve) => setTimeout(resolve, 10)); } }
		for (let i = 0; i < 5; i++) { gc(); await new Promise((resolve) => setTimeout(resolve, 20)); }
		console.log(Math.round((process.memoryUsage().rss - before) / 2 ** 20));
	`,
		{ nodeArguments: ['--expose-gc'] },
	);
	t.is(ended.code, 0, ended.stderr);
	// 24 models of about 12 MB: kept, they would add 280 MB.
	t.true(Number(ended.stdout) < 100, `resident memory grew by ${ended.stdout.trim()} MB`);
});

test('a second dispose does nothing', async (t) => {
	const ended = await runScript(`${smallModel}
		const model = await DiffuGPT.fromConfig(config, { seed: 1 });
		await model.dispose();
		await model.dispose();
		await Promise.all([model.dispose(), model[Symbol.asyncDispose]()]);
		console.log('fine');
	`);
	t.is(ended.code, 0, ended.stderr);
	t.regex(ended.stdout, /fine/);
});

test('every use after dispose is ERR_DN_DISPOSED', async (t) => {
	const ended = await runScript(`${smallModel}
		const model = await DiffuGPT.fromConfig(config, { seed: 1 });
		await model.dispose();
		const uses = {
			forward: () => model.forward(Int32Array.of(2)),
			generate: () => model.generate({ tokens: Int32Array.of(2) }, { length: 2 }),
			batch: () => model.generateBatch([{ tokens: Int32Array.of(2) }], { length: 2 }),
			stream: async () => { for await (const _ of model.stream({ tokens: Int32Array.of(2) }, { length: 2 })); },
			loss: () => model.loss({ tokens: [Int32Array.of(2, 3)] }),
			get: async () => model.getParameter('wte.weight'),
			set: async () => model.setParameter('ln_f.bias', new Float32Array(16)),
			save: () => model.save('/nonexistent/x'),
		};
		for (const [name, use] of Object.entries(uses)) {
			const code = await use().then(() => 'no error', (error) => error.code);
			console.log(name, code);
		}
	`);
	t.is(ended.code, 0, ended.stderr);
	const lines = ended.stdout.trim().split('\n');
	t.is(lines.length, 8);
	for (const line of lines) t.regex(line, / ERR_DN_DISPOSED$/);
});

test('dispose waits for the call in flight', async (t) => {
	const ended = await runScript(`${slowModel}
		let finished = false;
		const call = model.forward([long], { output: 'hidden' }).then(() => { finished = true; });
		await new Promise((resolve) => setTimeout(resolve, 10));
		await model.dispose();
		await call.catch(() => {});
		console.log(finished ? 'finished' : 'not finished');
	`);
	t.is(ended.code, 0, ended.stderr);
	t.regex(ended.stdout, /^finished/);
});

test('four workers load and generate at once, with equal results for equal seeds', async (t) => {
	const ended = await runScript(`
		import { Worker } from 'node:worker_threads';
		const source = \`
			import('diffusion-native').then(async ({ DiffuGPT }) => {
				const { parentPort } = await import('node:worker_threads');
				const model = await DiffuGPT.fromConfig({ layers: 2, heads: 2, channels: 32, vocab: 50, context: 64, maskId: 1, eosId: 0 }, { seed: 3 });
				const { tokens } = await model.generate({ tokens: Int32Array.of(2, 3, 4) }, { length: 20, steps: 10, sampler: 'ancestral', seed: 5 });
				parentPort.postMessage(Array.from(tokens).join(' '));
			});
		\`;
		const results = await Promise.all(Array.from({ length: 4 }, () => new Promise((resolve, reject) => {
			const worker = new Worker(source, { eval: true });
			let result;
			worker.once('message', (message) => { result = message; });
			worker.once('error', reject);
			worker.once('exit', (code) => (code === 0 ? resolve(result) : reject(new Error('exit ' + code))));
		})));
		console.log(new Set(results).size, results[0].split(' ').length);
	`);
	t.is(ended.signal, null, ended.stderr);
	t.is(ended.code, 0, ended.stderr);
	t.is(ended.stdout.trim(), '1 20');
});

test('a result that memory cannot hold is an error with a code, and the model goes on', async (t) => {
	if (process.platform !== 'linux') return t.pass('memory is limited by ulimit -v');
	const script = `
		import { DiffuGPT } from 'diffusion-native';
		const sizes = { layers: 1, heads: 1, channels: 8, vocab: 50257, context: 1024, maskId: 0 };
		const model = await DiffuGPT.fromConfig(sizes, { device: 'cpu', threads: 1 });
		const codes = [];
		for (const sequences of [20, 1000]) {
			const list = Array.from({ length: sequences }, () => new Int32Array(1024));
			await model.forward(list).catch(({ code, message }) => codes.push(code, message));
		}
		const [row] = await model.forward(new Int32Array(4));
		console.log(JSON.stringify([...codes, row.length]));`;
	const limited = ['-c', 'ulimit -v 4000000; exec "$0" "$@"', process.execPath, '--input-type=module', '-e', script];
	const { stdout } = await promisify(execFile)('sh', limited, { cwd: root });
	const [memory, missing, argument, most, rest] = JSON.parse(stdout) as string[];
	t.is(memory, 'ERR_DN_OUT_OF_MEMORY');
	t.is(missing, 'cannot allocate 4117053440 bytes of host memory');
	t.is(argument, constants.MAX_LENGTH < 2 ** 37 ? 'ERR_DN_ARGUMENT' : 'ERR_DN_OUT_OF_MEMORY', most);
	t.is(Number(rest), 4 * 50257);
});
