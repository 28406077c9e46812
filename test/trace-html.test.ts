/** The page that plays a denoising back: its frames against the events, its markup, and the page itself in a browser. */
import { execFile } from 'node:child_process';
import { existsSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { promisify } from 'node:util';

import test, { type ExecutionContext } from 'ava';
import {
	type DenoiseStep,
	DiffuGPT,
	type GenerateOptions,
	type GenerateResult,
	type Piece,
	Tokenizer,
	traceFrames,
	traceHtml,
} from 'diffusion-native';

const folder = mkdtempSync(join(tmpdir(), 'diffusion-native-html-'));
const hostile = '<script>document.title = "owned"</script><!-- &amp; </script > 😀';
const tokenizer = Tokenizer.gpt2();

interface Run {
	events: DenoiseStep[];
	result: GenerateResult;
	maskId: number;
	decode(ids: Int32Array): string;
}

async function record(options: GenerateOptions): Promise<Run> {
	const model = await DiffuGPT.fromConfig(
		{ layers: 1, heads: 2, channels: 16, vocab: 50257, context: 128 },
		{ seed: 1, tokenizer, device: 'cpu' },
	);
	const stream = model.stream(hostile, { seed: 3, ...options });
	const events: DenoiseStep[] = [];
	for (;;) {
		const { done, value } = await stream.next();
		if (!done) {
			events.push(value);
			continue;
		}
		await model.dispose();
		return { events, result: value, maskId: model.config.maskId, decode: (ids) => tokenizer.decode(ids) };
	}
}

/** Something with revisions, so that every kind of piece occurs. */
const revocable: GenerateOptions = { sampler: 'revocable', threshold: 0, verify: 0.9, attempts: 1, length: 12 };

/** The data inside a page, read without a browser. */
function dataOf(html: string): { facts: string; frames: Piece[][] } {
	const parts = html.split(/<script[^>]*>|<\/script>/);
	const data = parts[1] as string;
	return JSON.parse(data) as { facts: string; frames: Piece[][] };
}

test.after.always(() => rmSync(folder, { recursive: true, force: true }));

test('frames tell what the events tell', async (t) => {
	for (const options of [
		revocable,
		{ sampler: 'ancestral', steps: 5, length: 14 },
		{ length: { max: 20, method: 'block', block: 6 }, steps: 4 },
	] as GenerateOptions[]) {
		const { events, result, maskId, decode } = await record(options);
		const frames = traceFrames(events, maskId, decode);
		t.is(frames.length, events.length + 1);
		const count = (frame: Piece[] | undefined, kind: string): number =>
			frame?.filter((piece) => piece[1] === kind).length ?? 0;
		for (const [e, event] of events.entries()) {
			const frame = frames[e + 1] as Piece[];
			const open = event.tokens.filter((id) => id === maskId).length;
			t.is(count(frame, 'provisional') + count(frame, 'open') + count(frame, 'reopened') > 0, open > 0);
			t.is(
				count(frame, 'reopened') > 0,
				event.reopened.some((p) => event.tokens[p] === maskId),
			);
		}
		t.is(count(frames[0], 'committed'), 0);
		t.is((frames.at(-1) as Piece[]).map(([text]) => text).join(''), decode(result.sequence));
		for (const frame of frames) {
			for (const [text, kind, confidence] of frame) {
				t.is(confidence !== null, kind === 'committed', text);
				t.true(confidence === null || (confidence > 0 && confidence <= 1));
			}
		}
	}
	t.deepEqual(traceFrames([], 0, null), []);
});

test('a character of several tokens is one piece, and a prompt may hold the mask id', (t) => {
	const ids = [...tokenizer.encode('a😀')];
	t.true(ids.length >= 3);
	const maskId = 10541;
	const tokens = Int32Array.of(7, maskId, ...ids);
	const committed = ids.map((_, i) => 2 + i);
	const event: DenoiseStep = {
		...{ step: 1, steps: 1, tokens, committed, reopened: [], text: 'a😀' },
		confidence: committed.map((_, i) => 0.9 - i / 10),
	};
	const [before, after] = traceFrames([event], maskId, (each) => tokenizer.decode(each)) as [Piece[], Piece[]];
	t.deepEqual(
		before.map(([, kind]) => kind),
		['given', 'given', ...ids.map(() => 'open')],
	);
	t.deepEqual(
		after.map(([, kind]) => kind),
		['given', 'given', 'committed', 'committed'],
	);
	t.deepEqual(after[3], ['😀', 'committed', 0.9 - (ids.length - 1) / 10]);
});

test('the page is self-contained and text never becomes markup', async (t) => {
	const { events, result, maskId, decode } = await record(revocable);
	const html = traceHtml(events, result, maskId, decode);
	t.is(html.split('<script').length, 3, 'the data and the player, nothing from the text');
	t.false(/(src|href)\s*=|@import|url\(/i.test(html), 'nothing is loaded');
	t.false(html.includes(hostile.slice(0, 8).repeat(1).concat('document.title')));
	const { frames, facts } = dataOf(html);
	t.deepEqual(frames, traceFrames(events, maskId, decode));
	t.true(facts.includes(`${result.stats.forwards} forwards`) && facts.includes('seed 3'));
});

const chromium = [process.env['CHROMIUM'], '/usr/bin/chromium', '/usr/bin/chromium-browser'].find(
	(path) => path && existsSync(path),
);

/**
 * The document after its scripts ran for some virtual time. A browser that crashes or hangs, which happens on busy machines,
 * is started once more; what it shows has one chance.
 */
async function dump(t: ExecutionContext, url: string, again = true): Promise<string> {
	const profile = mkdtempSync(join(folder, 'profile-'));
	const flags = [
		...['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-dev-shm-usage'],
		...[
			'--disable-background-networking',
			'--disable-component-update',
			'--disable-sync',
			`--user-data-dir=${profile}`,
		],
		...['--virtual-time-budget=30000', '--dump-dom', url],
	];
	let stdout: string;
	try {
		({ stdout } = await promisify(execFile)(chromium as string, flags, { timeout: 40_000, maxBuffer: 2 ** 26 }));
	} catch (error) {
		if (!again) throw error;
		return dump(t, url, false);
	}
	t.true(stdout.includes('id="canvas"'), stdout.slice(0, 500));
	return stdout;
}

/** Red, green and blue of the CSS colour hsl(hue 70% 50%). */
function rgb(hue: number): number[] {
	return [0, 8, 4].map((n) => {
		const k = (n + hue / 30) % 12;
		return Math.round(255 * (0.5 - 0.35 * Math.max(-1, Math.min(k - 3, 9 - k, 1))));
	});
}

/** Probability and background of the committed spans of the canvas. */
function colours(dom: string): { probability: number; background: number[] }[] {
	const canvas = /<div id="canvas"[^>]*>([\s\S]*?)<\/div>/.exec(dom)?.[1] ?? '';
	return [...canvas.matchAll(/<span class="committed"([^>]*)>/g)].map(([, attributes]) => ({
		probability: Number(/probability ([\d.]+)/.exec(attributes as string)?.[1]),
		background: (/background: rgba?\((\d+), (\d+), (\d+)/.exec(attributes as string) ?? []).slice(1).map(Number),
	}));
}

/** The spans of the canvas: class and text. */
function shown(dom: string): [string, string][] {
	const canvas = /<div id="canvas"[^>]*>([\s\S]*?)<\/div>/.exec(dom)?.[1] ?? '';
	const unescaped = (text: string): string =>
		text
			.replace(/&lt;/g, '<')
			.replace(/&gt;/g, '>')
			.replace(/&nbsp;/g, '\u00a0')
			.replace(/&amp;/g, '&');
	return [...canvas.matchAll(/<span class="(\w+)"[^>]*>([\s\S]*?)<\/span>/g)].map(([, kind, text]) => [
		kind as string,
		unescaped(text as string),
	]);
}

// Without Chromium at $CHROMIUM, /usr/bin/chromium or /usr/bin/chromium-browser the other tests read the page.
const inBrowser = chromium ? test : test.skip;

inBrowser('in a browser the page opens at a step, plays to the end and stays inert', async (t) => {
	t.timeout(180_000);
	const { events, result, maskId, decode } = await record(revocable);
	const frames = traceFrames(events, maskId, decode);
	const path = join(folder, 'page.html');
	writeFileSync(path, traceHtml(events, result, maskId, decode));
	const url = pathToFileURL(path).href;
	// What a control character or a lone surrogate looks like in a dump is the browser's business.
	const plain = (text: string): string => text.replace(/\p{Cc}|\u00a0|\uFFFD/gu, '');
	const expected = (step: number): [string, string][] =>
		(frames[step] as Piece[]).map(([text, kind]) => [kind, plain(text)]);
	const seen = (dom: string): [string, string][] => shown(dom).map(([kind, text]) => [kind, plain(text)]);
	const last = frames.length - 1;
	const withReopened = frames.findIndex((frame) => frame.some(([, kind]) => kind === 'reopened'));
	t.true(withReopened > 0);
	const opened = await dump(t, `${url}#step=${withReopened}`);
	t.deepEqual(seen(opened), expected(withReopened));
	t.true(opened.includes(`step ${withReopened} of ${last}`));
	const played = await dump(t, `${url}#play`);
	t.deepEqual(seen(played), expected(last), 'it played to the end');
	t.true(played.includes(`data-step="${last}"`) && />Play</.test(played));
	t.false(played.includes('<title>owned'));
	t.true(played.includes('<title>Denoising</title>'));
});

inBrowser('in a browser the slider moves over the steps, and sure tokens are greener than unsure ones', async (t) => {
	t.timeout(180_000);
	const { events, result, maskId, decode } = await record({ sampler: 'ancestral', steps: 6, length: 24 });
	const scaled = events.map((event) => ({ ...event, confidence: event.confidence.map((_, k) => (k % 5) / 4) }));
	const frames = traceFrames(scaled, maskId, decode);
	const path = join(folder, 'slider.html');
	const drag = "slider.value = '2'; slider.dispatchEvent(new Event('input'));";
	const html = traceHtml(scaled, result, maskId, decode);
	writeFileSync(
		path,
		html.replace('</body>', () => `<script>${drag}</script></body>`),
	);
	const dom = await dump(t, pathToFileURL(path).href);
	t.true(dom.includes('data-step="2"') && dom.includes(`step 2 of ${frames.length - 1}`));
	t.regex(dom, new RegExp(`<input[^>]*type="range"[^>]*max="${frames.length - 1}"`));
	const expected = (frames[2] as Piece[]).flatMap(([, kind, confidence]) => (kind === 'committed' ? [confidence] : []));
	const seen = colours(dom);
	t.deepEqual(
		seen.map(({ probability }) => probability),
		expected,
	);
	t.true(new Set(expected).size > 2, `${expected}`);
	for (const { probability, background } of seen) {
		for (const [c, value] of rgb(Math.round(120 * probability)).entries())
			t.true(Math.abs((background[c] as number) - value) <= 1, `${probability}: ${background}`);
	}
});
