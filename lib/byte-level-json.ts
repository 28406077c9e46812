/**
 * The `tokenizer.json` of a byte-level BPE with GPT-2's words, in the form that Hugging Face's libraries read. Needs nothing
 * but its arguments: scripts/make-gpt2-tokenizer.mjs uses it too.
 */

/** What tells one such tokenizer from another. */
export interface ByteLevelParts {
	/** Token in byte-level spelling -> id. */
	readonly vocab: Readonly<Record<string, number>>;
	/** In their order: 'left right', or the two parts. */
	readonly merges: readonly (string | readonly [string, string])[];
	/** Special tokens, never made from plain text. */
	readonly added: readonly { readonly id: number; readonly content: string }[];
}

export function byteLevelJson({ vocab, merges, added }: ByteLevelParts): string {
	const flags = { single_word: false, lstrip: false, rstrip: false, normalized: false, special: true };
	const byteLevel = { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: true };
	return JSON.stringify({
		version: '1.0',
		truncation: null,
		padding: null,
		added_tokens: added.map(({ id, content }) => ({ id, content, ...flags })).sort((a, b) => a.id - b.id),
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
