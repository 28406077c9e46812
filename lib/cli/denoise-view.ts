/**
 * A generation as it appears on a terminal: committed text plain, guesses dim, positions opened again in reverse video, and what
 * is drawn over again with every step. Text of a model may hold anything; what would steer the terminal is shown as a symbol.
 */
import type { DenoiseStep } from '../denoise-loop.js';

/** ANSI styles of the view. */
export const style = {
	dim: (text: string): string => `\u001b[2m${text}\u001b[22m`,
	marked: (text: string): string => `\u001b[7m${text}\u001b[27m`,
};

/** What the view knows of the model and the prompt. */
export interface ViewOptions {
	maskId: number;
	decode(ids: Int32Array): string;
	/** Given tokens before and after the gap; there an id is text even when it is the mask's. */
	before: number;
	after: number;
}

/** The canvas of a step. Runs of equal style are decoded together, so that characters of several tokens stay whole. */
export function renderStep(event: DenoiseStep, { maskId, decode, before, after }: ViewOptions): string {
	const reopened = new Set(event.reopened);
	const runs: { kind: 'plain' | 'dim' | 'marked'; ids: number[]; unknown: number }[] = [];
	for (const [i, id] of event.tokens.entries()) {
		const isOpen = id === maskId && i >= before && i < event.tokens.length - after;
		const kind = !isOpen ? 'plain' : reopened.has(i) ? 'marked' : 'dim';
		const shown = isOpen ? (event.provisional?.[i] ?? maskId) : id;
		let run = runs.at(-1);
		if (run?.kind !== kind) {
			run = { kind, ids: [], unknown: 0 };
			runs.push(run);
		}
		if (isOpen && shown === maskId) run.unknown++;
		else run.ids.push(shown);
	}
	return runs
		.map(({ kind, ids, unknown }) => {
			const text = printable(decode(Int32Array.from(ids))) + '\u00b7'.repeat(unknown);
			return kind === 'plain' ? text : style[kind](text);
		})
		.join('');
}

/** Control characters as the symbols that stand for them, tabs as spaces; only line feeds stay. */
export function printable(text: string): string {
	// biome-ignore lint/suspicious/noControlCharactersInRegex: these are what is replaced
	return text.replace(/[\u0000-\u0009\u000b-\u001f\u007f-\u009f]/g, (character) => {
		const code = character.charCodeAt(0);
		if (code === 9) return '    ';
		return code < 32 ? String.fromCharCode(0x2400 + code) : code === 127 ? '\u2421' : '\uFFFD';
	});
}

/** The rows that `text` takes at `columns`, each with the styles that it begins in. Wide characters count as two columns. */
export function screenRows(text: string, columns: number): string[] {
	const rows: string[] = [];
	let row = '';
	let width = 0;
	let active = '';
	const end = (): void => {
		rows.push(row);
		row = active;
		width = 0;
	};
	// biome-ignore lint/suspicious/noControlCharactersInRegex: escape sequences begin with one
	for (const [part] of text.matchAll(/\u001b\[[0-9;]*m|./gsu)) {
		if (part === '\n') {
			end();
		} else if (part.length > 1 && part.startsWith('\u001b')) {
			active = part === '\u001b[2m' || part === '\u001b[7m' ? part : '';
			row += part;
		} else {
			const size = (part.codePointAt(0) as number) >= 0x1100 ? 2 : 1;
			if (width + size > columns) end();
			row += part;
			width += size;
		}
	}
	rows.push(row);
	return rows;
}

/** A part of the terminal that is drawn over again. Of what is taller than the screen, the end is shown meanwhile. */
export class Redraw {
	readonly #stream: Pick<NodeJS.WriteStream, 'write' | 'columns' | 'rows'>;
	#rows = 0;

	constructor(stream: Pick<NodeJS.WriteStream, 'write' | 'columns' | 'rows'>) {
		this.#stream = stream;
	}

	draw(text: string): void {
		const rows = screenRows(text, this.#stream.columns || 80).slice(1 - (this.#stream.rows || 24));
		this.#over(rows.join('\n'));
		this.#rows = rows.length;
	}

	/** Draws for the last time, all of the text, and goes to a new line. */
	finish(text: string): void {
		this.#over(`${text}\n`);
		this.#rows = 0;
	}

	/** Leaves what was drawn last, if anything was and `finish` was not called, and goes to a new line. */
	end(): void {
		if (this.#rows > 0) this.#stream.write('\n');
		this.#rows = 0;
	}

	#over(text: string): void {
		const up = this.#rows > 1 ? `\u001b[${this.#rows - 1}A` : '';
		this.#stream.write(`${this.#rows > 0 ? `\r${up}\u001b[J` : ''}${text}`);
	}
}
