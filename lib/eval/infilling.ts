/**
 * 'infilling': { prefix, middle, suffix } records, the middle filled in at its own number of tokens (the oracle length) and
 * compared with the original by ROUGE-1, ROUGE-2, ROUGE-L F1 (lib/eval/rouge.ts) and by equality without white space at the
 * ends (as DiffuLLaMA evaluates ROCStories). The three are tokenised together; an id across a seam belongs to the later part.
 * A causal model sees the prefix only and continues it. Default: one token per step, the most probable first.
 */
import { TokenDataset } from '../data/dataset.js';
import { check, checkData } from '../errors.js';
import { show } from '../option-checks.js';
import { decodeDrawn } from '../prompt.js';
import type { EvaluationContext } from './context.js';
import { blockWithin, Costs, type GenerationJob, generateAll, generateOptions } from './generation.js';
import type { EvaluationData, InfillingOptions, InfillingResult } from './options.js';
import { rouge } from './rouge.js';
import { rateOf } from './statistics.js';

export async function infilling(
	context: EvaluationContext,
	data: EvaluationData,
	options: InfillingOptions,
): Promise<Omit<InfillingResult, 'seed' | 'ms' | 'seesFuture'>> {
	check(
		data !== null && data !== undefined && !(data instanceof TokenDataset),
		"the metric 'infilling' needs records { prefix, middle, suffix }",
	);
	const given = generateOptions(options, ['length'], 'infilling');
	if (context.causal) context.needCausal();
	else context.needDiffusion();
	const tokenizer = context.tokenizer();
	const costs = new Costs();
	let records = 0;
	let equal = 0;
	let rouge1 = 0;
	let rouge2 = 0;
	let rougeL = 0;
	for await (const { key, index, result } of generateAll(context, jobs(context, data, given), options)) {
		// The oracle length is filled whole: an end token inside stands for nothing.
		const text = decodeDrawn(tokenizer, result.tokens, { special: false });
		const found = rouge(text, key.middle);
		const correct = text.trim() === key.middle.trim();
		records++;
		rouge1 += found.rouge1;
		rouge2 += found.rouge2;
		rougeL += found.rougeL;
		if (correct) equal++;
		costs.add(result);
		context.report(() => ({ index, middle: key.middle, generated: text, ...found, correct }));
	}
	return {
		metric: 'infilling',
		records,
		rouge1: rouge1 / records,
		rouge2: rouge2 / records,
		rougeL: rougeL / records,
		exactMatch: rateOf(equal, records),
		prefixOnly: context.causal,
		...costs.result(),
	};
}

async function* jobs(
	context: EvaluationContext,
	data: Exclude<EvaluationData, TokenDataset | null>,
	given: NonNullable<InfillingOptions['generate']>,
): AsyncGenerator<GenerationJob<{ middle: string }>, void> {
	const { config, separator, causal } = context;
	const tokenizer = context.tokenizer();
	const planned = !causal && (given.sampler === undefined || given.sampler === 'confidence');
	let index = 0;
	for await (const row of context.rows(data)) {
		const { where } = row;
		const part = (name: string): string => {
			const value = context.need(row, name);
			checkData(typeof value === 'string', `${where}: the field '${name}' is ${show(value)}, expected text`);
			return value;
		};
		const [prefix, middle, suffix] = [part('prefix'), part('middle'), part('suffix')];
		checkData(middle !== '', `${where}: the field 'middle' is empty`);
		const parts = [prefix, (prefix === '' ? '' : separator) + middle, (suffix === '' ? '' : separator) + suffix];
		const { tokens: body, ends } = context.encode(parts, where);
		const pinned = ends[0] === 0 && config.shift;
		const front = pinned ? [config.bosId] : [];
		const tokens = Int32Array.from([...front, ...body]);
		context.checkFit(tokens.length, where, 'prefix, middle and suffix');
		const begin = front.length + (ends[0] as number);
		const end = front.length + (ends[1] as number);
		checkData(end > begin, `${where}: no token of the text begins in the middle`);
		const length = end - begin;
		const open = new Uint8Array(tokens.length).fill(1, begin, end);
		yield {
			prompt: causal ? { tokens: tokens.slice(0, begin), open: new Uint8Array(begin) } : { tokens, open },
			options: {
				...(planned ? { steps: length } : {}),
				...(causal ? { temperature: 0 } : {}),
				...given,
				...blockWithin(given, length),
				...(causal ? { length } : {}),
			},
			index: index++,
			where,
			key: { middle: tokenizer.decode(tokens.subarray(begin, end)) },
		};
	}
}
