/**
 * One model in a process of its own, for its peak memory: loads a checkpoint, runs one forward and prints
 * { loadMs, forwardMs, peakRssBytes, loadedRssBytes }, or { error }.
 * Arguments: folder, dtype, T (0: load only), 'logits' or 'hidden'.
 */
import { DiffuGPT } from 'diffusion-native';

import { someTokens } from './shapes.js';

const [folder = '', dtype = 'fp32', length = '0', output = 'hidden'] = process.argv.slice(2);
const peak = () => process.resourceUsage().maxRSS * 1024;

async function measure() {
	const started = performance.now();
	await using model = await DiffuGPT.fromPretrained(folder, { device: 'cpu', dtype: dtype as 'fp32' | 'int8' });
	const loadMs = performance.now() - started;
	const loadedRssBytes = peak();
	const begun = performance.now();
	// One only: the result of an earlier one might still be in memory.
	if (Number(length) > 0) {
		await model.forward(someTokens('gpt2', Number(length)), { output: output as 'logits' | 'hidden' });
	}
	return { loadMs, forwardMs: performance.now() - begun, loadedRssBytes, peakRssBytes: peak() };
}

console.log(JSON.stringify(await measure().catch((error: Error) => ({ error: error.message }))));
