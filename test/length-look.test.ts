/** What a look at masked positions sees is the model's own probability, to the bit, alone and beside other requests. */
import test from 'ava';
import type { Engine } from '../lib/engine.js';
import { eosId, given } from './helpers/length-canvas.js';
import { logSoftmax, sharpModel, smallConfig } from './helpers/models.js';

test('a look does not depend on the requests it is merged with, and is not guided', async (t) => {
	// Gentle weights: many probabilities of a middling size, whose last bits show.
	await using model = await sharpModel({ eosId }, 1, 6);
	const { maskId } = smallConfig;
	const max = 12;
	const prompts = Array.from({ length: 4 }, (_, i) => ({
		tokens: Int32Array.from(given, (id) => (id + 7 * i) % 50),
	}));
	const { engine } = model as unknown as { engine: Engine };
	const before = engine.counters.batches;
	const look = (one: { tokens: Int32Array }) => model.predictLength(one, { max, method: 'expected' });
	const merged = await Promise.all(prompts.map(look));
	t.true(engine.counters.batches < before + prompts.length, 'they were merged');
	for (const [i, one] of prompts.entries()) {
		const alone = await look(one);
		t.deepEqual(alone, merged[i]);
		const canvas = new Int32Array(one.tokens.length + max).fill(maskId);
		canvas.set(one.tokens);
		const rows = Int32Array.from({ length: max }, (_, r) => one.tokens.length + r - 1);
		const [logits] = await model.forward(canvas, { rows: [rows] });
		for (let r = 0; r < max; r++) {
			const row = (logits as Float32Array).subarray(r * smallConfig.vocab, (r + 1) * smallConfig.vocab);
			const expected = Math.exp(logSoftmax(row, maskId)[eosId] as number);
			t.true(Math.abs((alone.probabilities?.[r] as number) - expected) < 1e-6 * expected, `position ${r}`);
		}
	}
});
