import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';
import test from 'ava';
import { DiffusionNativeError, Tokenizer } from 'diffusion-native';
import { Tokenizer as PackageTokenizer } from 'tokenizers';

import { ByteBpe, byteToChar } from '../lib/byte-bpe.js';
import { uniform } from '../lib/random.js';
import { fixture, root } from './helpers/fixtures.js';

const scratch = mkdtempSync(join(tmpdir(), 'dn-tokenizer-'));
test.after.always(() => rmSync(scratch, { recursive: true, force: true }));

const gpt2 = Tokenizer.gpt2();
const gpt2File = join(root, 'assets', 'gpt2', 'tokenizer.json');
const gpt2Json = JSON.parse(readFileSync(gpt2File, 'utf8'));

/** GPT-2's file with changes at the top level. */
const changed = (changes: object): Tokenizer => Tokenizer.fromString(JSON.stringify({ ...gpt2Json, ...changes }));

/** Text of `length` code points from many scripts, with white space and contractions, a function of `seed`. */
function randomText(seed: number, length: number): string {
	const ranges = [
		[0, 128],
		[0x80, 0xa1],
		[0xa0, 0x370],
		[0x600, 0x700],
		[0x2000, 0x2070],
		[0x3000, 0xa000],
		[0xfe00, 0xff00],
		[0x1f300, 0x1f700],
	];
	let text = '';
	for (let i = 0; i < length; i++) {
		const [choice, offset] = [uniform(BigInt(seed), 90, 0, i), uniform(BigInt(seed), 91, 0, i)];
		const [from, to] = ranges[Math.floor(offset * 1e6) % ranges.length] as [number, number];
		text += choice < 0.2 ? ' ' : choice < 0.3 ? "'re" : String.fromCodePoint(from + Math.floor(offset * (to - from)));
	}
	return text;
}

test('GPT-2 encodings equal those of an independent implementation', (t) => {
	t.deepEqual([...gpt2.encode('Hello, world')], [15496, 11, 995]);
	t.is(gpt2.vocabSize, 50257);
	const cases = JSON.parse(readFileSync(fixture('tokenizer', 'gpt2-encodings.json'), 'utf8')) as {
		text: string;
		ids: number[];
	}[];
	t.true(cases.length > 20);
	for (const { text, ids } of cases) {
		t.deepEqual([...gpt2.encode(text)], ids, text);
		t.is(gpt2.decode(ids), text);
	}
});

test('encodings equal those of the tokenizers package on text of every script', async (t) => {
	const reference = PackageTokenizer.fromFile(gpt2File);
	for (let seed = 0; seed < 120; seed++) {
		const text = randomText(seed, seed % 40 === 0 ? 2000 : 30);
		const ids = gpt2.encode(text);
		t.deepEqual([...ids], (await reference.encode(text)).getIds(), JSON.stringify(text));
		t.is(gpt2.decode(ids), text);
	}
});

test('other pre-tokenizers and normalisers run as the tokenizers package runs them', async (t) => {
	const byteLevel = { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: true };
	const digits = { type: 'Sequence', pretokenizers: [{ type: 'Digits', individual_digits: true }, byteLevel] };
	for (const changes of [
		{ pre_tokenizer: digits },
		{ pre_tokenizer: { ...byteLevel, add_prefix_space: true } },
		{ pre_tokenizer: { ...byteLevel, use_regex: false } },
		{ normalizer: { type: 'NFC' } },
		{ model: { ...gpt2Json.model, ignore_merges: true } },
		{ model: { ...gpt2Json.model, merges: gpt2Json.model.merges.map((merge: string) => merge.split(' ')) } },
	]) {
		const ours = changed(changes);
		const reference = PackageTokenizer.fromString(JSON.stringify({ ...gpt2Json, ...changes }));
		for (let seed = 0; seed < 8; seed++) {
			const text = `in 1984 e\u0301 ${randomText(seed, 60)}`;
			t.deepEqual([...ours.encode(text)], (await reference.encode(text)).getIds(), JSON.stringify(text));
		}
	}
});

test('special tokens are plain text unless asked for', (t) => {
	const ids = gpt2.encode('a<|endoftext|>b');
	t.false(ids.includes(50256));
	t.is(gpt2.decode(ids), 'a<|endoftext|>b');
	t.deepEqual([...gpt2.encode('a<|endoftext|>b', { special: true })], [64, 50256, 65]);
	t.is(gpt2.decode([64, 50256, 65]), 'a<|endoftext|>b');
	t.is(gpt2.decode([64, 50256, 65], { special: false }), 'ab');
	t.is(gpt2.idOf('<|endoftext|>'), 50256);
	t.is(gpt2.idOf(' the'), 262);
	t.is(gpt2.idOf('no such token'), undefined);
	t.deepEqual(gpt2.special, [50256]);
});

test('added tokens are found by the rules of their flags', async (t) => {
	const token = (id: number, content: string, flags: object = {}): object => ({
		id,
		content,
		single_word: false,
		lstrip: false,
		rstrip: false,
		normalized: false,
		special: true,
		...flags,
	});
	const added_tokens = [
		...gpt2Json.added_tokens,
		token(50257, '[M]', { lstrip: true }),
		token(50258, '[M][M]', { rstrip: true }),
		token(50259, 'qzword', { single_word: true }),
		token(60000, 'dog'),
		token(50260, 'plainish', { special: false }),
		token(50261, 'qé', { normalized: true }),
	];
	const ours = changed({ added_tokens, normalizer: { type: 'NFC' } });
	const reference = PackageTokenizer.fromString(
		JSON.stringify({ ...gpt2Json, added_tokens, normalizer: { type: 'NFC' } }),
	);
	for (const text of [
		'a [M] b',
		'x[M][M]  y',
		'qzword aqzword qzword. qzword_ (qzword)',
		'dog',
		'explain plainish plain',
		'cafe\u0301 qe\u0301 qé',
		'[M][M][M] \n',
		'  [M]',
	]) {
		t.deepEqual([...ours.encode(text, { special: true })], (await reference.encode(text)).getIds(), text);
	}
	t.false(ours.encode('a [M] qzword').some((id) => id > 50256));
	t.true(ours.encode('plainish').includes(50260), 'an added token that is not special is ordinary vocabulary');
	t.deepEqual([...ours.encode('dog', { special: true })], [ours.idOf('dog')], 'a token of the vocabulary keeps its id');
	t.is(ours.vocabSize, 50262);
	const fitted = ours.forModel(50261, [50260]);
	t.is(fitted.vocabSize, 50261);
	t.false(fitted.encode('plainish').includes(50260), 'a reserved token is not');
	t.is(fitted.idOf('plainish'), 50260);
});

test('a tokenizer fitted to a model shares what was read: nothing is read a second time', (t) => {
	const plain = { special: false, single_word: false, lstrip: false, rstrip: false, normalized: false };
	const added = [
		...gpt2Json.added_tokens,
		{ ...plain, id: 50257, content: '[M]' },
		{ ...plain, id: 50258, content: '[P]' },
	];
	const whole = changed({ added_tokens: added });
	whole.encode('the words of one are known to the other');
	const fitted = whole.forModel(50258, [50257]);
	const baseOf = (tokenizer: Tokenizer): unknown => (tokenizer as unknown as { base: object }).base;
	t.truthy(baseOf(fitted));
	t.is(baseOf(fitted), baseOf(whole));
	t.is(whole.forModel(50259), whole, 'nothing to change');
	const again = Tokenizer.fromString(fitted.toJSON());
	for (const tokenizer of [fitted, again]) {
		t.is(tokenizer.vocabSize, 50258);
		t.deepEqual(tokenizer.special, [50256, 50257]);
		t.is(tokenizer.encode('a [M] b').indexOf(50257), -1);
		t.deepEqual([...tokenizer.encode('a[M][P]', { special: true })].slice(0, 2), [64, 50257]);
		t.is(tokenizer.idOf('[P]'), undefined);
		t.throws(() => tokenizer.decode([50258]), { message: /50258 .* not in the vocabulary of 50258/ });
		t.is(tokenizer.decode([50257]), '[M]');
		t.is(tokenizer.fingerprint, gpt2.fingerprint);
		t.is(tokenizer.dataFingerprint(), fitted.dataFingerprint());
	}
	t.deepEqual(JSON.parse(fitted.toJSON()).model, gpt2Json.model);
	t.true(whole.encode('a [M] b').includes(50257), 'the tokenizer that it came from stays as it was');
	t.is(whole.decode([50258]), '[P]');
});

test('decoding is lossless and never splits a character of a stream', (t) => {
	const text = '\ufeffBOM, naïve 😀👩‍👩‍👧 日本語 \u0000 end';
	const ids = gpt2.encode(text);
	t.is(gpt2.decode(ids), text);
	t.is(Buffer.from(gpt2.decodeBytes(ids)).toString('utf8'), text);
	const stream = gpt2.decodeStream();
	const parts = [...ids].map((id) => stream.push([id]));
	t.true(parts.includes(''), 'some tokens end inside a character');
	t.false(parts.join('').includes('\ufffd'));
	t.is(parts.join('') + stream.end(), text);
	const [first] = gpt2.encode('😀');
	t.is(stream.push([first as number]) + stream.end(), '\ufffd');
	t.is(stream.push(ids) + stream.end(), text, 'after end it is as new');
	t.is(gpt2.decode([]), '');
});

test('every single token decodes to bytes that its text encodes back to', (t) => {
	const bytes = new Set<number>();
	for (let id = 0; id < 256; id++) for (const byte of gpt2.decodeBytes([id])) bytes.add(byte);
	t.is(bytes.size, 256, 'the first 256 tokens are the bytes');
	for (let id = 0; id < gpt2.vocabSize; id += 7) {
		const text = gpt2.decode([id]);
		if (!text.includes('\ufffd')) t.is(gpt2.decode(gpt2.encode(text)), text);
	}
});

test('lone surrogates become U+FFFD', (t) => {
	t.is(gpt2.decode(gpt2.encode('a\ud800b\udc00')), 'a\ufffdb\ufffd');
	t.deepEqual(gpt2.encode('\ud83d'), gpt2.encode('\ufffd'));
});

test('a long word without spaces takes time in proportion to its length', async (t) => {
	const reference = PackageTokenizer.fromFile(gpt2File);
	for (const unit of ['abcdefghij', 'xyzzy😀', '漢字', ' ', '!']) {
		const short = unit.repeat(3000);
		t.deepEqual([...gpt2.encode(short)], (await reference.encode(short)).getIds(), unit);
	}
	const long = 'internationalisation'.repeat(50_000);
	const started = performance.now();
	const ids = gpt2.encode(long);
	t.is(gpt2.decode(ids), long);
	t.true(performance.now() - started < 60_000, 'a quadratic encoder takes hours');
});

test('remembered words do not keep their texts alive', (t) => {
	setFlagsFromString('--expose-gc');
	const collectGarbage = runInNewContext('gc') as () => void;
	const used = (): number => {
		collectGarbage();
		return process.memoryUsage().heapUsed;
	};
	const bytes = new ByteBpe(new Map(byteToChar.map((char, id) => [char, id])), [], false, 'bytes');
	const before = used();
	for (let i = 0; i < 64; i++) {
		const text = Buffer.alloc(2 ** 19, `a word of document ${i} `).toString('latin1');
		bytes.encodeText(text.slice(0, 24), []);
	}
	const grown = used() - before;
	t.true(grown < 2 ** 22, `${grown} bytes more after 32 MB of text`);
});

test('ids outside the vocabulary and texts that are no strings are refused', (t) => {
	for (const id of [50257, -1, 1.5, Number.NaN]) {
		t.is(gpt2.decode([5, id], { unknown: 'replace' }), '&\ufffd');
		const error = t.throws(() => gpt2.decode([5, id]), { instanceOf: DiffusionNativeError });
		t.is(error?.code, 'ERR_DN_ARGUMENT');
		t.regex(error?.message ?? '', /index 1 is not in the vocabulary of 50257/);
	}
	t.is(t.throws(() => gpt2.encode(5 as never), { instanceOf: DiffusionNativeError })?.code, 'ERR_DN_ARGUMENT');
});

test('saving and both file forms give the same tokenizer and fingerprint', async (t) => {
	const directory = join(scratch, 'pair');
	mkdirSync(directory);
	writeFileSync(join(directory, 'vocab.json'), JSON.stringify(gpt2Json.model.vocab));
	writeFileSync(join(directory, 'merges.txt'), `#version: 0.2\r\n${gpt2Json.model.merges.join('\r\n')}\r\n`);
	const pair = Tokenizer.fromDirectory(directory);
	t.is(pair.fingerprint, gpt2.fingerprint);
	t.deepEqual([...pair.encode('a<|endoftext|>', { special: true })], [64, 50256]);
	const path = join(scratch, 'tokenizer.json');
	await pair.save(path);
	await pair.save(path);
	const saved = Tokenizer.fromDirectory(scratch);
	t.is(saved.fingerprint, gpt2.fingerprint);
	t.deepEqual(saved.encode('Hello, world'), gpt2.encode('Hello, world'));
	t.not(
		changed({ model: { ...gpt2Json.model, merges: gpt2Json.model.merges.slice(0, -1) } }).fingerprint,
		gpt2.fingerprint,
	);
	t.is(changed({ added_tokens: [] }).fingerprint, gpt2.fingerprint, 'added tokens are no part of it');
	const error = await t.throwsAsync(pair.save(join(scratch, 'none', 'x.json')), { instanceOf: DiffusionNativeError });
	t.is(error?.code, 'ERR_DN_CHECKPOINT');
});

test('a vocabulary without some byte refuses the texts that need it', (t) => {
	const vocab = { a: 0, b: 1, ab: 2 };
	const small = changed({ model: { ...gpt2Json.model, vocab, merges: ['a b'] }, added_tokens: [] });
	t.deepEqual([...small.encode('abba')], [2, 1, 0]);
	const error = t.throws(() => small.encode('abc'), { instanceOf: DiffusionNativeError });
	t.is(error?.code, 'ERR_DN_ARGUMENT');
	t.regex(error?.message ?? '', /no token for the byte 0x63 of "abc"/);
});

test('files that are missing, malformed or of another kind are refused', (t) => {
	const refuses = (make: () => unknown, message: RegExp): void => {
		const error = t.throws(make, { instanceOf: DiffusionNativeError });
		t.is(error?.code, 'ERR_DN_CHECKPOINT');
		t.regex(error?.message ?? '', message);
	};
	refuses(() => Tokenizer.fromFile(join(scratch, 'nowhere.json')), /nowhere\.json: no such file/);
	refuses(
		() => Tokenizer.fromDirectory(join(scratch, 'nowhere')),
		/no tokenizer\.json, and no vocab\.json and no merges\.txt/,
	);
	refuses(() => Tokenizer.fromString('{'), /not a tokenizer/);
	refuses(() => Tokenizer.fromString('[]'), /not a tokenizer/);
	refuses(() => changed({ pre_tokenizer: { type: 'Whitespace' } }), /the pre-tokenizer is not byte-level/);
	refuses(() => changed({ model: { type: 'WordLevel', vocab: { a: 0 }, unk_token: 'a' } }), /the model is WordLevel/);
	refuses(() => changed({ model: { ...gpt2Json.model, merges: ['zz@ q9'] } }), /zz@|not a tokenizer/);
});
