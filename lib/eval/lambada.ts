/**
 * 'lambada': passages, one per line of a text file or { text } records; the last word is hidden, its number of tokens is
 * given, and the prediction must equal it without white space at the ends (Paperno et al. 2016). A
 * diffusion model fills it in as many steps as it has tokens, the most probable first; a causal model decodes greedily.
 * The beginning-of-text token stands in front. `compat` draws at temperature 1 and leaves that token away, as upstream does;
 * upstream's double count of hits is in neither.
 */
import { TokenDataset } from '../data/dataset.js';
import { check, checkData } from '../errors.js';
import { decodeDrawn } from '../prompt.js';
import type { EvaluationContext } from './context.js';
import { blockWithin, Costs, type GenerationJob, generateAll, generateOptions } from './generation.js';
import type { EvaluationData, LambadaOptions, LambadaResult } from './options.js';
import { rateOf } from './statistics.js';

export async function lambada(
	context: EvaluationContext,
	data: EvaluationData,
	options: LambadaOptions,
): Promise<Omit<LambadaResult, 'seed' | 'ms' | 'seesFuture'>> {
	check(
		data !== null && data !== undefined && !(data instanceof TokenDataset),
		"the metric 'lambada' needs passages: a text file, or records { text }",
	);
	const given = generateOptions(options, ['length', 'steps'], 'lambada');
	if (context.causal) context.needCausal();
	else context.needDiffusion();
	const tokenizer = context.tokenizer();
	const costs = new Costs();
	let records = 0;
	let hits = 0;
	for await (const { key, index, result } of generateAll(
		context,
		jobs(context, data, given, options.compat ?? false),
		options,
	)) {
		const text = decodeDrawn(tokenizer, result.tokens);
		const correct = text.trim() === key.word;
		records++;
		if (correct) hits++;
		costs.add(result);
		context.report(() => ({ index, word: key.word, generated: text, correct }));
	}
	return { metric: 'lambada', records, ...rateOf(hits, records), ...costs.result() };
}

async function* jobs(
	context: EvaluationContext,
	data: Exclude<EvaluationData, TokenDataset | null>,
	given: NonNullable<LambadaOptions['generate']>,
	compat: boolean,
): AsyncGenerator<GenerationJob<{ word: string }>, void> {
	const { config, causal } = context;
	const planned =
		!causal && (given.sampler === undefined || given.sampler === 'confidence' || given.sampler === 'ancestral');
	let index = 0;
	for await (const row of context.rows(data, 'text')) {
		const { where } = row;
		const text = context.need(row, 'text');
		checkData(typeof text === 'string', `${where}: the field 'text' is not text`);
		const passage = text.trim();
		const at = passage.search(/\s+\S+$/u);
		checkData(at > 0, `${where}: the passage ${JSON.stringify(passage.slice(0, 40))} has no two words`);
		const { tokens: body, ends } = context.encode([passage.slice(0, at), passage.slice(at)], where);
		const front = compat ? [] : [config.bosId];
		const tokens = Int32Array.from([...front, ...body]);
		context.checkFit(tokens.length, where, 'the passage');
		const begin = front.length + (ends[0] as number);
		checkData(begin > 0, `${where}: no token of the passage ends before its last word`);
		const length = tokens.length - begin;
		const open = new Uint8Array(tokens.length).fill(1, begin);
		yield {
			prompt: causal ? { tokens: tokens.slice(0, begin), open: new Uint8Array(begin) } : { tokens, open },
			options: {
				temperature: compat ? 1 : 0,
				...(planned ? { steps: length } : {}),
				...given,
				...blockWithin(given, length),
				...(causal ? { length } : {}),
			},
			index: index++,
			where,
			key: { word: passage.slice(at).trim() },
		};
	}
}
