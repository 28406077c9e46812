/** `evaluate`: one call for every metric. The metrics themselves are in lib/eval, one file each, with formula and source. */
import { check } from './errors.js';
import { EvaluationContext } from './eval/context.js';
import { exactMatch } from './eval/exact-match.js';
import { generativePerplexity } from './eval/generative-perplexity.js';
import { infilling } from './eval/infilling.js';
import { lambada } from './eval/lambada.js';
import { likelihood } from './eval/likelihood.js';
import { multipleChoice } from './eval/multiple-choice.js';
import { nelbo } from './eval/nelbo.js';
import type { EvaluationData, EvaluationResult, Metric, Metrics } from './eval/options.js';
import { perplexity } from './eval/perplexity.js';
import { lengthMetric } from './length/metric.js';
import { DiffuGPT } from './model.js';
import { show } from './option-checks.js';

interface Entry<M extends Metric> {
	run(
		context: EvaluationContext,
		data: EvaluationData,
		options: Metrics[M]['options'],
	): Promise<Omit<Metrics[M]['result'], 'seed' | 'ms' | 'seesFuture'>>;
	/** Options beyond the common ones. */
	readonly uses: readonly Exclude<keyof Metrics[M]['options'], (typeof common)[number]>[];
	/** @default ' ' */
	readonly separator?: string;
}

const common = ['seed', 'limit', 'signal', 'onProgress', 'onRecord', 'batchTokens', 'columns', 'separator'] as const;

const metrics: { readonly [M in Metric]: Entry<M> } = {
	nelbo: { run: nelbo, uses: ['samples', 'enumerate', 'endToken', 'padding', 'stride'] },
	perplexity: { run: perplexity, uses: ['endToken', 'padding', 'stride'] },
	likelihood: { run: likelihood, uses: ['samples', 'enumerate', 'endToken'] },
	'exact-match': { run: exactMatch, uses: ['generate', 'concurrency', 'extract'] },
	'multiple-choice': { run: multipleChoice, uses: ['form', 'samples', 'compat'] },
	infilling: { run: infilling, uses: ['generate', 'concurrency'], separator: '' },
	lambada: { run: lambada, uses: ['generate', 'concurrency', 'compat'] },
	'generative-perplexity': {
		run: generativePerplexity,
		uses: ['generate', 'concurrency', 'judge', 'samples', 'stride'],
	},
	length: {
		run: lengthMetric,
		uses: [
			...(['max', 'methods', 'coverage', 'calibration', 'calibrationLimit', 'generations', 'generate'] as const),
			...(['seeds', 'batch', 'judge', 'likelihoods', 'samples'] as const),
		],
	},
};

/** Names of the metrics. */
export const metricNames = Object.keys(metrics) as Metric[];

/**
 * Scores a model on data. Data are read as a stream; the result is a function of model, data, options and seed, and does
 * not depend on how records are batched.
 * @param data see {@link EvaluationData}; the fields of its records, by metric: 'nelbo' and 'perplexity' { text },
 * { prompt, answer } or { tokens, promptLength? }; 'likelihood' and 'exact-match' { prompt, answer }; 'multiple-choice'
 * { context, endings, label }; 'infilling' { prefix, middle, suffix }; 'lambada' { text }; 'generative-perplexity'
 * { prompt }; 'length' { prompt, answer, kind? }. Ids may stand for texts except in 'infilling' and 'lambada'.
 * @throws `ERR_DN_ARGUMENT` naming the record, the option or the kind of model that does not fit; `ERR_DN_CHECKPOINT` when
 * the data cannot be read; `ERR_DN_DIVERGED` where the model gives no finite number; `ERR_DN_BUSY`; `ERR_DN_OUT_OF_MEMORY`;
 * `signal.reason`
 */
export async function evaluate<M extends Metric>(
	model: DiffuGPT,
	data: EvaluationData,
	options: { readonly metric: M } & Metrics[M]['options'],
): Promise<Metrics[M]['result']> {
	const begin = performance.now();
	check(model instanceof DiffuGPT, 'evaluate: the first argument is not a model');
	check(typeof options === 'object' && options !== null, 'evaluate needs the option metric');
	const { metric, ...rest } = options;
	check(
		typeof metric === 'string' && Object.hasOwn(metrics, metric),
		`option metric is ${show(metric)}, expected ${metricNames.map((name) => `'${name}'`).join(', ')}`,
	);
	const entry = metrics[metric] as Entry<M>;
	for (const [key, value] of Object.entries(rest)) {
		check(
			value === undefined || [...common, ...(entry.uses as readonly string[])].includes(key as never),
			`option ${key} has no meaning for the metric '${metric}'`,
		);
	}
	model.engine.check();
	const own = rest as unknown as Metrics[M]['options'];
	const context = new EvaluationContext(metric, model, own, entry.separator);
	context.signal?.throwIfAborted();
	const seesFuture = await looksAhead(context);
	const result = await entry.run(context, data, own);
	const shared: Pick<EvaluationResult, 'seed' | 'ms' | 'seesFuture'> = {
		seed: context.seed,
		ms: performance.now() - begin,
		seesFuture,
	};
	return { ...result, ...shared } as unknown as Metrics[M]['result'];
}

/** Whether another last token changes the hidden state of the first one (full attention can be lost silently). */
async function looksAhead({ model, config, signal }: EvaluationContext): Promise<boolean> {
	const length = Math.min(4, config.context);
	const one = Int32Array.from({ length }, (_, i) => i % config.vocab);
	const other = one.slice();
	other[length - 1] = ((other[length - 1] as number) + 1) % config.vocab;
	const rows = [Int32Array.of(0), Int32Array.of(0)];
	const [a, b] = await model.forward([one, other], { output: 'hidden', rows, ...(signal ? { signal } : {}) });
	return length > 1 && (a as Float32Array).some((value, i) => value !== (b as Float32Array)[i]);
}
