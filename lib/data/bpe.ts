/**
 * Trains a byte-level BPE tokenizer on a corpus. The trainer of the `tokenizers` package has fixed settings (30,000
 * entries); merges are learnt greedily, each from the corpus as the earlier ones left it, so its first k merges are the
 * tokenizer of k merges. The vocabulary always holds all 256 bytes, so any text can be encoded.
 */
import { execFile } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { closeSync, mkdtempSync, openSync, rmSync, writeSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';

import { byteToChar } from '../byte-bpe.js';
import { byteLevelJson } from '../byte-level-json.js';
import { check, DiffusionNativeError } from '../errors.js';
import { fileError, readJsonObject, reasonOf } from '../files.js';
import { checkOptions } from '../option-checks.js';
import { Tokenizer } from '../tokenizer.js';
import { Turns } from '../turns.js';
import type { DataRecord, PrepareInput } from './prepare-options.js';
import { checkOutputs, fileKind, listFiles, type ReadOptions, readCsv, readJsonLines, readText } from './readers.js';
import { checkInput, isPaths } from './records.js';

/** Options of {@link trainTokenizer}. */
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
	/** Aborting rejects with `signal.reason`, also during the learning. @default none */
	readonly signal?: AbortSignal;
}

const optionNames = [
	'vocabSize',
	'specials',
	'out',
	'columns',
	'maxLine',
	'signal',
] as const satisfies readonly (keyof TrainTokenizerOptions)[];

/**
 * Learns a tokenizer. The corpus is read as a stream into a temporary text file, which the trainer counts words of.
 * @throws `ERR_DN_ARGUMENT` naming the option, or the file and place of a malformed input, when `out` is an input, or when the corpus is
 * empty or too small for that many merges; `ERR_DN_CHECKPOINT` when an input cannot be read or `out` not be written; `ERR_DN_INTERNAL` when
 * the process that learns fails; `signal.reason`
 */
export async function trainTokenizer(input: PrepareInput, options: TrainTokenizerOptions): Promise<Tokenizer> {
	check(options !== undefined, 'trainTokenizer needs the option vocabSize, the entries of the vocabulary');
	checkOptions('trainTokenizer', options, optionNames);
	checkInput(input);
	const { vocabSize, specials = ['<|endoftext|>', '<|mask|>'], out, columns, maxLine = 1 } = options;
	const names = (value: unknown): boolean =>
		Array.isArray(value) && value.every((name) => typeof name === 'string' && name !== '');
	check(names(specials), `specials is ${JSON.stringify(specials)}, expected a list of texts`);
	check(columns === undefined || names(columns), `columns is ${JSON.stringify(columns)}, expected a list of names`);
	check(
		out === undefined || (typeof out === 'string' && out !== ''),
		`out is ${JSON.stringify(out)}, expected the path of the tokenizer.json to write`,
	);
	check(
		Number.isSafeInteger(maxLine) && maxLine > 0,
		`maxLine is ${String(maxLine)}, expected a positive whole number of characters`,
	);
	const least = 256 + specials.length;
	check(
		Number.isInteger(vocabSize) && vocabSize >= least && vocabSize <= 30_000,
		`vocabSize is ${String(vocabSize)}, expected ${least} (256 bytes and ${specials.length} special tokens) to 30000`,
	);
	const paths = pathsOf(input);
	if (out !== undefined && paths) checkOutputs([['out', out]], await listFiles(paths));
	const folder = mkdtempSync(join(tmpdir(), `diffusion-native-${randomBytes(4).toString('hex')}-`));
	try {
		const corpus = join(folder, 'corpus.txt');
		const characters = await writeCorpus(corpus, input, options);
		check(characters > 0, 'the corpus is empty: a tokenizer cannot be trained on it');
		const merges = await learn(corpus, folder, options.signal);
		const tokenizer = Tokenizer.fromString(assemble(merges, vocabSize, specials));
		if (out !== undefined) await tokenizer.save(out);
		return tokenizer;
	} finally {
		rmSync(folder, { recursive: true, force: true });
	}
}

type Merge = readonly [string, string];

/** All merges that the package's trainer learns, in their order. See bpe-learn.ts for why in a process of its own. */
async function learn(corpus: string, folder: string, signal: AbortSignal | undefined): Promise<Merge[]> {
	const path = join(folder, 'trained.json');
	const program = fileURLToPath(new URL('./bpe-learn.js', import.meta.url));
	const learning = promisify(execFile)(process.execPath, [program, corpus, path], {
		// As Node also inside Electron; without the flags of this process, a debugger's port for instance.
		env: { ...process.env, ELECTRON_RUN_AS_NODE: '1', NODE_OPTIONS: '' },
		maxBuffer: 1 << 26,
		windowsHide: true,
		...(signal ? { signal } : {}),
	});
	try {
		await learning;
	} catch (cause) {
		// An abort rejects at once, while the process may still be writing into the folder that is about to be removed.
		const { child } = learning;
		if (child.pid !== undefined && child.exitCode === null && child.signalCode === null)
			await new Promise((resolve) => child.once('exit', resolve));
		signal?.throwIfAborted();
		const { stderr = '' } = cause as { stderr?: string };
		const reason = stderr.trim().split('\n').slice(-5).join(' ') || reasonOf(cause);
		throw new DiffusionNativeError('ERR_DN_INTERNAL', `learning a tokenizer failed: ${reason}`, { cause });
	}
	const trained = readJsonObject(path) as { model: { merges: Merge[] } } | undefined;
	return (trained as { model: { merges: Merge[] } }).model.merges;
}

/** A tokenizer.json: the 256 bytes in GPT-2's spelling, the first merges that fill the vocabulary, the special tokens. */
function assemble(learnt: readonly Merge[], vocabSize: number, specials: readonly string[]): string {
	// No prototype: a token may be spelt 'constructor'.
	const vocab: Record<string, number> = Object.create(null) as Record<string, number>;
	let next = 0;
	// Printable bytes come first, then the others: GPT-2's order, and that of the characters that stand for them.
	for (const char of [...byteToChar].sort()) vocab[char] = next++;
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
	const added = specials.map((content) => ({ id: next++, content }));
	for (const { content, id } of added) {
		check(!(content in vocab), `the special token ${JSON.stringify(content)} is also an ordinary one`);
		vocab[content] = id;
	}
	return byteLevelJson({ vocab, merges, added });
}

async function writeCorpus(path: string, input: PrepareInput, options: TrainTokenizerOptions): Promise<number> {
	const fd = openSync(path, 'w');
	let characters = 0;
	try {
		const turns = new Turns();
		for await (const text of texts(input, options)) {
			await turns.next();
			options.signal?.throwIfAborted();
			characters += text.trim().length;
			try {
				writeSync(fd, text);
			} catch (error) {
				throw fileError('write', path, error);
			}
		}
	} finally {
		closeSync(fd);
	}
	return characters;
}

function pathsOf(input: PrepareInput): readonly string[] | undefined {
	return typeof input === 'string' ? [input] : isPaths(input) ? input : undefined;
}

async function* texts(input: PrepareInput, options: TrainTokenizerOptions): AsyncGenerator<string, void> {
	const read: ReadOptions = { maxLine: options.maxLine ?? 1 << 24, onBytes: () => {} };
	const paths = pathsOf(input);
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
