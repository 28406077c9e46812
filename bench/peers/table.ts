/** The table of a comparison, for a terminal. */
import type { ComparisonResult, Measured } from './compare.js';

const columns = ['ours ms', 'tuned', 'as shipped', 'ratio', 'to reach', 'reached'];
const widths = [10, 10, 12, 16, 14, 9];
const nameWidth = 44;
const peerWidth = 18;

function aligned(cells: readonly string[]): string {
	return cells.map((cell, i) => cell.padStart(widths[i] as number)).join('');
}

export function header(): string {
	return 'case'.padEnd(nameWidth) + 'peer'.padEnd(peerWidth) + aligned(columns);
}

function milliseconds(measured: Measured | string): string {
	if (typeof measured === 'string') return '-';
	const { median } = measured.ms;
	return `${median.toFixed(median < 100 ? 1 : 0)}${measured.scaled === undefined ? '' : '*'}`;
}

/** "1.31 / 1.44": against the tuned peer and the one as shipped. */
export function ratios({ tuned, shipped }: { tuned: number | null; shipped?: number | null | undefined }): string {
	const one = (ratio: number | null): string => ratio?.toFixed(2) ?? '-';
	return shipped === undefined ? one(tuned) : `${one(tuned)} / ${one(shipped)}`;
}

/** One line, and below it what could not be measured and why. */
export function line(row: ComparisonResult): string {
	const { bar, reached } = row;
	const cells = [
		...[row.ours, row.tuned, row.shipped].map(milliseconds),
		ratios(row.ratio),
		bar ? ratios(bar) : '',
		reached === null ? (bar ? 'unknown' : '') : reached ? 'yes' : 'NO',
	];
	const reasons = new Set([row.ours, row.tuned, row.shipped].filter((entry) => typeof entry === 'string'));
	return [
		`${row.name} ${row.dtype}`.padEnd(nameWidth) +
			`${row.peer.engine} ${row.peer.dtype}`.padEnd(peerWidth) +
			aligned(cells),
		...[...reasons].map((reason) => `  not measured: ${reason}`),
	].join('\n');
}

export const legend = [
	'Milliseconds, medians; ratio: the peer over ours, tuned / as shipped; *: a part was run and scaled up. Smaller is better for',
	'milliseconds, larger for ratios. Every contender computed the same results as ours before it was timed.',
].join('\n');
