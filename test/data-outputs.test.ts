/** What data preparation may write over, and what it leaves when it runs twice or is stopped. */
import childProcess from 'node:child_process';
import { existsSync, linkSync, readFileSync, symlinkSync } from 'node:fs';
import { syncBuiltinESMExports } from 'node:module';
import { dirname, join, relative } from 'node:path';
import { promisify } from 'node:util';

import test from 'ava';
import { DiffusionNativeError, prepare, TokenDataset, trainTokenizer } from 'diffusion-native';

import { all, file, gpt2, leftovers, options } from './helpers/data.js';

const refusal = { instanceOf: DiffusionNativeError, code: 'ERR_DN_ARGUMENT' };

test('an output that is an input is refused, by whatever name, and the input stays', async (t) => {
	const text = 'A corpus of a few words, which nobody has twice.';
	const corpus = file('corpus.txt', text);
	const [hard, soft] = [join(dirname(corpus), 'hard.bin'), join(dirname(corpus), 'soft.bin')];
	linkSync(corpus, hard);
	symlinkSync(corpus, soft);
	for (const out of [corpus, hard, soft, relative('.', corpus), join(dirname(corpus), '.', 'corpus.txt')]) {
		for (const named of [{ out }, { validation: 0.5, validationOut: out }]) {
			const error = await t.throwsAsync(prepare(corpus, options(named)), refusal, out);
			t.true(
				error?.message.includes(`${'out' in named ? 'out' : 'validationOut'} ${out} is the same file as the input`),
			);
			t.true(error?.message.includes(corpus));
		}
	}
	await t.throwsAsync(prepare(dirname(corpus), options({ out: corpus })), refusal, 'an input in a folder');
	await t.throwsAsync(trainTokenizer(corpus, { vocabSize: 300, out: corpus }), {
		...refusal,
		message: /^out .* is the same file as the input/,
	});
	t.is(readFileSync(corpus, 'utf8'), text);
	t.deepEqual(leftovers(corpus), []);
});

test('validationOut that is out by another name is refused', async (t) => {
	const out = join(dirname(file('a.txt', 'a')), 'new.bin');
	const validationOut = relative('.', out);
	await t.throwsAsync(prepare([{ text: 'a' }], options({ out, validation: 0.5, validationOut })), {
		...refusal,
		message: /validationOut .*new\.bin is the same file as out .*new\.bin/,
	});
	t.false(existsSync(out));
});

test('two preparations of one file at a time do not mix: the last one stays', async (t) => {
	const target = options({ format: 'documents', context: 64, bosId: false });
	const texts = ['one', 'another'].map((word) => Array.from({ length: 2000 }, (_, i) => `${word} text ${i}`));
	await Promise.all(
		texts.map((list) =>
			prepare(
				list.map((text) => ({ text })),
				target,
			),
		),
	);
	const found = all(await TokenDataset.open(target.out)).map((ids) => gpt2.decode(ids));
	const [first, second] = texts.map((list) => list.map((text) => `${text}<|endoftext|>`));
	t.deepEqual(found, found[0]?.startsWith('one') ? first : second);
	t.deepEqual(leftovers(target.out), []);
});

test.serial('an aborted learning has ended before its folder is removed', async (t) => {
	const stop = new AbortController();
	const reason = new Error('enough');
	const { execFile } = childProcess;
	let child: childProcess.ChildProcess | undefined;
	const started = promisify(execFile);
	const watched = (...parameters: Parameters<typeof started>): ReturnType<typeof started> => {
		const promise = started(...parameters);
		child = promise.child;
		setImmediate(() => stop.abort(reason));
		return promise;
	};
	childProcess.execFile = Object.assign(() => t.fail('not promisified'), { [promisify.custom]: watched }) as never;
	syncBuiltinESMExports();
	try {
		const learning = trainTokenizer(file('corpus.txt', 'some words'), { vocabSize: 300, signal: stop.signal });
		await t.throwsAsync(learning, { is: reason });
	} finally {
		childProcess.execFile = execFile;
		syncBuiltinESMExports();
	}
	t.is(child?.signalCode, 'SIGTERM');
});
