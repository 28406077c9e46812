/** This library as a contender of its own benchmark. */
import { DiffuGPT, info, Trainer } from 'diffusion-native';

import type { WeightType } from '../shapes.js';
import { type Contender, type Job, sample, serve } from './channel.js';
import { maskOdd, tokensOf } from './inputs.js';

let model: DiffuGPT;
let work: () => Promise<unknown> = async () => undefined;

/**
 * The inputs of calls that repeat the same work. No token stands at its place in two calls that follow each other: the
 * model keeps what it knows of one that does, which is what a sampler has of it.
 */
function inTurns<Input>(...inputs: Input[]): () => Input {
	let call = 0;
	return () => inputs[call++ % inputs.length] as Input;
}

/** The sample of a forward with logits or hidden states over plain tokens. */
async function forward(T: number, output: 'logits' | 'hidden'): Promise<number[]> {
	const [values] = await model.forward(tokensOf(model.config.vocab, T), { output });
	return sample(values as Float32Array, T, output === 'logits' ? model.config.vocab : model.config.channels);
}

async function prepare(job: Job): Promise<number[]> {
	const { vocab, maskId } = model.config;
	switch (job.kind) {
		case 'forward': {
			const tokens = inTurns(tokensOf(vocab, job.T), tokensOf(vocab, job.T, 1));
			let last: Float32Array[] = [];
			work = async () => {
				last = await model.forward(tokens(), { output: job.output, reuse: last });
			};
			return forward(job.T, job.output);
		}
		case 'denoise': {
			const tokens = maskOdd(tokensOf(vocab, job.T), maskId);
			const step = () => model.generate({ tokens }, { sampler: 'confidence', steps: 1, seed: 1 });
			const { sequence: found, stats } = await step();
			const [logits] = await model.forward(tokens, { output: 'aligned-logits' });
			let same = 0;
			for (let i = 1; i < job.T; i += 2) {
				const row = (logits as Float32Array).subarray(i * vocab, (i + 1) * vocab);
				row[maskId] = -Infinity;
				if (row[found[i] as number] === row.reduce((best, value) => Math.max(best, value))) same++;
			}
			if (stats.forwards !== 1 || same !== job.T / 2)
				throw new Error(`${stats.forwards} forwards, ${same} of ${job.T / 2} tokens are the most probable ones`);
			// Masks move by one: otherwise they would stand where they stood. As many, of which one, the last, does.
			const other = maskOdd(tokensOf(vocab, job.T + 1, 1), maskId).subarray(1);
			other[0] = 0;
			other[job.T - 1] = maskId;
			const canvas = inTurns(tokens, other);
			work = () => model.generate({ tokens: canvas() }, { sampler: 'confidence', steps: 1, seed: 1 });
			return forward(job.T, 'logits');
		}
		case 'train': {
			// No clipping: the peers do none.
			const trainer = new Trainer(model, { maxSteps: 1000, learningRate: 1e-4, gradClip: 0 });
			const tokens = Array.from({ length: job.B }, (_, s) => tokensOf(vocab, job.T, s));
			const mask = tokens.map((ids) => Uint8Array.from(ids, (_, i) => i % 2));
			work = () => trainer.step({ tokens, mask, t: tokens.map(() => 0.5) });
			const losses: number[] = [];
			for (let i = 0; i < 2; i++) losses.push(((await work()) as { loss: number }).loss);
			return losses;
		}
		case 'sample': {
			const tokens = new Int32Array(job.T).fill(maskId);
			tokens[0] = 0;
			const { steps, topP, temperature } = job;
			const generate = async (count: number) => {
				const options = { sampler: 'ancestral', steps: count, topP, temperature, seed: 1 } as const;
				const { sequence } = await model.generate({ tokens }, options);
				const open = sequence.filter((id) => id === maskId).length;
				if (open > 0) throw new Error(`${open} of ${job.T} tokens are left open`);
			};
			await generate(2);
			work = () => generate(steps);
			return forward(job.T, 'logits');
		}
		case 'decode': {
			const tokens = tokensOf(vocab, job.prompt);
			const generate = async (length: number) => {
				const options = { sampler: 'autoregressive', temperature: 0, seed: 1, length } as const;
				const { sequence, stats } = await model.generate({ tokens }, options);
				const found = sequence.length - job.prompt;
				if (found !== length || stats.forwards !== length)
					throw new Error(`${found} tokens in ${stats.forwards} forwards, expected ${length} in as many`);
			};
			await generate(4);
			work = () => generate(job.tokens);
			const [logits] = await model.forward(tokens, { attention: 'causal', rows: [Int32Array.of(job.prompt - 1)] });
			return centred(logits as Float32Array);
		}
	}
}

/** 64 logits less their mean: what is left of them in probabilities that some engines give instead. */
function centred(logits: Float32Array): number[] {
	const picked = sample(logits, 1, logits.length).slice(0, 64);
	const mean = picked.reduce((sum, value) => sum + value) / picked.length;
	return picked.map((value) => value - mean);
}

const contender: Contender = {
	async open({ path, dtype }) {
		model = await DiffuGPT.fromPretrained(path, { device: 'cpu', dtype: dtype as WeightType });
		const { version, cpu } = info();
		return { version: `diffusion-native ${version} (${cpu.isa})` };
	},
	prepare,
	async run() {
		await work();
		return undefined;
	},
};

await serve(contender);
