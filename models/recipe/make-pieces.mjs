// Writes the training pairs of the last stages: those of make-data.mjs, with the made-up words replaced by ones around every
// piece of the vocabulary. A piece that is a held-out headword by itself stands in hardly any training word, and its letters
// can be learnt from nothing else. No made-up word is a headword of any split.
//
// node make-pieces.mjs --data DIR --tokenizer FILE --out FILE [--each 24] [--seed 1]
import { createHash } from 'node:crypto';
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { parseArgs } from 'node:util';

import { Tokenizer } from 'diffusion-native';

const { values: options } = parseArgs({
	options: {
		data: { type: 'string' },
		tokenizer: { type: 'string' },
		out: { type: 'string' },
		each: { type: 'string', default: '24' },
		seed: { type: 'string', default: '1' },
	},
});
if (!options.data || !options.tokenizer || !options.out) {
	console.error('usage: node make-pieces.mjs --data DIR --tokenizer FILE --out FILE [--each 24] [--seed 1]');
	process.exit(2);
}
const read = (split) =>
	readFileSync(join(options.data, `${split}.jsonl`), 'utf8')
		.trim()
		.split('\n')
		.map((line) => JSON.parse(line));
const wordOf = ({ prompt }) => prompt.slice('spell '.length, -1);
const isWord = ({ kind, madeUp }) => kind === 'spelling' && !madeUp;

const train = read('train').filter(({ madeUp }) => !madeUp);
const known = train.filter(isWord).map(wordOf);
const refused = new Set([
	...known,
	...['validation', 'test'].flatMap((split) => read(split).filter(isWord).map(wordOf)),
]);
const tokenizer = Tokenizer.fromFile(options.tokenizer);

/** An integer in [0, below) that depends only on the text. */
function draw(text, below) {
	const hash = createHash('sha256').update(`${options.seed}:${text}`).digest().readUInt32BE(0);
	return Math.floor((hash / 2 ** 32) * below);
}

const made = new Set();
for (const [piece, id] of Object.entries(JSON.parse(readFileSync(options.tokenizer, 'utf8')).model.vocab)) {
	const [, space, letters] = /^(Ġ?)([a-z]{2,15})$/.exec(piece) ?? [];
	if (letters === undefined) continue;
	for (let i = 0, kept = 0; kept < Number(options.each) && i < 4 * Number(options.each); i++) {
		const key = `${piece}:${i}`;
		const head = known[draw(`head:${key}`, known.length)];
		const tail = known[draw(`tail:${key}`, known.length)];
		const before = space ? '' : head.slice(0, 1 + draw(`cut:${key}`, head.length));
		// A third ends with the piece, where it does not stand alone.
		const after = !space && draw(`end:${key}`, 3) === 0 ? '' : tail.slice(draw(`join:${key}`, tail.length));
		const word = `${before}${letters}${after}`;
		if (word.length > 16 || refused.has(word) || made.has(word)) continue;
		if (!tokenizer.encode(` ${word}`).includes(id)) continue;
		made.add(word);
		kept++;
	}
}
const pairs = [
	...train,
	...[...made].map((word) => ({ kind: 'spelling', prompt: `spell ${word}:`, answer: [...word].join('-') })),
];
const order = pairs.map((pair, i) => [createHash('sha256').update(`order:${options.seed}:${i}`).digest('hex'), pair]);
order.sort(([a], [b]) => (a < b ? -1 : 1));
writeFileSync(options.out, order.map(([, pair]) => `${JSON.stringify(pair)}\n`).join(''));
console.log(`${options.out}: ${pairs.length} pairs, ${made.size} of them made-up words`);
