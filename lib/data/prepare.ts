/**
 * Text in, token file out. Inputs are read as streams, so memory does not grow with them; the training and validation
 * parts are told apart by a hash of the document, so no text and no window is in both.
 */
import { createHash } from 'node:crypto';

import { check, checkData } from '../errors.js';
import { Turns } from '../turns.js';
import { TokenDataset } from './dataset.js';
import { type EncodedItem, encodeItems } from './encode.js';
import { concatenate } from './pack.js';
import {
	type DataRecord,
	type PrepareInput,
	type PrepareOptions,
	type PrepareProgress,
	type PrepareSettings,
	resolvePrepareOptions,
} from './prepare-options.js';
import { checkOutputs, listFiles, type ReadOptions } from './readers.js';
import { checkInput, fileItems, isPaths, recordItems } from './records.js';
import { TokenWriter } from './writer.js';

/**
 * Tokenises `input` into a token file and opens it. Files appear whole or not at all.
 * @throws `ERR_DN_ARGUMENT` naming the file and the place when the input is empty, binary, not UTF-8, malformed or lacks a
 * column, or when an output is an input or the other output; `ERR_DN_CHECKPOINT` when an input cannot be read or the output not be written; `signal.reason` when aborted.
 */
export async function prepare(input: PrepareInput, options: PrepareOptions): Promise<TokenDataset> {
	const settings = resolvePrepareOptions(options);
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
	const outputs: [string, string][] = [['out', options.out]];
	if (validation > 0) outputs.push(['validationOut', settings.validationOut]);
	checkOutputs(outputs, files);
	const items = paths ? fileItems(files, settings, read) : recordItems(input as Iterable<DataRecord>);
	const train = new TokenWriter({ ...settings, path: options.out });
	let held: TokenWriter | undefined;
	try {
		if (validation > 0) held = new TokenWriter({ ...settings, path: settings.validationOut });
		let target = train;
		let lastReport = 0;
		const turns = new Turns();
		const open = new OpenDocument();
		for await (const encoded of encodeItems(items, settings)) {
			await turns.next();
			signal?.throwIfAborted();
			const { item } = encoded;
			if (item.begins) target = held && falls(splitKey(item.record), settings.splitSeed) < validation ? held : train;
			dropped += write(target, encoded, settings, open);
			const now = performance.now();
			if (options.onProgress && now - lastReport > 100) {
				lastReport = now;
				options.onProgress(progress(item.file));
			}
		}
		signal?.throwIfAborted();
		const source = paths ? paths.join(', ') : 'the input';
		checkData(
			train.documents + (held?.documents ?? 0) > 0,
			dropped > 0
				? `${source} is left with nothing: all ${dropped} records are longer than the context of ${context}`
				: `${source} is empty: no text was found`,
		);
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
function write(writer: TokenWriter, encoded: EncodedItem, settings: PrepareSettings, open: OpenDocument): number {
	const { item, tokens } = encoded;
	const { format, eosId, bosId } = settings;
	if (format === 'pairs') return writePair(writer, encoded, settings);
	if (format === 'documents') return open.write(writer, encoded, settings);
	if (item.begins && bosId !== false) writer.append(Int32Array.of(bosId));
	writer.append(tokens);
	if (item.ends) {
		writer.append(Int32Array.of(eosId));
		writer.endSequence(0, 0);
	}
	return 0;
}

/** A document that comes in pieces: what has not been written of it. */
class OpenDocument {
	#held = new Int32Array(0);
	/** Its end was cut off, or it is left out: further pieces are passed over. */
	#isClosed = false;

	/** Adds a piece and writes what is complete; returns how many documents were left out. */
	write(writer: TokenWriter, { item, tokens }: EncodedItem, settings: PrepareSettings): number {
		const { context, bosId, eosId, overlong } = settings;
		if (item.begins) {
			this.#held = new Int32Array(0);
			this.#isClosed = false;
		}
		if (this.#isClosed) return 0;
		const front = bosId === false ? [] : [bosId];
		const room = context - front.length;
		// The end token closes a document only where it really ends, not where it was cut.
		const whole = concatenate([this.#held, tokens, item.ends ? [eosId] : []]);
		let end = item.ends ? whole.length : 0;
		if (whole.length > room) {
			check(
				overlong !== 'error',
				`${item.where}: a document has ${whole.length} tokens${item.ends ? '' : ' or more'}, more than the ${room} that fit ` +
					`a context of ${context}`,
			);
			this.#isClosed = overlong !== 'split';
			if (overlong === 'drop') return 1;
			if (overlong === 'truncate') end = room;
			else if (!item.ends) end = Math.floor((whole.length - 1) / room) * room;
		}
		for (let from = 0; from < end; from += room) {
			const first = writer.tokens;
			writer.append(concatenate([front, whole.subarray(from, Math.min(end, from + room))]));
			const isLast = this.#isClosed || (item.ends && from + room >= end);
			writer.endSequence(first, front.length, isLast);
		}
		this.#held = whole.slice(end);
		return 0;
	}
}

function writePair(
	writer: TokenWriter,
	{ item, tokens, promptLength }: EncodedItem,
	settings: PrepareSettings,
): number {
	const { context, bosId, eosId, overlong } = settings;
	let prompt = concatenate([bosId === false ? [] : [bosId], tokens.subarray(0, promptLength)]);
	let answer = concatenate([tokens.subarray(promptLength), [eosId]]);
	checkData(prompt.length > 0, `${item.where}: the prompt is empty; give it text or set bosId`);
	if (prompt.length + answer.length > context) {
		check(
			overlong !== 'error',
			`${item.where}: the pair has ${prompt.length + answer.length} tokens, more than the context of ${context}; ` +
				"choose overlong: 'drop' or 'truncate', or a larger context",
		);
		if (overlong === 'drop') return 1;
		// The answer is cut first (and then has no end token); the prompt keeps its last tokens, at least one.
		answer = answer.subarray(0, context - 1);
		prompt = prompt.subarray(Math.max(0, prompt.length - (context - answer.length)));
	}
	const first = writer.tokens;
	writer.append(prompt);
	writer.append(answer);
	writer.endSequence(first, prompt.length);
	return 0;
}
