/**
 * Trains a byte-level BPE tokenizer on a corpus. The trainer of the `tokenizers` package has fixed settings (30,000
 * entries); merges are learnt greedily, each from the corpus as the earlier ones left it, so its first k merges are the
 * tokenizer of k merges. The vocabulary always holds all 256 bytes, so any text can be encoded.
 */
import { randomBytes } from 'node:crypto';
import { closeSync, mkdtempSync, openSync, rmSync, writeSync } from 'node:fs';
import { createRequire } from 'node:module';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import { check } from '../errors.js';
import { Tokenizer } from '../tokenizer.js';
import type { DataRecord, PrepareInput } from './prepare.js';
import { fileKind, listFiles, type ReadOptions, readCsv, readJsonLines, readText } from './readers.js';

const require = createRequire(import.meta.url);

export interface TrainTokenizerOptions {
	/** Entries of the vocabulary, bytes and special tokens included: 256 + specials to 30,000. */
	readonly vocabSize: number;
	/** Special tokens, last in the vocabulary. @default ['<|endoftext|>', '<|mask|>'] */
	readonly specials?: readonly string[];
	/** Path of the tokenizer.json to write. @default not written */
	readonly out?: string;
	/** Columns of JSONL and CSV files to learn from. @default every column that holds text */
	readonly columns?: readonly string[];
	/** Longest line held in memory, characters. @default 16,777,216 */
	readonly maxLine?: number;
	readonly signal?: AbortSignal;
}

/**
 * Learns a tokenizer. The corpus is read as a stream into a temporary text file, which the trainer counts words of.
 * @throws `ERR_DN_ARGUMENT` when the corpus is empty or too small for that many merges.
 */
export async function trainTokenizer(input: PrepareInput, options: TrainTokenizerOptions): Promise<Tokenizer> {
	const { vocabSize } = options;
	const specials = options.specials ?? ['<|endoftext|>', '<|mask|>'];
	const least = 256 + specials.length;
	check(
		Number.isInteger(vocabSize) && vocabSize >= least && vocabSize <= 30_000,
		`vocabSize is ${String(vocabSize)}, expected ${least} (256 bytes and ${specials.length} special tokens) to 30000`,
	);
	const folder = mkdtempSync(join(tmpdir(), `diffusion-native-${randomBytes(4).toString('hex')}-`));
	try {
		const corpus = join(folder, 'corpus.txt');
		const characters = await writeCorpus(corpus, input, options);
		check(characters > 0, 'the corpus is empty: a tokenizer cannot be trained on it');
		const merges = learn(corpus, folder);
		const tokenizer = Tokenizer.fromString(assemble(merges, vocabSize, specials));
		if (options.out !== undefined) await tokenizer.save(options.out);
		return tokenizer;
	} finally {
		rmSync(folder, { recursive: true, force: true });
	}
}

type Merge = readonly [string, string];

/** All merges that the package's trainer learns, in their order. */
function learn(corpus: string, folder: string): Merge[] {
	const { BPE, Tokenizer: Package, byteLevelPreTokenizer } = require('tokenizers') as typeof import('tokenizers');
	const trained = new Package(BPE.empty());
	trained.setPreTokenizer(byteLevelPreTokenizer(false, true));
	trained.train([corpus]);
	const path = join(folder, 'trained.json');
	trained.save(path);
	return (require(path) as { model: { merges: Merge[] } }).model.merges;
}

/** A tokenizer.json: the 256 bytes in GPT-2's spelling, the first merges that fill the vocabulary, the special tokens. */
function assemble(learnt: readonly Merge[], vocabSize: number, specials: readonly string[]): string {
	// No prototype: a token may be spelt 'constructor'.
	const vocab: Record<string, number> = Object.create(null) as Record<string, number>;
	let next = 0;
	for (const byte of byteAlphabet()) vocab[byte] = next++;
	const merges: Merge[] = [];
	for (const merge of learnt) {
		if (next === vocabSize - specials.length) break;
		merges.push(merge);
		// Two merges can spell the same token; it has one id.
		vocab[merge[0] + merge[1]] ??= next++;
	}
	check(
		next === vocabSize - specials.length,
		`the corpus is too small for a vocabulary of ${vocabSize}: it gives at most ${next + specials.length}`,
	);
	const flags = { single_word: false, lstrip: false, rstrip: false, normalized: false, special: true };
	const added = specials.map((content) => ({ id: next++, content, ...flags }));
	for (const { content, id } of added) {
		check(!(content in vocab), `the special token ${JSON.stringify(content)} is also an ordinary one`);
		vocab[content] = id;
	}
	const byteLevel = { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: true };
	return JSON.stringify({
		version: '1.0',
		truncation: null,
		padding: null,
		added_tokens: added,
		normalizer: null,
		pre_tokenizer: byteLevel,
		post_processor: null,
		decoder: byteLevel,
		model: {
			type: 'BPE',
			dropout: null,
			unk_token: null,
			continuing_subword_prefix: null,
			end_of_word_suffix: null,
			fuse_unk: false,
			byte_fallback: false,
			ignore_merges: false,
			vocab,
			merges,
		},
	});
}

/** GPT-2's printable stand-ins of the bytes, in the order of its vocabulary: printable bytes first, then the others. */
function byteAlphabet(): string[] {
	const printable = (byte: number): boolean =>
		(byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || (byte >= 0xae && byte <= 0xff);
	const shown: string[] = [];
	const others: string[] = [];
	for (let byte = 0; byte < 256; byte++) {
		if (printable(byte)) shown.push(String.fromCharCode(byte));
		else others.push(String.fromCharCode(256 + others.length));
	}
	return [...shown, ...others];
}

async function writeCorpus(path: string, input: PrepareInput, options: TrainTokenizerOptions): Promise<number> {
	const fd = openSync(path, 'w');
	let characters = 0;
	try {
		for await (const text of texts(input, options)) {
			options.signal?.throwIfAborted();
			characters += text.trim().length;
			writeSync(fd, text);
		}
	} finally {
		closeSync(fd);
	}
	return characters;
}

async function* texts(input: PrepareInput, options: TrainTokenizerOptions): AsyncGenerator<string, void> {
	const read: ReadOptions = { maxLine: options.maxLine ?? 1 << 24, onBytes: () => {} };
	const paths =
		typeof input === 'string'
			? [input]
			: Array.isArray(input) && input.every((entry) => typeof entry === 'string')
				? (input as readonly string[])
				: undefined;
	if (!paths) {
		for await (const record of input as Iterable<DataRecord>) yield `${recordText(record)}\n`;
		return;
	}
	for (const { path } of await listFiles(paths)) {
		const kind = fileKind(path);
		if (kind === 'text') {
			for await (const text of readText(path, read)) yield text;
			continue;
		}
		for await (const { fields, where } of kind === 'csv' ? readCsv(path, read) : readJsonLines(path, read)) {
			const names = options.columns ?? Object.keys(fields).filter((name) => typeof fields[name] === 'string');
			const parts = names.map((name) => {
				check(
					typeof fields[name] === 'string',
					`${where}: no text in the column '${name}'; found ${Object.keys(fields).join(', ')}`,
				);
				return fields[name] as string;
			});
			yield `${parts.join(' ')}\n`;
		}
	}
}

function recordText(record: DataRecord): string {
	if (typeof record === 'string') return record;
	check(!(record instanceof Int32Array) && !('tokens' in record), 'a tokenizer is trained on text, not on token ids');
	return 'text' in record ? record.text : `${record.prompt} ${record.answer}`;
}
