/**
 * Reading a `tokenizer.json`: its checks, and what of it does not depend on the added tokens, which tokenizers that differ in
 * those alone share: reading one of GPT-2's size takes near half a second.
 */
import { createRequire } from 'node:module';
import type { Normalizer, Tokenizer as PackageTokenizer, PreTokenizer } from 'tokenizers';
import type { AddedToken } from './added-tokens.js';
import { ByteBpe } from './byte-bpe.js';
import { DiffusionNativeError } from './errors.js';
import { reasonOf } from './files.js';

const require = createRequire(import.meta.url);

/** A `tokenizer.json`. */
export interface TokenizerFile {
	added_tokens?: AddedToken[];
	normalizer?: unknown;
	pre_tokenizer?: PreTokenizerJson | null;
	model: {
		type?: string;
		vocab: Record<string, number>;
		merges: (string | [string, string])[];
		dropout?: number | null;
		continuing_subword_prefix?: string | null;
		end_of_word_suffix?: string | null;
		byte_fallback?: boolean;
		ignore_merges?: boolean;
	};
}

interface PreTokenizerJson {
	type: string;
	add_prefix_space?: boolean;
	use_regex?: boolean;
	pretokenizers?: PreTokenizerJson[];
}

function isByteLevel(json: PreTokenizerJson | null | undefined): boolean {
	return json?.type === 'ByteLevel' || (json?.type === 'Sequence' && (json.pretokenizers ?? []).some(isByteLevel));
}

function isGpt2Words(json: PreTokenizerJson | null | undefined): boolean {
	return json?.type === 'ByteLevel' && json.add_prefix_space === false && json.use_regex !== false;
}

/** A tokenizer but for its added tokens. */
export interface TokenizerBase {
	readonly vocab: ReadonlyMap<string, number>;
	/** Entries of the vocabulary by id. */
	readonly tokens: readonly (string | undefined)[];
	readonly merges: readonly (readonly [string, string])[];
	/** How text is prepared, where that is not GPT-2's way; part of the fingerprint. */
	readonly manner: readonly unknown[];
	readonly normalizer: Normalizer | null;
	/** Null: the words of GPT-2. */
	readonly preTokenizer: PreTokenizer | null;
	/** The merges, made ready when they are first used. */
	readonly bpe: () => ByteBpe;
}

/**
 * @param known A file of ours with GPT-2's words: the `tokenizers` package need not read it, and its merges are looked at when
 * they are first used, which leaves a third of the time.
 * @throws `ERR_DN_CHECKPOINT` naming `source`
 */
export function readTokenizer(
	json: string,
	source: string,
	known: boolean,
): { base: TokenizerBase; added: readonly AddedToken[] } {
	let package_: PackageTokenizer | undefined;
	let file: TokenizerFile;
	try {
		if (!known) package_ = (require('tokenizers') as typeof import('tokenizers')).Tokenizer.fromString(json);
		file = JSON.parse(json) as TokenizerFile;
	} catch (error) {
		throw new DiffusionNativeError('ERR_DN_CHECKPOINT', `${source}: not a tokenizer: ${reasonOf(error)}`, {
			cause: error,
		});
	}
	const reject = (what: string): never => {
		throw new DiffusionNativeError(
			'ERR_DN_CHECKPOINT',
			`${source}: ${what}; only byte-level BPE tokenizers (as GPT-2's) are supported`,
		);
	};
	const { model } = file;
	if (model.type !== undefined && model.type !== 'BPE') reject(`the model is ${model.type}`);
	if (model.continuing_subword_prefix || model.end_of_word_suffix) reject('the model marks the ends of words');
	if (model.byte_fallback) reject('the model falls back to byte tokens');
	if (model.dropout) reject('the model drops merges at random');
	if (!isByteLevel(file.pre_tokenizer)) reject('the pre-tokenizer is not byte-level');

	const vocab = new Map<string, number>();
	for (const token of Object.keys(model.vocab)) vocab.set(token, model.vocab[token] as number);
	const merges = model.merges.map((merge): [string, string] => {
		if (typeof merge !== 'string') return merge;
		const space = merge.indexOf(' ');
		return [merge.slice(0, space), merge.slice(space + 1)];
	});
	let made: ByteBpe | undefined;
	const bpe = (): ByteBpe => {
		made ??= new ByteBpe(vocab, merges, model.ignore_merges === true, source);
		return made;
	};
	if (!known) bpe(); // refuses merges that do not fit
	const tokens: (string | undefined)[] = [];
	for (const [token, id] of vocab) tokens[id] = token;
	const isPlain = !file.normalizer && isGpt2Words(file.pre_tokenizer) && model.ignore_merges !== true;
	const manner = isPlain ? [] : [[file.normalizer ?? null, file.pre_tokenizer ?? null, model.ignore_merges === true]];
	const normalizer = package_?.getNormalizer() ?? null;
	const preTokenizer = isGpt2Words(file.pre_tokenizer) ? null : (package_?.getPreTokenizer() ?? null);
	return { base: { vocab, tokens, merges, manner, normalizer, preTokenizer, bpe }, added: file.added_tokens ?? [] };
}
