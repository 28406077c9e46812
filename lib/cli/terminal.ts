/** What the commands share: printing, errors and exit status, interruption. */
import { DiffusionNativeError } from '../errors.js';

/** ANSI styles of the denoising view. */
export const style = {
	dim: (text: string): string => `\u001b[2m${text}\u001b[22m`,
	marked: (text: string): string => `\u001b[7m${text}\u001b[27m`,
};

/** Whether the stream is a terminal on which lines may be redrawn. */
export function isTerminal(stream: NodeJS.WriteStream): boolean {
	return stream.isTTY === true && process.env['TERM'] !== 'dumb';
}

/** Rows of the terminal that `text` takes at `columns`, escape sequences apart. Wide characters count as two. */
export function rowsOf(text: string, columns: number): number {
	// biome-ignore lint/suspicious/noControlCharactersInRegex: escape sequences begin with one
	const plain = text.replace(/\u001b\[[0-9;]*m/g, '');
	let rows = 0;
	for (const line of plain.split('\n')) {
		let width = 0;
		for (const character of line) width += (character.codePointAt(0) as number) >= 0x1100 ? 2 : 1;
		rows += Math.max(1, Math.ceil(width / columns));
	}
	return rows;
}

/** A part of the terminal that is drawn over again. */
export class Redraw {
	readonly #stream: NodeJS.WriteStream;
	#rows = 0;

	constructor(stream: NodeJS.WriteStream) {
		this.#stream = stream;
	}

	draw(text: string): void {
		const up = this.#rows > 1 ? `\u001b[${this.#rows - 1}A` : '';
		this.#stream.write(`${this.#rows > 0 ? `\r${up}\u001b[J` : ''}${text}`);
		this.#rows = rowsOf(text, this.#stream.columns || 80);
	}

	/** Leaves what was drawn last and goes to a new line. */
	end(): void {
		if (this.#rows > 0) this.#stream.write('\n');
		this.#rows = 0;
	}
}

/** Wrong usage of a command: exit status 2. */
export class UsageError extends Error {}

/** The end of every `--help`. */
export const exitStatus = `
Exit status: 0 done, 1 failed or interrupted, 2 wrong usage. Ctrl-C stops cleanly, a second one kills.`;

/** Aborted by the first Ctrl-C, which alone is caught: a second one ends the process as if nobody listened. */
export function interruptible(message?: string): { signal: AbortSignal; end(): void } {
	const controller = new AbortController();
	const listener = (): void => controller.abort(new Interrupted(message));
	process.once('SIGINT', listener);
	return { signal: controller.signal, end: () => process.off('SIGINT', listener) };
}

/** The reason of an abort by Ctrl-C. */
export class Interrupted extends Error {
	constructor(message = 'interrupted') {
		super(message);
	}
}

/** Prints an error and sets the exit status: 2 wrong usage, 1 anything else, an interruption too. */
export function fail(error: unknown): void {
	if (error instanceof Interrupted) {
		process.stderr.write(`${error.message}\n`);
		process.exitCode = 1;
		return;
	}
	const isUsage =
		error instanceof UsageError || (error instanceof DiffusionNativeError && error.code === 'ERR_DN_ARGUMENT');
	const text =
		error instanceof DiffusionNativeError
			? `error ${error.code}: ${error.message}`
			: error instanceof UsageError
				? `error: ${error.message}`
				: error instanceof Error
					? (error.stack ?? error.message)
					: String(error);
	process.stderr.write(`${text}\n`);
	process.exitCode = isUsage ? 2 : 1;
}

/** Wraps a command's action: errors are printed and become the exit status. */
export function action<A extends unknown[]>(run: (...args: A) => Promise<void>): (...args: A) => Promise<void> {
	return async (...args) => {
		try {
			await run(...args);
		} catch (error) {
			fail(error);
		}
	};
}

/** Parses the value of a numeric option. */
export function number(name: string): (text: string) => number {
	return (text) => {
		const value = Number(text);
		if (text.trim() === '' || Number.isNaN(value))
			throw new UsageError(`--${name} is ${JSON.stringify(text)}, expected a number`);
		return value;
	};
}

/** JSON with typed arrays as lists and big integers as decimal strings. */
export function toJson(value: unknown): string {
	return JSON.stringify(value, (_, item: unknown) =>
		typeof item === 'bigint' ? item.toString() : ArrayBuffer.isView(item) ? Array.from(item as Int32Array) : item,
	);
}
