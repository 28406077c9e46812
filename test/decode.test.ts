/** Left-to-right decoding: one result however many tokens a native call takes, alone and among other requests. */
import test from 'ava';
import { type DenoiseStep, DiffuGPT, type GenerateOptions } from 'diffusion-native';

const config = { layers: 2, heads: 2, channels: 32, context: 96, vocab: 64, maskId: 63, eosId: 5 };
const prompt = { tokens: Int32Array.from({ length: 9 }, (_, i) => i + 10) };

const open = (): Promise<DiffuGPT> => DiffuGPT.fromConfig(config, { seed: 1, device: 'cpu' });

test('tokens, events and forwards are the same however many tokens a call takes', async (t) => {
	const model = await open();
	for (const options of [{ length: 40 }, { length: 1 }, { length: { max: 40 } }, { length: 30, guidance: 0.5 }]) {
		for (let seed = 0; seed < 4; seed++) {
			const results = [];
			for (const stepsPerCall of [1, 3, 64]) {
				const given: GenerateOptions = { ...options, sampler: 'autoregressive', topP: 0.95, seed, stepsPerCall };
				const stream = model.stream(prompt, given);
				const events: DenoiseStep[] = [];
				let step = await stream.next();
				for (; !step.done; step = await stream.next()) events.push(step.value);
				const { sequence, finishReason, stats } = step.value;
				results.push({ events, sequence, finishReason, forwards: stats.forwards });
			}
			t.deepEqual(results[1], results[0]);
			t.deepEqual(results[2], results[0]);
		}
	}
	await model.dispose();
});

test('a call goes on alone, until a text of variable length ends', async (t) => {
	const model = await open();
	const calls = async (options: GenerateOptions): Promise<[number, number]> => {
		const before = model.engine.counters.batches;
		const { stats } = await model.generate(prompt, { sampler: 'autoregressive', seed: 2, ...options });
		return [model.engine.counters.batches - before, stats.forwards];
	};
	t.deepEqual(await calls({ length: 40, stepsPerCall: 1 }), [40, 40]);
	const [several, forwards] = await calls({ length: 40 });
	t.is(forwards, 40);
	t.true(several < 40, `${several} calls`);
	// The cache has room for the canvas only: what is beyond its end is never asked for.
	t.deepEqual((await calls({ length: 96 - 9, stepsPerCall: 1000 }))[1], 96 - 9);
	let ended = 0;
	for (let seed = 0; seed < 20; seed++) {
		const { tokens, finishReason } = await model.generate(prompt, {
			...{ sampler: 'autoregressive', temperature: 2, length: { max: 80 }, seed },
		});
		if (finishReason === 'end-of-text') ended++;
		t.false(tokens.includes(config.eosId));
	}
	t.true(ended > 5, `${ended} of 20 ended`);
	await model.dispose();
});

test('requests that come together give what each gives alone', async (t) => {
	const model = await open();
	const ask = (seed: number) => {
		const sampler =
			seed % 3 === 2 ? ({ sampler: 'confidence', steps: 6 } as const) : { sampler: 'autoregressive' as const };
		return model.generate(prompt, { ...sampler, temperature: 1, length: 20 + seed, seed });
	};
	const seeds = Array.from({ length: 9 }, (_, i) => i);
	const alone = [];
	for (const seed of seeds) alone.push((await ask(seed)).sequence);
	const together = await Promise.all(seeds.map(ask));
	t.deepEqual(
		together.map(({ sequence }) => sequence),
		alone,
	);
	await model.dispose();
});

test('an abort between two calls ends a generation, and the model goes on', async (t) => {
	const model = await open();
	const controller = new AbortController();
	const stream = model.stream(prompt, {
		...{ sampler: 'autoregressive', length: 60, stepsPerCall: 4, seed: 1, signal: controller.signal },
	});
	await stream.next();
	controller.abort(new Error('enough'));
	await t.throwsAsync(stream.next(), { message: 'enough' });
	t.is((await model.generate(prompt, { sampler: 'autoregressive', length: 5, seed: 1 })).tokens.length, 5);
	await model.dispose();
});
