// Fills the tables of docs/length.md from the files of measure-length.mjs, and draws its two plots: what stands between
// `<!-- figures: NAME -->` and `<!-- end -->` is replaced. A figure whose file is not there is "Not measured yet.", so that no
// number is in the page without a results file behind it. --check writes nothing and fails when the page would change.
//
// node models/recipe/write-length.mjs [--results bench/results] [--docs docs/length.md] [--check]
import { existsSync, readFileSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { parseArgs } from 'node:util';

import { coverageChart, speedChart } from 'diffusion-native';

const { values: options } = parseArgs({
	options: {
		results: { type: 'string', default: 'bench/results' },
		docs: { type: 'string', default: 'docs/length.md' },
		check: { type: 'boolean', default: false },
	},
});

const unmeasured = 'Not measured yet.';
const percent = (value, digits = 1) => `${(100 * value).toFixed(digits)} %`;
const fixed = (value, digits = 2) => (value === null || value === undefined ? '-' : value.toFixed(digits));
const mean = (values) => values.reduce((a, b) => a + b, 0) / Math.max(1, values.length);
const range = (values, show) => `${show(mean(values))} (${show(Math.min(...values))} .. ${show(Math.max(...values))})`;
const spread = ({ mean: middle, min, max }, show) =>
	min === max ? show(middle) : `${show(middle)} (${show(min)} .. ${show(max)})`;
const interval = ({ mean: middle, interval: [low, high] }, digits = 3, scale = 1) =>
	`${fixed(scale * middle, digits)} [${fixed(scale * low, digits)}, ${fixed(scale * high, digits)}]`;

/** Mean of differences on prompts of their own, with the interval of the mean of independent ones. */
function pooled(list) {
	const half = (side) => Math.hypot(...list.map(({ mean: m, interval: i }) => i[side] - m)) / list.length;
	const middle = mean(list.map(({ mean: m }) => m));
	return { mean: middle, interval: [middle - half(0), middle + half(1)] };
}

const files = new Map();
/** The parts of a complete stage, in order, or undefined. */
function parts(name) {
	if (!files.has(name)) {
		const path = join(options.results, `length-${name}.json`);
		const found = existsSync(path) ? JSON.parse(readFileSync(path, 'utf8')) : undefined;
		files.set(name, found?.complete ? found : undefined);
	}
	const found = files.get(name);
	return found && Object.values(found.parts);
}

/** How a table came about, in a line below it. */
function source(...names) {
	const lines = names.map((name) => {
		const { machine, seconds, weights, options: used } = files.get(name);
		const facts = Object.entries(used).map(([key, value]) => `${key} ${JSON.stringify(value)}`);
		return `\`bench/results/length-${name}.json\` (${machine.isa}, ${machine.threads} threads, ${Math.round(seconds)} s, weights ${weights.model.slice(0, 8)}; ${facts.join(', ')})`;
	});
	return `\nFrom ${lines.join('; ')}.`;
}

function table(columns, rows) {
	const line = (cells) => `| ${cells.join(' | ')} |`;
	return [line(columns), line(columns.map(() => '---')), ...rows.map(line)].join('\n');
}

const boundColumns = [
	'method',
	'target',
	'right',
	'looseness',
	'tightness',
	'saved',
	'RMSE',
	'pinball - best constant',
];
const boundCells = (row) => [
	...[row.method, row.coverage === null ? 'as it is' : percent(row.coverage, 0), percent(row.correct)],
	...[fixed(row.looseness), fixed(row.tightness), fixed(row.saved, 1), fixed(row.rmse)],
	row.versusConstant ? interval(row.versusConstant) : '-',
];

function boundTables(rows, counts, wanted) {
	return Object.keys(counts)
		.map((kind) => {
			const own = rows.filter((row) => row.kind === kind && wanted(row));
			return `**${kind === '' ? 'All kinds' : kind}**, ${counts[kind]} pairs\n\n${table(boundColumns, own.map(boundCells))}`;
		})
		.join('\n\n');
}

const headed = (row) => row.method.startsWith('head');
const is = (method, coverage, kind) => (row) => row.method === method && row.coverage === coverage && row.kind === kind;

const figures = {
	bounds() {
		const found = parts('bounds')?.[0];
		if (!found) return unmeasured;
		const signal = Object.entries(found.signal).map(([kind, { before, after, auc }]) => [
			...[kind === '' ? 'all' : kind, fixed(before, 3), fixed(after, 3), fixed(auc, 3)],
		]);
		const wanted = (row) => !headed(row) && (row.coverage === null || row.coverage === 0.95);
		return [
			table(['end probabilities', 'mean before the end', 'mean from it on', 'area under the curve'], signal),
			boundTables(found.bounds, found.kinds, wanted),
			`![Coverage and looseness](${picture('coverage', coverageChart(found))})`,
			source('bounds'),
		].join('\n\n');
	},

	methods() {
		const found = parts('methods')?.[0];
		if (!found) return unmeasured;
		const columns = [
			'method',
			'tokens/s',
			'x fixed',
			'forwards',
			'canvas',
			'exact match',
			'truncated',
			'W1',
			'judged',
			'NELBO',
		];
		const rows = found.generations.rows.filter(({ kind }) => kind === '');
		const cells = rows.map((row) => [
			...[row.method, spread(row.tokensPerSecond, (v) => v.toFixed(0)), spread(row.speedup, (v) => v.toFixed(1))],
			...[fixed(row.forwards, 1), fixed(row.canvas, 1), spread(row.exactMatch, percent)],
			...[spread(row.truncated, percent), spread(row.wasserstein, fixed)],
			...[row.judged ? spread(row.judged, (v) => fixed(v, 3)) : '-', fixed(row.nelbo)],
		]);
		const svg = speedChart(found);
		return [
			`${found.generations.pairs} prompts of all kinds, seeds ${found.generations.seeds.join(', ')}; judged in nats per token, W1 between generated and true lengths in tokens.`,
			table(columns, cells),
			`![Speed and quality](${picture('speed', svg)})`,
			source('methods'),
		].join('\n\n');
	},

	'first-step'() {
		const list = parts('first-step');
		if (!list) return unmeasured;
		const columns = [
			'kind',
			'prompts',
			'mean e at the end',
			'one before',
			'e >= 1/2 at the end',
			'one before',
			'undecided',
		];
		const rows = list.map((row) => [
			...[row.kind, row.pairs, fixed(row.atTheEnd, 3), fixed(row.oneBefore, 3)],
			...[percent(row.sureAtTheEnd), percent(row.sureOneBefore), fixed(row.undecided, 1)],
		]);
		return [table(columns, rows), 'Undecided: positions with 0.05 < e < 0.95.', source('first-step')].join('\n\n');
	},

	sharpening() {
		const list = parts('sharpening');
		if (!list) return unmeasured;
		const columns = ['kind', 'from', ...Array.from({ length: 10 }, (_, i) => `${10 * i} %`)];
		const rows = list.flatMap(({ kind, toFinal, toTrue }) => [
			[kind, 'the end that comes out', ...toFinal.map((v) => fixed(v, 1))],
			[kind, 'the true end', ...toTrue.map((v) => fixed(v, 1))],
		]);
		return [table(columns, rows), source('sharpening')].join('\n\n');
	},

	training() {
		const list = parts('training');
		if (!list) return unmeasured;
		const columns = [
			'recipe',
			'kind',
			'e before',
			'e after',
			'AUC',
			'threshold 95 %: right',
			'looseness',
			'as it is: right',
			'looseness',
		];
		const rows = list.flatMap(({ recipe, signal, bounds }) =>
			Object.keys(signal).map((kind) => {
				const fitted = bounds.find(is('threshold', 0.95, kind));
				const plain = bounds.find(is('threshold', null, kind));
				const { before, after, auc } = signal[kind];
				return [
					...[recipe, kind === '' ? 'all' : kind, fixed(before, 3), fixed(after, 3), fixed(auc, 3)],
					...[fitted, plain].flatMap((row) => [percent(row.correct), fixed(row.looseness)]),
				];
			}),
		);
		return [table(columns, rows), source('training')].join('\n\n');
	},

	heads() {
		const found = parts('bounds')?.[0];
		if (!found) return unmeasured;
		const wanted = (row) =>
			row.coverage === 0.95 && (headed(row) || ['threshold', 'expected', 'constant'].includes(row.method));
		return [boundTables(found.bounds, found.kinds, wanted), source('bounds')].join('\n\n');
	},

	definitions() {
		const found = parts('definitions')?.[0];
		if (!found) return unmeasured;
		const rows = found.bounds.filter((row) => row.kind === '');
		return [
			`${found.pairs} definitions, margins from ${found.calibration.pairs} others.`,
			table(boundColumns, rows.map(boundCells)),
			source('definitions'),
		].join('\n\n');
	},

	twin() {
		const list = parts('twin');
		if (!list) return unmeasured;
		const names = [...new Set(list.map(({ name }) => name))];
		const columns = ['lengths of', 'W1 to the true ones', 'times the twin', 'mean length', 'truncated', 'forwards'];
		const twin = list.filter(({ name }) => name === 'twin');
		const rows = names.map((name) => {
			const own = list.filter((row) => row.name === name);
			return [
				...[
					name,
					range(
						own.map((row) => row.wasserstein),
						fixed,
					),
				],
				range(
					own.map((row, s) => row.wasserstein / twin[s].wasserstein),
					fixed,
				),
				...[fixed(mean(own.map((row) => row.meanLength)), 1), percent(mean(own.map((row) => row.truncated)))],
				fixed(mean(own.map((row) => row.forwards)), 1),
			];
		});
		const { pairs, trueMean } = list[0];
		return [
			`${pairs} definitions, ${twin.length} seeds, true mean length ${fixed(trueMean, 1)}.`,
			table(columns, rows),
			source('twin'),
		].join('\n\n');
	},

	parallel() {
		const list = parts('parallel');
		if (!list) return unmeasured;
		const columns = [
			'threshold',
			'tokens per forward',
			'exact match',
			'95 %',
			'definitions: tokens per forward',
			'judge perplexity',
			'entropy',
		];
		const rows = list.map(({ threshold, tokensPerForward, exactMatch, interval: [low, high], definitions: d }) => [
			...[threshold, fixed(tokensPerForward), percent(exactMatch), `${percent(low)} to ${percent(high)}`],
			...(d ? [fixed(d.tokensPerForward), fixed(d.perplexity, 1), fixed(d.entropy)] : ['-', '-', '-']),
		]);
		return [`${list[0].pairs} numbers and spellings.`, table(columns, rows), source('parallel')].join('\n\n');
	},

	targets,
};

/** The figures that issue and model are held to, each with what was measured. */
function targets() {
	const bounds = parts('bounds')?.[0];
	const definitions = parts('definitions')?.[0];
	const traffic = parts('traffic');
	const twin = parts('twin');
	const bound = (coverage, kind) => bounds?.bounds.find(is('threshold', coverage, kind));
	const exact = ['number', 'spelling'];
	const pinball = definitions?.bounds.find(is('threshold', 0.95, ''));
	const constant = definitions?.bounds.find(is('constant', 0.95, ''));
	const rowsOf = (kind, method = 'threshold', stage = traffic) =>
		stage?.map(({ rows }) => rows.find((row) => row.method === method && row.kind === kind));
	const points = exact.map((kind) => rowsOf(kind)?.map((row) => row.exactMatchVersusFixed));
	const judged = rowsOf('definition')?.map((row) => row.judgedVersusFixed);
	const distances = (name) => twin?.filter((row) => row.name === name).map((row) => row.wasserstein);
	const ratio = twin && mean(distances('length drawn')) / mean(distances('twin'));
	const told = (value, show) =>
		value === undefined || value?.includes?.(undefined) ? unmeasured.toLowerCase().replace('.', '') : show(value);
	const speed = (list) =>
		range(
			list.map((row) => row.speedup.mean),
			fixed,
		);
	const speeds = [
		['sampler `threshold`', traffic],
		["LLaDA's sampler, 64 steps", parts('plain-traffic')],
	];
	const rows = [
		...exact.flatMap((kind) => [
			[
				`${kind}: bound right (threshold, 99 %)`,
				'>= 99 %',
				told(bound(0.99, kind), (row) => `${percent(row.correct, 2)} of ${row.pairs}`),
			],
			[`${kind}: mean looseness`, '<= 2 tokens', told(bound(0.99, kind), (row) => fixed(row.looseness))],
		]),
		...[0.8, 0.9, 0.95].map((coverage) => [
			`definitions: coverage at ${percent(coverage, 0)} (threshold)`,
			'within 1.5 points',
			told(
				definitions?.bounds.find(is('threshold', coverage, '')),
				(row) => `${percent(row.correct, 2)} of ${row.pairs}`,
			),
		]),
		[
			'definitions: pinball loss at 95 % minus the best constant',
			'interval below 0',
			told(pinball, (row) => interval(row.versusConstant)),
		],
		[
			'definitions: mean looseness at 95 %, threshold against constant',
			'less',
			told(pinball && constant, () => `${fixed(pinball.looseness)} against ${fixed(constant.looseness)}`),
		],
		...speeds.flatMap(([under, stage]) => [
			[
				`mixed traffic, \`max\` 256, ${under}: speed against the fixed canvas`,
				'>= 4 times',
				told(rowsOf('', 'threshold', stage), speed),
			],
			[`${under}: by the early cut alone, without a look`, '', told(rowsOf('', 'early cut', stage), speed)],
		]),
		...exact.map((kind, k) => [
			`mixed traffic: exact match of ${kind} minus the fixed canvas's`,
			'within 0.5 points',
			told(points[k], (list) => `${interval(pooled(list), 2, 100)} points`),
		]),
		[
			'mixed traffic: judged nats per token of definitions',
			"inside the fixed canvas's spread",
			told(judged?.every(Boolean) ? rowsOf('definition') : undefined, (list) => {
				const of = (rows) =>
					range(
						rows.map((row) => row.judged.mean),
						(v) => fixed(v, 3),
					);
				return `${of(list)} against ${of(rowsOf('definition', 'fixed'))}; per answer ${interval(pooled(judged))}`;
			}),
		],
		["definitions: Wasserstein-1 of lengths drawn, times the twin's", '<= 1.2', told(ratio, fixed)],
		[
			'mixed traffic: truncated answers',
			'< 1 %',
			told(rowsOf(''), (list) =>
				range(
					list.map((row) => row.truncated.mean),
					percent,
				),
			),
		],
	];
	const names = ['bounds', 'definitions', 'traffic', 'plain-traffic', 'twin'].filter((name) => parts(name));
	return table(['held-out prompts', 'target', 'measured'], rows) + (names.length > 0 ? `\n${source(...names)}` : '');
}

const pictures = new Map();
/** Keeps a plot to be written beside the page; its name there. */
function picture(name, svg) {
	pictures.set(join(dirname(options.docs), `length-${name}.svg`), svg);
	return `length-${name}.svg`;
}

const before = readFileSync(options.docs, 'utf8');
const after = before.replace(/(<!-- figures: ([a-z-]+) -->\n)[\s\S]*?(<!-- end -->)/g, (_, open, name, close) => {
	if (!figures[name]) throw new Error(`${options.docs}: there are no figures ${name}`);
	return `${open}\n${figures[name]()}\n\n${close}`;
});
const written = new Map([[options.docs, after], ...pictures]);
const stale = [...written].filter(([path, text]) => !existsSync(path) || readFileSync(path, 'utf8') !== text);
for (const [path, text] of options.check ? [] : stale) writeFileSync(path, text);
console.log(
	stale.length === 0
		? 'nothing to change'
		: `${stale.map(([path]) => path).join(', ')}: ${options.check ? 'not up to date' : 'written'}`,
);
if (options.check && stale.length > 0) process.exitCode = 1;
