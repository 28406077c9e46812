/** Trained length heads: the margins, canvases and requests that go with them. */
import test from 'ava';
import { calibrateLength, evaluateLength, trainLengthHead } from 'diffusion-native';

import { lengthExtras } from '../lib/length/extras.js';
import { prompt } from './helpers/generate.js';
import { sharpModel } from './helpers/models.js';

const max = 12;

/** Answers of `length` to `length` + 2 tokens. */
const pairs = (length: number) =>
	Array.from({ length: 40 }, (_, i) => ({
		prompt: [1, 2 + (i % 5)],
		answer: Array.from({ length: length + (i % 3) }, () => 7),
	}));

const training = { max, epochs: 1, units: 4 };

test('new heads drop the margins of the old ones, and keep those of other methods', async (t) => {
	const model = await sharpModel();
	const { engine } = model;
	await trainLengthHead(model, pairs(1), training);
	for (const method of ['head', 'first-step'] as const) {
		await calibrateLength(model, pairs(1), { method, max, coverage: 0.5 });
	}
	t.deepEqual(
		lengthExtras(engine).calibrations.map(({ method }) => method),
		['head', 'first-step'],
	);
	await trainLengthHead(model, pairs(8), training);
	t.deepEqual(
		lengthExtras(engine).calibrations.map(({ method }) => method),
		['first-step'],
	);
	await t.throwsAsync(model.predictLength(prompt, { max, method: 'head', coverage: 0.5 }), {
		code: 'ERR_DN_ARGUMENT',
		message: /no calibration of the token head/,
	});
	await model.dispose();
});

test('heads are asked on the canvas that they were trained on', async (t) => {
	const model = await sharpModel();
	await trainLengthHead(model, pairs(3), training);
	await t.notThrowsAsync(model.predictLength(prompt, { max, method: 'head' }));
	const refused = {
		code: 'ERR_DN_ARGUMENT',
		message: 'option length.max is 30, but the length heads were trained for max 12',
	};
	await t.throwsAsync(model.predictLength(prompt, { max: 30, method: 'head' }), refused);
	await t.throwsAsync(model.generate(prompt, { length: { max: 30, method: 'head', head: 'pooled' } }), refused);
	// An evaluation of all methods leaves out what cannot be asked.
	const heads = async (size: number): Promise<number> => {
		const { bounds } = await evaluateLength(model, pairs(3), { max: size });
		return new Set(bounds.map(({ method }) => method).filter((name) => name.startsWith('head'))).size;
	};
	t.is(await heads(max), 3);
	t.is(await heads(16), 0);
	await model.dispose();
});

test('requests that wait keep the heads that they were checked with', async (t) => {
	const model = await sharpModel();
	await trainLengthHead(model, pairs(3), training);
	const options = { length: { max, method: 'head' }, seed: 1 } as const;
	const expected = (await model.generate(prompt, options)).tokens;
	const bias = model.getParameter('ln_f.bias');
	// More than run at once: the last ones begin after the weights were set.
	const running = model.generateBatch(Array(200).fill(prompt), options);
	model.setParameter('ln_f.bias', bias);
	t.is(lengthExtras(model.engine).head, undefined);
	t.deepEqual((await running).at(-1)?.tokens, expected);
	await model.dispose();
});
