/** 'length' as a metric of `evaluate`: see `evaluateLength`. */
import { check } from '../errors.js';
import type { EvaluationContext } from '../eval/context.js';
import type { EvaluationData, LengthMetricOptions, LengthMetricResult } from '../eval/options.js';
import { evaluateLength } from './evaluate.js';

export async function lengthMetric(
	context: EvaluationContext,
	data: EvaluationData,
	options: LengthMetricOptions,
): Promise<Omit<LengthMetricResult, 'seed' | 'ms' | 'seesFuture'>> {
	check(data !== null && data !== undefined, "the metric 'length' needs pairs { prompt, answer }");
	const { onProgress, onRecord, batchTokens, seed: _, ...own } = options;
	check(
		onRecord === undefined && batchTokens === undefined,
		"the metric 'length' has no options onRecord and batchTokens",
	);
	let records = 0;
	const { ms: __, ...found } = await evaluateLength(context.model, data, {
		...own,
		...(onProgress ? { onProgress: ({ fraction }) => onProgress({ records: records++, fraction }) } : {}),
	});
	return { metric: 'length', records: found.pairs, ...found };
}
