/**
 * One model in a process of its own, for its peak memory; prints a report as JSON, or { error }.
 * Arguments of a forward: folder, dtype, T (0: load only), 'logits' or 'hidden'. Of training: 'train', B, T.
 */
import { DiffuGPT } from 'diffusion-native';

import { someTokens, type WeightType } from './shapes.js';
import { halfMasked, startTraining } from './training.js';

const peak = () => process.resourceUsage().maxRSS * 1024;

/** { loadMs, forwardMs, loadedRssBytes, peakRssBytes } */
async function measureForward([folder = '', dtype = 'fp32', length = '0', output = 'hidden']: string[]) {
	const started = performance.now();
	await using model = await DiffuGPT.fromPretrained(folder, { device: 'cpu', dtype: dtype as WeightType });
	const loadMs = performance.now() - started;
	const loadedRssBytes = peak();
	const begun = performance.now();
	// One only: the result of an earlier one might still be in memory.
	if (Number(length) > 0) {
		await model.forward(someTokens('gpt2', Number(length)), { output: output as 'logits' | 'hidden' });
	}
	return { loadMs, forwardMs: performance.now() - begun, loadedRssBytes, peakRssBytes: peak() };
}

/** { stepMs, peakRssBytes }: the second of two steps, when all that a step needs is there. */
async function measureTraining([B = '4', T = '256']: string[]) {
	const trainer = await startTraining('gpt2', true);
	const batch = halfMasked('gpt2', Number(B), Number(T));
	await trainer.step(batch);
	const begun = performance.now();
	await trainer.step(batch);
	return { stepMs: performance.now() - begun, peakRssBytes: peak() };
}

const parameters = process.argv.slice(2);
const measured = parameters[0] === 'train' ? measureTraining(parameters.slice(1)) : measureForward(parameters);
console.log(JSON.stringify(await measured.catch((error: Error) => ({ error: error.message }))));
