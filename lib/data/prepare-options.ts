/** Options of `prepare`: the types of what goes in, the defaults, and the checks. */
import { availableParallelism } from 'node:os';

import { check } from '../errors.js';
import { checkOptions, suggest } from '../option-checks.js';
import { checkPadding, type DataFormat, type Padding } from './format.js';
import type { TextSplit } from './readers.js';

/** What `prepare` needs of a tokenizer; `model.tokenizer` is one. */
export interface DataTokenizer {
	/** Ids of a text, without tokens at its ends. */
	encode(text: string): Int32Array;
	/** Largest id plus one. */
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

/**
 * A document (a text, or ids) or a prompt with its answer. `promptLength`: tokens at the front that are never masked, 0 by
 * default. `split` decides the part it falls in, by default the record itself; equal values stay together.
 */
export type DataRecord =
	| string
	| Int32Array
	| { readonly text: string; readonly split?: string }
	| { readonly tokens: Int32Array; readonly promptLength?: number; readonly split?: string }
	| { readonly prompt: string; readonly answer: string; readonly split?: string };

/** A path, an array of paths (files or folders: .txt, .md, .jsonl, .csv), or records. */
export type PrepareInput = string | readonly string[] | Iterable<DataRecord> | AsyncIterable<DataRecord>;

/** How far `prepare` is. */
export interface PrepareProgress {
	/** Bytes read of the input files; 0 for records. */
	readonly bytes: number;
	/** Bytes of the input files; 0 for records. */
	readonly totalBytes: number;
	/** Documents or pairs written, of both parts. */
	readonly documents: number;
	/** Tokens written, of both parts. */
	readonly tokens: number;
	/** Records left out because they were too long (`overlong: 'drop'`). */
	readonly dropped: number;
	/** The file being read; '' for records. */
	readonly file: string;
}

/** Options of `prepare`. */
export interface PrepareOptions {
	/** Its fingerprint is stored in the file and compared when training. */
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
	/** Columns of JSONL and CSV files. @default text; prompt and answer, or a usual name for them; of two for the prompt one must be empty */
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
	/** Threads that tokenize long inputs, when the tokenizer is a `Tokenizer`; the file is the same for any number. @default all cores, at most 8 */
	readonly threads?: number;
	/** Called at most ten times a second, and at the end. @default none */
	readonly onProgress?: (progress: PrepareProgress) => void;
	/** Aborting rejects with `signal.reason` and leaves no file. @default none */
	readonly signal?: AbortSignal;
}

/** Path of the validation file that belongs to `out`. */
export function validationPath(out: string): string {
	const dot = out.lastIndexOf('.');
	return dot > out.lastIndexOf('/') + 1 ? `${out.slice(0, dot)}.validation${out.slice(dot)}` : `${out}.validation`;
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
	'threads',
	'onProgress',
	'signal',
] as const satisfies readonly (keyof PrepareOptions)[];

const columnRoles: readonly string[] = ['text', 'prompt', 'answer', 'split'];

/** Options with their defaults. */
export type PrepareSettings = ReturnType<typeof resolvePrepareOptions>;

/** Fills defaults and checks all options. @throws `ERR_DN_ARGUMENT` naming the option. */
export function resolvePrepareOptions(options: PrepareOptions) {
	check(options !== undefined, 'prepare needs the options tokenizer and out');
	checkOptions('prepare', options, prepareOptionNames);
	const { tokenizer, out } = options;
	check(tokenizer && typeof tokenizer.encode === 'function', 'prepare needs the option tokenizer');
	check(typeof out === 'string' && out.length > 0, 'prepare needs the option out, the path of the token file');
	const { separator = ' ', splitText = 'file' } = options;
	const columns = options.columns ?? {};
	check(typeof separator === 'string', `separator is ${JSON.stringify(separator)}, expected text`);
	check(
		typeof splitText === 'string',
		`splitText is ${JSON.stringify(splitText)}, expected 'file', 'paragraph', 'line' or a separator`,
	);
	check(typeof columns === 'object', `columns is ${JSON.stringify(columns)}, expected names of columns by role`);
	for (const [role, name] of Object.entries(columns)) {
		check(columnRoles.includes(role), () => `columns.${role} is not known${suggest(role, columnRoles)}`);
		check(
			name === undefined || (typeof name === 'string' && name !== ''),
			`columns.${role} is ${JSON.stringify(name)}, expected the name of a column`,
		);
	}
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
	const threads = options.threads ?? Math.min(8, availableParallelism());
	check(
		Number.isSafeInteger(threads) && threads > 0 && threads <= 1024,
		`threads is ${String(threads)}, expected a whole number from 1 to 1024`,
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
		separator,
		splitText,
		splitSeed,
		columns,
		threads,
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
