// Trains the judge that scores generated answers: an autoregressive model of the shipped size on the training pairs without
// made-up words, from another seed and in another order than the twin. An interrupted run continues from its last checkpoint.
//
// node models/recipe/train-judge.mjs [--run runs/tiny/judge] [--data runs/tiny/data] [--tokenizer models/tiny/tokenizer.json]
//   [--steps 700] [--batch-tokens 8192] [--seed 7]
import { existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { parseArgs } from 'node:util';

import { DiffuGPT, evaluate, prepare, TokenDataset, Tokenizer, Trainer } from 'diffusion-native';

const { values: options } = parseArgs({
	options: {
		run: { type: 'string', default: 'runs/tiny/judge' },
		data: { type: 'string', default: 'runs/tiny/data' },
		tokenizer: { type: 'string', default: 'models/tiny/tokenizer.json' },
		steps: { type: 'string', default: '700' },
		'batch-tokens': { type: 'string', default: '8192' },
		seed: { type: 'string', default: '7' },
	},
});
const path = (...parts) => join(options.run, ...parts);
const context = 320;
mkdirSync(options.run, { recursive: true });
const tokenizer = Tokenizer.fromFile(options.tokenizer);
if (!existsSync(path('train.bin'))) {
	const lines = readFileSync(join(options.data, 'train.jsonl'), 'utf8').split('\n').filter(Boolean);
	writeFileSync(path('train.jsonl'), lines.filter((line) => !JSON.parse(line).madeUp).join('\n'));
	await prepare(path('train.jsonl'), {
		...{ tokenizer, out: path('train.bin'), format: 'pairs', context, overlong: 'drop' },
	});
}
const data = await TokenDataset.open(path('train.bin'));
const config = {
	...{ layers: 6, heads: 4, channels: 256, context, vocab: 8192, attention: 'causal' },
	...{ eosId: tokenizer.idOf('<|endoftext|>'), maskId: tokenizer.idOf('<|mask|>') },
};
const progress = {
	log({ step, loss, tokensPerSecond, epoch }) {
		if (step % 25 > 0) return;
		console.log(
			`step ${step}, loss ${loss.toFixed(3)}, ${Math.round(tokensPerSecond)} tokens/s, epoch ${epoch.toFixed(2)}`,
		);
	},
};
const steps = path('steps');
const common = { data, loggers: [progress] };
const resumable = existsSync(steps) && readdirSync(steps).some((entry) => entry.startsWith('step-'));
const trainer = resumable
	? await Trainer.resume(steps, common)
	: new Trainer(await DiffuGPT.fromConfig(config, { seed: Number(options.seed), tokenizer }), {
			...common,
			...{ objective: 'autoregressive', maxSteps: Number(options.steps), seed: Number(options.seed) },
			...{ batchTokens: Number(options['batch-tokens']), betas: [0.9, 0.98], weightDecay: 0.05, precision: 'bf16' },
			learningRate: { kind: 'cosine', peak: 2e-3, warmupSteps: 100, final: 1e-4 },
			checkpoint: { dir: steps, every: 100, keep: 1 },
		});
for await (const _ of trainer.run());
await trainer.model.save(path('model'));
const { nll, kinds } = await evaluate(trainer.model, join(options.data, 'validation.jsonl'), {
	...{ metric: 'perplexity', limit: 1000 },
});
console.log(`validation: ${nll.toFixed(3)} nats per token`, kinds);
await trainer.model.dispose();
