/**
 * Text, JSON lines and CSV files as streams of records. Every reader holds one line (or one document) at a time, checks
 * that the bytes are UTF-8, and names the file and the place when they are not what they should be.
 */
import { isUtf8 } from 'node:buffer';
import { createReadStream } from 'node:fs';
import { readdir, stat } from 'node:fs/promises';
import { extname, join } from 'node:path';
import { pipeline, Readable } from 'node:stream';

import { CsvError, parse } from 'csv-parse';

import { check, checkData, DiffusionNativeError, dataError } from '../errors.js';
import { fileError, fileIdentity } from '../files.js';

/** Where one document ends and the next begins in a text file; any other string: a line that equals it. */
export type TextSplit = 'file' | 'line' | 'paragraph' | (string & {});

/** A row of a JSONL or CSV file and where it stands. */
export interface Row {
	readonly fields: Readonly<Record<string, unknown>>;
	/** "corpus.jsonl, line 12", for messages. */
	readonly where: string;
}

/** A part of a document; a long text file comes in several. */
export interface TextPiece {
	readonly text: string;
	readonly begins: boolean;
	readonly ends: boolean;
}

export interface ReadOptions {
	/** Longest line, or longest document of a text file that is split, in characters. */
	readonly maxLine: number;
	/** Called with the bytes of each piece read. */
	readonly onBytes: (bytes: number) => void;
}

const readBytes = 1 << 20;
/** A text file that is one document is handed on in pieces of about this many characters. */
const pieceCharacters = 1 << 16;
const folderExtensions: ReadonlySet<string> = new Set(['.txt', '.md', '.text', '.jsonl', '.ndjson', '.csv']);

export type FileKind = 'text' | 'jsonl' | 'csv';

export function fileKind(path: string): FileKind {
	const extension = extname(path).toLowerCase();
	return extension === '.csv' ? 'csv' : extension === '.jsonl' || extension === '.ndjson' ? 'jsonl' : 'text';
}

/** Files behind the given paths, folders walked in name order. Throws when a path is missing or nothing is found. */
export async function listFiles(paths: readonly string[]): Promise<{ path: string; bytes: number }[]> {
	const files: { path: string; bytes: number }[] = [];
	for (const path of paths) {
		const found = await stat(path).catch((cause: unknown) => {
			// An array of strings is paths; whoever passed texts sees their own text in the message.
			const advice = /\s/.test(path) ? '; pass texts as { text } objects or from a generator' : '';
			const reason = cause instanceof Error ? cause.message : String(cause);
			throw new DiffusionNativeError('ERR_DN_CHECKPOINT', `input ${path} cannot be read (${reason})${advice}`, {
				cause,
			});
		});
		if (!found.isDirectory()) {
			files.push({ path, bytes: found.size });
			continue;
		}
		const before = files.length;
		await walk(path, files);
		check(files.length > before, `folder ${path} holds no ${[...folderExtensions].join(', ')} file`);
	}
	check(files.length > 0, 'no input files were given');
	return files;
}

/**
 * Refuses outputs that would replace an input or each other, whatever links and spellings lead there. `outputs`: names of
 * options and their paths.
 * @throws `ERR_DN_ARGUMENT` naming both.
 */
export function checkOutputs(
	outputs: readonly (readonly [option: string, path: string])[],
	inputs: readonly { readonly path: string }[],
): void {
	const taken = new Map<string, string>();
	for (const [option, path] of outputs) {
		const identity = fileIdentity(path);
		const other = taken.get(identity);
		check(other === undefined, () => `${option} ${path} is the same file as ${other}: choose another`);
		taken.set(identity, `${option} ${path}`);
	}
	for (const { path } of inputs) {
		const output = taken.get(fileIdentity(path));
		check(output === undefined, () => `${output} is the same file as the input ${path}, which it would replace`);
	}
}

async function walk(folder: string, files: { path: string; bytes: number }[]): Promise<void> {
	const entries = await readdir(folder, { withFileTypes: true }).catch((error) => {
		throw fileError('read', folder, error);
	});
	entries.sort((a, b) => (a.name < b.name ? -1 : a.name > b.name ? 1 : 0));
	for (const entry of entries) {
		const path = join(folder, entry.name);
		if (entry.isDirectory()) await walk(path, files);
		else if (folderExtensions.has(extname(entry.name).toLowerCase()))
			files.push({
				path,
				bytes: (
					await stat(path).catch((error) => {
						throw fileError('read', path, error);
					})
				).size,
			});
	}
}

/** The file as text. Throws `ERR_DN_ARGUMENT` with the byte offset when it is binary or not UTF-8. */
export async function* readText(path: string, options: ReadOptions): AsyncGenerator<string, void> {
	let carry: Buffer = Buffer.alloc(0);
	let offset = 0;
	for await (const chunk of chunks(path)) {
		options.onBytes(chunk.length);
		const zero = chunk.indexOf(0);
		checkData(zero < 0, `${path} looks binary: byte ${offset + carry.length + zero} is zero; expected UTF-8 text`);
		const bytes = carry.length > 0 ? Buffer.concat([carry, chunk]) : chunk;
		const end = completeEnd(bytes);
		const whole = bytes.subarray(0, end);
		if (!isUtf8(whole)) throw notUtf8(path, offset + firstInvalid(whole));
		const text = whole.toString('utf8');
		yield offset === 0 && text.startsWith('\ufeff') ? text.slice(1) : text;
		carry = bytes.subarray(end);
		offset += end;
	}
	if (carry.length > 0) throw notUtf8(path, offset);
}

/** The file's bytes. @throws `ERR_DN_CHECKPOINT` with the system's reason */
async function* chunks(path: string): AsyncGenerator<Buffer, void> {
	try {
		yield* createReadStream(path, { highWaterMark: readBytes }) as AsyncIterable<Buffer>;
	} catch (error) {
		throw fileError('read', path, error);
	}
}

/** Where the last, perhaps incomplete, character begins; the length when the last one is complete. */
function completeEnd(bytes: Buffer): number {
	for (let back = 1; back <= Math.min(3, bytes.length); back++) {
		const byte = bytes[bytes.length - back] as number;
		if (byte < 0x80) return bytes.length;
		if (byte >= 0xc0) {
			const needed = byte >= 0xf0 ? 4 : byte >= 0xe0 ? 3 : 2;
			return needed > back ? bytes.length - back : bytes.length;
		}
	}
	return bytes.length;
}

function firstInvalid(bytes: Buffer): number {
	let at = 0;
	while (at < bytes.length) {
		const byte = bytes[at] as number;
		const length = byte < 0x80 ? 1 : byte >= 0xf0 ? 4 : byte >= 0xe0 ? 3 : 2;
		if (length > 1 && !isUtf8(bytes.subarray(at, at + length))) return at;
		at += length;
	}
	return at;
}

function notUtf8(path: string, offset: number): DiffusionNativeError {
	return dataError(`${path} is not UTF-8 text: byte ${offset} begins no valid character; convert the file to UTF-8`);
}

/** Lines without their end, numbered from 1. Throws when one is longer than `maxLine`. */
async function* readLines(path: string, options: ReadOptions): AsyncGenerator<{ line: string; number: number }, void> {
	let rest = '';
	let number = 1;
	for await (const text of readText(path, options)) {
		let from = 0;
		for (;;) {
			const newline = text.indexOf('\n', from);
			if (newline < 0) break;
			const line = rest + text.slice(from, newline);
			rest = '';
			from = newline + 1;
			tooLong(path, number, line.length, options.maxLine);
			yield { line: line.endsWith('\r') ? line.slice(0, -1) : line, number: number++ };
		}
		rest += text.slice(from);
		tooLong(path, number, rest.length, options.maxLine);
	}
	if (rest) yield { line: rest, number };
}

function tooLong(path: string, number: number, length: number, limit: number): void {
	checkData(
		length <= limit,
		`${path}, line ${number}: longer than ${limit} characters; break the line, or raise maxLine and have the memory for it`,
	);
}

/** The documents of a text file. A file that is one document comes in pieces cut where no GPT-2 token can cross. */
export async function* readDocuments(
	path: string,
	split: TextSplit,
	options: ReadOptions,
): AsyncGenerator<TextPiece, void> {
	if (split === 'file') {
		yield* readWhole(path, options);
		return;
	}
	if (split === 'line') {
		for await (const { line } of readLines(path, options)) {
			if (line.trim()) yield { text: line, begins: true, ends: true };
		}
		return;
	}
	let lines: string[] = [];
	let characters = 0;
	let first = 1;
	for await (const { line, number } of readLines(path, options)) {
		const ends = split === 'paragraph' ? !line.trim() : line === split;
		if (!ends) {
			if (lines.length === 0) first = number;
			lines.push(line);
			characters += line.length + 1;
			checkData(
				characters <= options.maxLine,
				`${path}: the document that begins at line ${first} is longer than ${options.maxLine} characters; ` +
					'split it, or raise maxLine and have the memory for it',
			);
			continue;
		}
		const text = lines.join('\n');
		lines = [];
		characters = 0;
		if (text.trim()) yield { text, begins: true, ends: true };
	}
	const text = lines.join('\n');
	if (text.trim()) yield { text, begins: true, ends: true };
}

async function* readWhole(path: string, options: ReadOptions): AsyncGenerator<TextPiece, void> {
	let held = '';
	let begins = true;
	for await (const text of readText(path, options)) {
		held += text;
		while (held.length > 2 * pieceCharacters) {
			const cut = safeCut(held, pieceCharacters);
			if (cut < 0) break;
			yield { text: held.slice(0, cut), begins, ends: false };
			held = held.slice(cut);
			begins = false;
		}
		checkData(
			held.length <= Math.max(options.maxLine, pieceCharacters) + pieceCharacters,
			`${path} has a line longer than ${options.maxLine} characters; break it, or raise maxLine and have the memory for it`,
		);
	}
	if (held.trim() || !begins) yield { text: held, begins, ends: true };
}

/**
 * Where to cut at or after `from`, -1: nowhere. Before the white space that a line ends with, the first that follows a letter
 * or digit: no pre-token of a byte-level BPE crosses from another character into white space. Where none comes in a piece,
 * the first that follows any other character, which some pre-tokenizers join with a line end.
 */
function safeCut(text: string, from: number): number {
	let other = -1;
	let before = -1; // the line end before
	for (let at = text.indexOf('\n', from); at >= 0; at = text.indexOf('\n', at + 1)) {
		let end = at;
		while (end > before + 1 && /\s/.test(text.charAt(end - 1))) end--;
		const isSame = end === before + 1; // nothing but white space since
		before = at;
		if (isSame) continue;
		if (/[\p{L}\p{N}]/u.test(text.charAt(end - 1))) return end;
		if (other < 0) other = end;
		if (at - from >= pieceCharacters) break;
	}
	return other;
}

/** Says of a row that two of its columns may be the prompt, `name` first in the list of usual names. */
export function twoPrompts(where: string, name: string, other: string): string {
	return (
		`${where}: both '${name}' and '${other}' hold text, expected one prompt: name it with columns: { prompt: '${name}' }, ` +
		'which leaves the other away, or join the two in one column'
	);
}

/** Objects of a JSONL file. */
export async function* readJsonLines(path: string, options: ReadOptions): AsyncGenerator<Row, void> {
	for await (const { line, number } of readLines(path, options)) {
		if (!line.trim()) continue;
		const where = `${path}, line ${number}`;
		let value: unknown;
		try {
			value = JSON.parse(line);
		} catch (cause) {
			const reason = cause instanceof Error ? cause.message : String(cause);
			throw dataError(`${where}: not JSON: ${reason}`, { cause });
		}
		if (typeof value === 'string') value = { text: value };
		checkData(typeof value === 'object' && value !== null && !Array.isArray(value), `${where}: expected a JSON object`);
		yield { fields: value as Record<string, unknown>, where };
	}
}

/** Rows of a CSV file whose first line names the columns. */
export async function* readCsv(path: string, options: ReadOptions): AsyncGenerator<Row, void> {
	const parser = parse({ columns: true, skip_empty_lines: true, max_record_size: options.maxLine, info: true });
	pipeline(Readable.from(readText(path, options)), parser, () => {});
	try {
		for await (const { record, info } of parser as AsyncIterable<{
			record: Record<string, string>;
			info: { lines: number };
		}>) {
			yield { fields: record, where: `${path}, line ${info.lines}` };
		}
	} catch (error) {
		if (!(error instanceof CsvError)) throw error;
		throw dataError(`${path}: not a valid CSV file: ${error.message}`, { cause: error });
	}
}
