/**
 * Text in, token file out. Inputs are read as streams, so memory does not grow with them; the training and validation
 * parts are told apart by a hash of the document, so no text and no window is in both.
 */
import { createHash } from 'node:crypto';

import { check, DiffusionNativeError } from '../errors.js';
import { checkOptions } from '../option-checks.js';
import { TokenDataset } from './dataset.js';
import { checkPadding, type DataFormat, type Padding } from './format.js';
import { encodeDocument, encodePair } from './pack.js';
import {
	fileKind,
	listFiles,
	type ReadOptions,
	type Row,
	readCsv,
	readDocuments,
	readJsonLines,
	type TextSplit,
} from './readers.js';
import { TokenWriter } from './writer.js';

/** What `prepare` needs of a tokenizer; `model.tokenizer` is one. */
export interface DataTokenizer {
	encode(text: string): Int32Array;
	readonly vocabSize: number;
	/** Tells tokenizers apart; stored in the file and compared when training. */
	readonly fingerprint?: string;
	/** What is stored in place of `fingerprint`; see `Tokenizer.dataFingerprint`. */
	dataFingerprint?(): string;
	/** Replaces the comparison of fingerprints; see `Tokenizer.acceptsData`. */
	acceptsData?(fingerprint: string, vocab: number): boolean;
	/** Id of the token that spells exactly this text; finds '<|endoftext|>'. */
	idOf?(text: string): number | undefined;
	/** The bytes that ids stand for; finds the seam of prompt and answer. */
	decodeBytes?(ids: ArrayLike<number>): Uint8Array;
}

/** A document or a prompt with its answer. `split` decides the part it falls in; equal values stay together. */
export type DataRecord =
	| string
	| Int32Array
	| { readonly text: string; readonly split?: string }
	| { readonly tokens: Int32Array; readonly promptLength?: number; readonly split?: string }
	| { readonly prompt: string; readonly answer: string; readonly split?: string };

/** A path, an array of paths (files or folders: .txt, .md, .jsonl, .csv), or records. */
export type PrepareInput = string | readonly string[] | Iterable<DataRecord> | AsyncIterable<DataRecord>;

export interface PrepareProgress {
	/** Bytes read of the input files, and in all; both 0 for records. */
	readonly bytes: number;
	readonly totalBytes: number;
	readonly documents: number;
	readonly tokens: number;
	/** Records left out because they were too long (`overlong: 'drop'`). */
	readonly dropped: number;
	/** The file being read; '' for records. */
	readonly file: string;
}

export interface PrepareOptions {
	readonly tokenizer: DataTokenizer;
	/** Path of the token file. */
	readonly out: string;
	/**
	 * 'packed': documents and end tokens end to end, cut in windows (no overlap, the remainder is dropped);
	 * 'documents': one sequence per document; 'pairs': a prompt that is never masked, its answer, and the end token.
	 * @default 'packed'
	 */
	readonly format?: DataFormat;
	/** Window of 'packed', longest sequence otherwise, tokens. @default 1024 */
	readonly context?: number;
	/** @default the id of '<|endoftext|>' */
	readonly eosId?: number;
	/** Token put in front of documents and pairs, so that their first token can be learnt; false: none. @default eosId for 'documents', false otherwise */
	readonly bosId?: number | false;
	/** Token that pads answers. @default eosId */
	readonly padId?: number;
	/** End tokens after each answer or document, added when a batch is made. @default 'none' */
	readonly padding?: Padding;
	/** Text between prompt and answer; belongs to the answer. @default ' ' */
	readonly separator?: string;
	/** How a text file divides into documents. @default 'file' */
	readonly splitText?: TextSplit;
	/** Columns of JSONL and CSV files. @default text; prompt and answer, or a usual name for them */
	readonly columns?: {
		readonly text?: string;
		readonly prompt?: string;
		readonly answer?: string;
		readonly split?: string;
	};
	/** A sequence longer than the context: cut it up ('documents' only), cut its end off, leave it out, or stop. @default 'split' for documents, 'error' for pairs */
	readonly overlong?: 'split' | 'truncate' | 'drop' | 'error';
	/** Share of the documents that goes to the validation file. @default 0 */
	readonly validation?: number;
	/** @default `out` with '.validation' before its extension */
	readonly validationOut?: string;
	/** Changes which documents are validation. @default 0 */
	readonly splitSeed?: number;
	/** 'nanogpt' writes headerless uint16 ids. @default 'own' */
	readonly container?: 'own' | 'nanogpt';
	/** Longest line or document that is held in memory, characters. @default 16,777,216 */
	readonly maxLine?: number;
	readonly onProgress?: (progress: PrepareProgress) => void;
	readonly signal?: AbortSignal;
}

/** Path of the validation file that belongs to `out`. */
export function validationPath(out: string): string {
	const dot = out.lastIndexOf('.');
	return dot > out.lastIndexOf('/') + 1 ? `${out.slice(0, dot)}.validation${out.slice(dot)}` : `${out}.validation`;
}

interface Item {
	readonly record: Exclude<DataRecord, string>;
	readonly begins: boolean;
	readonly ends: boolean;
	readonly where: string;
	readonly file: string;
}

/**
 * Tokenises `input` into a token file and opens it. Files appear whole or not at all.
 * @throws `ERR_DN_ARGUMENT` naming the file and the place when the input is empty, binary, not UTF-8, malformed or lacks a
 * column; `ERR_DN_CHECKPOINT` when the output cannot be written; `signal.reason` when aborted.
 */
export async function prepare(input: PrepareInput, options: PrepareOptions): Promise<TokenDataset> {
	const settings = resolve(options);
	const { format, context, validation, signal } = settings;
	let bytes = 0;
	let dropped = 0;
	const read: ReadOptions = {
		maxLine: options.maxLine ?? 1 << 24,
		onBytes: (count) => {
			bytes += count;
		},
	};
	checkInput(input);
	const paths = typeof input === 'string' ? [input] : isPaths(input) ? input : undefined;
	const files = paths ? await listFiles(paths) : [];
	const totalBytes = files.reduce((sum, file) => sum + file.bytes, 0);
	const items = paths ? fileItems(files, settings, read) : recordItems(input as Iterable<DataRecord>);
	const train = new TokenWriter({ ...settings, path: options.out });
	let held: TokenWriter | undefined;
	try {
		if (validation > 0) held = new TokenWriter({ ...settings, path: settings.validationOut });
		let target = train;
		let lastReport = 0;
		for await (const item of items) {
			signal?.throwIfAborted();
			if (item.begins) target = held && falls(splitKey(item.record), settings.splitSeed) < validation ? held : train;
			dropped += write(target, item, settings);
			const now = performance.now();
			if (options.onProgress && now - lastReport > 100) {
				lastReport = now;
				options.onProgress(progress(item.file));
			}
		}
		signal?.throwIfAborted();
		const source = paths ? paths.join(', ') : 'the input';
		check(train.documents + (held?.documents ?? 0) > 0, `${source} is empty: no text was found`);
		for (const [name, writer] of [
			['training', train],
			['validation', held],
		] as const) {
			if (!writer) continue;
			check(
				writer.documents > 0,
				`the ${name} part is empty: the input divides into ${train.documents + (held?.documents ?? 0)} documents; ` +
					"divide it further (splitText: 'paragraph' or 'line') or change validation",
			);
			check(
				format !== 'packed' || options.container === 'nanogpt' || writer.tokens >= context,
				`the ${name} part has ${writer.tokens} tokens, fewer than one window of ${context}: give more text or a smaller context`,
			);
		}
		held?.finish();
		train.finish();
	} catch (error) {
		train.discard();
		held?.discard();
		throw error;
	}
	options.onProgress?.(progress(''));
	return TokenDataset.open(
		options.out,
		options.container === 'nanogpt' ? { context: Math.min(context, train.tokens) } : {},
	);

	function progress(file: string): PrepareProgress {
		return {
			bytes,
			totalBytes,
			documents: train.documents + (held?.documents ?? 0),
			tokens: train.tokens + (held?.tokens ?? 0),
			dropped,
			file,
		};
	}
}

/** Throws `ERR_DN_ARGUMENT` for what is no input at all. */
export function checkInput(input: unknown): asserts input is PrepareInput {
	check(
		typeof input === 'string' ||
			(typeof input === 'object' && input !== null && (Symbol.iterator in input || Symbol.asyncIterator in input)),
		`the input is ${String(input)}, expected a path, a list of paths, or records`,
	);
}

const prepareOptionNames = [
	'tokenizer',
	'out',
	'format',
	'context',
	'eosId',
	'bosId',
	'padId',
	'padding',
	'separator',
	'splitText',
	'columns',
	'overlong',
	'validation',
	'validationOut',
	'splitSeed',
	'container',
	'maxLine',
	'onProgress',
	'signal',
] as const satisfies readonly (keyof PrepareOptions)[];

type Settings = ReturnType<typeof resolve>;

function resolve(options: PrepareOptions) {
	check(options !== undefined, 'prepare needs the options tokenizer and out');
	checkOptions('prepare', options, prepareOptionNames);
	const { tokenizer, out } = options;
	check(tokenizer && typeof tokenizer.encode === 'function', 'prepare needs the option tokenizer');
	check(typeof out === 'string' && out.length > 0, 'prepare needs the option out, the path of the token file');
	const format = options.format ?? 'packed';
	check(
		['packed', 'documents', 'pairs'].includes(format),
		`format is ${JSON.stringify(format)}, expected 'packed', 'documents' or 'pairs'`,
	);
	const { container = 'own', maxLine = 1 } = options;
	check(
		container === 'own' || container === 'nanogpt',
		`container is ${JSON.stringify(container)}, expected 'own' or 'nanogpt'`,
	);
	check(
		Number.isSafeInteger(maxLine) && maxLine > 0,
		`maxLine is ${String(maxLine)}, expected a positive whole number of characters`,
	);
	const context = options.context ?? 1024;
	check(
		Number.isInteger(context) && context > 1,
		`context is ${String(context)}, expected a whole number of tokens above 1`,
	);
	const validation = options.validation ?? 0;
	check(validation >= 0 && validation < 1, `validation is ${String(validation)}, expected a share from 0 to below 1`);
	const eosId = options.eosId ?? endOfText(tokenizer);
	const overlong = options.overlong ?? (format === 'pairs' ? 'error' : 'split');
	check(
		['split', 'truncate', 'drop', 'error'].includes(overlong) && !(overlong === 'split' && format === 'pairs'),
		`overlong is ${JSON.stringify(overlong)}, expected ${format === 'pairs' ? '' : "'split', "}'truncate', 'drop' or 'error'`,
	);
	const bosId = options.bosId ?? (format === 'documents' ? eosId : false);
	const padding = options.padding ?? 'none';
	checkPadding(padding);
	const { validationOut = validationPath(out), splitSeed = 0, padId = eosId } = options;
	for (const [name, id, limit] of [
		['eosId', eosId, tokenizer.vocabSize],
		['bosId', bosId === false ? 0 : bosId, tokenizer.vocabSize],
		['padId', padId, 2 ** 31],
	] as const) {
		check(
			Number.isInteger(id) && id >= 0 && id < limit,
			`${name} is ${String(id)}, expected a token id below ${limit}${name === 'bosId' ? ', or false' : ''}`,
		);
	}
	check(
		typeof validationOut === 'string' && validationOut !== '' && validationOut !== out,
		`validationOut is ${JSON.stringify(validationOut)}, expected the path of a file other than out`,
	);
	check(Number.isFinite(splitSeed), `splitSeed is ${String(splitSeed)}, expected a number`);
	return {
		tokenizer,
		format,
		context,
		validation,
		validationOut,
		eosId,
		padId,
		bosId,
		overlong,
		padding,
		container: options.container ?? ('own' as const),
		separator: options.separator ?? ' ',
		splitText: options.splitText ?? ('file' as const),
		splitSeed,
		columns: options.columns ?? {},
		vocab: tokenizer.vocabSize,
		fingerprint: tokenizer.dataFingerprint?.() ?? tokenizer.fingerprint ?? '',
		signal: options.signal,
	};
}

function endOfText(tokenizer: DataTokenizer): number {
	const id = tokenizer.idOf?.('<|endoftext|>');
	check(id !== undefined, "the tokenizer has no token '<|endoftext|>': pass eosId");
	return id;
}

function isPaths(input: unknown): input is readonly string[] {
	return Array.isArray(input) && input.length > 0 && input.every((entry) => typeof entry === 'string');
}

async function* fileItems(
	files: readonly { path: string }[],
	settings: Settings,
	read: ReadOptions,
): AsyncGenerator<Item, void> {
	const { format, splitText, columns } = settings;
	for (const { path } of files) {
		const kind = fileKind(path);
		if (kind === 'text') {
			check(format !== 'pairs', `${path} is a text file; pairs need a .jsonl or .csv file with a prompt and an answer`);
			for await (const { text, begins, ends } of readDocuments(path, splitText, read)) {
				yield { record: { text }, begins, ends, where: path, file: path };
			}
			continue;
		}
		let names: Columns | undefined;
		for await (const row of kind === 'csv' ? readCsv(path, read) : readJsonLines(path, read)) {
			names ??= findColumns(row, format, columns);
			yield { record: toRecord(row, names), begins: true, ends: true, where: row.where, file: path };
		}
	}
}

async function* recordItems(input: Iterable<DataRecord> | AsyncIterable<DataRecord>): AsyncGenerator<Item, void> {
	let number = 0;
	for await (const given of input) {
		const record = typeof given === 'string' ? { text: given } : given;
		check(
			typeof record === 'object' && record !== null && (!('text' in record) || typeof record.text === 'string'),
			`record ${number}: expected text, { text }, { tokens } or { prompt, answer }`,
		);
		yield { record, begins: true, ends: true, where: `record ${number++}`, file: '' };
	}
}

interface Columns {
	readonly text?: string;
	readonly prompt?: string;
	readonly answer?: string;
	readonly split?: string;
}

const usual = {
	text: ['text', 'content', 'document'],
	prompt: ['prompt', 'user_prompt', 'question', 'instruction', 'input', 'source'],
	answer: ['answer', 'response', 'model_response', 'completion', 'output', 'target'],
};

function findColumns(row: Row, format: DataFormat, given: NonNullable<PrepareOptions['columns']>): Columns {
	const found = Object.keys(row.fields);
	const find = (role: keyof typeof usual): string => {
		const wanted = given[role] !== undefined ? [given[role]] : usual[role];
		const name = wanted.find((candidate) => found.includes(candidate));
		check(
			name !== undefined,
			`${row.where}: no column ${wanted.map((candidate) => `'${candidate}'`).join(' or ')} for the ${role}; ` +
				`found ${found.map((candidate) => `'${candidate}'`).join(', ')}. Name it with columns: { ${role}: '...' }`,
		);
		return name;
	};
	const { split } = given;
	check(
		split === undefined || found.includes(split),
		`${row.where}: no column '${String(split)}'; found ${found.join(', ')}`,
	);
	const own = split === undefined ? {} : { split };
	return format === 'pairs'
		? { prompt: find('prompt'), answer: find('answer'), ...own }
		: { text: find('text'), ...own };
}

function toRecord(row: Row, names: Columns): Exclude<DataRecord, string> {
	const text = (name: string): string => {
		const value = row.fields[name];
		check(typeof value === 'string', `${row.where}: the column '${name}' is ${JSON.stringify(value)}, expected text`);
		return value;
	};
	const split = names.split === undefined ? {} : { split: String(row.fields[names.split]) };
	if (names.text !== undefined) return { text: text(names.text), ...split };
	return { prompt: text(names.prompt as string), answer: text(names.answer as string), ...split };
}

function splitKey(record: Exclude<DataRecord, string>): string | Uint8Array {
	if (record instanceof Int32Array) return new Uint8Array(record.buffer, record.byteOffset, record.byteLength);
	if (record.split !== undefined) return record.split;
	if ('tokens' in record) return splitKey(record.tokens);
	return 'text' in record ? record.text : record.prompt;
}

/** A number in [0, 1) that depends on the text only. */
function falls(key: string | Uint8Array, seed: number): number {
	return createHash('sha256').update(`${seed}\n`).update(key).digest().readUInt32LE(0) / 2 ** 32;
}

/** Appends one item; returns how many records were left out. */
function write(writer: TokenWriter, item: Item, settings: Settings): number {
	const { record, where } = item;
	const { format, tokenizer, eosId, bosId } = settings;
	if (format === 'pairs') {
		let pair: { tokens: Int32Array; promptLength: number };
		if (!(record instanceof Int32Array) && 'prompt' in record) {
			check(
				typeof record.prompt === 'string' && typeof record.answer === 'string',
				`${where}: prompt and answer must be text`,
			);
			pair = encodePair(record.prompt, settings.separator + record.answer, tokenizer);
		} else if (!(record instanceof Int32Array) && 'tokens' in record && record.promptLength !== undefined) {
			const { tokens, promptLength } = record;
			check(
				Number.isInteger(promptLength) && promptLength >= 0 && promptLength <= tokens.length,
				`${where}: promptLength is ${String(promptLength)}, expected 0 to the ${tokens.length} tokens`,
			);
			pair = { tokens, promptLength };
		} else {
			throw new DiffusionNativeError(
				'ERR_DN_ARGUMENT',
				`${where}: pairs need { prompt, answer } or { tokens, promptLength }`,
			);
		}
		return writePair(writer, pair, where, settings);
	}
	const ids = record instanceof Int32Array ? record : 'tokens' in record ? record.tokens : undefined;
	check(
		ids !== undefined || 'text' in record,
		`${where}: expected text, { text } or token ids for the format '${format}'`,
	);
	const body = ids ?? encodeDocument((record as { text: string }).text, tokenizer);
	if (format === 'packed') {
		if (item.begins && bosId !== false) writer.append(Int32Array.of(bosId));
		writer.append(body);
		if (item.ends) {
			writer.append(Int32Array.of(eosId));
			writer.endSequence(0, 0);
		}
		return 0;
	}
	return writeDocument(writer, item, body, settings);
}

function writeDocument(writer: TokenWriter, item: Item, body: Int32Array, settings: Settings): number {
	const { context, bosId, eosId, overlong } = settings;
	const front = bosId === false ? [] : [bosId];
	const room = context - front.length;
	// The end token closes a document only where it really ends, not where it was cut.
	const whole = item.ends ? Int32Array.from([...body, eosId]) : body;
	if (whole.length > room && overlong !== 'split') {
		check(
			overlong !== 'error',
			`${item.where}: a document has ${whole.length} tokens, more than the ${room} that fit a context of ${context}`,
		);
		if (overlong === 'drop') return 1;
	}
	const end = overlong === 'split' ? whole.length : Math.min(whole.length, room);
	for (let from = 0; from < end; from += room) {
		const first = writer.tokens;
		writer.append(Int32Array.from([...front, ...whole.subarray(from, Math.min(end, from + room))]));
		writer.endSequence(first, front.length);
	}
	return 0;
}

function writePair(
	writer: TokenWriter,
	pair: { tokens: Int32Array; promptLength: number },
	where: string,
	settings: Settings,
): number {
	const { context, bosId, eosId, overlong } = settings;
	const front = bosId === false ? [] : [bosId];
	let prompt = [...front, ...pair.tokens.subarray(0, pair.promptLength)];
	let answer = [...pair.tokens.subarray(pair.promptLength), eosId];
	check(prompt.length > 0, `${where}: the prompt is empty; give it text or set bosId`);
	if (prompt.length + answer.length > context) {
		check(
			overlong !== 'error',
			`${where}: the pair has ${prompt.length + answer.length} tokens, more than the context of ${context}; ` +
				"choose overlong: 'drop' or 'truncate', or a larger context",
		);
		if (overlong === 'drop') return 1;
		// The answer is cut first (and then has no end token); the prompt keeps its last tokens, at least one.
		answer = answer.slice(0, context - 1);
		prompt = prompt.slice(Math.max(0, prompt.length - (context - answer.length)));
	}
	const first = writer.tokens;
	writer.append(Int32Array.from([...prompt, ...answer]));
	writer.endSequence(first, prompt.length);
	return 0;
}
