/** Agreement with the independent PyTorch model of test/reference/reference.py, through the public API. */
import test from 'ava';
import { DiffuGPT, type DiffusionBatch, Trainer } from 'diffusion-native';

import { close, worst } from './helpers/close.js';
import { fixture, readTensors } from './helpers/fixtures.js';

const logitCases = [
	{ name: 'logits-small', lengths: [1, 2, 7, 65, 1024] },
	{ name: 'logits-odd', lengths: [1, 5, 40] },
];
const attentions = [
	{ key: 'full', attention: 'full' },
	{ key: 'causal', attention: 'causal' },
	{ key: 'block4', attention: { blockCausal: 4 } },
] as const;

function tensor(tensors: Map<string, Float32Array>, name: string): Float32Array {
	const values = tensors.get(name);
	if (!values) throw new Error(`the fixture has no ${name}`);
	return values;
}

for (const { name, lengths } of logitCases) {
	for (const { key, attention } of attentions) {
		test(`${name}: ${key} logits agree with PyTorch within 2e-4`, async (t) => {
			const expected = readTensors(fixture('reference', name, 'expected.safetensors'));
			await using model = await DiffuGPT.fromPretrained(fixture('reference', name), {
				config: { maskId: 0, attention: 'bidirectional' },
			});
			const sequences = lengths.map((length) => Int32Array.from(tensor(expected, `ids.${length}`)));
			const rows = lengths.map((length) => Int32Array.from(tensor(expected, `rows.${length}`)));
			const logits = await model.forward(sequences, { attention, rows });
			for (const [i, length] of lengths.entries()) {
				close(t, logits[i] as Float32Array, tensor(expected, `${key}.${length}`), 2e-4, `T = ${length}`);
			}
		});
	}
}

async function trainingModel(): Promise<{
	model: DiffuGPT;
	expected: Map<string, Float32Array>;
	batch: DiffusionBatch;
}> {
	const expected = readTensors(fixture('reference', 'training', 'expected.safetensors'));
	const maskId = tensor(expected, 'mask_id')[0] as number;
	const model = await DiffuGPT.fromPretrained(fixture('reference', 'training'), {
		config: { maskId, attention: 'bidirectional' },
	});
	const times = tensor(expected, 't');
	const each = <T>(convert: (s: number) => T): T[] => Array.from(times, (_, s) => convert(s));
	const batch: DiffusionBatch = {
		tokens: each((s) => Int32Array.from(tensor(expected, `ids.${s}`))),
		maskable: each((s) => Uint8Array.from(tensor(expected, `maskable.${s}`))),
		mask: each((s) => Uint8Array.from(tensor(expected, `mask.${s}`))),
		t: Array.from(times),
	};
	return { model, expected, batch };
}

for (const normalise of ['tokens', 'masked', 'answer'] as const) {
	test(`loss normalised by ${normalise} agrees with PyTorch`, async (t) => {
		const { model, expected, batch } = await trainingModel();
		const { loss, unweighted, masked, tokens } = await model.loss(batch, { normalise });
		const [expectedLoss, sum, count, predictable] = tensor(expected, `${normalise}.loss`);
		close(
			t,
			[loss, unweighted],
			[expectedLoss as number, (sum as number) / (count as number)],
			1e-4 * (expectedLoss as number),
			normalise,
		);
		t.is(masked, count as number);
		t.is(tokens, predictable as number);
		await model.dispose();
	});
}

for (const objective of ['diffusion', 'autoregressive'] as const) {
	test(`every gradient of the ${objective} objective agrees with PyTorch within 1e-4 relative`, async (t) => {
		const { model, expected, batch } = await trainingModel();
		const key = objective === 'diffusion' ? 'tokens' : 'autoregressive';
		const given =
			objective === 'diffusion'
				? batch
				: { tokens: batch.tokens, ...(batch.maskable ? { maskable: batch.maskable } : {}) };
		const trainer = new Trainer(model, { objective, maxSteps: 1 });
		const gradients = await trainer.gradients(given);
		t.is(gradients.size, model.parameters().length);
		for (const [name, gradient] of gradients) {
			const wanted = tensor(expected, `${key}.grad.${name}`);
			close(t, gradient, wanted, 1e-4 * worst(wanted, wanted).scale, name);
		}
		await model.dispose();
	});
}

test('ten AdamW steps give the losses, gradient norms and parameters of PyTorch within 1e-4 relative', async (t) => {
	const { model, expected, batch } = await trainingModel();
	const trainer = new Trainer(model, {
		maxSteps: 10,
		learningRate: 1e-3,
		weightDecay: 0.1,
		betas: [0.9, 0.95],
		eps: 1e-8,
		gradClip: 1,
	});
	const losses: number[] = [];
	const norms: number[] = [];
	for (let step = 0; step < 10; step++) {
		const { loss, gradNorm } = await trainer.step(batch);
		losses.push(loss);
		norms.push(gradNorm);
	}
	const relative = (actual: readonly number[], wanted: Float32Array, what: string): void =>
		close(
			t,
			actual.map((value, step) => value / (wanted[step] as number)),
			wanted.map(() => 1),
			1e-4,
			what,
		);
	relative(losses, tensor(expected, 'adamw.losses'), 'losses');
	relative(norms, tensor(expected, 'adamw.norms'), 'norms');
	for (const { name } of model.parameters()) {
		const actual = model.getParameter(name);
		const wanted = tensor(expected, `adamw.${name}`);
		const allowed = 1e-4 * worst(wanted, wanted).scale;
		if (name.endsWith('attn.c_attn.bias')) {
			// The gradient of the key third is zero in theory; Adam turns its rounding noise into whole steps.
			const C = actual.length / 3;
			close(t, actual.subarray(0, C), wanted.subarray(0, C), allowed, `${name}, q`);
			close(t, actual.subarray(2 * C), wanted.subarray(2 * C), allowed, `${name}, v`);
		} else {
			close(t, actual, wanted, allowed, name);
		}
	}
	await model.dispose();
});
