/**
 * Generation from checked request to result, and length prediction; the steps in between are lib/denoise-loop.ts. One request is one async generator that awaits one forward per step, so a
 * slow consumer slows only its own request, and concurrent requests meet in the engine's batches.
 */
import { type DenoiseStep, Loop } from './denoise-loop.js';
import type { Engine } from './engine.js';
import { check } from './errors.js';
import { cachedEvaluator, type Evaluator, endIds, fullEvaluator } from './evaluator.js';
import {
	type LengthMethod,
	type LengthOptions,
	type LengthPrediction,
	type LengthRule,
	resolveLength,
} from './length/method.js';
import { type GenerateOptions, type ResolvedOptions, resolveOptions } from './options.js';
import { makeCanvas, type ParsedPrompt, type Prompt, parsePrompt, type TextCodec } from './prompt.js';

/** What a generation returns. */
export interface GenerateResult {
	/** The new text (of infilling: what was filled in), up to the first end token. */
	text: string;
	/** The new ids in order of position. Fixed length: all of them. Variable length: up to the end token, without it. */
	tokens: Int32Array;
	/** The final canvas: prompt, new ids (the end token too) and suffix. */
	sequence: Int32Array;
	/** 'end-of-text': variable length, and an end token was committed. An aborted generation rejects. */
	finishReason: 'length' | 'end-of-text' | 'abort';
	/** The seed that reproduces this result. */
	seed: bigint;
	stats: GenerateStats;
}

export interface GenerateStats {
	/** Forwards this request took part in; twins and verification copies share their canvas's forward. */
	forwards: number;
	/** New tokens before the first end token. */
	generatedTokens: number;
	/** Time spent, without the time the consumer of the stream took. */
	ms: number;
	tokensPerSecond: number;
	tokensPerForward: number;
	/** Positions of the largest canvas that was denoised, prompt included. */
	canvas: number;
}

/** A checked request. */
export interface GenerationRequest {
	prompt: ParsedPrompt;
	options: ResolvedOptions;
	/** Variable length, or null. */
	rule: LengthRule | null;
	/** Open positions of the first canvas (of the look that predicts the length). */
	open: number;
}

/** Checks prompt and options together. @throws `ERR_DN_ARGUMENT`, or `signal.reason` when it is aborted already */
export function prepareRequest(
	engine: Engine,
	tokenizer: TextCodec | null,
	prompt: Prompt,
	given: GenerateOptions = {},
): GenerationRequest {
	engine.check();
	const { config } = engine;
	const options = resolveOptions(given, config);
	options.signal?.throwIfAborted();
	const parsed = parsePrompt(prompt, config, tokenizer);
	const { length } = options;
	const fixed = parsed.before.length + parsed.after.length;
	check(fixed <= config.context, `the prompt has ${fixed} tokens, the model's context ${config.context}`);
	let rule: LengthRule | null = null;
	let open: number;
	if (parsed.open) {
		check(length === undefined, 'option length cannot be combined with open positions in prompt.tokens');
		open = parsed.open.reduce((sum, isOpen) => sum + isOpen, 0);
		check(
			!options.isAutoregressive || parsed.open.indexOf(1) === parsed.open.length - open,
			"the sampler 'autoregressive' only continues: open positions must all come last",
		);
	} else {
		if (typeof length === 'object') {
			rule = resolveLength(length);
			open = rule.predict ? rule.max : rule.initial;
		} else {
			open = length ?? (typeof prompt === 'object' && 'tokens' in prompt ? 0 : Math.min(64, config.context - fixed));
		}
		const largest = rule?.max ?? open;
		check(
			fixed + largest <= config.context,
			`the prompt's ${fixed} tokens and ${largest} new ones do not fit the model's context of ${config.context}`,
		);
		check(
			!options.isAutoregressive || parsed.after.length === 0,
			"the sampler 'autoregressive' only continues: it cannot fill a gap before a suffix",
		);
		check(
			!options.isAutoregressive || !rule?.predict,
			`option length.method: '${rule?.method}' looks at masked positions, which the sampler 'autoregressive' has none of`,
		);
		if (options.block !== undefined && largest > 0) {
			check(
				options.block <= largest,
				`option block is ${options.block}, longer than the ${largest} tokens to generate`,
			);
		}
	}
	if (options.steps !== undefined && options.block !== undefined && !rule?.predict) {
		const blocks = Math.ceil(open / options.block);
		check(options.steps >= blocks, `option steps is ${options.steps}, fewer than the ${blocks} blocks`);
	}
	return { prompt: parsed, options, rule, open };
}

/** Runs a checked request. */
export async function* denoise(
	engine: Engine,
	tokenizer: TextCodec | null,
	request: GenerationRequest,
): AsyncGenerator<DenoiseStep, GenerateResult> {
	const { prompt, options, rule } = request;
	const { signal } = options;
	signal?.throwIfAborted();
	let resumed = performance.now();
	let ms = 0;
	let forwards = 0;
	let evaluator: Evaluator | undefined;
	try {
		let open = request.open;
		if (rule?.predict) {
			const look = await lookAtEnds(engine, prompt, open, signal);
			forwards++;
			const end = rule.predict(look);
			open = end < 0 ? open : end + 1;
		}
		const canvas = makeCanvas(prompt, open, engine.config);
		evaluator = options.isAutoregressive
			? await cachedEvaluator(engine, canvas, options, prompt.pinned, prompt.before.length + (rule?.max ?? open))
			: fullEvaluator(engine, canvas, options, prompt.pinned);
		const loop = new Loop(canvas, options, rule, endIds(engine.config), tokenizer);
		for (;;) {
			const plan = loop.next();
			if (!plan) break;
			const look = await evaluator.look(
				plan.positions,
				plan.groups,
				plan.view.step,
				options.policy.needsLogits ?? false,
			);
			forwards++;
			const event = loop.apply(plan, look);
			ms += performance.now() - resumed;
			yield event;
			signal?.throwIfAborted();
			resumed = performance.now();
		}
		const { tokens, text, ended } = loop.finish();
		ms += performance.now() - resumed;
		const generatedTokens = loop.realTokens();
		return {
			text,
			tokens,
			sequence: canvas.tokens.slice(),
			finishReason: ended ? 'end-of-text' : 'length',
			seed: options.seed,
			stats: {
				forwards,
				generatedTokens,
				ms,
				tokensPerSecond: ms > 0 ? (generatedTokens * 1000) / ms : 0,
				tokensPerForward: forwards > 0 ? generatedTokens / forwards : 0,
				canvas: loop.largest,
			},
		};
	} finally {
		evaluator?.release();
	}
}

/** P(end) at each of `open` positions in the prompt's gap, from one forward. */
async function lookAtEnds(
	engine: Engine,
	prompt: ParsedPrompt,
	open: number,
	signal: AbortSignal | undefined,
): Promise<Float32Array> {
	const canvas = makeCanvas(prompt, open, engine.config);
	const sampling = { temperature: 0, topK: 0, topP: 1, guidance: 0, seed: 0n, signal };
	const look = await fullEvaluator(engine, canvas, sampling, prompt.pinned).look(canvas.openPositions(), [], 0, false);
	return look.end;
}

/** Predicts the length of the answer without generating it. */
export async function predictLength(
	engine: Engine,
	tokenizer: TextCodec | null,
	prompt: Prompt,
	options: LengthOptions & { readonly signal?: AbortSignal },
): Promise<LengthPrediction> {
	engine.check();
	check(typeof options === 'object' && options !== null, 'predictLength needs options with max');
	const { signal, ...length } = options;
	signal?.throwIfAborted();
	const { config } = engine;
	check(
		config.attention === 'bidirectional' && config.maskId >= 0,
		'predictLength needs a bidirectional model with a mask token',
	);
	const rule = resolveLength(length, 'first-step');
	const method: LengthMethod = rule.method;
	const parsed = parsePrompt(prompt, config, tokenizer);
	check(!parsed.open, 'predictLength needs a prompt with one gap, not scattered open positions');
	const fixed = parsed.before.length + parsed.after.length;
	check(
		fixed + rule.max <= config.context,
		`the prompt's ${fixed} tokens and length.max ${rule.max} do not fit the model's context of ${config.context}`,
	);
	const probabilities = await lookAtEnds(engine, parsed, rule.max, signal);
	const end = rule.predict ? rule.predict(probabilities) : -1;
	return { length: end < 0 ? rule.max : end, method, probabilities };
}
