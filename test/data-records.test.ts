/** What goes into prepared data: long documents, places to cut, seams, and records of a wrong kind. */
import { mkdirSync, symlinkSync } from 'node:fs';
import { join } from 'node:path';

import test from 'ava';
import { prepare, Tokenizer } from 'diffusion-native';

import { readDocuments } from '../lib/data/readers.js';
import { all, eos, file, gpt2, options, root, story } from './helpers/data.js';

test('a long document in pieces is one document: split, truncated, dropped or refused as a whole', async (t) => {
	const text = story(7000);
	t.true(text.length > 4 * 65536, 'several pieces');
	const path = file('long.txt', text);
	const ids = [...gpt2.encode(text), eos];
	const settings = { format: 'documents', context: 256 } as const;
	const split = await prepare(path, options(settings));
	t.is(split.documents, 1);
	t.is(split.sequences, Math.ceil(ids.length / 255));
	t.deepEqual(
		all(split).flatMap((tokens) => tokens.slice(1)),
		ids,
	);
	const cut = await prepare(path, options({ ...settings, overlong: 'truncate' }));
	t.deepEqual(all(cut), [[eos, ...ids.slice(0, 255)]]);
	t.is(cut.documents, 1);
	const error = options({ ...settings, context: 40_000, overlong: 'error' });
	await t.throwsAsync(prepare(path, error), { message: /a document has \d+ tokens or more, more than the 39999/ });
	const both = [path, file('short.txt', 'A short text.')];
	const dropped: number[] = [];
	const kept = options({ ...settings, overlong: 'drop', onProgress: (progress) => dropped.push(progress.dropped) });
	t.deepEqual(all(await prepare(both, kept)), [[eos, ...gpt2.encode('A short text.'), eos]]);
	t.is(dropped.at(-1), 1);
	await t.throwsAsync(prepare(path, options({ ...settings, overlong: 'drop' })), {
		message: /left with nothing: all 1 records are longer/,
	});
});

test('lines that end in CRLF or in punctuation of any script are places to cut', async (t) => {
	for (const [name, line] of [
		['crlf', 'The quick brown fox jumps over the lazy dog.\r\n'],
		['cjk', '\u5929\u5730\u7384\u9ec4\u5b87\u5b99\u6d2a\u8352\u3002\n'],
		['markup', '<row id="1">value</row>\n'],
		['spaces', 'Words apart , as in some corpora . \n'],
	] as const) {
		const text = line.repeat(Math.ceil(300_000 / line.length));
		const pieces: string[] = [];
		for await (const piece of readDocuments(file(`${name}.txt`, text), 'file', { maxLine: 1000, onBytes: () => {} }))
			pieces.push(piece.text);
		t.true(
			pieces.length >= 3 && pieces.every((piece) => piece.length <= 3 * 65536),
			`${name}: ${pieces.length} pieces`,
		);
		t.is(pieces.join(''), text);
		t.true(
			pieces.slice(0, -1).every((piece) => /\S$/.test(piece)),
			`${name}: white space stays together`,
		);
		t.deepEqual(
			pieces.flatMap((piece) => [...gpt2.encode(piece)]),
			[...gpt2.encode(text)],
			name,
		);
	}
});

test('a second column that may be the prompt is refused where it holds text, and columns choose', async (t) => {
	const rows = (...inputs: unknown[]): string =>
		file(
			'alpaca.jsonl',
			inputs
				.map((input) => `${JSON.stringify({ instruction: 'Translate to French.', input, output: 'bonjour' })}\n`)
				.join(''),
		);
	const pairs = { format: 'pairs', context: 32 } as const;
	await t.throwsAsync(prepare(rows('', 'good morning'), options(pairs)), {
		code: 'ERR_DN_ARGUMENT',
		message: /alpaca\.jsonl, line 2: both 'instruction' and 'input' hold text.*columns: \{ prompt: 'instruction' \}/,
	});
	const csv = file('both.csv', 'prompt,question,answer\na,b,c\n');
	await t.throwsAsync(prepare(csv, options(pairs)), { message: /line 2: both 'prompt' and 'question' hold text/ });
	const texts = async (path: string, more: object = {}): Promise<string[]> =>
		all(await prepare(path, options({ ...pairs, ...more }))).map((ids) => gpt2.decode(ids));
	const translated = 'Translate to French. bonjour<|endoftext|>';
	t.deepEqual(await texts(rows('', ' ', null, undefined)), Array(4).fill(translated));
	t.deepEqual(await texts(rows('good morning'), { columns: { prompt: 'instruction' } }), [translated]);
	t.deepEqual(await texts(rows('good morning'), { columns: { prompt: 'input' } }), [
		'good morning bonjour<|endoftext|>',
	]);
	// Beside a prompt, a source is where the record comes from.
	t.deepEqual(await texts(file('source.jsonl', '{"prompt":"a","answer":"b","source":"c"}\n')), ['a b<|endoftext|>']);
});

test('records and columns of a wrong kind are named', async (t) => {
	const wrong = async (records: unknown, more: object, message: RegExp): Promise<void> => {
		await t.throwsAsync(prepare(records as never, options({ ...more, eosId: eos } as never)), {
			code: 'ERR_DN_ARGUMENT',
			message,
		});
	};
	await wrong([{ tokens: [1.7, 'x', 3] }], { format: 'documents' }, /record 0: tokens is no Int32Array/);
	await wrong([{ text: 'a', split: 3 }], { validation: 0.5 }, /record 0: split is 3, expected text/);
	await wrong([{ text: 'a' }], { separator: 5 }, /separator is 5/);
	await wrong([{ text: 'a' }], { splitText: 5 }, /splitText is 5/);
	await wrong([{ text: 'a' }], { columns: 'text' }, /columns is "text"/);
	await wrong([{ text: 'a' }], { columns: { txt: 'body' } }, /columns\.txt is not known, did you mean 'text'/);
	await wrong([{ text: 'a' }], { columns: { text: 7 } }, /columns\.text is 7/);
	mkdirSync(join(root, 'linked'));
	symlinkSync(join(root, 'nowhere'), join(root, 'linked', 'b.txt'));
	await t.throwsAsync(prepare(join(root, 'linked'), options()), { code: 'ERR_DN_CHECKPOINT', message: /b\.txt/ });
});

test('the seam of a pair follows what the tokenizer makes of the text', async (t) => {
	const json = JSON.parse(gpt2.toJSON()) as Record<string, unknown>;
	const spaced = { type: 'ByteLevel', add_prefix_space: true, trim_offsets: true, use_regex: true };
	const composed = 'caf\u00e9 caf\u00e9 caf\u00e9';
	for (const [changes, prompt, expected] of [
		[{ pre_tokenizer: spaced }, 'He went', ' He went'],
		[{ normalizer: { type: 'NFC' } }, `He ate ${composed.normalize('NFD')}`, `He ate ${composed}`],
		[{}, 'He went', 'He went'],
	] as const) {
		const tokenizer = Tokenizer.fromString(JSON.stringify({ ...json, ...changes }));
		const data = await prepare([{ prompt, answer: 'to the X' }], options({ tokenizer, format: 'pairs', context: 32 }));
		const { tokens, promptLength } = data.get(0);
		t.is(tokenizer.decode(tokens.subarray(0, promptLength)), expected);
		t.is(tokenizer.decode(tokens.subarray(promptLength)), ' to the X<|endoftext|>');
	}
});

test.serial('many blank lines are passed in one go', async (t) => {
	const path = file('blank.txt', `One.${'\n'.repeat(400_000)}Two.`);
	const begin = process.cpuUsage();
	const pieces: string[] = [];
	for await (const { text } of readDocuments(path, 'file', { maxLine: 1 << 24, onBytes: () => {} })) pieces.push(text);
	t.is(pieces.join('').length, 400_008);
	const { user } = process.cpuUsage(begin);
	t.true(user < 3e6, `${user} us`);
});
