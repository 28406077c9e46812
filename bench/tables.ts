/** The tables of docs/performance.md, from a results file of the benchmark. What the file lacks they call not measured. */
import type { BenchResult } from './harness.js';
import type { ComparisonResult, Measured } from './peers/compare.js';
import { ratios } from './peers/table.js';

export interface Results {
	machine: Record<string, string | number>;
	results: BenchResult[];
	comparisons?: ComparisonResult[];
}

/**
 * One from several, of the same machine: what a later one measured stands in the place of what an earlier one did.
 * @throws when they are of different machines
 */
export function merge(files: readonly Results[]): Results {
	const [first, ...later] = files as [Results, ...Results[]];
	for (const { machine } of later) {
		for (const key of ['cpu', 'isa', 'platform', 'peers']) {
			if (machine[key] !== first.machine[key])
				throw new Error(
					`results of different machines: ${key} is ${machine[key]} in one, ${first.machine[key]} in another`,
				);
		}
	}
	const newest = <T>(lists: readonly (readonly T[] | undefined)[], keyOf: (entry: T) => string): T[] => {
		const byKey = new Map<string, T>();
		for (const entry of lists.flatMap((list) => list ?? [])) byKey.set(keyOf(entry), entry);
		return [...byKey.values()];
	};
	const commits = new Set(files.map(({ machine }) => machine['commit'] as string));
	return {
		machine: { ...first.machine, commit: [...commits].join(' and ') },
		results: newest(
			files.map(({ results }) => results),
			({ name }) => name,
		),
		comparisons: newest(
			files.map(({ comparisons }) => comparisons),
			({ name, dtype, peer }) => [name, dtype, peer.engine, peer.dtype].join(' '),
		),
	};
}

const notMeasured = 'Not measured yet.';

function table(head: readonly string[], rows: readonly (readonly string[])[]): string {
	const lines = [head, head.map((_, i) => (i === 0 ? '---' : '---:')), ...rows];
	return lines.map((cells) => `| ${cells.join(' | ')} |`).join('\n');
}

function find(results: Results, name: string): BenchResult | undefined {
	return results.results.find((result) => result.name === name);
}

function figure(value: number | undefined, digits: number): string {
	return value === undefined || !Number.isFinite(value) ? 'not measured' : value.toFixed(digits);
}

/** Figure of the machine on all threads: 'fp32 peak', 'int8 peak', 'memory read', 'memory copy'; NaN where it is missing. */
function ceiling(results: Results, name: string): number {
	const found = Object.entries(find(results, 'machine')?.extra ?? {}).filter(([key]) => key.startsWith(`${name}, t`));
	return found.map(([, value]) => value).at(-1) ?? Number.NaN;
}

function machineTable(results: Results): string {
	const { extra } = find(results, 'machine') ?? {};
	if (!extra) return notMeasured;
	const rows = Object.entries(extra).map(([key, value]) => {
		const unit = key.slice(key.lastIndexOf(', ') + 2);
		const [name, threads] = key.slice(0, key.lastIndexOf(', ')).split(', t') as [string, string];
		return [name, threads, figure(value, value < 10 ? 2 : 0), unit];
	});
	const { cpu, isa, node, platform, commit } = results.machine;
	const where = `${cpu}, kernels for ${isa}, Node ${node}, ${platform}, commit ${commit}.`;
	return `${where}\n\n${table(['figure', 'threads', 'value', 'unit'], rows)}`;
}

function cell(measured: Measured | string): string {
	if (typeof measured === 'string') return 'not measured';
	return `${figure(measured.ms.median, measured.ms.median < 100 ? 1 : 0)}${measured.scaled === undefined ? '' : '\\*'}`;
}

function peersTable({ comparisons = [] }: Results): string {
	if (comparisons.length === 0) return notMeasured;
	const rows = comparisons.map((row) => [
		`\`${row.name}\` ${row.dtype}`,
		`${row.peer.engine} ${row.peer.dtype}`,
		cell(row.ours),
		cell(row.tuned),
		cell(row.shipped),
		ratios(row.ratio),
		row.bar ? ratios(row.bar) : '',
		row.bar ? (row.reached === null ? 'not measured' : row.reached ? 'yes' : 'no') : '',
	]);
	return table(['case', 'peer', 'ours ms', 'tuned ms', 'as shipped ms', 'ratio', 'to reach', 'reached'], rows);
}

/** Every op of a step: what it costs at least on this machine, and what share of that it reached. */
function rooflineTable(results: Results, step: string): string {
	const measured = find(results, `operations/gpt2/${step}`);
	if (!measured?.extra) return notMeasured;
	const extra = measured.extra;
	const peak = ceiling(results, 'fp32 peak');
	const copy = ceiling(results, 'memory copy');
	const read = ceiling(results, 'memory read');
	// Some machines read faster than they copy, others the other way round; older results have no copy.
	const bandwidth = Number.isNaN(copy) ? read : Math.max(read, copy);
	const names = Object.keys(extra)
		.filter((key) => key.endsWith(', calls'))
		.map((key) => key.slice(0, -', calls'.length));
	const rows = names.map((name) => {
		const get = (field: string): number => extra[`${name}, ${field}`] ?? Number.NaN;
		const [gflop, gigabytes, wall] = [get('GFLOP'), get('GB'), get('wall ms')];
		const compute = (gflop / peak) * 1e3;
		const memory = (gigabytes / bandwidth) * 1e3;
		const least = Math.max(compute, memory);
		const bound = compute >= memory ? 'compute' : 'memory';
		return [
			name,
			String(get('calls')),
			figure(gflop, 2),
			figure(gigabytes * 1e3, 0),
			figure(least, 2),
			Number.isNaN(least) ? 'not measured' : bound,
			figure(wall, 2),
			figure((least / wall) * 100, 0),
		];
	});
	return table(['op', 'calls', 'GFLOP', 'MB', 'least ms', 'bound by', 'ms', 'achieved %'], rows);
}

function memoryTable(results: Results): string {
	const names = results.results.filter(({ name }) => /^(memory|load|scaling)\//.test(name));
	if (names.length === 0) return notMeasured;
	const rows = names.map(({ name, ms, peakRssBytes, extra }) => [
		`\`${name}\``,
		figure(ms.median, 0),
		name.startsWith('scaling') || peakRssBytes === null ? '' : figure(peakRssBytes / 2 ** 20, 0),
		figure(extra?.['speedup'], 2).replace('not measured', ''),
	]);
	return table(['case', 'ms', 'peak RSS, MiB', 'speed-up'], rows);
}

export const tables: Record<string, (results: Results) => string> = {
	machine: machineTable,
	peers: peersTable,
	'roofline forward T = 256': (results) => rooflineTable(results, 'forward/T256/logits'),
	'roofline forward T = 1024': (results) => rooflineTable(results, 'forward/T1024/logits'),
	'roofline denoising step': (results) => rooflineTable(results, 'denoise/T256/half'),
	'roofline training step': (results) => rooflineTable(results, 'train-step/2x256'),
	memory: memoryTable,
};

/** `text` with what stands between `<!-- table: NAME -->` and `<!-- end -->` made anew. @throws when it marks a table that does not exist */
export function fill(text: string, results: Results): string {
	return text.replace(
		/(<!-- table: (.+?) -->\n)[\s\S]*?(<!-- end -->)/g,
		(_, begin: string, name: string, end: string) => {
			const make = tables[name];
			if (!make) throw new Error(`no table ${JSON.stringify(name)}; there are ${Object.keys(tables).join(', ')}`);
			return `${begin}\n${make(results)}\n\n${end}`;
		},
	);
}
