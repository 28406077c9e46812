/** A prompt, every sampler and every length method, for the tests of generation. */
import {
	type DenoiseStep,
	DiffuGPT,
	type GenerateOptions,
	type GenerateResult,
	type Prompt,
	Tokenizer,
} from 'diffusion-native';

export const maskId = 60;

export const prompt = { tokens: Int32Array.of(5, 17, 33, 2) };

export async function collect(
	model: DiffuGPT,
	given: Prompt,
	options: GenerateOptions,
): Promise<{ events: DenoiseStep[]; result: GenerateResult }> {
	const stream = model.stream(given, options);
	const events: DenoiseStep[] = [];
	for (;;) {
		const { done, value } = await stream.next();
		if (done) return { events, result: value };
		events.push(value);
	}
}

/** Everything that does not depend on the clock. */
export function facts(result: GenerateResult): object {
	const { text, tokens, sequence, finishReason, seed, stats } = result;
	return {
		text,
		tokens,
		sequence,
		finishReason,
		seed,
		forwards: stats.forwards,
		real: stats.generatedTokens,
		canvas: stats.canvas,
	};
}

export const everySampler: GenerateOptions[] = [
	{ sampler: 'ancestral', steps: 5 },
	{ sampler: 'ancestral', steps: 6, block: 4, topP: 0.8 },
	{ sampler: 'confidence', steps: 5 },
	{ sampler: 'confidence', plan: 'linear', score: 'margin', temperature: 0.8, topK: 5 },
	{ sampler: 'confidence', score: 'random', steps: 4, temperature: 1 },
	{ sampler: 'threshold', threshold: 0.5, block: 5 },
	{ sampler: 'factor', factor: 1.5 },
	{ sampler: 'entropy-bound', entropyBound: 1, temperature: 0.7 },
	{ sampler: 'klass', threshold: 0.3, divergence: 0.5, stableSteps: 1 },
	{ sampler: 'revocable', threshold: 0.2, verify: 0.4 },
	{ sampler: 'revocable', threshold: 0.2, verify: 0.4, temperature: 1, guidance: 0.5 },
	{ sampler: 'first-hitting', guidance: 1 },
	{ sampler: 'autoregressive' },
	{ sampler: 'autoregressive', guidance: 1, temperature: 0.5 },
];

export const everyLength: GenerateOptions['length'][] = [
	14,
	{ max: 14 },
	{ max: 14, method: 'block', block: 4 },
	{ max: 14, method: 'first-step' },
	{ max: 14, method: 'quantile', quantile: 0.5 },
	{ max: 14, method: 'threshold', probability: 0.2 },
	{ max: 14, method: 'expected', coverage: 0.3 },
	{ max: 14, method: 'daedal', initial: 4, grow: 3, window: 2 },
	{ max: 14, method: 'rho-eos', initial: 4, grow: 3, low: 0.1, high: 0.2 },
];

/** All combinations that make sense. */
export const combinations = everySampler.flatMap((sampler) =>
	everyLength
		.filter(
			(length) =>
				sampler.sampler !== 'autoregressive' ||
				typeof length === 'number' ||
				['constant', 'block', undefined].includes(length?.method),
		)
		.map((length): GenerateOptions => ({ ...sampler, ...(length === undefined ? {} : { length }) })),
);

/** A model on GPT-2's vocabulary, for prompts that are text. */
export function textModel(config: object = {}): Promise<DiffuGPT> {
	return DiffuGPT.fromConfig(
		{ layers: 1, heads: 2, channels: 16, vocab: 50257, context: 64, ...config },
		{ seed: 1, tokenizer: Tokenizer.gpt2(), device: 'cpu' },
	);
}
