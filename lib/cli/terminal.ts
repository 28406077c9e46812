/** What the commands share: printing, errors and exit status, interruption. */
import type { Padding } from '../data/format.js';
import { DiffusionNativeError, isDataError } from '../errors.js';

/** Whether the stream is a terminal on which lines may be redrawn. */
export function isTerminal(stream: NodeJS.WriteStream): boolean {
	return stream.isTTY === true && process.env['TERM'] !== 'dumb';
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

/**
 * When what a command prints cannot be written, the command is interrupted as by Ctrl-C and the rest is lost: the reader has
 * left (`| head -1`), or, which also makes the exit status 1, the terminal is gone (EIO) or a disk is full.
 */
export function stopWhenNobodyReads(): void {
	let left = false;
	for (const stream of [process.stdout, process.stderr]) {
		stream.on('error', (error: NodeJS.ErrnoException) => {
			if (error.code !== 'EPIPE') process.exitCode = 1;
			if (!left) left = process.emit('SIGINT');
		});
	}
}

/** Prints an error and sets the exit status: 2 wrong usage, 1 anything else, bad data and an interruption too. */
export function fail(error: unknown): void {
	if (error instanceof Interrupted) {
		process.stderr.write(`${error.message}\n`);
		process.exitCode = 1;
		return;
	}
	const isUsage =
		error instanceof UsageError ||
		(error instanceof DiffusionNativeError && error.code === 'ERR_DN_ARGUMENT' && !isDataError(error));
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
		if (text.trim() === '' || !Number.isFinite(value))
			throw new UsageError(`--${name} is ${JSON.stringify(text)}, expected a number`);
		return value;
	};
}

/** The kinds of --padding as help and errors spell them; `words` are those without an amount. */
export function paddingKinds(words: readonly string[]): string {
	return `${words.join(', ')}, multiple:N, random:N or log-uniform:N`;
}

/** Parses the value of --padding; log-uniform may also be spelt as the library spells it, logUniform. */
export function padding<Word extends 'none' | 'context' | 'batch'>(
	words: readonly Word[],
): (text: string) => Word | Exclude<Padding, string> {
	return (text) => {
		const word = words.find((known) => known === text);
		if (word !== undefined) return word;
		const [, kind, amount] = /^(multiple|random|log-uniform|logUniform):(\d+)$/.exec(text) ?? [];
		if (kind === undefined)
			throw new UsageError(`--padding is ${JSON.stringify(text)}, expected ${paddingKinds(words)}`);
		const N = Number(amount);
		if (kind === 'multiple') return { multiple: N };
		return kind === 'random' ? { random: N } : { logUniform: N };
	};
}

/** JSON with typed arrays as lists and big integers as decimal strings. */
export function toJson(value: unknown): string {
	return JSON.stringify(value, (_, item: unknown) =>
		typeof item === 'bigint' ? item.toString() : ArrayBuffer.isView(item) ? Array.from(item as Int32Array) : item,
	);
}
