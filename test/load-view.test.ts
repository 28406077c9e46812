/** The progress of loading a model: silence for a second, then lines or a bar. */
import test from 'ava';
import type { LoadProgress } from 'diffusion-native';

import { showLoading } from '../lib/cli/load-view.js';

process.env['TERM'] = 'xterm';

/** Tells the events, each at its time in ms; what was written. */
async function shown(
	events: readonly (readonly [at: number, event: LoadProgress])[],
	{ json = false, isTTY = false, fails = false } = {},
): Promise<string> {
	let written = '';
	let time = 0;
	const write = (text: string): boolean => {
		written += text;
		return true;
	};
	const stream = { isTTY, columns: 120, write };
	const loading = showLoading(
		async (onProgress) => {
			for (const [at, event] of events) {
				time = at;
				onProgress(event);
			}
			if (fails) throw new Error('the connection broke');
			return 'model';
		},
		{ json, stream: stream as unknown as NodeJS.WriteStream, now: () => time },
	);
	if (fails) await loading.catch(() => undefined);
	else await loading;
	return written;
}

const megabyte = 1e6;
const download = (file: string, loaded: number, total: number): LoadProgress => ({
	status: 'download',
	file,
	loaded: loaded * megabyte,
	total: total * megabyte,
});
const load = (loaded: number): LoadProgress => ({ status: 'load', loaded: loaded * megabyte, total: 500 * megabyte });

test('what is loaded within a second shows nothing', async (t) => {
	const events = [
		[0, { status: 'ready' }],
		[10, load(100)],
		[990, load(499)],
		[2000, load(500)],
	] as const;
	for (const isTTY of [false, true]) t.is(await shown(events, { isTTY }), '');
});

test('without a terminal there is a line every five seconds, with the rate and the time left', async (t) => {
	const events = [
		// 100 MB are there from before: they count as loaded, not for the rate.
		[0, download('a', 100, 400)],
		[0, download('b', 0, 100)],
		[500, download('b', 50, 100)],
		[2000, download('a', 150, 400)],
		[6000, download('a', 200, 400)],
		[7000, download('a', 300, 400)],
		[9000, download('a', 400, 400)],
		[9100, { status: 'ready' }],
		[14_100, load(250)],
	] as const;
	t.is(
		await shown(events),
		'downloading  200/500 MB  50.0 MB/s  6s left\n' +
			'downloading  350/500 MB  35.7 MB/s  5s left\n' +
			'loading  250/500 MB  50.0 MB/s  5s left\n',
	);
	t.is(await shown(events, { json: true }), '');
});

test('on a terminal there is a bar, which is gone when the model is there or loading has failed', async (t) => {
	for (const fails of [false, true]) {
		const written = await shown(
			[
				[0, load(0)],
				[2000, load(250)],
			],
			{ isTTY: true, fails },
		);
		t.regex(written, /loading .* 50% {2}250\/500 MB {2}125 MB\/s {2}2s left/);
		t.true(written.lastIndexOf('\u001b[?25h') > written.lastIndexOf('\u001b[?25l'), 'the cursor is back');
	}
});
