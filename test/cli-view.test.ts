/** The terminal view of `generate`: what is plain, dim and marked, what fits the screen, and the command on a pseudo-terminal. */
import { execFile } from 'node:child_process';
import { existsSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';

import test from 'ava';
import { type DenoiseStep, Tokenizer } from 'diffusion-native';

import { printable, Redraw, renderStep, screenRows } from '../lib/cli/denoise-view.js';
import { root } from './helpers/fixtures.js';
import { textModel } from './helpers/generate.js';

const tokenizer = Tokenizer.gpt2();
const maskId = 10541;
const encode = (text: string): number[] => [...tokenizer.encode(text)];
const dim = (text: string): string => `\u001b[2m${text}\u001b[22m`;
const marked = (text: string): string => `\u001b[7m${text}\u001b[27m`;

function event(tokens: number[], fields: Partial<DenoiseStep> = {}): DenoiseStep {
	const none = { step: 1, steps: 1, committed: [], confidence: [], reopened: [], text: '' };
	return { ...none, tokens: Int32Array.from(tokens), ...fields };
}

test('committed text is plain, guesses are dim, unknown positions dots, reopened positions marked', (t) => {
	const options = { maskId, decode: (ids: Int32Array) => tokenizer.decode(ids), before: 1, after: 1 };
	const [once, upon, a, time, end] = encode('Once upon a time.') as [number, number, number, number, number];
	const tokens = [once, upon, maskId, maskId, end];
	t.is(renderStep(event(tokens), options), `Once upon${dim('··')}.`);
	const guessed = event(tokens, { provisional: Int32Array.of(once, upon, a, maskId, end) });
	t.is(renderStep(guessed, options), `Once upon${dim(' a·')}.`);
	const reopened = event(tokens, { provisional: Int32Array.of(once, upon, a, time, end), reopened: [3] });
	t.is(renderStep(reopened, options), `Once upon${dim(' a')}${marked(' time')}.`);
	t.is(renderStep(event([once, upon, a, time, end]), options), 'Once upon a time.');
	// The four bytes of one character, and a prompt that holds the mask id.
	t.is(renderStep(event([once, ...encode('😀'), end]), options), 'Once😀.');
	const spelled = renderStep(event([maskId, upon, maskId, end, maskId]), options);
	const mask = tokenizer.decode(Int32Array.of(maskId));
	t.is(spelled, `${mask} upon${dim('·')}.${mask}`);
});

test('text cannot steer the terminal', (t) => {
	t.is(printable('a\u001b[2Jb\r\t\u007f\u009b\nc'), 'a␛[2Jb␍    ␡\uFFFD\nc');
	t.is(printable('é漢😀'), 'é漢😀');
});

test('rows break at the width of the screen and keep their style', (t) => {
	t.deepEqual(screenRows('abcdef\ng', 4), ['abcd', 'ef', 'g']);
	t.deepEqual(screenRows('abcd', 4), ['abcd']);
	t.deepEqual(screenRows('a漢漢', 4), ['a漢', '漢']);
	t.deepEqual(screenRows(`ab${dim('cdef')}g`, 4), ['ab\u001b[2mcd', '\u001b[2mef\u001b[22mg']);
	t.deepEqual(screenRows(dim('a\nb'), 4), ['\u001b[2ma', '\u001b[2mb\u001b[22m']);
});

test('a view goes back to where it began, shows the end of what is too tall, and leaves the whole text', (t) => {
	const written: string[] = [];
	const stream = { columns: 4, rows: 4, write: (text: string) => written.push(text) > 0 };
	const view = new Redraw(stream as never);
	view.draw('ab\ncd');
	view.draw('abcdefgh\n12345678');
	view.draw('x');
	view.finish('abcdefgh\n12345678');
	view.end();
	t.deepEqual(written, [
		'ab\ncd',
		'\r\u001b[1A\u001b[Jefgh\n1234\n5678',
		'\r\u001b[2A\u001b[Jx',
		'\r\u001b[Jabcdefgh\n12345678\n',
	]);
	view.draw('left');
	view.end();
	t.deepEqual(written.slice(-2), ['left', '\n']);
});

// `script` of util-linux gives a command a terminal; without it the tests above stand alone.
const inTerminal = existsSync('/usr/bin/script') ? test : test.skip;

inTerminal('on a terminal the text appears as it is denoised, then stands with its figures', async (t) => {
	t.timeout(120_000);
	const folder = mkdtempSync(join(tmpdir(), 'diffusion-native-view-'));
	const model = await textModel();
	await model.save(join(folder, 'model'));
	const options = { length: 6, sampler: 'revocable', threshold: 0, verify: 0.9, attempts: 1, seed: 3 } as const;
	const { text, stats } = await model.generate('Hello', options);
	await model.dispose();
	const main = join(root, 'dist', 'lib', 'cli', 'main.js');
	const flags = '--length 6 --sampler revocable --threshold 0 --verify 0.9 --attempts 1 --seed 3 --device cpu';
	const command = `${process.execPath} ${main} generate ${join(folder, 'model')} Hello ${flags}`;
	// A slow machine shows the loading on standard error.
	const { stdout } = await promisify(execFile)('/usr/bin/script', ['-qec', `${command} 2>/dev/null`, '/dev/null'], {
		env: { ...process.env, TERM: 'xterm', COLUMNS: '80' },
	});
	rmSync(folder, { recursive: true });
	const shown = stdout.replaceAll('\r\n', '\n').replaceAll('\u001b', '␛');
	t.true(shown.startsWith('Hello'));
	t.regex(shown, /␛\[7m[^␛]+␛\[27m/, 'reopened drafts are marked');
	t.regex(shown, /␛\[2mstep 1 of at most \d+/);
	const last = shown.slice(shown.lastIndexOf('␛[J') + 3);
	t.true(last.startsWith(printable(`Hello${text}`)), JSON.stringify(last));
	t.true(
		last.includes(`6 tokens, ${stats.forwards} forwards, ${stats.tokensPerForward.toFixed(2)} tokens per forward`),
	);
});
