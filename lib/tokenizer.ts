/**
 * Text to token ids and back: byte-level BPE, as GPT-2 and its relatives use. The `tokenizers` package reads and checks the
 * file and runs its normaliser and pre-tokenizer; merging is done here (byte-bpe.ts), because the package encodes only
 * asynchronously. The pre-tokenizer of GPT-2 itself is one regular expression and is matched here too, which is much faster.
 */
import { createHash } from 'node:crypto';
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { type AddedToken, AddedTokenMatcher } from './added-tokens.js';
import { packageRoot } from './binding.js';
import { fromByteChars, toByteChars } from './byte-bpe.js';
import { byteLevelJson } from './byte-level-json.js';
import { check, DiffusionNativeError } from './errors.js';
import { readJsonObject, readText, writeFileAtomic } from './files.js';
import { readTokenizer, type TokenizerBase, type TokenizerFile } from './tokenizer-file.js';

/** GPT-2's words; \p{White_Space} and not \s, which in JavaScript also holds U+FEFF and lacks U+0085. */
const gpt2Words =
	/'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+/gu;

/** Options of {@link Tokenizer.encode}. */
export interface EncodeOptions {
	/**
	 * Turn the spelling of special tokens into those tokens. Off, `<|endoftext|>` in a text is nothing but these characters.
	 * @default false
	 */
	special?: boolean;
}

/** Options of {@link Tokenizer.decode}. */
export interface DecodeOptions {
	/** Spell special tokens out; false leaves them away. @default true */
	special?: boolean;
	/**
	 * An id that is not in the vocabulary is refused, or becomes U+FFFD: a model may have more embedding rows than its
	 * tokenizer has ids, and draw one of them. @default 'error'
	 */
	unknown?: 'error' | 'replace';
}

/** U+FFFD in UTF-8. */
const replacement = Uint8Array.of(0xef, 0xbf, 0xbd);

/** Turns ids that arrive piece by piece into text, never splitting a character. */
export interface TokenDecoder {
	/** The text that is complete after these ids. @throws what `Tokenizer.decode` does */
	push(ids: ArrayLike<number>): string;
	/** What is left: U+FFFD when the ids ended inside a character. The decoder is then as new. */
	end(): string;
}

/** A byte-level BPE tokenizer. Immutable. */
export class Tokenizer {
	/** Largest id plus one, added tokens included. */
	readonly vocabSize: number;
	private readonly base: TokenizerBase;
	private readonly added: readonly AddedToken[];
	private readonly specialIds: ReadonlySet<number>;
	/** What ids stand for: of added tokens at once, of others since they were first asked for. */
	private readonly bytes = new Map<number, Uint8Array>();
	private readonly ordinary: AddedTokenMatcher;
	private readonly all: AddedTokenMatcher;
	private digest: string | undefined;
	/** The text of the `tokenizer.json`, or how it is written. */
	private json: string | (() => string);

	private constructor(base: TokenizerBase, added: readonly AddedToken[], json: string | (() => string)) {
		const { vocab } = base;
		this.base = base;
		this.json = json;
		// An added token that is in the vocabulary has its id there, whatever the list says, as in Hugging Face's tokenizers.
		this.added = added.map((token) => ({ ...token, id: vocab.get(token.content) ?? token.id }));
		let size = base.tokens.length;
		for (const { id, content } of this.added) {
			if (!vocab.has(content)) this.bytes.set(id, new TextEncoder().encode(content));
			size = Math.max(size, id + 1);
		}
		this.vocabSize = size;
		this.specialIds = new Set(this.added.filter((token) => token.special).map((token) => token.id));
		this.ordinary = new AddedTokenMatcher(this.added.filter((token) => !token.special));
		this.all = new AddedTokenMatcher(this.added);
	}

	private static read(json: string, source: string, known = false): Tokenizer {
		const { base, added } = readTokenizer(json, source, known);
		return new Tokenizer(base, added, json);
	}

	/**
	 * SHA-256 (hex) of vocabulary and merges, and of how text is prepared where that is not GPT-2's way: equal for tokenizers
	 * that give the same ids to plain text. Tokens added beyond the vocabulary (a mask token, say) change nothing.
	 */
	get fingerprint(): string {
		this.digest ??= sha256([this.entries(), this.base.merges, ...this.base.manner]);
		return this.digest;
	}

	/**
	 * Reads a `tokenizer.json`.
	 * @throws `ERR_DN_CHECKPOINT` when it is missing, malformed or not byte-level BPE.
	 */
	static fromFile(path: string): Tokenizer {
		return Tokenizer.read(textOf(path), path);
	}

	/** Parses the text of a `tokenizer.json`. @throws `ERR_DN_CHECKPOINT` when it is malformed or not byte-level BPE. */
	static fromString(json: string): Tokenizer {
		return Tokenizer.read(json, 'the given tokenizer');
	}

	/** Whether {@link Tokenizer.fromDirectory} would find files in `directory`. */
	static existsIn(directory: string): boolean {
		const has = (name: string): boolean => existsSync(join(directory, name));
		return has('tokenizer.json') || has('vocab.json') || has('merges.txt');
	}

	/**
	 * Reads `tokenizer.json`, or `vocab.json` and `merges.txt` with GPT-2's words, from a model directory. In the second form
	 * the special tokens are `<|endoftext|>` and those of `added_tokens.json`.
	 * @throws `ERR_DN_CHECKPOINT` naming the missing or malformed file.
	 */
	static fromDirectory(directory: string): Tokenizer {
		check(typeof directory === 'string', `fromDirectory: directory is ${typeof directory}, expected a path`);
		const whole = join(directory, 'tokenizer.json');
		if (existsSync(whole)) return Tokenizer.fromFile(whole);
		const vocabPath = join(directory, 'vocab.json');
		const mergesPath = join(directory, 'merges.txt');
		const vocab = readJsonObject(vocabPath);
		const merges = readText(mergesPath);
		if (!vocab || merges === undefined) {
			const missing = [...(vocab ? [] : ['vocab.json']), ...(merges === undefined ? ['merges.txt'] : [])].join(
				' and no ',
			);
			throw new DiffusionNativeError('ERR_DN_CHECKPOINT', `${directory}: no tokenizer.json, and no ${missing}`);
		}
		for (const [token, id] of Object.entries(vocab)) {
			if (!Number.isInteger(id) || (id as number) < 0) {
				throw new DiffusionNativeError(
					'ERR_DN_CHECKPOINT',
					`${vocabPath}: the id of ${JSON.stringify(token)} is ${JSON.stringify(id)}`,
				);
			}
		}
		const added = { ...readJsonObject(join(directory, 'added_tokens.json')) } as Record<string, number>;
		const endOfText = '<|endoftext|>';
		if (endOfText in vocab) added[endOfText] = vocab[endOfText] as number;
		return Tokenizer.read(gpt2Json(vocab as Record<string, number>, merges, added), vocabPath);
	}

	/** GPT-2's own tokenizer, 50257 tokens, from the package. Read once per thread. @throws `ERR_DN_CHECKPOINT` when it is missing there */
	static gpt2(): Tokenizer {
		if (!packaged) {
			const path = join(packageRoot(), 'assets', 'gpt2', 'tokenizer.json');
			packaged = Tokenizer.read(textOf(path), path, true);
		}
		return packaged;
	}

	/**
	 * This tokenizer for a model with `vocab` rows: added tokens beyond them are left away, and the added tokens among
	 * `reserved` become special, so that plain text never turns into them.
	 */
	forModel(vocab: number, reserved: readonly number[] = []): Tokenizer {
		const stays = (token: AddedToken): boolean => token.id < vocab && (token.special || !reserved.includes(token.id));
		if (this.added.every(stays)) return this;
		const added = this.added
			.filter((token) => token.id < vocab)
			.map((token) => ({ ...token, special: token.special || reserved.includes(token.id) }));
		return new Tokenizer(this.base, added, () => {
			const file = JSON.parse(this.toJSON()) as TokenizerFile;
			file.added_tokens = added;
			return JSON.stringify(file);
		});
	}

	/**
	 * What data made with this tokenizer records of it: the fingerprint, and a digest of the tokens that are added beyond the
	 * vocabulary, where there are any.
	 * @param vocab only the ids below it. @default all
	 */
	dataFingerprint(vocab: number = this.vocabSize): string {
		const extra = this.addedBelow(vocab).filter(([content]) => !this.base.vocab.has(content));
		return extra.length === 0 ? this.fingerprint : `${this.fingerprint}+${sha256(extra).slice(0, 32)}`;
	}

	/**
	 * Whether ids below `vocab`, made with the tokenizer of this `dataFingerprint`, mean the same here: the same
	 * {@link Tokenizer.fingerprint}, and the same added tokens below `vocab`. Further added tokens of this tokenizer do no harm.
	 */
	acceptsData(fingerprint: string, vocab: number): boolean {
		if (vocab > this.vocabSize) return false;
		if (fingerprint === this.dataFingerprint(vocab)) return true;
		// Older token files hold one digest of everything.
		return fingerprint === sha256([this.entries(), this.base.merges, this.addedBelow(vocab)]);
	}

	/** The vocabulary in the order of its ids. */
	private entries(): [string, number][] {
		return [...this.base.vocab].sort((a, b) => a[1] - b[1]);
	}

	private addedBelow(vocab: number): (readonly [string, number])[] {
		const below = this.added.filter(({ id }) => id < vocab);
		return below.map(({ id, content }) => [content, id] as const).sort((a, b) => a[1] - b[1]);
	}

	/** Writes a `tokenizer.json` that Hugging Face's libraries read as well. The file appears whole or not at all. @throws `ERR_DN_CHECKPOINT` */
	async save(path: string): Promise<void> {
		await writeFileAtomic(path, this.toJSON());
	}

	/** The text of the `tokenizer.json`. */
	toJSON(): string {
		if (typeof this.json !== 'string') this.json = this.json();
		return this.json;
	}

	/**
	 * Ids of a text. No token is added at either end. Lone surrogates become U+FFFD, everything else decodes back to exactly
	 * this text (unless the tokenizer's own normaliser changes it; GPT-2's has none).
	 * @throws `ERR_DN_ARGUMENT` when it is no string
	 */
	encode(text: string, options: EncodeOptions = {}): Int32Array {
		check(typeof text === 'string', `encode: text is ${typeof text}, expected a string`);
		const matcher = options.special ? this.all : this.ordinary;
		const out: number[] = [];
		for (const part of matcher.split(text.replace(/\p{Surrogate}/gu, '\ufffd'), false)) {
			if (typeof part === 'number') {
				out.push(part);
				continue;
			}
			const normal = this.base.normalizer?.normalizeString(part) ?? part;
			for (const piece of matcher.split(normal, true)) {
				if (typeof piece === 'number') out.push(piece);
				else this.encodePlain(piece, out);
			}
		}
		return Int32Array.from(out);
	}

	private encodePlain(text: string, out: number[]): void {
		const { preTokenizer } = this.base;
		const bpe = this.base.bpe();
		if (preTokenizer) {
			for (const [word] of preTokenizer.preTokenizeString(text)) bpe.encodeByteChars(word, out);
			return;
		}
		for (const match of text.matchAll(gpt2Words)) bpe.encodeText(match[0], out);
	}

	/**
	 * Text of ids. Bytes that are not valid UTF-8, an unfinished character at the end for instance, become U+FFFD.
	 * @throws `ERR_DN_ARGUMENT` for an id that is not in the vocabulary, unless `unknown` is 'replace'.
	 */
	decode(ids: ArrayLike<number>, options: DecodeOptions = {}): string {
		return new TextDecoder('utf-8', { ignoreBOM: true }).decode(this.decodeBytes(ids, options));
	}

	/** The bytes that ids stand for; lossless, but for unknown ids that are replaced. @throws `ERR_DN_ARGUMENT` for an id that is not in the vocabulary, unless `unknown` is 'replace'. */
	decodeBytes(ids: ArrayLike<number>, options: DecodeOptions = {}): Uint8Array {
		check(
			typeof ids === 'object' && ids !== null && typeof ids.length === 'number',
			'decode: ids is not an array of token ids',
		);
		const parts: Uint8Array[] = [];
		let length = 0;
		for (let i = 0; i < ids.length; i++) {
			const id = ids[i] as number;
			const bytes = this.bytesOf(id) ?? (options.unknown === 'replace' ? replacement : undefined);
			if (!bytes) {
				throw new DiffusionNativeError(
					'ERR_DN_ARGUMENT',
					`decode: id ${id} at index ${i} is not in the vocabulary of ${this.vocabSize} tokens`,
				);
			}
			if (options.special === false && this.specialIds.has(id)) continue;
			parts.push(bytes);
			length += bytes.length;
		}
		const out = new Uint8Array(length);
		let at = 0;
		for (const part of parts) {
			out.set(part, at);
			at += part.length;
		}
		return out;
	}

	private bytesOf(id: number): Uint8Array | undefined {
		const known = this.bytes.get(id);
		if (known) return known;
		const token = this.base.tokens[id];
		if (token === undefined) return undefined;
		const bytes = fromByteChars(token) ?? new TextEncoder().encode(token);
		this.bytes.set(id, bytes);
		return bytes;
	}

	/** A decoder for ids that arrive piece by piece. */
	decodeStream(options: DecodeOptions = {}): TokenDecoder {
		let decoder = new TextDecoder('utf-8', { ignoreBOM: true });
		return {
			push: (ids) => decoder.decode(this.decodeBytes(ids, options), { stream: true }),
			end: () => {
				const rest = decoder.decode();
				decoder = new TextDecoder('utf-8', { ignoreBOM: true });
				return rest;
			},
		};
	}

	/** Id of the token that spells exactly `text` (`'<|endoftext|>'`, `' the'`); undefined when there is none. */
	idOf(text: string): number | undefined {
		return this.added.find((token) => token.content === text)?.id ?? this.base.vocab.get(toByteChars(text));
	}

	/** Ids of the tokens that plain text never turns into. */
	get special(): readonly number[] {
		return [...this.specialIds];
	}
}

let packaged: Tokenizer | undefined;

function textOf(path: string): string {
	const text = readText(path);
	if (text === undefined) throw new DiffusionNativeError('ERR_DN_CHECKPOINT', `${path}: no such file`);
	return text;
}

function gpt2Json(vocab: Record<string, number>, mergesText: string, ids: Record<string, number>): string {
	const merges = mergesText.split(/\r?\n/).filter((line) => line !== '' && !line.startsWith('#version'));
	const added = Object.entries(ids).map(([content, id]) => ({ id, content }));
	return byteLevelJson({ vocab, merges, added });
}

function sha256(value: unknown): string {
	return createHash('sha256').update(JSON.stringify(value)).digest('hex');
}
