/**
 * A token file, opened. Sequences are read by position when asked for; nothing of the file is kept in memory.
 */
import { closeSync, fstatSync, openSync, readSync } from 'node:fs';

import { check, DiffusionNativeError } from '../errors.js';
import { checkOptions } from '../option-checks.js';
import { type DataFormat, type DataHeader, decodeHeader, headerBytes, type Padding, recordBytes } from './format.js';
import type { DataTokenizer } from './prepare-options.js';

/** One sequence as it lies in the file, without padding. */
export interface DataSequence {
	/** (T) token ids. */
	readonly tokens: Int32Array;
	/** Tokens at the front that are never masked; 0 unless the format is 'pairs'. */
	readonly promptLength: number;
}

/** What tells whether a tokenizer fits a file. */
export type TokenizerIdentity = Pick<DataTokenizer, 'fingerprint' | 'vocabSize' | 'acceptsData'>;

/** Options of `TokenDataset.open`. */
export interface OpenDatasetOptions {
	/** Window length of a packed file, tokens. @default what the header says; 1024 for files without that */
	readonly context?: number;
	/**
	 * Only these sequences: number of the first one, and of the one after the last. For splitting a foreign file into
	 * training and validation; files of this library are split when they are prepared. @default all
	 */
	readonly range?: readonly [number, number];
	/** The tokenizer the ids must have been made with; a different one is an error. @default not checked */
	readonly tokenizer?: TokenizerIdentity;
}

const handles = new FinalizationRegistry<number>((fd) => closeSync(fd));

/** A prepared data set. Opened with `TokenDataset.open`, made with `prepare`. */
export class TokenDataset implements Disposable {
	/** Path of the file, as given. */
	readonly path: string;
	/** Sequences of the file that this data set is: the first one, and the one after the last. */
	readonly range: readonly [number, number];
	readonly #header: DataHeader;
	#fd: number;

	private constructor(path: string, fd: number, header: DataHeader, range: readonly [number, number]) {
		this.path = path;
		this.#fd = fd;
		this.#header = header;
		this.range = range;
		handles.register(this, fd, this);
	}

	/**
	 * Opens a token file: this library's, llm.c's (told by its magic), or nanoGPT's headerless uint16.
	 * @throws `ERR_DN_CHECKPOINT` when the file is missing, truncated or damaged; `ERR_DN_ARGUMENT` naming the option, or when
	 * it was prepared with another tokenizer.
	 */
	static async open(path: string, options: OpenDatasetOptions = {}): Promise<TokenDataset> {
		check(
			typeof path === 'string' && path !== '',
			`TokenDataset.open: the path is ${JSON.stringify(path)}, expected a file`,
		);
		checkOptions('TokenDataset.open', options, ['context', 'range', 'tokenizer']);
		const { context, tokenizer } = options;
		check(
			tokenizer === undefined || (typeof tokenizer === 'object' && Number.isInteger(tokenizer?.vocabSize)),
			'TokenDataset.open: option tokenizer is not a tokenizer (it has no vocabSize)',
		);
		check(
			context === undefined || (Number.isInteger(context) && context > 0),
			`context is ${String(context)}, expected a positive whole number of tokens`,
		);
		let fd: number;
		try {
			fd = openSync(path, 'r');
		} catch (cause) {
			const reason = cause instanceof Error ? cause.message : String(cause);
			throw new DiffusionNativeError('ERR_DN_CHECKPOINT', `token file ${path} cannot be opened: ${reason}`, { cause });
		}
		let dataset: TokenDataset;
		try {
			const stat = fstatSync(fd);
			if (!stat.isFile()) throw new DiffusionNativeError('ERR_DN_CHECKPOINT', `token file ${path} is not a file`);
			const head = Buffer.alloc(headerBytes);
			const read = readSync(fd, head, 0, headerBytes, 0);
			let header = decodeHeader(path, head.subarray(0, read), stat.size, context ?? 1024);
			if (context !== undefined && header.format === 'packed' && header.context !== context) {
				check(
					header.tokens >= context,
					`token file ${path} has ${header.tokens} tokens, fewer than one window of ${context}`,
				);
				header = { ...header, context, longest: context, sequences: Math.floor(header.tokens / context) };
			}
			const range = options.range ?? ([0, header.sequences] as const);
			check(
				Array.isArray(range) &&
					range.length === 2 &&
					range.every(Number.isInteger) &&
					range[0] >= 0 &&
					range[0] < range[1] &&
					range[1] <= header.sequences,
				`range is ${JSON.stringify(range)}, expected two numbers from 0 to ${header.sequences}, the second one larger`,
			);
			dataset = new TokenDataset(path, fd, header, range);
		} catch (error) {
			closeSync(fd);
			throw error;
		}
		try {
			if (tokenizer) dataset.checkTokenizer(tokenizer);
		} catch (error) {
			dataset.close();
			throw error;
		}
		return dataset;
	}

	/** Tokens in the whole file. */
	get tokens(): number {
		return this.#header.tokens;
	}

	/** Windows, documents or pairs. */
	get sequences(): number {
		return this.range[1] - this.range[0];
	}

	/** Tokens of the longest sequence, without padding. */
	get longest(): number {
		return this.#header.longest;
	}

	/** What a sequence is. */
	get format(): DataFormat {
		return this.#header.format;
	}

	/** Window length of a packed file; 0 otherwise. */
	get context(): number {
		return this.#header.context;
	}

	/** Padding asked for when the file was prepared. */
	get padding(): Padding {
		return this.#header.padding;
	}

	/** Id of the end token that was added; -1: not known. */
	get eosId(): number {
		return this.#header.eosId;
	}

	/** Id that pads; -1: not known. */
	get padId(): number {
		return this.#header.padId;
	}

	/** Vocabulary the ids were made for; 0: not known. */
	get vocab(): number {
		return this.#header.vocab;
	}

	/** Fingerprint of the tokenizer; '' for foreign files, which do not say. */
	get fingerprint(): string {
		return this.#header.fingerprint;
	}

	/** Documents or pairs that went in; 0: not known. */
	get documents(): number {
		return this.#header.documents;
	}

	/**
	 * Reads sequence `index`.
	 * @throws `ERR_DN_ARGUMENT` when there is no such sequence or the file is closed; `ERR_DN_CHECKPOINT` when the file
	 * holds an id beyond its own vocabulary.
	 */
	get(index: number): DataSequence {
		const { format, context, indexStart } = this.#header;
		check(
			Number.isInteger(index) && index >= 0 && index < this.sequences,
			`sequence ${String(index)} of ${this.path}: there are ${this.sequences}, numbered from 0`,
		);
		const number = this.range[0] + index;
		if (format === 'packed') return { tokens: this.#read(number * context, context, number), promptLength: 0 };
		const record = this.#bytes(indexStart + number * recordBytes, recordBytes);
		const tokens = this.#read(Number(record.readBigUInt64LE(0)), record.readUInt32LE(8), number);
		return { tokens, promptLength: record.readUInt32LE(12) };
	}

	/**
	 * How often each id occurs, (V); reads the whole file once, a piece at a time.
	 * @throws `ERR_DN_ARGUMENT` for an id beyond `vocab`, or when the file is closed; `ERR_DN_CHECKPOINT` when the file holds an
	 * id beyond its own vocabulary or was cut.
	 */
	counts(vocab: number): Float64Array {
		const counts = new Float64Array(vocab);
		const piece = 1 << 18;
		for (let from = 0; from < this.tokens; from += piece) {
			const ids = this.#read(from, Math.min(piece, this.tokens - from), -1);
			for (const id of ids) {
				check(id < vocab, `${this.path} holds the id ${id}, beyond the vocabulary of ${vocab}`);
				counts[id] = (counts[id] as number) + 1;
			}
		}
		return counts;
	}

	/**
	 * Checks that every id of the file means the same to this tokenizer (or that the file does not say). A tokenizer that has
	 * gained tokens since is fine; one that lacks or renames an id of the file is not.
	 * @throws `ERR_DN_ARGUMENT` naming file and tokenizers
	 */
	checkTokenizer(tokenizer: TokenizerIdentity): void {
		const { fingerprint, vocab } = this.#header;
		if (!fingerprint || !tokenizer.fingerprint) return;
		const accepts = tokenizer.acceptsData
			? tokenizer.acceptsData(fingerprint, vocab)
			: fingerprint === tokenizer.fingerprint;
		if (accepts) return;
		const [base] = fingerprint.split('+');
		check(
			base !== tokenizer.fingerprint,
			`${this.path} was prepared with ${vocab} ids, of which added tokens are missing from this tokenizer or spelt ` +
				`otherwise in it (vocabulary ${tokenizer.vocabSize}): prepare it again`,
		);
		check(
			false,
			`${this.path} was prepared with another tokenizer (fingerprint ${fingerprint.slice(0, 12)}, vocabulary ${vocab}; ` +
				`this one: ${tokenizer.fingerprint.slice(0, 12)}, vocabulary ${tokenizer.vocabSize}): prepare it again`,
		);
	}

	/** Closes the file; idempotent. */
	close(): void {
		if (this.#fd < 0) return;
		handles.unregister(this);
		closeSync(this.#fd);
		this.#fd = -1;
	}

	/** `close`, for `using`. */
	[Symbol.dispose](): void {
		this.close();
	}

	#read(first: number, count: number, sequence: number): Int32Array {
		const { width, vocab, tokenStart } = this.#header;
		const bytes = this.#bytes(tokenStart + first * width, count * width);
		const ids = new Int32Array(count);
		for (let i = 0; i < count; i++) ids[i] = width === 2 ? bytes.readUInt16LE(2 * i) : bytes.readInt32LE(4 * i);
		if (vocab > 0) {
			for (let i = 0; i < count; i++) {
				const id = ids[i] as number;
				if (id >= 0 && id < vocab) continue;
				const where = sequence < 0 ? `token ${first + i}` : `token ${i} of sequence ${sequence}`;
				throw new DiffusionNativeError(
					'ERR_DN_CHECKPOINT',
					`${this.path} is damaged: ${where} is ${id}, beyond its vocabulary of ${vocab}`,
				);
			}
		}
		return ids;
	}

	#bytes(position: number, length: number): Buffer {
		check(this.#fd >= 0, `${this.path} is closed`);
		const bytes = Buffer.allocUnsafe(length);
		let done = 0;
		while (done < length) {
			const read = readSync(this.#fd, bytes, done, length - done, position + done);
			if (read === 0) {
				throw new DiffusionNativeError(
					'ERR_DN_CHECKPOINT',
					`${this.path} ends at byte ${position + done}: it was cut while open`,
				);
			}
			done += read;
		}
		return bytes;
	}
}
