/**
 * Trains a small diffusion model on a text file from nothing and prints a sample every 200 steps.
 *
 * Run: node dist/examples/train-from-text.js FILE.txt [folder of the run]
 */
import { mkdirSync } from 'node:fs';
import { join } from 'node:path';

import { DiffuGPT, prepare, Trainer, trainTokenizer } from 'diffusion-native';

const [, , file, run = 'runs/example'] = process.argv;
if (!file) throw new Error('usage: node dist/examples/train-from-text.js FILE.txt [folder of the run]');
mkdirSync(run, { recursive: true });

const tokenizer = await trainTokenizer(file, { vocabSize: 2048, out: join(run, 'tokenizer.json') });
const data = await prepare(file, { tokenizer, out: join(run, 'data.bin'), format: 'packed', context: 128 });

await using model = await DiffuGPT.fromConfig(
	{
		layers: 4,
		heads: 4,
		channels: 192,
		context: 128,
		vocab: 2048,
		eosId: tokenizer.idOf('<|endoftext|>') as number,
		maskId: tokenizer.idOf('<|mask|>') as number,
	},
	{ tokenizer, seed: 1 },
);
const trainer = new Trainer(model, {
	data,
	batchTokens: 4096,
	maxSteps: 1000,
	learningRate: { kind: 'cosine', peak: 1e-3, warmupSteps: 50 },
	precision: 'bf16',
	checkpoint: { dir: join(run, 'checkpoints'), every: 200 },
});
for await (const { step, loss, unweighted, tokensPerSecond } of trainer.run()) {
	if (step % 200 > 0) continue;
	console.log(
		`step ${step}: loss ${loss.toFixed(3)}, plain ${unweighted.toFixed(3)}, ${tokensPerSecond.toFixed(0)} tokens/s`,
	);
	const { text } = await model.generate('The ', { length: 48, steps: 24, seed: step });
	console.log(text);
}
