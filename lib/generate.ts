/**
 * Generation from checked request to result, and length prediction; the steps in between are lib/denoise-loop.ts. One
 * request is one async generator that awaits one forward per step, so a slow consumer slows only its own request, and
 * concurrent requests meet in the engine's batches.
 */
import { aheadEvaluator, goesAhead } from './ahead.js';
import { toSeed } from './batch.js';
import { blockEvaluator, maskOf } from './block-cache.js';
import type { Canvas } from './canvas.js';
import { checkMask } from './config.js';
import { type DenoiseStep, Loop } from './denoise-loop.js';
import type { Engine } from './engine.js';
import { check } from './errors.js';
import { cachedEvaluator, type Drift, type Evaluator, endIds, fullEvaluator } from './evaluator.js';
import { lengthExtras } from './length/extras.js';
import type { LengthHead } from './length/head.js';
import { firstCanvas } from './length/look.js';
import { type LengthOptions, type LengthPrediction, type LengthRule, resolveLength } from './length/method.js';
import { checkSignal } from './option-checks.js';
import { type GenerateOptions, type ResolvedOptions, resolveOptions } from './options.js';
import { makeCanvas, type ParsedPrompt, type Prompt, parsePrompt, type TextCodec } from './prompt.js';
import { countWindows } from './windows.js';

/** What a generation returns. */
export interface GenerateResult {
	/**
	 * The new text (of infilling: what was filled in), up to the first end token; all of it where the open positions of
	 * `prompt.tokens` are scattered. An id that the tokenizer does not know, of a model with more embedding rows than the
	 * tokenizer has ids, is U+FFFD here and itself in `tokens`. Empty without a tokenizer.
	 */
	text: string;
	/** The new ids in order of position. Fixed length: all of them. Variable length: up to the end token, without it. */
	tokens: Int32Array;
	/** The final canvas: prompt, new ids (the end token too) and suffix. */
	sequence: Int32Array;
	/**
	 * 'end-of-text': variable length, and an end token was committed. 'abort' is never returned: an aborted generation rejects
	 * with `signal.reason`.
	 */
	finishReason: 'length' | 'end-of-text' | 'abort';
	/** The seed that reproduces this result. */
	seed: bigint;
	/** What it cost. */
	stats: GenerateStats;
}

/** What a generation cost. */
export interface GenerateStats {
	/** Forwards this request took part in; twins and verification copies share their canvas's forward. */
	forwards: number;
	/** New tokens before the first end token; all of them where the open positions of `prompt.tokens` are scattered. */
	generatedTokens: number;
	/** Time spent, milliseconds, without the time the consumer of the stream took. */
	ms: number;
	/** `generatedTokens` by the time spent. */
	tokensPerSecond: number;
	/** `generatedTokens` by `forwards`; 0 without forwards. */
	tokensPerForward: number;
	/** Positions of the largest canvas that was denoised, prompt included. */
	canvas: number;
	/**
	 * With `measureDrift`: over all rows that came from a cache. The exact forwards that measure it are not counted in
	 * `forwards`.
	 */
	drift?: Drift;
}

/** A checked request. */
export interface GenerationRequest {
	prompt: ParsedPrompt;
	options: ResolvedOptions;
	/** Variable length, or null. */
	rule: LengthRule | null;
	/** The trained heads that the rule may ask: a model drops its own when its weights change. */
	head: LengthHead | undefined;
	/** Open positions of the first canvas (of the look that predicts the length). */
	open: number;
}

/** Steps of one native call where nobody watches and the options do not say. */
export const usualStepsPerCall = 8;

/**
 * Checks prompt and options together. `stepsPerCall`: where the options do not say.
 * @throws `ERR_DN_ARGUMENT`, or `signal.reason` when it is aborted already
 */
export function prepareRequest(
	engine: Engine,
	tokenizer: TextCodec | null,
	prompt: Prompt,
	given: GenerateOptions = {},
	stepsPerCall = 1,
): GenerationRequest {
	engine.check();
	const { config } = engine;
	const options = resolveOptions(given, config);
	options.stepsPerCall ??= stepsPerCall;
	options.signal?.throwIfAborted();
	const parsed = parsePrompt(prompt, config, tokenizer);
	const { length } = options;
	const extras = lengthExtras(engine);
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
			rule = resolveLength(length, 'constant', { extras, infilling: parsed.after.length > 0 });
			open = rule.looks && !rule.extend ? rule.max : rule.initial;
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
			!options.isAutoregressive || !(rule?.looks || rule?.adapt),
			`option length.method: '${rule?.method}' looks at masked positions, which the sampler 'autoregressive' has none of`,
		);
		check(
			options.blockCausal === null || parsed.after.length === 0,
			'option attention: { blockCausal } only continues: the blocks before a suffix do not see it',
		);
		check(
			options.blockCausal === null || !(rule?.looks || rule?.adapt),
			`option length.method: '${rule?.method}' looks at the whole canvas, which block-causal attention does not`,
		);
		check(
			!rule?.exact || config.padId === config.eosId,
			`option length.coverage: 'draw' keeps one end token from being sampled, and the model has two: config.eosId ${config.eosId} and padId ${config.padId}`,
		);
		check(
			!options.cache || !rule?.adapt,
			`option length.method: '${rule?.method}' follows every open position, of which option cache computes only a part`,
		);
	}
	const request = { prompt: parsed, options, rule, head: extras.head, open };
	check(
		options.block === undefined || options.blockCausal !== null || open === 0 || options.block <= (rule?.max ?? open),
		() => `option block is ${options.block}, longer than the ${rule?.max ?? open} tokens to generate`,
	);
	checkSteps(request);
	return request;
}

/**
 * Throws `ERR_DN_ARGUMENT` unless there is a step for every block: of a length that is looked for or grows, for as many as
 * `max` tokens have, so that no answer to a look is an error.
 */
export function checkSteps({ prompt, options, rule, open }: GenerationRequest): void {
	const { steps, block, blockCausal } = options;
	if (steps === undefined || (block === undefined && blockCausal === null && !rule?.grow)) return;
	const { before } = prompt;
	const count = rule?.looks ? rule.max : (rule?.initial ?? open);
	const positions = prompt.open
		? before.map((_, i) => i).filter((i) => prompt.open?.[i])
		: Int32Array.from({ length: count }, (_, i) => before.length + i);
	const blocks = countWindows(positions, options, rule);
	const where = rule?.looks || rule?.grow ? ` that length.max ${rule.max} allows` : '';
	check(steps >= blocks, `option steps is ${steps}, fewer than the ${blocks} blocks${where}`);
}

/** Tokens that a forward of the whole first canvas takes. */
export function canvasSize({ prompt, open, options }: GenerationRequest): number {
	const length = prompt.before.length + prompt.after.length + (prompt.open ? 0 : open);
	return length * (options.guidance === 0 ? 1 : 2);
}

/** Runs a checked request. */
export async function* denoise(
	engine: Engine,
	tokenizer: TextCodec | null,
	request: GenerationRequest,
): AsyncGenerator<DenoiseStep, GenerateResult> {
	const { prompt, options, rule, head } = request;
	const { signal } = options;
	signal?.throwIfAborted();
	let resumed = performance.now();
	let ms = 0;
	let forwards = 0;
	const drift = new DriftTotal();
	let evaluator: Evaluator | undefined;
	try {
		let open = request.open;
		let drawn: number | undefined;
		if (rule) {
			const first = await firstCanvas(engine, prompt, rule, head, options.seed, signal);
			forwards += first.forwards;
			open = first.open;
			if (rule.exact) drawn = first.length;
		}
		const canvas = makeCanvas(prompt, open, engine.config);
		if (drawn !== undefined) canvas.keepLength(engine.config.eosId, drawn < open);
		const most = Math.max(canvas.length, prompt.before.length + (rule?.max ?? 0) + prompt.after.length);
		const loop = new Loop(canvas, options, rule, endIds(engine.config), tokenizer);
		evaluator = evaluatorOf(engine, canvas, request, most, loop);
		for (;;) {
			const plan = loop.next();
			if (!plan) break;
			const { looked: positions, groups, begin, end, view } = plan;
			const { step } = view;
			const { needsLogits: logits = false, needsDivergence = false } = options.policy;
			const history = needsDivergence ? loop.history.next(positions, engine.config.vocab) : undefined;
			const look = await evaluator.look({ positions, groups, begin, end, step, logits, history });
			forwards++;
			if (look.drift) drift.add(look.drift);
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
				...(options.measureDrift ? { drift: drift.total() } : {}),
			},
		};
	} finally {
		evaluator?.release();
	}
}

/** How a request's forwards are run. `most`: positions of the longest canvas to come. */
function evaluatorOf(
	engine: Engine,
	canvas: Canvas,
	{ prompt, options, rule }: GenerationRequest,
	most: number,
	loop: Loop,
): Evaluator {
	const { pinned } = prompt;
	const { blockCausal, cache, measureDrift } = options;
	if (options.isAutoregressive) {
		// A text of variable length ends there.
		const stops = rule ? endIds(engine.config) : new Int32Array(0);
		return cachedEvaluator(engine, canvas, options, pinned, most, stops);
	}
	if (goesAhead(engine, options, rule)) return aheadEvaluator(engine, canvas, options, loop, maskOf(blockCausal));
	if (!cache) return fullEvaluator(engine, canvas, options, pinned, maskOf(blockCausal));
	return blockEvaluator(engine, canvas, options, pinned, { kind: cache, blockCausal, measureDrift, capacity: most });
}

/** The drift of a whole generation. */
class DriftTotal {
	#sum = 0;
	#max = 0;
	#rows = 0;

	add({ mean, max, rows }: Drift): void {
		this.#sum += mean * rows;
		this.#max = Math.max(this.#max, max);
		this.#rows += rows;
	}

	total(): Drift {
		return { mean: this.#rows > 0 ? this.#sum / this.#rows : 0, max: this.#max, rows: this.#rows };
	}
}

/** Of `predictLength`, beside the length options. */
export interface PredictOptions {
	/** Of a length that is drawn: the one that `generate` draws with this seed. @default 0 */
	readonly seed?: number | bigint;
	/** Aborting rejects with `signal.reason`. @default none */
	readonly signal?: AbortSignal;
}

/** Predicts the length of the answer without generating it. */
export async function predictLength(
	engine: Engine,
	tokenizer: TextCodec | null,
	prompt: Prompt,
	options: LengthOptions & PredictOptions,
): Promise<LengthPrediction> {
	engine.check();
	check(typeof options === 'object' && options !== null, 'predictLength needs options with max');
	const { signal, seed: given, ...length } = options;
	checkSignal('predictLength', signal);
	const seed = toSeed(given ?? 0);
	signal?.throwIfAborted();
	const { config } = engine;
	check(config.attention === 'bidirectional', 'predictLength needs a bidirectional model, and this one is causal');
	checkMask(config, 'predictLength');
	const parsed = parsePrompt(prompt, config, tokenizer);
	check(!parsed.open, 'predictLength needs a prompt with one gap, not scattered open positions');
	const extras = lengthExtras(engine);
	const rule = resolveLength(length, 'first-step', { extras, infilling: parsed.after.length > 0 });
	const { method, max } = rule;
	check(
		rule.looks || method === 'constant',
		`predictLength: '${method}' decides on the length while it denoises${rule.infilling ? ' before a suffix' : ''}`,
	);
	const fixed = parsed.before.length + parsed.after.length;
	check(
		fixed + max <= config.context,
		`the prompt's ${fixed} tokens and length.max ${max} do not fit the model's context of ${config.context}`,
	);
	if (!rule.looks) {
		// The baseline looks at nothing; the probabilities are those that it does without.
		const look = resolveLength({ max, method: 'first-step' }, 'first-step', { extras, infilling: rule.infilling });
		const { probabilities } = await firstCanvas(engine, parsed, look, undefined, seed, signal);
		return { length: rule.initial < max ? rule.initial - 1 : max, method, probabilities };
	}
	const { length: predicted = max, probabilities } = await firstCanvas(engine, parsed, rule, extras.head, seed, signal);
	return { length: predicted, method, probabilities };
}
