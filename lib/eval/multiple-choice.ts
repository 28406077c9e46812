/**
 * 'multiple-choice': { context, endings, label } records; right when the labelled ending scores best.
 * Diffusion models, 'weighted': the bound on log p(ending | context) by exact counts (lib/eval/likelihood.ts), the correct
 * evidence lower bound; endings so short that all their masks cost no more than the draws are computed exactly.
 * 'unweighted': DiffuLLaMA's score, for k = T .. 1 every ending token masked with probability k / T, the mean cross-entropy
 * of the masked tokens (0 when none is), averaged over k. Causal models: log p(ending | context). An ending wins by its sum
 * and, `perToken`, by its mean over its tokens; 'unweighted' is a mean already. Ties go to the first ending.
 * Context and ending are tokenised together with the separator between them, spaces at the context's end moved to the
 * ending; `compat` tokenises each by itself without the separator, as upstream does for HellaSwag and SIQA.
 */
import { TokenDataset } from '../data/dataset.js';
import type { Row } from '../data/readers.js';
import { check, checkData } from '../errors.js';
import { show } from '../option-checks.js';
import { Stream, uniform } from '../random.js';
import { type EvaluationContext, isTextOrIds, shorten, wholeNumber } from './context.js';
import { autoregressive, bounds, type Scorable } from './likelihood.js';
import type { EvaluationData, MultipleChoiceOptions, MultipleChoiceResult, TextOrIds } from './options.js';
import { type ScoringJob, score } from './scoring.js';
import { rateOf } from './statistics.js';

/** Endings of one record at most. */
const mostEndings = 1024;

interface Question {
	number: number;
	label: number;
	/** Costs so far, nats, one per ending: smaller is better. */
	costs: number[];
	lengths: number[];
	endings: number;
}

interface Ending extends Scorable {
	readonly question: Question;
	readonly ending: number;
}

export async function multipleChoice(
	context: EvaluationContext,
	data: EvaluationData,
	options: MultipleChoiceOptions,
): Promise<Omit<MultipleChoiceResult, 'seed' | 'ms' | 'seesFuture'>> {
	check(
		data !== null && data !== undefined && !(data instanceof TokenDataset),
		"the metric 'multiple-choice' needs records { context, endings, label }",
	);
	const { form: asked = 'weighted', compat = false } = options;
	check(
		asked === 'weighted' || asked === 'unweighted',
		`option form is ${show(asked)}, expected 'weighted' or 'unweighted'`,
	);
	const samples = wholeNumber('samples', options.samples ?? 32, 1);
	if (context.causal) context.needCausal();
	else context.needDiffusion();
	const form = context.causal ? 'autoregressive' : asked;
	const list = endings(context, data, compat);
	const found =
		form === 'autoregressive'
			? autoregressive(context, list)
			: form === 'weighted'
				? bounds(context, list, { samples, enumerate: Math.floor(Math.log2(samples + 1)) })
				: unweighted(context, list, samples);
	let records = 0;
	let correct = 0;
	let correctPerToken = 0;
	for await (const { sequence, nats } of found) {
		const { question } = sequence;
		question.costs.push(nats);
		question.lengths.push(sequence.scorable.length);
		if (question.costs.length < question.endings) continue;
		const perToken = question.costs.map((cost, i) =>
			form === 'unweighted' ? cost : cost / (question.lengths[i] as number),
		);
		const chosen = smallest(question.costs);
		const chosenPerToken = smallest(perToken);
		records++;
		if (chosen === question.label) correct++;
		if (chosenPerToken === question.label) correctPerToken++;
		context.report(() => ({
			index: question.number,
			costs: question.costs,
			tokens: question.lengths,
			chosen,
			chosenPerToken,
			label: question.label,
		}));
	}
	return {
		metric: 'multiple-choice',
		form,
		records,
		...rateOf(correct, records),
		perToken: rateOf(correctPerToken, records),
	};
}

async function* endings(
	context: EvaluationContext,
	data: Exclude<EvaluationData, TokenDataset | null>,
	compat: boolean,
): AsyncGenerator<Ending, void> {
	const { bosId } = context.config;
	let number = 0;
	for await (const row of context.rows(data)) {
		const { where } = row;
		const given = context.need(row, 'context');
		const { list, label } = choices(context, row);
		const question: Question = { number, label, costs: [], lengths: [], endings: list.length };
		for (const [ending, text] of list.entries()) {
			const { tokens, from } = join(context, given, text, compat, where);
			const front = from === 0 ? [bosId] : [];
			const all = Int32Array.from([...front, ...tokens]);
			checkData(from < tokens.length, `${where}: ending ${ending} is empty`);
			context.checkFit(all.length, where, `the context with ending ${ending}`);
			const begin = front.length + from;
			const scorable = Array.from({ length: all.length - begin }, (_, i) => begin + i);
			yield { tokens: all, scorable, index: number * mostEndings + ending, question, ending };
		}
		number++;
	}
}

function choices(context: EvaluationContext, row: Row): { list: TextOrIds[]; label: number } {
	const { where } = row;
	const endings = context.find(row, 'endings');
	checkData(endings, `${where}: there is no field 'endings'; found ${Object.keys(row.fields).join(', ')}`);
	const list = endings.value;
	checkData(
		Array.isArray(list) && list.length >= 2 && list.length <= mostEndings && list.every(isTextOrIds),
		`${where}: the field '${endings.name}' is ${shorten(list)}, expected a list of 2 to ${mostEndings} texts`,
	);
	const found = context.find(row, 'label');
	checkData(found, `${where}: there is no field 'label'; found ${Object.keys(row.fields).join(', ')}`);
	const label = typeof found.value === 'string' && /^\d+$/.test(found.value) ? Number(found.value) : found.value;
	checkData(
		Number.isInteger(label) && (label as number) >= 0 && (label as number) < list.length,
		`${where}: the field '${found.name}' is ${shorten(found.value)}, expected the number of an ending, 0 to ${list.length - 1}`,
	);
	return { list: list as TextOrIds[], label: label as number };
}

/** Ids of context and ending; `from` is the first of the ending. */
function join(
	context: EvaluationContext,
	given: TextOrIds,
	ending: TextOrIds,
	compat: boolean,
	where: string,
): { tokens: Int32Array; from: number } {
	if (typeof given !== 'string' || typeof ending !== 'string') {
		const { tokens, ends } = context.encode([given, ending], where);
		return { tokens, from: ends[0] as number };
	}
	if (compat) {
		const tokenizer = context.tokenizer();
		const front = tokenizer.encode(given);
		return { tokens: Int32Array.from([...front, ...tokenizer.encode(ending)]), from: front.length };
	}
	const body = given.trimEnd();
	const spaces = given.slice(body.length);
	const separator = body === '' || spaces !== '' || /^\s/.test(ending) ? '' : context.separator;
	const { tokens, ends } = context.encode([body, spaces + separator + ending], where);
	return { tokens, from: ends[0] as number };
}

/** DiffuLLaMA's score of each ending, in order. */
async function* unweighted(
	context: EvaluationContext,
	list: AsyncIterable<Ending>,
	T: number,
): AsyncGenerator<{ sequence: Ending; nats: number }, void> {
	interface Key {
		sequence: Ending;
		state: { sum: number };
		k: number;
		masked: number;
	}
	async function* jobs(): AsyncGenerator<ScoringJob<Key>, void> {
		for await (const sequence of list) {
			const state = { sum: 0 };
			for (let k = T; k >= 1; k--) {
				const mask = new Uint8Array(sequence.tokens.length);
				let masked = 0;
				for (const i of sequence.scorable) {
					if (uniform(context.seed, Stream.mask, k, sequence.index * 2 ** 20 + i) >= k / T) continue;
					mask[i] = 1;
					masked++;
				}
				yield { tokens: sequence.tokens, scored: mask, key: { sequence, state, k, masked } };
			}
		}
	}
	for await (const { key, nats } of score(context.model, 'diffusion', jobs(), context)) {
		if (key.masked > 0) key.state.sum += nats / key.masked;
		if (key.k === 1) yield { sequence: key.sequence, nats: key.state.sum / T };
	}
}

function smallest(values: readonly number[]): number {
	let best = 0;
	for (let i = 1; i < values.length; i++) if ((values[i] as number) < (values[best] as number)) best = i;
	return best;
}
