/** Prepared data: what each format holds, token files of every kind, threads and memory, and what is refused or stopped. */
import { spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, readFileSync, truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { Readable } from 'node:stream';

import test from 'ava';
import { type PrepareOptions, prepare, TokenDataset, validationPath } from 'diffusion-native';

import { padSequence } from '../lib/data/pack.js';
import { all, eos, file, gpt2, leftovers, options, root, story } from './helpers/data.js';
import { root as repository } from './helpers/fixtures.js';
import { runScript } from './helpers/fork.js';

test('packed: text and end token, end to end, in windows without overlap', async (t) => {
	const texts = ['The first document.', 'A second one, rather longer than the first.', 'Third.'];
	const data = await prepare(
		texts.map((text) => ({ text })),
		options(),
	);
	const stream = texts.flatMap((text) => [...gpt2.encode(text), eos]);
	t.is(data.tokens, stream.length);
	t.is(data.sequences, Math.floor(stream.length / 8));
	t.deepEqual(all(data).flat(), stream.slice(0, data.sequences * 8));
	t.is(data.get(0).promptLength, 0);
	t.is(data.fingerprint, gpt2.fingerprint);
	t.is(data.eosId, eos);
});

test('a long text file read in pieces has the tokens of the whole', async (t) => {
	const text = story(7000);
	t.true(text.length > 300_000);
	const data = await prepare(file('story.txt', text), options({ context: 64 }));
	t.deepEqual(all(data).flat(), [...gpt2.encode(text), eos].slice(0, data.sequences * 64));
});

test('documents: ragged, the first token a given one, cut where too long', async (t) => {
	const data = await prepare(
		[{ text: 'Short.' }, { text: 'one two three four five six seven eight nine ten' }],
		options({ format: 'documents' }),
	);
	t.deepEqual(all(data)[0], [eos, ...gpt2.encode('Short.'), eos]);
	t.is(data.get(0).promptLength, 1);
	const long = [...gpt2.encode('one two three four five six seven eight nine ten'), eos];
	t.deepEqual(all(data)[1], [eos, ...long.slice(0, 7)]);
	t.deepEqual(all(data)[2], [eos, ...long.slice(7)]);
	const dropped: number[] = [];
	const one = await prepare(
		[{ text: 'Short.' }, { text: 'one two three four five six seven eight nine ten' }],
		options({ format: 'documents', overlong: 'drop', onProgress: (progress) => dropped.push(progress.dropped) }),
	);
	t.is(one.sequences, 1);
	t.is(dropped.at(-1), 1);
});

test('pairs are tokenised together: the seam follows the joint tokens', async (t) => {
	// Apart these give other ids: ' out' + 'side' is one token of the joint text.
	const prompt = 'He went out';
	const answer = 'side again';
	const joint = [...gpt2.encode(prompt + answer)];
	t.notDeepEqual(joint, [...gpt2.encode(prompt), ...gpt2.encode(answer)]);
	const data = await prepare([{ prompt, answer }], options({ format: 'pairs', separator: '' }));
	t.deepEqual([...data.get(0).tokens], [...joint, eos]);
	t.is(gpt2.decode(data.get(0).tokens.subarray(0, data.get(0).promptLength)), 'He went');
	const spaced = await prepare([{ prompt: 'two plus two:', answer: 'four' }], options({ format: 'pairs' }));
	t.deepEqual([...spaced.get(0).tokens], [...gpt2.encode('two plus two: four'), eos]);
	t.is(spaced.get(0).promptLength, gpt2.encode('two plus two:').length);
});

test('a pair beyond the context is an error, or cut: the answer first, then the front of the prompt', async (t) => {
	const record = { prompt: 'a b c d e f', answer: 'u v w x y z' };
	await t.throwsAsync(prepare([record], options({ format: 'pairs' })), {
		code: 'ERR_DN_ARGUMENT',
		message: /record 0.*13 tokens/,
	});
	const data = await prepare([record], options({ format: 'pairs', overlong: 'truncate' }));
	t.is(data.get(0).tokens.length, 8);
	t.is(gpt2.decode(data.get(0).tokens), ' f u v w x y z<|endoftext|>');
	t.is(data.get(0).promptLength, 1);
});

test('prompts are never maskable; padding is', (t) => {
	const sequence = { tokens: Int32Array.of(1, 2, 3, 4, 9), promptLength: 2 };
	const pad = (padding: Parameters<typeof padSequence>[1]['padding'], epoch = 0, number = 0) =>
		padSequence(sequence, { padding, padId: 9, context: 16 }, { seed: 5n, epoch, sequence: number });
	t.deepEqual(pad('none'), { tokens: sequence.tokens, maskable: Uint8Array.of(0, 0, 1, 1, 1) });
	t.deepEqual([...pad({ multiple: 4 }).tokens], [1, 2, 3, 4, 9, 9, 9, 9]);
	t.deepEqual([...(pad({ multiple: 4 }).maskable as Uint8Array)], [0, 0, 1, 1, 1, 1, 1, 1]);
	t.is(pad('context').tokens.length, 16);
	t.is(pad({ multiple: 100 }).tokens.length, 16);
	const lengths = Array.from({ length: 200 }, (_, i) => pad({ random: 6 }, 0, i).tokens.length);
	t.deepEqual(
		[...new Set(lengths)].sort((a, b) => a - b),
		[5, 6, 7, 8, 9, 10, 11],
	);
	t.deepEqual(
		lengths,
		Array.from({ length: 200 }, (_, i) => pad({ random: 6 }, 0, i).tokens.length),
	);
	t.notDeepEqual(
		lengths,
		Array.from({ length: 200 }, (_, i) => pad({ random: 6 }, 1, i).tokens.length),
	);
});

test('JSONL and CSV, folders in name order, quoted newlines', async (t) => {
	const folder = join(root, 'corpus');
	mkdirSync(join(folder, 'b'), { recursive: true });
	writeFileSync(join(folder, 'a.jsonl'), '{"question":"q1","response":"r1"}\n\n{"question":"q2","response":"r2"}\n');
	writeFileSync(join(folder, 'b', 'c.csv'), '\ufeffuser_prompt,model_response\nq3,"r,\n3"\n');
	writeFileSync(join(folder, 'ignored.bin'), 'x');
	const data = await prepare(folder, options({ format: 'pairs', context: 32 }));
	t.deepEqual(
		all(data).map((ids) => gpt2.decode(ids)),
		['q1 r1<|endoftext|>', 'q2 r2<|endoftext|>', 'q3 r,\n3<|endoftext|>'],
	);
});

test('validation: every document on one side, the same side again, nothing lost', async (t) => {
	const texts = Array.from({ length: 400 }, (_, i) => `Document number ${i} of the corpus.`);
	const make = async () => {
		const target = options({ format: 'documents', context: 32, validation: 0.25 });
		const train = await prepare(
			texts.map((text) => ({ text })),
			target,
		);
		return { train, held: await TokenDataset.open(validationPath(target.out)) };
	};
	const { train, held } = await make();
	const a = all(train).map((ids) => gpt2.decode(ids));
	const b = all(held).map((ids) => gpt2.decode(ids));
	t.deepEqual(new Set([...a, ...b]).size, 400);
	t.is(a.length + b.length, 400);
	t.true(b.length > 60 && b.length < 140, String(b.length));
	t.deepEqual(all((await make()).held), all(held));
	// Rows with one headword fall together.
	const words = Array.from({ length: 300 }, (_, i) => ({
		prompt: `w${i % 50} (${i}):`,
		answer: 'x',
		split: `w${i % 50}`,
	}));
	const target = options({ format: 'pairs', context: 32, validation: 0.3 });
	const pairs = await prepare(words, target);
	const head = (data: TokenDataset): Set<string> =>
		new Set(all(data).map((ids) => gpt2.decode(ids).split(' ')[0] as string));
	const heldHeads = head(await TokenDataset.open(validationPath(target.out)));
	t.true([...head(pairs)].every((word) => !heldHeads.has(word)));
});

test('nanoGPT and llm.c files', async (t) => {
	const target = options({ container: 'nanogpt' });
	const text = story(20);
	await prepare([{ text }], target);
	const ids = [...gpt2.encode(text), eos];
	const raw = readFileSync(target.out);
	t.is(raw.length, ids.length * 2);
	t.deepEqual(
		Array.from({ length: ids.length }, (_, i) => raw.readUInt16LE(2 * i)),
		ids,
	);
	const nano = await TokenDataset.open(target.out, { context: 16 });
	t.deepEqual([...nano.get(1).tokens], ids.slice(16, 32));
	for (const [magic, version, width] of [
		[20240520, 1, 2],
		[20240801, 7, 4],
	] as const) {
		const bytes = Buffer.alloc(1024 + 40 * width);
		bytes.writeInt32LE(magic, 0);
		bytes.writeInt32LE(version, 4);
		bytes.writeInt32LE(40, 8);
		for (let i = 0; i < 40; i++) bytes.writeUIntLE(1000 + i, 1024 + i * width, width);
		const data = await TokenDataset.open(file('llmc.bin', bytes), { context: 16 });
		t.is(data.sequences, 2);
		t.is(data.tokens, 40);
		t.is(data.get(1).tokens[0], 1016);
	}
});

test('ids beyond 16 bits are stored in 32', async (t) => {
	const wide = { encode: () => Int32Array.of(0), vocabSize: 100_000, fingerprint: 'wide' };
	const data = await prepare(
		[Int32Array.of(1, 99_999, 70_000)],
		options({ tokenizer: wide, eosId: 99_998, context: 4 }),
	);
	t.deepEqual([...data.get(0).tokens], [1, 99_999, 70_000, 99_998]);
	await t.throwsAsync(prepare([Int32Array.of(100_000)], options({ tokenizer: wide, eosId: 0 })), {
		message: /100000 is beyond the vocabulary of 100000/,
	});
});

test('rows without text are passed over; a file of nothing else is empty', async (t) => {
	const rows = file('rows.jsonl', '{"text":"one"}\n{"text":""}\n{"text":" \\n"}\n{"text":"two"}\n');
	const data = await prepare(rows, options({ format: 'documents' }));
	t.deepEqual(
		all(data).map((ids) => gpt2.decode(ids)),
		['<|endoftext|>one<|endoftext|>', '<|endoftext|>two<|endoftext|>'],
	);
	const blank = file('blank.jsonl', '{"text":""}\n{"text":" "}\n');
	for (const input of [blank, ['', ' '].map((text) => ({ text }))]) {
		await t.throwsAsync(prepare(input, options({ format: 'documents' })), { message: /is empty: no text was found/ });
	}
});

test('threads change nothing in the file', async (t) => {
	const text = file('long.txt', story(12_000));
	const rows = Array.from({ length: 9000 }, (_, i) =>
		i % 7 === 3
			? { tokens: Int32Array.of(i, 7, 8, 9), promptLength: 1 }
			: { prompt: `Row ${i} asks naïvely:`, answer: `word${'s'.repeat(i % 9)} ${i * 31} and more of them` },
	);
	for (const [input, more] of [
		[text, { format: 'packed' }],
		[text, { format: 'documents', splitText: 'paragraph', context: 64, validation: 0.3 }],
		[rows, { format: 'pairs', context: 64 }],
	] as const) {
		const files = [];
		for (const threads of [1, 2]) {
			const target = options({ ...more, threads });
			(await prepare(input, target)).close();
			files.push(readFileSync(target.out));
			t.deepEqual(leftovers(target.out), []);
		}
		t.true(files[0]?.equals(files[1] as Buffer), more.format);
	}
	// An error of a row that is encoded elsewhere still names the row.
	const far = [...rows, { prompt: 5, answer: 'x' }] as unknown as typeof rows;
	await t.throwsAsync(prepare(far, options({ format: 'pairs', context: 64, threads: 2 })), {
		code: 'ERR_DN_ARGUMENT',
		message: /record 9000: prompt and answer must be text/,
	});
});

test('memory does not grow with the input', async (t) => {
	const path = file('much.jsonl', '');
	const source = `
		import { appendFileSync, writeFileSync } from 'node:fs';
		import { prepare } from 'diffusion-native';
		const path = ${JSON.stringify(path)};
		const tokenizer = { encode: (text) => new Int32Array(text.length >> 2).fill(7), vocabSize: 100 };
		const line = (i) => JSON.stringify({ text: i + ' words of a text '.repeat(120) }) + '\\n';
		const run = async (megabytes) => {
			writeFileSync(path, '');
			for (let i = 0; i < megabytes; i++) appendFileSync(path, Array.from({ length: 500 }, (_, j) => line(500 * i + j)).join(''));
			for (const format of ['packed', 'documents']) {
				const data = await prepare(path, { tokenizer, out: path + '.bin', format, eosId: 0, validation: 0.1 });
				data.close();
			}
			return process.resourceUsage().maxRSS / 1024;
		};
		// A process takes some more for its first files, whatever their size.
		for (let i = 0; i < 2; i++) await run(4);
		console.log(JSON.stringify([await run(4), await run(40)]));
	`;
	// The text of 36 megabytes more would hardly fit this heap, and would show in the process's peak.
	const limits = { nodeArguments: ['--max-old-space-size=48'], timeoutMs: 170_000 };
	const { code, stdout, stderr } = await runScript(source, limits);
	t.is(code, 0, stderr);
	const [little, much] = JSON.parse(stdout) as [number, number];
	t.log(`peak RSS ${little.toFixed(0)} MB for 4 MB, ${much.toFixed(0)} MB for 40 MB`);
	t.true(much - little < 30, `${little} MB, then ${much} MB`);
});

const withLimits = process.platform === 'win32' ? test.skip : test;

withLimits('a disk that fills up leaves the old token file and no part of the new one', async (t) => {
	const target = options();
	(await prepare([{ text: story(10) }], target)).close();
	const before = readFileSync(target.out);
	const source = `
		import { prepare } from 'diffusion-native';
		const tokenizer = { encode: () => new Int32Array(50_000), vocabSize: 100 };
		const records = Array.from({ length: 40 }, (_, i) => ({ text: 'text ' + i }));
		try {
			await prepare(records, { tokenizer, out: ${JSON.stringify(target.out)}, eosId: 0, context: 8 });
		} catch ({ code, message }) {
			console.log(code, message);
		}`;
	const limited = ['-c', 'ulimit -f 2000 && exec "$0" --input-type=module --eval "$1"', process.execPath, source];
	const { stdout, stderr } = spawnSync('sh', limited, { cwd: repository, encoding: 'utf8' });
	t.regex(stdout, /^ERR_DN_CHECKPOINT token file .*cannot be written: (EFBIG|ENOSPC)/, stderr);
	t.true(readFileSync(target.out).equals(before));
	t.deepEqual(leftovers(target.out), []);
});

test('bad input is named', async (t) => {
	const bad = async (path: string, message: RegExp, more: Partial<PrepareOptions> = {}) => {
		const target = options(more);
		const error = await t.throwsAsync(prepare(path, target), { code: 'ERR_DN_ARGUMENT', message });
		t.false(existsSync(target.out), error?.message);
		t.deepEqual(leftovers(target.out), []);
	};
	await bad(file('empty.txt', ''), /empty\.txt is empty/);
	await bad(file('blank.txt', ' \n\n '), /is empty/);
	await bad(file('binary.txt', Buffer.from([65, 66, 0, 67])), /binary\.txt looks binary: byte 2/);
	await bad(file('latin1.txt', Buffer.from('caf\xe9 au lait', 'latin1')), /latin1\.txt is not UTF-8 text: byte 3/);
	const far = Buffer.concat([Buffer.from('é'.repeat(600_001)), Buffer.from([0xff, 0x20])]);
	await bad(file('far.txt', far), /byte 1200002/);
	await bad(file('cut.txt', Buffer.from([65, 0xe2, 0x82])), /byte 1 /);
	await bad(file('line.txt', 'x'.repeat(200_000)), /line longer than 1000 characters/, { maxLine: 1000 });
	const lines = `${'forty characters in every line of this on'}\n`.repeat(3000);
	(await prepare(file('lines.txt', lines), options({ maxLine: 1000 }))).close();
	await bad(file('line.jsonl', `{"text":"${'x'.repeat(5000)}"}`), /line 1: longer than 1000/, { maxLine: 1000 });
	await bad(file('bad.jsonl', '{"text":"a"}\n{"text":\n'), /bad\.jsonl, line 2: not JSON/);
	await bad(file('number.jsonl', '{"text":5}\n'), /line 1: the column 'text' is 5/);
	await bad(file('columns.csv', 'a,b\n1,2\n'), /no column 'prompt'.*for the prompt; found 'a', 'b'/, {
		format: 'pairs',
	});
	await bad(file('ragged.csv', 'prompt,answer\n1,2\n3\n'), /ragged\.csv: not a valid CSV.*line 3/, { format: 'pairs' });
	await bad(file('few.txt', 'a b'), /3 tokens, fewer than one window of 8/);
	await t.throwsAsync(prepare(join(root, 'missing.txt'), options({})), {
		code: 'ERR_DN_CHECKPOINT',
		message: /missing\.txt cannot be read/,
	});
	await bad(file('one.txt', story(30)), /the validation part is empty|the training part is empty/, { validation: 0.5 });
});

test('damaged token files are named', async (t) => {
	const target = options();
	(await prepare([{ text: story(10) }], target)).close();
	const open = (path: string) => TokenDataset.open(path, { context: 8 });
	const whole = readFileSync(target.out);
	const flipped = Buffer.from(whole);
	flipped.writeUInt8(1 ^ flipped.readUInt8(24), 24);
	await t.throwsAsync(open(file('flipped.bin', flipped)), { code: 'ERR_DN_CHECKPOINT', message: /damaged header/ });
	const beyond = Buffer.from(whole);
	beyond.writeUInt16LE(60_000, 256 + 2 * 10);
	const data = await open(file('beyond.bin', beyond));
	t.throws(() => data.get(1), { code: 'ERR_DN_CHECKPOINT', message: /token 2 of sequence 1 is 60000/ });
	truncateSync(target.out, whole.length - 2);
	await t.throwsAsync(open(target.out), { code: 'ERR_DN_CHECKPOINT', message: /truncated/ });
	await t.throwsAsync(open(file('short.bin', whole.subarray(0, 100))), {
		code: 'ERR_DN_CHECKPOINT',
		message: /truncated inside its header/,
	});
	await t.throwsAsync(open(file('odd.bin', Buffer.from([1, 2, 3]))), { code: 'ERR_DN_CHECKPOINT', message: /3 bytes/ });
	await t.throwsAsync(open(join(root, 'none.bin')), {
		code: 'ERR_DN_CHECKPOINT',
		message: /none\.bin cannot be opened/,
	});
	await t.throwsAsync(TokenDataset.open(file('a.bin', whole), { tokenizer: { fingerprint: 'other', vocabSize: 5 } }), {
		code: 'ERR_DN_ARGUMENT',
		message: /another tokenizer/,
	});
});

test('an aborted or failed preparation leaves the old file', async (t) => {
	const target = options();
	await prepare([{ text: story(10) }], target);
	const before = readFileSync(target.out);
	const stop = new AbortController();
	const endless = Readable.from(
		(function* () {
			for (let i = 0; ; i++) {
				if (i === 50) stop.abort(new Error('enough'));
				yield { text: `text ${i}` };
			}
		})(),
	);
	await t.throwsAsync(prepare(endless, { ...target, signal: stop.signal }), { message: 'enough' });
	t.deepEqual(readFileSync(target.out), before);
	t.deepEqual(leftovers(target.out), []);
});

test('records from memory let the event loop turn, and an abort through', async (t) => {
	const slow = {
		vocabSize: 300,
		encode: (text: string): Int32Array => {
			const end = performance.now() + 1;
			while (performance.now() < end);
			return Int32Array.from(Buffer.from(text));
		},
	};
	const records = Array.from({ length: 3000 }, (_, i) => ({ text: `record ${i}` }));
	const enough = new Error('enough');
	const stop = new AbortController();
	let turns = 0;
	const ticking = setInterval(() => {
		if (++turns === 10) stop.abort(enough);
	}, 10);
	const target = options({ tokenizer: slow, eosId: 256, threads: 1, signal: stop.signal });
	const error = await t.throwsAsync(prepare(records, target)).finally(() => clearInterval(ticking));
	t.is(error, enough);
	t.false(existsSync(target.out));
});
