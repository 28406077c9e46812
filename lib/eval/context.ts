/** What every metric is given: the model and the common options, checked, and the records of the data as a stream. */
import { stat } from 'node:fs/promises';

import { toSeed } from '../batch.js';
import { checkMask, type ModelConfig } from '../config.js';
import type { TokenDataset } from '../data/dataset.js';
import { concatenate, seams } from '../data/pack.js';
import { fileKind, type Row, readDocuments, readJsonLines, twoPrompts } from '../data/readers.js';
import type { Engine } from '../engine.js';
import { check, checkData, DiffusionNativeError } from '../errors.js';
import type { DiffuGPT } from '../model.js';
import { show, suggest } from '../option-checks.js';
import type { Tokenizer } from '../tokenizer.js';
import type { EvaluationData, EvaluationOptions, Metric, TextOrIds } from './options.js';

/** Longest line of a file of records, characters. */
const maxLine = 1 << 24;

/** Other names a role's field is known by. */
const usual: Readonly<Record<string, readonly string[]>> = {
	text: ['content', 'document', 'passage'],
	prompt: ['question', 'instruction', 'input', 'user_prompt'],
	answer: ['response', 'completion', 'output', 'target', 'model_response'],
	context: ['ctx', 'query'],
	endings: ['choices', 'options'],
	label: ['gold', 'answer_index'],
};

/** Fields that `columns` may name. */
const roles: readonly string[] = [...Object.keys(usual), 'prefix', 'middle', 'suffix'];

export class EvaluationContext {
	readonly metric: Metric;
	readonly model: DiffuGPT;
	readonly seed: bigint;
	readonly signal: AbortSignal | undefined;
	readonly batchTokens: number;
	readonly separator: string;
	readonly #options: EvaluationOptions;
	#records = 0;

	constructor(metric: Metric, model: DiffuGPT, options: EvaluationOptions, separator = ' ') {
		this.metric = metric;
		this.model = model;
		this.#options = options;
		this.seed = toSeed(options.seed ?? 0);
		this.signal = options.signal;
		this.batchTokens = wholeNumber('batchTokens', options.batchTokens ?? 4096, 1);
		this.separator = options.separator ?? separator;
		check(typeof this.separator === 'string', `option separator is ${typeof this.separator}, expected text`);
		if (options.limit !== undefined) wholeNumber('limit', options.limit, 1);
		for (const [role, name] of Object.entries(options.columns ?? {})) {
			check(roles.includes(role), () => `option columns.${role} is not known${suggest(role, roles)}`);
			check(typeof name === 'string', `option columns.${role} is ${shorten(name)}, expected the name of a field`);
		}
		check(options.signal === undefined || options.signal instanceof AbortSignal, 'option signal is not an AbortSignal');
	}

	get config(): ModelConfig {
		return this.model.config;
	}

	get engine(): Engine {
		return this.model.engine;
	}

	/** Whether the model is causal. */
	get causal(): boolean {
		return this.config.attention === 'causal';
	}

	/** Throws unless the model is a masked diffusion model. */
	needDiffusion(): void {
		check(
			!this.causal,
			`the metric '${this.metric}' needs a masked diffusion model, and this one is causal; use 'perplexity', or load it with { config: { attention: 'bidirectional', maskId } }`,
		);
		checkMask(this.config, `the metric '${this.metric}'`);
	}

	/** Throws unless the model predicts the next token. */
	needCausal(model: DiffuGPT = this.model, who = 'this one'): void {
		const { attention, shift } = model.config;
		check(
			attention === 'causal' && shift,
			`the metric '${this.metric}' needs a causal model, and ${who} is ${attention}${shift ? '' : ' without the shift'}; ` +
				"for a diffusion model use 'nelbo', for its autoregressive twin load it with { config: { attention: 'causal' } }",
		);
	}

	/** The tokenizer; throws when the model has none. */
	tokenizer(): Tokenizer {
		const { tokenizer } = this.model;
		check(tokenizer, `the metric '${this.metric}' needs a tokenizer for texts, and the model has none`);
		return tokenizer;
	}

	/** Calls `onRecord`; the record is made only when somebody listens. */
	report(record?: () => Readonly<Record<string, unknown>>): void {
		if (record) this.#options.onRecord?.(record());
	}

	/**
	 * The records of the data, in order, no more than `limit`; empty data is an error.
	 * @param lines the field that a line of a text file is, or undefined: text files are refused.
	 */
	async *rows(data: Exclude<EvaluationData, TokenDataset | null>, lines?: string): AsyncGenerator<Row, void> {
		const { limit = Number.POSITIVE_INFINITY } = this.#options;
		const opened = typeof data === 'string' ? await this.#file(data, lines) : this.#given(data);
		const { rows, fraction, name } = opened;
		let count = 0;
		for await (const row of rows) {
			this.signal?.throwIfAborted();
			yield row;
			count++;
			this.progress(fraction(count));
			if (count >= limit) return;
		}
		checkData(count > 0, `${name} holds no records`);
	}

	/** Counts a record and calls `onProgress`. */
	progress(fraction: number | undefined): void {
		const { limit, onProgress } = this.#options;
		this.#records++;
		const share = limit === undefined ? fraction : Math.max(fraction ?? 0, this.#records / limit);
		onProgress?.({ records: this.#records, fraction: share });
	}

	get limit(): number {
		return this.#options.limit ?? Number.POSITIVE_INFINITY;
	}

	/** The value of a role's field, and the name it goes by; undefined when there is none. */
	find(row: Row, role: string): { name: string; value: unknown } | undefined {
		const given = this.#options.columns?.[role];
		const names = given === undefined ? [role, ...(usual[role] ?? [])] : [given];
		const name = names.find((candidate) => row.fields[candidate] !== undefined);
		return name === undefined ? undefined : { name, value: row.fields[name] };
	}

	/** A field that must be text or ids. */
	need(row: Row, role: string): TextOrIds {
		const found = this.find(row, role);
		checkData(
			found,
			`${row.where}: there is no field '${this.#options.columns?.[role] ?? role}'; found ${Object.keys(row.fields).join(', ') || 'none'}. ` +
				`Name it with columns: { ${role}: '...' }`,
		);
		checkData(
			isTextOrIds(found.value),
			`${row.where}: the field '${found.name}' is ${shorten(found.value)}, expected text or a list of ids`,
		);
		if (role === 'prompt' && this.#options.columns?.['prompt'] === undefined) this.#checkOnly(row, found.name);
		return found.value;
	}

	/** Throws when another field than `name` that may be the prompt holds text: it would be lost. */
	#checkOnly(row: Row, name: string): void {
		const other = ['prompt', ...(usual['prompt'] ?? [])].find((field) => {
			const value = row.fields[field];
			return (
				field !== name && (typeof value === 'string' ? value.trim() !== '' : isTextOrIds(value) && value.length > 0)
			);
		});
		checkData(other === undefined, () => twoPrompts(row.where, name, other as string));
	}

	/** The field `kind`; '' when there is none, or null. */
	kind(row: Row): string {
		const kind = row.fields['kind'] ?? '';
		checkData(typeof kind === 'string', `${row.where}: the field 'kind' is ${shorten(kind)}, expected text`);
		return kind;
	}

	/**
	 * The ids of parts that are read as one text, and after how many ids each part ends. Texts are tokenised together, as a
	 * reader of the whole would; an id across a seam belongs to the later part.
	 */
	encode(parts: readonly TextOrIds[], where: string): { tokens: Int32Array; ends: number[] } {
		if (!parts.every((part) => typeof part === 'string')) {
			const lists = parts.map((part) => (typeof part === 'string' ? this.tokenizer().encode(part) : part));
			// Before they are 32-bit numbers: 2^32 + 5 would be 5.
			for (const list of lists) this.#checkIds(list, where);
			let end = 0;
			return { tokens: concatenate(lists), ends: lists.map((list) => (end += list.length)) };
		}
		const tokenizer = this.tokenizer();
		const texts = parts as readonly string[];
		const tokens = tokenizer.encode(texts.join(''));
		this.#checkIds(tokens, where);
		return { tokens, ends: seams(texts, tokens, tokenizer) };
	}

	/** Throws unless so many tokens fit the context. */
	checkFit(length: number, where: string, what: string): void {
		const { context } = this.config;
		checkData(length <= context, `${where}: ${what}: ${length} tokens, more than the model's context of ${context}`);
	}

	#checkIds(tokens: Iterable<number>, where: string): void {
		const { vocab } = this.config;
		for (const id of tokens) {
			checkData(id >= 0 && id < vocab, `${where}: the id ${id} is outside the model's vocabulary of ${vocab}`);
		}
	}

	async #file(path: string, lines: string | undefined): Promise<Opened> {
		const found = await stat(path).catch((cause: unknown) => {
			const reason = cause instanceof Error ? cause.message : String(cause);
			throw new DiffusionNativeError('ERR_DN_CHECKPOINT', `the data ${path} cannot be read (${reason})`, { cause });
		});
		if (!found.isFile()) throw new DiffusionNativeError('ERR_DN_CHECKPOINT', `the data ${path} is not a file`);
		const kind = fileKind(path);
		const scores = this.metric === 'nelbo' || this.metric === 'perplexity';
		const tokenFiles = scores ? ' and .bin files made by prepare, which also takes text' : '';
		check(
			kind === 'jsonl' || (kind === 'text' && lines !== undefined && !path.endsWith('.bin')),
			`the data ${path}: the metric '${this.metric}' reads .jsonl files${lines === undefined ? '' : ' and text files, one record per line'}${tokenFiles}`,
		);
		let bytes = 0;
		const options = {
			maxLine,
			onBytes: (count: number): void => {
				bytes += count;
			},
		};
		const rows = kind === 'jsonl' ? readJsonLines(path, options) : textRows(path, lines as string, options);
		return { rows, fraction: () => (found.size === 0 ? 1 : bytes / found.size), name: path };
	}

	#given(data: Iterable<unknown> | AsyncIterable<unknown>): Opened {
		check(
			typeof data === 'object' && data !== null && (Symbol.iterator in data || Symbol.asyncIterator in data),
			`the data is ${shorten(data)}, expected a path, a TokenDataset, or records`,
		);
		const length = Array.isArray(data) ? data.length : undefined;
		return {
			rows: givenRows(data),
			fraction: (count) => (length === undefined ? undefined : count / length),
			name: 'the data',
		};
	}
}

interface Opened {
	rows: AsyncGenerator<Row, void>;
	fraction: (count: number) => number | undefined;
	name: string;
}

async function* textRows(
	path: string,
	field: string,
	options: { maxLine: number; onBytes: (bytes: number) => void },
): AsyncGenerator<Row, void> {
	let number = 0;
	for await (const { text } of readDocuments(path, 'line', options)) {
		yield { fields: { [field]: text }, where: `${path}, passage ${++number}` };
	}
}

async function* givenRows(data: Iterable<unknown> | AsyncIterable<unknown>): AsyncGenerator<Row, void> {
	let number = 0;
	for await (const record of data) {
		const where = `record ${number++}`;
		const fields = typeof record === 'string' ? { text: record } : record;
		checkData(
			typeof fields === 'object' && fields !== null && !Array.isArray(fields) && !ArrayBuffer.isView(fields),
			`${where} is ${shorten(record)}, expected an object or text`,
		);
		yield { fields: fields as Record<string, unknown>, where };
	}
}

export function isTextOrIds(value: unknown): value is TextOrIds {
	return (
		typeof value === 'string' ||
		value instanceof Int32Array ||
		(Array.isArray(value) && value.every((id) => Number.isInteger(id)))
	);
}

/** Throws unless `value` is a whole number of at least `least`. */
export function wholeNumber(name: string, value: unknown, least: number, most = Number.MAX_SAFE_INTEGER): number {
	check(
		Number.isSafeInteger(value) && (value as number) >= least && (value as number) <= most,
		`option ${name} is ${String(value)}, expected a whole number ${most === Number.MAX_SAFE_INTEGER ? `>= ${least}` : `from ${least} to ${most}`}`,
	);
	return value as number;
}

/** A value for a message. */
export function shorten(value: unknown): string {
	const text = show(value);
	return text.length > 60 ? `${text.slice(0, 57)}...` : text;
}
