/**
 * Writes one token file as its sequences arrive. Tokens go to a temporary file beside the target and index records to a
 * second one, so memory does not grow with the data; `finish` joins them, writes the header, syncs and renames.
 */
import { closeSync, existsSync, fsyncSync, openSync, readSync, renameSync, rmSync, writeSync } from 'node:fs';
import { dirname } from 'node:path';

import { check, DiffusionNativeError } from '../errors.js';
import { temporaryName } from '../files.js';
import { type DataFormat, type DataHeader, encodeHeader, headerBytes, type Padding, recordBytes } from './format.js';

export interface WriterOptions {
	readonly path: string;
	/** 'nanogpt': no header, uint16 ids, windows are the reader's business. */
	readonly container: 'own' | 'nanogpt';
	readonly format: DataFormat;
	readonly vocab: number;
	readonly context: number;
	readonly eosId: number;
	readonly padId: number;
	readonly padding: Padding;
	readonly fingerprint: string;
}

const pieceBytes = 1 << 20;

/** Appends through a buffer of one piece. */
class Appender {
	readonly path: string;
	readonly fd: number;
	readonly #buffer = Buffer.allocUnsafe(pieceBytes);
	#used = 0;

	constructor(path: string) {
		this.path = path;
		this.fd = openSync(path, 'wx+');
	}

	/** Room for `bytes` more, at most one piece. */
	reserve(bytes: number): { buffer: Buffer; at: number } {
		if (this.#used + bytes > pieceBytes) this.flush();
		const at = this.#used;
		this.#used += bytes;
		return { buffer: this.#buffer, at };
	}

	flush(): void {
		writeAll(this.fd, this.#buffer.subarray(0, this.#used));
		this.#used = 0;
	}
}

export class TokenWriter {
	readonly #options: WriterOptions;
	readonly #width: 2 | 4;
	readonly #tokens: Appender;
	readonly #index: Appender | undefined;
	#count = 0;
	#sequences = 0;
	#documents = 0;
	#longest = 0;

	constructor(options: WriterOptions) {
		check(
			options.container === 'own' || (options.vocab <= 65536 && options.format === 'packed'),
			"nanoGPT's file holds uint16 ids of one stream: the vocabulary must be at most 65536 and the format 'packed'",
		);
		this.#options = options;
		this.#width = options.vocab <= 65536 ? 2 : 4;
		try {
			this.#tokens = new Appender(temporaryName(options.path));
			this.#index = options.format === 'packed' ? undefined : new Appender(temporaryName(`${options.path}.index`));
		} catch (cause) {
			throw unwritable(options.path, cause);
		}
		if (options.container === 'own') this.#tokens.reserve(headerBytes).buffer.fill(0, 0, headerBytes);
	}

	get path(): string {
		return this.#options.path;
	}

	/** Tokens so far. */
	get tokens(): number {
		return this.#count;
	}

	/** Documents or pairs so far. */
	get documents(): number {
		return this.#documents;
	}

	/** Appends ids to the stream. */
	append(ids: Int32Array): void {
		const { vocab, path } = this.#options;
		try {
			const most = pieceBytes / this.#width;
			for (let from = 0; from < ids.length; from += most) {
				const piece = ids.subarray(from, from + most);
				const { buffer, at } = this.#tokens.reserve(piece.length * this.#width);
				for (let i = 0; i < piece.length; i++) {
					const id = piece[i] as number;
					check(
						id >= 0 && id < vocab,
						`the id ${id} is beyond the vocabulary of ${vocab} (token ${this.#count + from + i} of ${path})`,
					);
					if (this.#width === 2) buffer.writeUInt16LE(id, at + 2 * i);
					else buffer.writeUInt32LE(id, at + 4 * i);
				}
			}
		} catch (error) {
			throw unwritable(path, error);
		}
		this.#count += ids.length;
	}

	/** Ends a document, or a part of one; with an index, the ids since `first` become one sequence. */
	endSequence(first: number, promptLength: number, isDocument = true): void {
		if (isDocument) this.#documents++;
		if (!this.#index) return;
		const length = this.#count - first;
		this.#longest = Math.max(this.#longest, length);
		try {
			const { buffer, at } = this.#index.reserve(recordBytes);
			buffer.writeBigUInt64LE(BigInt(first), at);
			buffer.writeUInt32LE(length, at + 8);
			buffer.writeUInt32LE(promptLength, at + 12);
		} catch (error) {
			throw unwritable(this.#options.path, error);
		}
		this.#sequences++;
	}

	/** Joins the parts, syncs, and gives the file its name. */
	finish(): void {
		const { path, container, format, vocab, context, eosId, padId, padding, fingerprint } = this.#options;
		const packed = format === 'packed';
		try {
			this.#tokens.flush();
			const tokenStart = container === 'own' ? headerBytes : 0;
			const indexStart = tokenStart + this.#count * this.#width;
			if (this.#index) {
				this.#index.flush();
				copy(this.#index.fd, this.#tokens.fd, this.#sequences * recordBytes);
			}
			if (container === 'own') {
				const header: DataHeader = {
					width: this.#width,
					format,
					vocab,
					tokens: this.#count,
					sequences: packed ? Math.floor(this.#count / context) : this.#sequences,
					longest: packed ? context : this.#longest,
					context: packed ? context : 0,
					eosId,
					padId,
					padding,
					fingerprint,
					documents: this.#documents,
					tokenStart,
					indexStart,
				};
				writeAll(this.#tokens.fd, encodeHeader(header), 0);
			}
			fsyncSync(this.#tokens.fd);
			this.#close();
			renameSync(this.#tokens.path, path);
			syncDirectory(dirname(path));
			if (this.#index) rmSync(this.#index.path, { force: true });
		} catch (error) {
			this.discard();
			throw unwritable(path, error);
		}
	}

	/** Removes the temporary files; the target stays as it was. */
	discard(): void {
		this.#close();
		rmSync(this.#tokens.path, { force: true });
		if (this.#index) rmSync(this.#index.path, { force: true });
	}

	#closed = false;
	#close(): void {
		if (this.#closed) return;
		this.#closed = true;
		closeSync(this.#tokens.fd);
		if (this.#index) closeSync(this.#index.fd);
	}
}

function writeAll(fd: number, bytes: Buffer, position?: number): void {
	let done = 0;
	while (done < bytes.length) {
		done += writeSync(fd, bytes, done, bytes.length - done, position === undefined ? null : position + done);
	}
}

function copy(from: number, to: number, bytes: number): void {
	const piece = Buffer.allocUnsafe(pieceBytes);
	for (let at = 0; at < bytes; ) {
		const read = readSync(from, piece, 0, Math.min(pieceBytes, bytes - at), at);
		if (read === 0) throw new Error('the temporary index was cut');
		writeAll(to, piece.subarray(0, read));
		at += read;
	}
}

function syncDirectory(path: string): void {
	if (process.platform === 'win32' || !existsSync(path)) return;
	const fd = openSync(path, 'r');
	try {
		fsyncSync(fd);
	} finally {
		closeSync(fd);
	}
}

function unwritable(path: string, cause: unknown): unknown {
	if (cause instanceof DiffusionNativeError) return cause;
	const reason = cause instanceof Error ? cause.message : String(cause);
	return new DiffusionNativeError('ERR_DN_CHECKPOINT', `token file ${path} cannot be written: ${reason}`, { cause });
}
