/**
 * What `prepare` reads, as a stream of records: the rows of JSONL and CSV files with their columns found, the documents of
 * text files (a long one in pieces), or records that the caller hands over.
 */
import { check, checkData } from '../errors.js';
import type { DataFormat } from './format.js';
import type { DataRecord, PrepareInput, PrepareOptions, PrepareSettings } from './prepare-options.js';
import { fileKind, type ReadOptions, type Row, readCsv, readDocuments, readJsonLines, twoPrompts } from './readers.js';

/** A record, or a piece of a long document, and where it stands. */
export interface Item {
	readonly record: Exclude<DataRecord, string>;
	readonly begins: boolean;
	readonly ends: boolean;
	readonly where: string;
	readonly file: string;
}

/** Throws `ERR_DN_ARGUMENT` for what is no input at all. */
export function checkInput(input: unknown): asserts input is PrepareInput {
	check(
		typeof input === 'string' ||
			(typeof input === 'object' && input !== null && (Symbol.iterator in input || Symbol.asyncIterator in input)),
		`the input is ${String(input)}, expected a path, a list of paths, or records`,
	);
}

/** True for a list of paths; an empty list is one of no records. */
export function isPaths(input: unknown): input is readonly string[] {
	return Array.isArray(input) && input.length > 0 && input.every((entry) => typeof entry === 'string');
}

/** Records of files. @throws `ERR_DN_ARGUMENT` naming the file and the line. */
export async function* fileItems(
	files: readonly { path: string }[],
	settings: PrepareSettings,
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
			if (names.prompt !== undefined && columns.prompt === undefined) checkOnlyPrompt(row, names.prompt);
			const record = toRecord(row, names);
			if (!isBlank(record)) yield { record, begins: true, ends: true, where: row.where, file: path };
		}
	}
}

/** Records that the caller gives. */
export async function* recordItems(
	input: Iterable<DataRecord> | AsyncIterable<DataRecord>,
): AsyncGenerator<Item, void> {
	let number = 0;
	for await (const given of input) {
		const record = typeof given === 'string' ? { text: given } : given;
		check(
			typeof record === 'object' && record !== null && (!('text' in record) || typeof record.text === 'string'),
			`record ${number}: expected text, { text }, { tokens } or { prompt, answer }`,
		);
		if (!(record instanceof Int32Array)) {
			const read = 'prompt' in record || !('tokens' in record) ? undefined : record.tokens;
			check(
				read === undefined || (read as unknown) instanceof Int32Array,
				`record ${number}: tokens is no Int32Array of ids`,
			);
			check(
				record.split === undefined || typeof record.split === 'string',
				`record ${number}: split is ${JSON.stringify(record.split)}, expected text`,
			);
		}
		const where = `record ${number++}`;
		if (!isBlank(record)) yield { record, begins: true, ends: true, where, file: '' };
	}
}

/** Documents without text are passed over, in rows as between the lines of a text file. */
function isBlank(record: Item['record']): boolean {
	return !(record instanceof Int32Array) && 'text' in record && record.text.trim() === '';
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
		checkData(
			name !== undefined,
			`${row.where}: no column ${wanted.map((candidate) => `'${candidate}'`).join(' or ')} for the ${role}; ` +
				`found ${found.map((candidate) => `'${candidate}'`).join(', ')}. Name it with columns: { ${role}: '...' }`,
		);
		return name;
	};
	const { split } = given;
	checkData(
		split === undefined || found.includes(split),
		`${row.where}: no column '${String(split)}'; found ${found.join(', ')}`,
	);
	const own = split === undefined ? {} : { split };
	return format === 'pairs'
		? { prompt: find('prompt'), answer: find('answer'), ...own }
		: { text: find('text'), ...own };
}

/** Throws when another column than `name` that may be the prompt holds text: it would be lost. */
function checkOnlyPrompt(row: Row, name: string): void {
	const other = usual.prompt.find((column) => {
		const value = row.fields[column];
		// Beside a prompt, 'source' says where a record comes from.
		return column !== name && column !== 'source' && typeof value === 'string' && value.trim() !== '';
	});
	checkData(other === undefined, () => twoPrompts(row.where, name, other as string));
}

function toRecord(row: Row, names: Columns): Exclude<DataRecord, string> {
	const text = (name: string): string => {
		const value = row.fields[name];
		checkData(
			typeof value === 'string',
			`${row.where}: the column '${name}' is ${JSON.stringify(value)}, expected text`,
		);
		return value;
	};
	const split = names.split === undefined ? {} : { split: String(row.fields[names.split]) };
	if (names.text !== undefined) return { text: text(names.text), ...split };
	return { prompt: text(names.prompt as string), answer: text(names.answer as string), ...split };
}
