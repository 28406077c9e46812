/**
 * The objective and the training loop against their definitions: losses by enumeration and from `forward`, what must not leak,
 * what must be equal bit for bit, and what a failure leaves behind.
 */
import { spawnSync } from 'node:child_process';
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import test from 'ava';
import {
	DiffuGPT,
	type DiffusionBatch,
	prepare,
	TokenDataset,
	Tokenizer,
	Trainer,
	type TrainOptions,
} from 'diffusion-native';

import { close, same, worst } from './helpers/close.js';
import { root } from './helpers/fixtures.js';
import { logSoftmax, sharpModel, smallConfig } from './helpers/models.js';

const scratch = mkdtempSync(join(tmpdir(), 'dn-spec-training-'));
let count = 0;
const fresh = (): string => join(scratch, String(count++));
test.after.always(() => rmSync(scratch, { recursive: true, force: true }));

const { vocab: V, maskId } = smallConfig;
const ids = Int32Array.of(0, 17, 4, 33, 8, 51);
const T = ids.length;

/** Cross-entropies (T) of the tokens given a mask, from a forward pass; entry 0 is NaN under the shift. */
async function crossEntropies(model: DiffuGPT, mask: Uint8Array): Promise<number[]> {
	const corrupted = ids.map((id, i) => (mask[i] ? maskId : id));
	const [logits] = (await model.forward(corrupted, { output: 'aligned-logits' })) as [Float32Array];
	return Array.from(ids, (id, i) => -(logSoftmax(logits.subarray(i * V, (i + 1) * V), -1)[id] as number));
}

/** The NELBO of `ids` beyond `prompt` tokens in nats, over all masks: sum of (k-1)! (L-k)! / L! times the cross-entropies. */
async function exactNelbo(model: DiffuGPT, prompt: number): Promise<number> {
	const L = T - prompt;
	const factorial = (n: number): number => (n < 2 ? 1 : n * factorial(n - 1));
	let sum = 0;
	for (let bits = 1; bits < 2 ** L; bits++) {
		const mask = Uint8Array.from(ids, (_, i) => (i < prompt ? 0 : (bits >> (i - prompt)) & 1));
		const losses = await crossEntropies(model, mask);
		const k = mask.reduce((a, b) => a + b, 0);
		const weight = (factorial(k - 1) * factorial(L - k)) / factorial(L);
		sum += weight * losses.reduce((a, loss, i) => a + (mask[i] ? loss : 0), 0);
	}
	return sum;
}

test('the mean of drawn losses is the NELBO over all masks, for every time sampler, within 3 sigma', async (t) => {
	for (const shift of [true, false]) {
		await using model = await sharpModel({ shift }, 3, 8);
		// Position 0 is a prompt: under the shift nothing predicts it.
		const maskable = Uint8Array.from(ids, (_, i) => (i > 0 ? 1 : 0));
		const exact = (await exactNelbo(model, 1)) / (T - 1);
		for (const timeSampler of ['uniform', 'stratified', 'exact-count'] as const) {
			const values: number[] = [];
			for (let step = 0; step < 120; step++) {
				const batch = { tokens: Array(64).fill(ids), maskable: Array(64).fill(maskable) } as DiffusionBatch;
				const { loss, tokens } = await model.loss(batch, { seed: 5, step, timeSampler });
				t.is(tokens, 64 * (T - 1));
				values.push(loss);
			}
			const mean = values.reduce((a, b) => a + b) / values.length;
			const variance = values.reduce((a, b) => a + (b - mean) ** 2, 0) / (values.length - 1);
			const sigma = Math.sqrt(variance / values.length);
			// The floor of t leaves out at most 1e-3 of the range.
			t.true(Math.abs(mean - exact) < 3 * sigma + 1e-3 * exact, `${timeSampler}: ${mean} +- ${sigma}, exact ${exact}`);
			t.true(sigma < 0.05 * exact, `${timeSampler}: sigma ${sigma} is small enough to tell`);
		}
	}
});

test('uniform predictions cost ln V under every normalisation, in its own way', async (t) => {
	await using model = await DiffuGPT.fromConfig(smallConfig, { device: 'cpu', seed: 1 });
	for (const { name } of model.parameters())
		model.setParameter(name, new Float32Array(model.getParameter(name).length));
	const ln = Math.log(V);
	const mask = Uint8Array.of(0, 1, 1, 0, 1, 0);
	const maskable = Uint8Array.of(0, 0, 1, 1, 1, 1).map((_, i) => (i === 0 ? 0 : 1));
	const batch: DiffusionBatch = { tokens: [ids], mask: [mask], maskable: [maskable], t: [0.25] };
	const value = async (normalise: 'tokens' | 'masked' | 'answer'): Promise<number> =>
		(await model.loss(batch, { normalise })).loss;
	close(t, [await value('tokens')], [((3 / 5) * ln) / 0.25], 1e-5, 'tokens: 3 masked of 5, weight 4');
	close(t, [await value('masked')], [ln / 0.25], 1e-5, 'masked');
	close(t, [await value('answer')], [((3 / 5) * ln) / 0.25], 1e-5, 'answer');
	close(t, [(await model.loss(batch, { weight: 'none', normalise: 'masked' })).loss], [ln], 1e-5, 'no weight');
	close(t, [(await model.loss(batch)).unweighted], [ln], 1e-5, 'unweighted');
	const many = { tokens: Array<Int32Array>(256).fill(ids) };
	for (const normalise of ['tokens', 'answer'] as const) {
		let sum = 0;
		for (let step = 0; step < 60; step++)
			sum += (await model.loss(many, { normalise, step, timeSampler: 'exact-count' })).loss;
		t.true(Math.abs(sum / 60 / ln - 1) < 0.02, `${normalise}: ${sum / 60} in the mean, ln V = ${ln}`);
	}
	const ar = await model.loss({ tokens: [ids] }, { objective: 'autoregressive' });
	close(t, [ar.loss, ar.masked], [ln, T - 1], 1e-5, 'autoregressive');
});

test('the identity of a masked token reaches no input: other losses and all logits stay', async (t) => {
	await using model = await sharpModel();
	const mask = Uint8Array.of(0, 0, 1, 0, 1, 1);
	const one = async (tokens: Int32Array, only: number): Promise<number> => {
		const maskable = Uint8Array.from(mask, (_, i) => (i === only ? 1 : 0));
		const corrupted = tokens.map((id, i) => (mask[i] && i !== only ? maskId : id));
		return (await model.loss({ tokens: [corrupted], mask: [maskable], maskable: [maskable], t: [1] })).loss;
	};
	const changed = Int32Array.from(ids);
	changed[4] = 29;
	const whole = (tokens: Int32Array) => model.loss({ tokens: [tokens], mask: [mask], t: [1] }, { normalise: 'masked' });
	const [a, b] = [await whole(ids), await whole(changed)];
	const differences = (await one(changed, 4)) - (await one(ids, 4));
	// Of the three cross-entropies only that of token 4 changes, by as much as its own loss does.
	close(t, [(b.loss - a.loss) * 3], [differences], 1e-4, 'the change is that of token 4 alone');
	t.true(Math.abs(differences) > 1e-2);
	const visible = Int32Array.from(ids);
	visible[3] = 29;
	t.not((await whole(visible)).loss, a.loss, 'a visible token does reach the input');
});

/** A model without blocks' effect whose row i says token i (copy) or nothing: it predicts what it sees at its own row. */
async function copier(shift: boolean): Promise<DiffuGPT> {
	const model = await DiffuGPT.fromConfig(
		{ ...smallConfig, layers: 1, channels: 64, shift },
		{ device: 'cpu', seed: 1 },
	);
	for (const { name } of model.parameters()) {
		const values = model.getParameter(name);
		values.fill(name === 'ln_f.weight' ? 4 : 0);
		if (name === 'wte.weight') for (let id = 0; id < V; id++) values[id * 64 + id] = 1;
		model.setParameter(name, values);
	}
	return model;
}

test('copying visible tokens earns nothing: the loss of a model that only copies stays at ln V or above', async (t) => {
	const random = Int32Array.from({ length: 40 }, (_, i) => (i * i * 31 + 7 * i) % 60);
	for (const shift of [true, false]) {
		await using model = await copier(shift);
		const [logits] = (await model.forward(random)) as [Float32Array];
		const own = random.reduce((n, id, i) => {
			const row = logits.subarray(i * V, (i + 1) * V);
			return n + (row.indexOf(Math.max(...row)) === id ? 1 : 0);
		}, 0);
		t.is(own, 40, 'row i says token i, which is visible to it');
		for (const normalise of ['tokens', 'masked'] as const) {
			for (let step = 0; step < 10; step++) {
				const { unweighted, masked } = await model.loss({ tokens: [random], t: [0.3] }, { normalise, step });
				if (masked > 0) t.true(unweighted > Math.log(V) - 0.1, `shift ${shift}: ${unweighted}`);
			}
		}
		if (!shift) continue;
		// The same model read without the shift and scored on visible tokens would have a loss of nearly 0.
		const constant = new Int32Array(20).fill(7);
		const { loss } = await model.loss({ tokens: [constant] }, { objective: 'autoregressive' });
		t.true(loss < 0.1, `a constant text is predicted by copying, loss ${loss}: the shift is there`);
	}
});

test('the autoregressive loss is the mean cross-entropy of the next token', async (t) => {
	await using model = await sharpModel({ attention: 'causal' });
	const [logits] = (await model.forward(ids, { attention: 'causal' })) as [Float32Array];
	const expected = Array.from(
		ids.subarray(1),
		(id, i) => -(logSoftmax(logits.subarray(i * V, (i + 1) * V), -1)[id] as number),
	);
	const { loss, masked, tokens } = await model.loss({ tokens: [ids] }, { objective: 'autoregressive' });
	close(t, [loss], [expected.reduce((a, b) => a + b) / (T - 1)], 1e-4, 'loss');
	t.deepEqual([masked, tokens], [T - 1, T - 1]);
});

const ragged: DiffusionBatch = {
	tokens: [ids, Int32Array.of(9, 3), Int32Array.from({ length: 64 }, (_, i) => (i * 13) % 60)],
};

test('recompute and threads change no gradient, bf16 products little', async (t) => {
	const gradients = async (options: TrainOptions, threads = 1): Promise<Map<string, Float32Array>> => {
		await using model = await DiffuGPT.fromConfig(smallConfig, { device: 'cpu', seed: 2, threads });
		await using trainer = new Trainer(model, { seed: 8, ...options });
		return await trainer.gradients(ragged);
	};
	for (const objective of ['diffusion', 'autoregressive'] as const) {
		const plain = await gradients({ objective });
		t.true([...plain.values()].every((values) => values.every(Number.isFinite)));
		for (const [name, other] of [
			['recompute', await gradients({ objective, recompute: true })],
			['2 threads', await gradients({ objective }, 2)],
			['8 threads and recompute', await gradients({ objective, recompute: true }, 8)],
		] as const) {
			for (const [parameter, values] of other)
				same(t, values, plain.get(parameter) as Float32Array, `${name}, ${parameter}`);
		}
		const rounded = await gradients({ objective, precision: 'bf16' });
		for (const [parameter, values] of rounded) {
			// The gradient of the key bias is zero in theory: only rounding is left there.
			const expected = plain.get(parameter) as Float32Array;
			const { difference, scale } = worst(values, expected);
			t.true(difference <= 0.05 * scale + 1e-6, `bf16, ${parameter}: ${difference} of ${scale}`);
		}
	}
});

test('a step on given micro-batches is what evaluate, loss and gradients say of it', async (t) => {
	await using model = await DiffuGPT.fromConfig(smallConfig, { device: 'cpu', seed: 2 });
	const batch = { ...ragged, mask: ragged.tokens.map((s) => Uint8Array.from(s, (_, i) => i % 2)), t: [0.5, 0.9, 0.2] };
	const expected = await model.loss(batch);
	await using trainer = new Trainer(model, { learningRate: 0, gradClip: 0 });
	const gradients = await trainer.gradients(batch);
	const norm = Math.sqrt([...gradients.values()].reduce((a, g) => a + g.reduce((b, x) => b + x * x, 0), 0));
	const before = model.parameters().map(({ name }) => model.getParameter(name));
	const metrics = await trainer.step(batch);
	close(t, [metrics.loss, metrics.unweighted], [expected.loss, expected.unweighted], 1e-5, 'loss');
	close(t, [metrics.gradNorm], [norm], 1e-4 * norm, 'gradient norm');
	for (const [i, { name }] of model.parameters().entries())
		same(t, model.getParameter(name), before[i] as Float32Array, `learning rate 0 changes nothing: ${name}`);
});

const tokenizer = { encode: (text: string) => Int32Array.from(Buffer.from(text), (byte) => byte % 60), vocabSize: 60 };
const records = Array.from({ length: 24 }, (_, i) =>
	Int32Array.from({ length: 3 + (i % 9) }, (__, j) => 1 + ((i * 7 + j) % 50)),
);
const dataset = (more: object = {}): Promise<TokenDataset> =>
	prepare(records, { tokenizer, out: `${fresh()}.bin`, format: 'documents', context: 32, eosId: 0, ...more });

test('the order of the data is a function of the seed and covers every sequence once per epoch', async (t) => {
	const data = await dataset();
	const losses = async (seed: number): Promise<number[]> => {
		await using model = await DiffuGPT.fromConfig(smallConfig, { device: 'cpu', seed: 1 });
		await using trainer = new Trainer(model, { data, seed, maxSteps: 6, batchSize: 8, learningRate: 0 });
		const seen: number[] = [];
		let tokens = 0;
		for await (const m of trainer.run()) {
			seen.push(m.loss, m.tokens);
			tokens += m.tokens;
			if (m.step === 3) t.is(tokens, data.tokens, 'three batches of eight are the whole set');
		}
		t.is(tokens, 2 * data.tokens);
		return seen;
	};
	t.deepEqual(await losses(1), await losses(1));
	t.notDeepEqual(await losses(1), await losses(2));
	data.close();
});

test('data of another tokenizer, another vocabulary or a longer context is refused before the first step', async (t) => {
	await using model = await DiffuGPT.fromConfig(smallConfig, { device: 'cpu' });
	const wide = await prepare([Int32Array.of(1, 2, 70)], {
		tokenizer: { ...tokenizer, vocabSize: 90 },
		out: `${fresh()}.bin`,
		format: 'documents',
		eosId: 0,
	});
	const bad = async (data: TokenDataset, message: RegExp, place: 'data' | 'validation' = 'data'): Promise<void> => {
		const error = await t.throwsAsync(
			async () => {
				await using trainer = new Trainer(model, { data: await dataset(), [place]: data, maxSteps: 2 });
				for await (const _ of trainer.run());
			},
			{ code: 'ERR_DN_ARGUMENT', message },
		);
		t.truthy(error);
	};
	await bad(wide, /vocabulary|90|70/);
	await bad(wide, /vocabulary|90|70/, 'validation');
	const gpt2 = Tokenizer.gpt2();
	await using reader = await DiffuGPT.fromConfig(
		{ layers: 1, heads: 2, channels: 8, vocab: 50257, context: 64 },
		{ device: 'cpu', tokenizer: gpt2 },
	);
	const foreign = await dataset({ tokenizer: { ...tokenizer, fingerprint: 'abcd' } });
	await using trainer = new Trainer(reader, {});
	for (const [what, call] of [
		['evaluate', () => trainer.evaluate(foreign)],
		['run', async () => new Trainer(reader, { data: foreign, maxSteps: 1 })],
	] as [string, () => Promise<unknown>][]) {
		if (what === 'run') await trainer.dispose();
		await t.throwsAsync(call, { code: 'ERR_DN_ARGUMENT', message: /another tokenizer.*abcd/ }, what);
	}
	const stamped = await dataset({ tokenizer: { ...tokenizer, fingerprint: 'aa' } });
	stamped.close();
	await t.throwsAsync(TokenDataset.open(stamped.path, { tokenizer: { ...tokenizer, fingerprint: 'bb' } }), {
		code: 'ERR_DN_ARGUMENT',
		message: /another tokenizer/,
	});
});

const onLimitedFiles = process.platform === 'win32' ? test.skip : test;

onLimitedFiles('a disk that fills up during a checkpoint: an error, and the last good checkpoint stays', async (t) => {
	const dir = fresh();
	const data = await dataset();
	const source = `
		import { DiffuGPT, TokenDataset, Trainer } from 'diffusion-native';
		const data = await TokenDataset.open(${JSON.stringify(data.path)});
		const resume = process.argv.at(-1) === 'resume';
		const config = { layers: 1, heads: 2, channels: 32, vocab: 512, context: 32, maskId: 60, eosId: 0 };
		const trainer = resume
			? await Trainer.resume(${JSON.stringify(dir)}, { device: 'cpu', maxSteps: 6 })
			: new Trainer(await DiffuGPT.fromConfig(config, { device: 'cpu' }), { data, maxSteps: 3, checkpoint: { dir: ${JSON.stringify(dir)}, every: 1 } });
		try {
			for await (const m of trainer.run()) console.log(m.step);
		} catch (error) {
			console.log(error.code);
		}
		await trainer.dispose();`;
	const run = (limit: string, mode: string): string => {
		const { status, stdout, stderr } = spawnSync(
			'sh',
			['-c', `${limit} exec "$0" --input-type=module --eval "$1" -- "$2"`, process.execPath, source, mode],
			{ cwd: root, encoding: 'utf8', timeout: 60_000 },
		);
		t.is(status, 0, stderr);
		return stdout;
	};
	t.is(run('', 'new'), '1\n2\n3\n');
	const weights = readFileSync(join(dir, 'step-00000003', 'model.safetensors'));
	t.is(run('ulimit -f 64 &&', 'resume'), 'ERR_DN_CHECKPOINT\n', 'step 4 cannot be saved');
	t.deepEqual(
		readdirSync(dir).filter((name) => /tmp|00004/.test(name)),
		[],
	);
	t.true(existsSync(join(dir, 'step-00000003', 'trainer.json')));
	t.deepEqual(readFileSync(join(dir, 'step-00000003', 'model.safetensors')), weights);
	t.is(run('', 'resume'), '4\n5\n6\n', 'the run goes on from the last good checkpoint');
	data.close();
});
