/** Lengths that are drawn: their distribution, that an answer has the length drawn for it, and what is refused. */
import test from 'ava';
import { calibrateLength, DiffuGPT, type GenerateOptions, type LengthOptions } from 'diffusion-native';

import { wasserstein } from '../lib/length/metrics.js';
import { boundAt, estimatorOf } from '../lib/length/rules.js';
import { Stream, uniform } from '../lib/random.js';
import { lookWith, eosId as sharpEnd, prompt as sharpPrompt } from './helpers/length-canvas.js';
import { toyLengthModel, toyPairs } from './helpers/lengths.js';
import { sharpModel } from './helpers/models.js';

const max = 14;
const shares = Array.from({ length: 99 }, (_, i) => (i + 1) / 100);
const loose = { tokens: Int32Array.of(1, 12) };

let toy: DiffuGPT;

test.before(async () => {
	toy = await toyLengthModel();
	await calibrateLength(toy, toyPairs(600, 55n), { method: 'threshold', max, coverage: shares });
});

test.after.always(async () => {
	await toy?.dispose();
});

test.serial('drawn lengths are as varied as the true ones, and fixed where the prompt fixes them', async (t) => {
	const length = { max, method: 'threshold', coverage: 'draw' } as const;
	const drawn: number[] = [];
	for (let seed = 0; seed < 400; seed++) drawn.push((await toy.predictLength(loose, { ...length, seed })).length);
	// Lengths 1 to 8 alike.
	const truth = Array.from({ length: 400 }, (_, i) => 1 + (i % 8));
	t.true(wasserstein(drawn, truth) < 0.5, `${wasserstein(drawn, truth)}`);
	t.is(
		(await toy.predictLength(loose, length)).length,
		(await toy.predictLength(loose, { ...length, seed: 0 })).length,
	);
	for (let k = 0; k < 8; k++) {
		for (const seed of [1, 2, 3, 4]) {
			const { length: found } = await toy.predictLength({ tokens: Int32Array.of(1, 2 + k) }, { ...length, seed });
			t.is(found, k + 1);
		}
	}
});

test.serial('an answer has exactly the length that was drawn for it, whatever the sampler and the batch', async (t) => {
	const length = { max, method: 'threshold', coverage: 'draw' } as const;
	const samplers: GenerateOptions[] = [
		{ sampler: 'first-hitting' },
		{ sampler: 'ancestral', steps: 6 },
		{ sampler: 'threshold' },
		{ sampler: 'confidence', steps: 3, temperature: 1 },
		{ sampler: 'first-hitting', block: 2, guidance: 0.5 },
	];
	const lengths = new Set<number>();
	for (const sampler of samplers) {
		const options = Array.from({ length: 20 }, (_, seed): GenerateOptions => ({ ...sampler, length, seed }));
		const results = await toy.generateBatch(
			options.map(() => loose),
			options,
		);
		for (const [seed, result] of results.entries()) {
			const { length: drawn } = await toy.predictLength(loose, { ...length, seed });
			t.is(result.tokens.length, drawn);
			t.is(result.finishReason, 'end-of-text');
			t.deepEqual(Array.from(result.sequence.subarray(2 + drawn)), [0], 'the end token comes last');
			t.false(result.tokens.includes(0) || result.tokens.includes(15));
			lengths.add(drawn);
		}
		t.deepEqual((await toy.generate(loose, options[7] as GenerateOptions)).sequence, results[7]?.sequence);
	}
	t.true(lengths.size >= 6, `${lengths.size} lengths`);
});

test('without a calibration the threshold is uniform; a sharp look is never cut below even odds', async (t) => {
	const model = await sharpModel({ eosId: sharpEnd });
	for (let seed = 1; seed < 30; seed++) {
		const u = uniform(BigInt(seed), Stream.time, 0, 0);
		const asked = { max: 12, method: 'threshold', coverage: 'draw', seed } as const;
		const { length, probabilities } = await model.predictLength(sharpPrompt, asked);
		const end = probabilities.findIndex((p) => p > u);
		t.is(length, end < 0 ? 12 : end);
	}
	const threshold = estimatorOf({ method: 'threshold' });
	t.is(boundAt(threshold, lookWith([0.01, 0.04, 0.99, 1]), 0.02), 2);
	t.is(boundAt(threshold, lookWith([0.01, 0.1, 0.3, 0.4, 0.99]), 0.02), 1, 'an open length is not held back');
	t.is(boundAt(threshold, lookWith([0.01, 0.04, 0.99, 1]), 0.995), 3, 'and a higher level stands');
	await model.dispose();
});

test('where no end within max is drawn, all max tokens are text', async (t) => {
	// Random weights: every id is about as likely as any other, the end among them.
	const model = await DiffuGPT.fromConfig(toy.config, { seed: 8, device: 'cpu' });
	const length = { max: 12, method: 'threshold', coverage: 'draw' } as const;
	let whole = 0;
	for (let seed = 0; seed < 40; seed++) {
		const { length: drawn } = await model.predictLength(loose, { ...length, seed });
		const { tokens, finishReason, stats } = await model.generate(loose, {
			length,
			sampler: 'ancestral',
			steps: 4,
			seed,
		});
		t.is(tokens.length, drawn);
		t.is(finishReason, drawn === 12 ? 'length' : 'end-of-text');
		t.is(stats.generatedTokens, drawn);
		if (drawn === 12) whole++;
	}
	t.true(whole > 20, `${whole} of 40`);
	await model.dispose();
});

test('a policy neither sees nor commits an end token where the length is drawn', async (t) => {
	// Random weights: the end token is about as likely as any other id.
	const model = await DiffuGPT.fromConfig(toy.config, { seed: 8, device: 'cpu' });
	const { eosId, maskId, vocab } = model.config;
	const length = { max: 12, method: 'threshold', coverage: 'draw' } as const;
	const every = [{}, { guidance: 0.7 }, { block: 4, cache: 'dual' }] as const;
	for (const options of every) {
		const { tokens } = await model.generate(loose, {
			...options,
			length,
			seed: 3,
			sampler: {
				needsLogits: true,
				decide({ logProbs, positions, best, probability, drawn, drawnLogProb }) {
					for (const k of positions.keys()) {
						const logs = logProbs(k);
						t.deepEqual([logs[eosId], logs[maskId]], [Number.NEGATIVE_INFINITY, Number.NEGATIVE_INFINITY]);
						let sum = 0;
						for (const log of logs) sum += Math.exp(log);
						t.true(Math.abs(sum - 1) < 1e-9);
						const [id, other] = [best[k] as number, drawn[k] as number];
						t.true(Math.abs(Math.exp(logs[id] as number) - (probability[k] as number)) < 1e-5);
						t.true(Math.abs((logs[other] as number) - (drawnLogProb[k] as number)) < 1e-4);
					}
					return { commit: [positions[0] as number] };
				},
			},
		});
		t.true(tokens.length > 0 && tokens.every((id) => id !== eosId && id < vocab));
	}
	await t.throwsAsync(
		model.generate(loose, {
			length,
			seed: 3,
			sampler: { name: 'mine', decide: ({ positions }) => ({ commit: [positions[0] as number], tokens: [eosId] }) },
		}),
		{ code: 'ERR_DN_ARGUMENT', message: /'mine' committed the id 0, the end token/ },
	);
	await model.dispose();
});

test('what cannot be drawn is refused with the reason', async (t) => {
	const model = await sharpModel({ eosId: sharpEnd });
	const ask = (length: object): Promise<unknown> =>
		model.predictLength(sharpPrompt, { max: 12, coverage: 'draw', ...length } as LengthOptions & { max: number });
	for (const [length, message] of [
		[{ method: 'constant' }, /'constant' does not/],
		[{ method: 'daedal' }, /'daedal' does not/],
		[{ method: 'rho-eos' }, /length.coverage has no meaning/],
		[{ method: 'expected' }, /no calibration of 'expected'/],
		[{ method: 'threshold', coverage: 'any' }, /a number from 0 to 1 or 'draw'/],
	] as const) {
		await t.throwsAsync(ask(length), { code: 'ERR_DN_ARGUMENT', message }, JSON.stringify(length));
	}
	await calibrateLength(model, toyPairs(50, 3n), { method: 'threshold', max: 12, coverage: [0.5, 0.9] });
	await t.throwsAsync(ask({ method: 'threshold' }), {
		message: /calibrated for 19 evenly spread shares or more; it is for 2/,
	});
	await model.dispose();
	const two = await sharpModel({ eosId: sharpEnd, padId: 44 });
	await t.throwsAsync(two.generate(sharpPrompt, { length: { max: 12, method: 'threshold', coverage: 'draw' } }), {
		code: 'ERR_DN_ARGUMENT',
		message: /config\.eosId 43 and padId 44/,
	});
	await two.dispose();
});

test.serial('the mask is as impossible as the end token where the length is exact', async (t) => {
	// Random weights: without a ban the mask is as likely as any other id.
	const model = await DiffuGPT.fromConfig(toy.config, { seed: 8, device: 'cpu' });
	await calibrateLength(model, toyPairs(60, 5n), { method: 'threshold', max, coverage: shares });
	const length = { max, method: 'threshold', coverage: 'draw' } as const;
	for (const sampler of [
		{ sampler: 'ancestral', steps: 2 },
		{ sampler: 'confidence', steps: 40, temperature: 1 },
		{ sampler: 'ancestral', steps: 5, block: 3 },
	] as const) {
		for (let seed = 0; seed < 60; seed++) {
			const { sequence, stats } = await model.generate(loose, { ...sampler, length, seed });
			t.false(sequence.includes(model.config.maskId));
			t.true(stats.forwards <= sampler.steps + 1); // the look
		}
	}
	await model.dispose();
});
