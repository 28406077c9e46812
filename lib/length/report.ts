/** The outcome of `evaluateLength` for people: a table for terminals, two Pareto plots, and one HTML file without outside parts. */
import type { BoundRow, LengthEvaluation } from './evaluate.js';
import type { GenerationRow } from './generations.js';
import type { Difference, Spread } from './metrics.js';
import { escapeXml, type Series, svgChart } from './report-svg.js';

interface Column<T> {
	readonly name: string;
	readonly cell: (row: T) => string;
}

const percent = (value: number): string => `${(100 * value).toFixed(1)} %`;
const number = (value: number | null, digits = 2): string => (value === null ? '-' : value.toFixed(digits));
const spread = (value: Spread | null, show: (value: number) => string): string =>
	value === null
		? '-'
		: value.min === value.max
			? show(value.mean)
			: `${show(value.mean)} (${show(value.min)} .. ${show(value.max)})`;
const difference = (value: Difference | null, scale: number, digits: number): string =>
	value === null
		? '-'
		: `${number(scale * value.mean, digits)} [${number(scale * value.interval[0], digits)}, ${number(scale * value.interval[1], digits)}]`;
const target = ({ coverage }: { coverage: number | null }): string => (coverage === null ? '-' : percent(coverage));

const boundColumns: readonly Column<BoundRow>[] = [
	{ name: 'method', cell: (row) => row.method },
	{ name: 'target', cell: target },
	{ name: 'right', cell: (row) => percent(row.correct) },
	{ name: 'below', cell: (row) => percent(row.below) },
	{ name: 'above', cell: (row) => percent(row.above) },
	{ name: 'exact', cell: (row) => percent(row.exact) },
	{ name: 'tightness', cell: (row) => number(row.tightness) },
	{ name: 'looseness', cell: (row) => number(row.looseness) },
	{ name: 'shortfall', cell: (row) => number(row.shortfall) },
	{ name: 'saved', cell: (row) => number(row.saved, 1) },
	{ name: 'RMSE', cell: (row) => number(row.rmse) },
	{ name: 'pinball', cell: (row) => number(row.pinball, 3) },
	{
		name: 'vs. best constant [95 %]',
		cell: (row) => difference(row.versusConstant, 1, 3),
	},
];

const generationColumns: readonly Column<GenerationRow>[] = [
	{ name: 'method', cell: (row) => row.method },
	{ name: 'target', cell: target },
	{ name: 'tokens/s', cell: (row) => spread(row.tokensPerSecond, (v) => v.toFixed(1)) },
	{ name: 'x fixed', cell: (row) => spread(row.speedup, (v) => v.toFixed(2)) },
	{ name: 'forwards', cell: (row) => number(row.forwards, 1) },
	{ name: 'canvas', cell: (row) => number(row.canvas, 1) },
	{ name: 'exact match', cell: (row) => spread(row.exactMatch, percent) },
	{ name: 'vs. fixed, points [95 %]', cell: (row) => difference(row.exactMatchVersusFixed, 100, 2) },
	{ name: 'truncated', cell: (row) => spread(row.truncated, percent) },
	{ name: 'Wasserstein-1', cell: (row) => spread(row.wasserstein, (v) => v.toFixed(2)) },
	{ name: 'length', cell: (row) => number(row.meanLength, 1) },
	{ name: 'judged nats/token', cell: (row) => spread(row.judged, (v) => v.toFixed(3)) },
	{ name: 'vs. fixed [95 %]', cell: (row) => difference(row.judgedVersusFixed, 1, 3) },
	{ name: 'NELBO', cell: (row) => number(row.nelbo) },
	{ name: 'fits', cell: (row) => (row.fits === null ? '-' : percent(row.fits)) },
];

/** Coverage against looseness: how many answers fit, and what that costs. */
export function coverageChart({ frontier }: LengthEvaluation): string {
	const names = [...new Set(frontier.map(({ method }) => method))];
	const series: Series[] = names.map((name) => ({
		name,
		line: true,
		points: frontier
			.filter(({ method }) => method === name)
			.map(({ correct, slack, coverage }) => ({ x: 100 * correct, y: slack, label: `target ${100 * coverage} %` })),
	}));
	return svgChart({
		title: 'Coverage and looseness',
		x: 'answers that fit, %',
		y: 'mean bound - length, tokens',
		series,
	});
}

/** Speed against quality: judged likelihood when there is a judge, else exact match. */
export function speedChart({ generations }: LengthEvaluation): string | undefined {
	if (!generations) return undefined;
	const rows = generations.rows.filter(({ kind }) => kind === '');
	const judged = rows.every((row) => row.judged !== null);
	const series: Series[] = rows.map((row) => ({
		name: row.method,
		points: [
			{
				x: row.tokensPerSecond?.mean ?? 0,
				y: judged ? -(row.judged as Spread).mean : 100 * row.exactMatch.mean,
			},
		],
	}));
	const y = judged ? 'judged log-likelihood, nats per token' : 'exact match, %';
	return svgChart({ title: 'Speed and quality', x: 'tokens per second', y, series });
}

/** Aligned lines for a terminal. */
export function textReport(found: LengthEvaluation): string {
	const lines: string[] = [head(found), ''];
	for (const { kind, bounds, generations } of sections(found)) {
		lines.push(
			`${kind === '' ? 'all kinds' : kind} (${found.kinds[kind]} pairs): bounds`,
			...aligned(bounds, boundColumns),
			'',
		);
		if (generations.length > 0) lines.push('generations', ...aligned(generations, generationColumns), '');
	}
	for (const warning of found.warnings) lines.push(`warning: ${warning}`);
	return `${lines.join('\n').trimEnd()}\n`;
}

/** One HTML file; nothing is loaded from anywhere. */
export function htmlReport(found: LengthEvaluation, title: string): string {
	const parts: string[] = [
		'<!doctype html>',
		`<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>${escapeXml(title)}</title>`,
		'<style>body{font:15px/1.5 sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}table{border-collapse:collapse;font-size:13px;margin:.5em 0 1.5em}th,td{border-bottom:1px solid #ddd;padding:.25em .6em;text-align:right;white-space:nowrap}th:first-child,td:first-child{text-align:left}div{overflow-x:auto}.warning{background:#fff3cd;padding:.5em 1em}</style>',
		`</head><body><h1>${escapeXml(title)}</h1><p>${escapeXml(head(found))}</p>`,
		...found.warnings.map((warning) => `<p class="warning">${escapeXml(warning)}</p>`),
		`<div>${coverageChart(found)}</div>`,
		`<div>${speedChart(found) ?? ''}</div>`,
	];
	for (const { kind, bounds, generations } of sections(found)) {
		parts.push(`<h2>${escapeXml(kind === '' ? 'All kinds' : kind)} (${found.kinds[kind]} pairs)</h2>`);
		parts.push('<h3>Bounds</h3>', htmlTable(bounds, boundColumns));
		if (generations.length > 0) parts.push('<h3>Generations</h3>', htmlTable(generations, generationColumns));
	}
	parts.push(
		'<h2>What the columns mean</h2>',
		'<p>right: the bound is at least the true length. tightness: mean of bound - length over the rows above; looseness: over the rows that are right. saved: mean of max - bound over all rows. pinball: the quantile loss at the target, and its difference to the constant that is best on these very pairs, with a 95 % bootstrap interval. tokens/s: whole generations, looks included, timed in turns; ranges are the least and largest over seeds. fixed: exactly as many tokens as the canvas has, denoised whole and cut afterwards; early cut: the same canvas, cut as soon as an end token is committed. NELBO: nats per reference answer on the first canvas, end and padding included.</p>',
		'</body></html>',
	);
	return `${parts.join('\n')}\n`;
}

function sections(
	found: LengthEvaluation,
): { kind: string; bounds: readonly BoundRow[]; generations: readonly GenerationRow[] }[] {
	return Object.keys(found.kinds).map((kind) => ({
		kind,
		bounds: found.bounds.filter((row) => row.kind === kind),
		generations: found.generations?.rows.filter((row) => row.kind === kind) ?? [],
	}));
}

function head(found: LengthEvaluation): string {
	const { pairs, max, meanLength, calibration, signal, generations } = found;
	const auc = signal['']?.auc ?? 0.5;
	return (
		`${pairs} pairs, canvas ${max}, mean length ${meanLength.toFixed(1)}; margins from ${calibration.pairs} ` +
		`${calibration.source === 'stored' ? 'pairs, stored with the model' : calibration.source === 'split' ? 'pairs split off' : 'other pairs'}; ` +
		`area under the curve of the end probabilities ${auc.toFixed(3)}` +
		(generations ? `; ${generations.pairs} generations per method and seed, seeds ${generations.seeds.join(', ')}` : '')
	);
}

function aligned<T>(rows: readonly T[], columns: readonly Column<T>[]): string[] {
	const cells = [columns.map(({ name }) => name), ...rows.map((row) => columns.map(({ cell }) => cell(row)))];
	const widths = columns.map((_, c) => Math.max(...cells.map((line) => (line[c] as string).length)));
	return cells.map((line) =>
		line.map((text, c) => (c === 0 ? text.padEnd(widths[c] as number) : text.padStart(widths[c] as number))).join('  '),
	);
}

function htmlTable<T>(rows: readonly T[], columns: readonly Column<T>[]): string {
	const line = (cells: readonly string[], tag: string): string =>
		`<tr>${cells.map((cell) => `<${tag}>${escapeXml(cell)}</${tag}>`).join('')}</tr>`;
	const body = rows.map((row) =>
		line(
			columns.map(({ cell }) => cell(row)),
			'td',
		),
	);
	return `<div><table>${line(
		columns.map(({ name }) => name),
		'th',
	)}${body.join('')}</table></div>`;
}
