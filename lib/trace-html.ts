/**
 * A generation as one self-contained HTML page that plays the denoising back: a slider over the steps, a play button, tokens
 * coloured by the confidence they were committed with, guesses dim, positions opened again marked. No network, no libraries;
 * text enters the page as JSON and leaves it through `textContent`, so nothing in it is ever markup.
 */
import type { DenoiseStep } from './denoise-loop.js';
import type { GenerateResult } from './generate.js';

/** How a piece of text is shown. */
export type PieceKind = 'given' | 'committed' | 'provisional' | 'open' | 'reopened';

/** A piece of a frame: text, kind, and the confidence of committed ones (null for the others). */
export type Piece = [text: string, kind: PieceKind, confidence: number | null];

/** One canvas position through all resizes. */
interface Cell {
	given: boolean;
	confidence: number | null;
}

interface Placed {
	cell: Cell;
	/** The id shown, -1: none yet. */
	id: number;
	kind: PieceKind;
	confidence: number | null;
}

/**
 * The frames of a playback: the canvas before the first step, then after each. Tokens that share a character are one piece.
 * `decode` gives the text of ids; null shows the ids themselves.
 */
export function traceFrames(
	events: readonly DenoiseStep[],
	maskId: number,
	decode: ((ids: Int32Array) => string) | null,
): Piece[][] {
	const first = events[0];
	if (!first) return [];
	const fresh = (): Cell => ({ given: false, confidence: null });
	const started = new Set(first.committed);
	let cells = Array.from(first.tokens, (id, i): Cell => ({ ...fresh(), given: id !== maskId && !started.has(i) }));
	const frames: Placed[][] = [
		cells.map((cell, i) => placed(cell, cell.given ? (first.tokens[i] as number) : -1, cell.given ? 'given' : 'open')),
	];
	for (const [e, event] of events.entries()) {
		for (const { at, removed, inserted } of e === 0 ? [] : (event.resized ?? [])) {
			cells = [...cells.slice(0, at), ...Array.from({ length: inserted }, fresh), ...cells.slice(at + removed)];
		}
		const reopened = new Set(event.reopened);
		for (const [j, position] of event.committed.entries()) {
			const cell = cells[position] as Cell;
			cell.confidence = event.confidence[j] as number;
		}
		frames.push(
			cells.map((cell, i) => {
				const id = event.tokens[i] as number;
				if (cell.given) return placed(cell, id, 'given');
				if (id !== maskId) return placed(cell, id, 'committed');
				const guess = event.provisional?.[i] ?? maskId;
				const kind = reopened.has(i) ? 'reopened' : guess === maskId ? 'open' : 'provisional';
				return placed(cell, guess === maskId ? -1 : guess, kind);
			}),
		);
	}
	// What was never open only looked so: the prompt holds the mask id there.
	for (const cell of cells) if (cell.confidence === null) cell.given = true;
	return frames.map((frame) =>
		toPieces(
			frame.map((item) => (item.cell.given && item.kind !== 'given' ? { ...item, id: maskId, kind: 'given' } : item)),
			decode,
		),
	);
}

function placed(cell: Cell, id: number, kind: PieceKind): Placed {
	return { cell, id, kind, confidence: kind === 'committed' ? cell.confidence : null };
}

/** One piece a token; the tokens of a character that is spread over several of one kind are one piece. */
function toPieces(frame: readonly Placed[], decode: ((ids: Int32Array) => string) | null): Piece[] {
	const pieces: Piece[] = [];
	for (let i = 0; i < frame.length; i++) {
		const { id, kind, confidence } = frame[i] as Placed;
		if (id < 0) {
			pieces.push(['\u00b7', kind, confidence]);
			continue;
		}
		if (!decode) {
			pieces.push([`${id} `, kind, confidence]);
			continue;
		}
		// A character has at most four bytes, and a token at least one.
		let text = decode(Int32Array.of(id));
		let lowest = confidence;
		for (let n = 2; n <= 4 && text.includes('\uFFFD'); n++) {
			const run = frame.slice(i, i + n);
			if (run.length < n || run.some((item) => item.kind !== kind || item.id < 0)) break;
			const joined = decode(Int32Array.from(run, (item) => item.id));
			if (joined.includes('\uFFFD')) continue;
			text = joined;
			lowest = confidence === null ? null : Math.min(...run.map((item) => item.confidence as number));
			i += n - 1;
		}
		pieces.push([text, kind, lowest]);
	}
	return pieces;
}

/**
 * The page of a finished generation.
 * @param events every event of the stream, in order
 */
export function traceHtml(
	events: readonly DenoiseStep[],
	result: GenerateResult,
	maskId: number,
	decode: ((ids: Int32Array) => string) | null,
): string {
	const { generatedTokens, forwards, tokensPerForward, ms, drift } = result.stats;
	const facts = [
		`${generatedTokens} tokens`,
		`${forwards} forwards`,
		`${tokensPerForward.toFixed(2)} tokens per forward`,
		`${ms.toFixed(0)} ms`,
		`seed ${result.seed}`,
		...(drift ? [`drift: mean ${drift.mean.toPrecision(3)}, max ${drift.max.toPrecision(3)} nats`] : []),
	].join(' \u00b7 ');
	// `<` would end the script element or open a comment inside it.
	const data = JSON.stringify({ facts, frames: traceFrames(events, maskId, decode) }).replace(/</g, '\\u003c');
	return page.replace('__TRACE__', () => data);
}

const page = `<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>Denoising</title>
<style>
:root { color-scheme: light dark; font: 16px/1.6 system-ui, sans-serif; }
body { max-width: 56rem; margin: 2rem auto; padding: 0 1rem; }
#canvas { font-family: ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; min-height: 8rem; }
#controls { display: flex; gap: 1rem; align-items: center; margin: 1rem 0; }
#slider { flex: 1; }
#facts, #legend { opacity: 0.75; font-size: 0.9rem; }
.given { opacity: 0.75; }
.committed { border-radius: 0.2em; }
.provisional { opacity: 0.4; font-style: italic; }
.open { opacity: 0.3; }
.reopened { outline: 2px solid #d33; text-decoration: line-through; }
</style>
</head>
<body>
<div id="controls">
<button id="play" type="button">Play</button>
<input id="slider" type="range" min="0" value="0" aria-label="step">
<output id="label" for="slider"></output>
</div>
<div id="canvas"></div>
<p id="legend"><span class="given">given</span> \u00b7 <span class="committed" data-confidence="0.2">committed, unsure</span> \u00b7 <span class="committed" data-confidence="1">committed, sure</span> \u00b7 <span class="provisional">guess</span> \u00b7 <span class="reopened">opened again</span> \u00b7 <span class="open">\u00b7 open</span></p>
<p id="facts"></p>
<script id="trace" type="application/json">__TRACE__</script>
<script>
'use strict';
const { facts, frames } = JSON.parse(document.getElementById('trace').textContent);
const [canvas, slider, label, play] = ['canvas', 'slider', 'label', 'play'].map((id) => document.getElementById(id));
const last = Math.max(0, frames.length - 1);
let timer = null;

// Red to green, by probability.
const colour = (confidence) => 'hsl(' + Math.round(120 * confidence) + ' 70% 50% / 0.3)';

function show(step) {
  slider.value = String(step);
  canvas.dataset.step = String(step);
  label.textContent = 'step ' + step + ' of ' + last;
  canvas.replaceChildren(...(frames[step] || []).map(([text, kind, confidence]) => {
    const span = document.createElement('span');
    span.className = kind;
    span.textContent = text;
    if (confidence !== null) {
      span.style.background = colour(confidence);
      span.title = 'probability ' + confidence.toFixed(3);
    }
    return span;
  }));
}

function stop() {
  clearInterval(timer);
  timer = null;
  play.textContent = 'Play';
}

function start() {
  if (Number(slider.value) >= last) show(0);
  play.textContent = 'Pause';
  timer = setInterval(() => {
    show(Math.min(last, Number(slider.value) + 1));
    if (Number(slider.value) >= last) stop();
  }, Math.max(40, Math.min(400, 12000 / (last + 1))));
}

slider.max = String(last);
slider.addEventListener('input', () => { stop(); show(Number(slider.value)); });
play.addEventListener('click', () => { if (timer === null) start(); else stop(); });
document.getElementById('facts').textContent = facts;
for (const span of document.querySelectorAll('#legend [data-confidence]')) span.style.background = colour(Number(span.dataset.confidence));
// #step=3 opens at a step, #play plays at once; without either the end is shown.
const asked = /^#step=(\\d+)$/.exec(location.hash);
show(asked ? Math.min(last, Number(asked[1])) : last);
if (location.hash === '#play') play.click();
</script>
</body>
</html>
`;
