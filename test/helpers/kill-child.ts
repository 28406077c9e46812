/** Trains a tiny model with a checkpoint after every step, going on from the newest one; is killed from outside. */
import { existsSync } from 'node:fs';

import { DiffuGPT, TokenDataset, Trainer } from 'diffusion-native';

const [dir, dataPath] = process.argv.slice(2) as [string, string];
const data = await TokenDataset.open(dataPath);
let trainer: Trainer;
if (existsSync(dir)) trainer = await Trainer.resume(dir, { device: 'cpu', threads: 1 });
else {
	const shape = { layers: 1, heads: 2, channels: 32, context: 16, vocab: 10, eosId: 8, maskId: 9 };
	const model = await DiffuGPT.fromConfig(shape, { device: 'cpu', threads: 1, seed: 1 });
	trainer = new Trainer(model, {
		data,
		maxSteps: 1_000_000,
		batchSize: 4,
		learningRate: 1e-3,
		checkpoint: { dir, every: 1, keep: 1 },
	});
	await trainer.checkpoint();
}
process.stdout.write(`at ${trainer.steps}\n`);
for await (const { step } of trainer.run()) process.stdout.write(`at ${step}\n`);
