/** Checks of options objects that every public call makes: known names (with "did you mean"), a signal, a listener. */
import { check } from './errors.js';

/** Whole numbers that reach the addon as 32-bit ones. */
export const mostInt32 = 2 ** 31 - 1;

/** Whether a number is finite where it reaches the addon, which computes in fp32. */
export function isFinite32(value: number): boolean {
	return Number.isFinite(Math.fround(value));
}

/** Throws `ERR_DN_ARGUMENT` unless `options` is an object (or absent) that has none but the known keys. */
export function checkOptions(what: string, options: unknown, known: readonly string[]): void {
	if (options === undefined) return;
	check(
		typeof options === 'object' && options !== null && !Array.isArray(options),
		`${what}: options is ${Array.isArray(options) ? 'a list' : String(options)}, expected an object`,
	);
	for (const key of Object.keys(options)) {
		check(
			known.includes(key),
			() => `${what}: option ${key} is not known${suggest(key, known) || `, expected ${known.join(', ')}`}`,
		);
	}
	const { signal, onProgress } = options as { signal?: unknown; onProgress?: unknown };
	checkSignal(what, signal);
	check(onProgress === undefined || typeof onProgress === 'function', `${what}: option onProgress is not a function`);
}

/** A value in a message: as JSON, where that can be, bigints as `1n`; else its kind. */
export function show(value: unknown): string {
	if (typeof value === 'bigint') return `${value}n`;
	try {
		return JSON.stringify(value, (_, part) => (typeof part === 'bigint' ? `${part}n` : part)) ?? typeof value;
	} catch {
		return typeof value; // circular
	}
}

/** Throws `ERR_DN_ARGUMENT` unless `signal` is an AbortSignal or absent. */
export function checkSignal(what: string, signal: unknown): asserts signal is AbortSignal | undefined {
	check(
		signal === undefined || signal instanceof AbortSignal,
		`${what}: option signal is not an AbortSignal; make one with new AbortController().signal`,
	);
}

/** ", did you mean 'maxSteps'?" or '' when nothing is near: at most a third of the letters differ. */
export function suggest(name: string, known: readonly string[]): string {
	let best: string | undefined;
	let least = Math.max(2, Math.floor(name.length / 3)) + 1;
	for (const candidate of known) {
		const distance = edits(name.toLowerCase(), candidate.toLowerCase());
		if (distance >= least) continue;
		least = distance;
		best = candidate;
	}
	return best === undefined ? '' : `, did you mean '${best}'?`;
}

/** Levenshtein distance. */
function edits(a: string, b: string): number {
	let row = Array.from({ length: b.length + 1 }, (_, j) => j);
	for (let i = 1; i <= a.length; i++) {
		const next = [i];
		for (let j = 1; j <= b.length; j++) {
			const replaced = (row[j - 1] as number) + (a[i - 1] === b[j - 1] ? 0 : 1);
			next.push(Math.min(replaced, (row[j] as number) + 1, (next[j - 1] as number) + 1));
		}
		row = next;
	}
	return row[b.length] as number;
}
