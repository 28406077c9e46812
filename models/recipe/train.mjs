// Trains the model that ships, end to end: data, tokenizer, token files, the autoregressive twin, the diffusion model adapted
// from it at a constant learning rate, its cooling, two rounds of made-up words around every piece of the vocabulary
// (make-pieces.mjs), each followed by a stage with long padding. Every stage that is already done is
// skipped, and an interrupted one continues from its last checkpoint. release.mjs then writes and measures the two folders
// under models/.
//
// Padding is short until the last stage of a round, where the model learns to find the end in a canvas of any length: long
// padding is two thirds of the work.
//
// node models/recipe/train.mjs [--run runs/tiny] [--from DIR] [--autoregressive-steps N] [--diffusion-steps N]
//   [--cooling-steps N] [--pieces-steps N] [--length-steps N] [--words-steps N] [--ending-steps N] [--batch-tokens N] [--seed N]
//   [--threads N]
//
// --from: a released model that has the first round behind it; only the second round is run.
import { execFileSync } from 'node:child_process';
import { existsSync, readdirSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';

import { DiffuGPT, prepare, TokenDataset, Tokenizer, Trainer, trainTokenizer } from 'diffusion-native';

const { values: options } = parseArgs({
	options: {
		run: { type: 'string', default: 'runs/tiny' },
		from: { type: 'string' },
		'autoregressive-steps': { type: 'string', default: '3000' },
		'diffusion-steps': { type: 'string', default: '4500' },
		'cooling-steps': { type: 'string', default: '2600' },
		'pieces-steps': { type: 'string', default: '1400' },
		'length-steps': { type: 'string', default: '1000' },
		'words-steps': { type: 'string', default: '1400' },
		'ending-steps': { type: 'string', default: '600' },
		'batch-tokens': { type: 'string', default: '8192' },
		seed: { type: 'string', default: '1' },
		threads: { type: 'string' },
	},
});
const threads = options.threads === undefined ? {} : { threads: Number(options.threads) };
const run = options.run;
const context = 320;
const path = (...parts) => join(run, ...parts);

if (!existsSync(path('data', 'corpus.txt'))) {
	execFileSync(process.execPath, [fileURLToPath(new URL('make-data.mjs', import.meta.url)), '--out', path('data')], {
		stdio: 'inherit',
	});
}
if (!existsSync(path('tokenizer.json'))) {
	await trainTokenizer(path('data', 'corpus.txt'), { vocabSize: 8192, out: path('tokenizer.json') });
}
const tokenizer = Tokenizer.fromFile(path('tokenizer.json'));
// Made-up words of each round.
for (const [name, each, seed] of [
	['pieces', 24, 1],
	['words', 40, 2],
]) {
	if (existsSync(path('data', `${name}.jsonl`))) continue;
	const given = ['--data', path('data'), '--tokenizer', path('tokenizer.json'), '--out', path('data', `${name}.jsonl`)];
	const script = fileURLToPath(new URL('make-pieces.mjs', import.meta.url));
	execFileSync(process.execPath, [script, ...given, '--each', String(each), '--seed', String(seed)], {
		stdio: 'inherit',
	});
}
for (const split of ['train', 'pieces', 'words', 'validation']) {
	if (existsSync(path(`${split}.bin`))) continue;
	const set = await prepare(path('data', `${split}.jsonl`), {
		tokenizer,
		out: path(`${split}.bin`),
		format: 'pairs',
		context,
		overlong: 'drop',
	});
	console.log(split, set.sequences, 'sequences,', set.tokens, 'tokens');
}
const data = await TokenDataset.open(path('train.bin'));
const pieces = await TokenDataset.open(path('pieces.bin'));
const words = await TokenDataset.open(path('words.bin'));
const validation = await TokenDataset.open(path('validation.bin'));
const eosId = tokenizer.idOf('<|endoftext|>');
const maskId = tokenizer.idOf('<|mask|>');
const config = { layers: 6, heads: 4, channels: 256, context, vocab: 8192, eosId, maskId, attention: 'bidirectional' };

const progress = {
	log(m) {
		if (m.step % 50 > 0 && m.validation === undefined) return;
		const cells = [
			`step ${m.step}`,
			`loss ${m.loss.toFixed(3)}`,
			`plain ${m.unweighted.toFixed(3)}`,
			`norm ${m.gradNorm.toFixed(2)}`,
		];
		cells.push(
			`lr ${m.learningRate.toExponential(2)}`,
			`${Math.round(m.tokensPerSecond)} tokens/s`,
			`epoch ${m.epoch.toFixed(2)}`,
		);
		if (m.validation !== undefined)
			cells.push(`validation ${m.validation.toFixed(4)}, plain ${m.validationUnweighted.toFixed(4)}`);
		console.log(cells.join(', '));
	},
};

/** Runs a stage to its last step, from its newest checkpoint when there is one; returns the folder of the trained model. */
async function train(name, start, stage) {
	const dir = path(name);
	const resumable = existsSync(dir) && readdirSync(dir).some((entry) => entry.startsWith('step-'));
	const trainer = resumable
		? await Trainer.resume(dir, { data, validation, loggers: [progress], ...stage, ...threads })
		: new Trainer(await start(), { data, validation, loggers: [progress], ...stage });
	let checkpoint;
	for await (const m of trainer.run()) checkpoint = m.checkpoint ?? checkpoint;
	await trainer.model.dispose();
	return checkpoint;
}

const common = {
	batchTokens: Number(options['batch-tokens']),
	betas: [0.9, 0.98],
	weightDecay: 0.05,
	precision: 'bf16',
	seed: Number(options.seed),
	evalSequences: 1024,
};
/** The newest checkpoint of a stage. */
function newest(name) {
	const steps = readdirSync(path(name)).filter((entry) => entry.startsWith('step-'));
	return path(name, steps.sort().at(-1));
}
/** What a stage of the diffusion model has of its own; the others begin where `after` ended. */
async function diffuse(name, after, stage) {
	await train(name, () => DiffuGPT.fromPretrained(after, { config, ...threads }), {
		...common,
		objective: 'diffusion',
		timeSampler: 'stratified',
		evalEvery: 500,
		maxSteps: Number(options[`${name}-steps`]),
		checkpoint: { dir: path(name), every: 250, keep: 2 },
		...stage,
	});
	return newest(name);
}
const short = { padding: { logUniform: 32 } };
const long = { padding: { logUniform: 256 } };

async function firstRound() {
	await train(
		'autoregressive',
		() => DiffuGPT.fromConfig(config, { seed: Number(options.seed), tokenizer, ...threads }),
		{
			...common,
			objective: 'autoregressive',
			maxSteps: Number(options['autoregressive-steps']),
			learningRate: { kind: 'cosine', peak: 2e-3, warmupSteps: 200, final: 1e-4 },
			evalEvery: 250,
			checkpoint: { dir: path('autoregressive'), every: 250, keep: 2 },
		},
	);
	const adapted = await diffuse('diffusion', newest('autoregressive'), {
		...short,
		attentionAnnealing: { steps: 300 },
		learningRate: { kind: 'constant', peak: 1.5e-3, warmupSteps: 200 },
	});
	const cooled = await diffuse('cooling', adapted, {
		...short,
		learningRate: { kind: 'cosine', peak: 1.5e-3, warmupSteps: 50, final: 1e-4 },
	});
	const spelling = await diffuse('pieces', cooled, {
		...short,
		data: pieces,
		learningRate: { kind: 'cosine', peak: 8e-4, warmupSteps: 50, final: 1e-4 },
	});
	return diffuse('length', spelling, {
		...long,
		data: pieces,
		learningRate: { kind: 'cosine', peak: 4e-4, warmupSteps: 50, final: 1e-5 },
	});
}

const spelling = await diffuse('words', options.from ?? (await firstRound()), {
	...short,
	data: words,
	learningRate: { kind: 'cosine', peak: 8e-4, warmupSteps: 50, final: 1e-4 },
});
await diffuse('ending', spelling, {
	...long,
	data: words,
	learningRate: { kind: 'cosine', peak: 4e-4, warmupSteps: 50, final: 1e-5 },
});
