/**
 * `npm run bench [-- parts of names] [options]`: runs the cases whose name is or contains one of the arguments, prints a table
 * and, with --json, writes { machine, results } after every case. With --peers it runs those of the machine, scaling, memory and
 * operations, and then compares with other engines; bench/peers/README.md.
 */
import { execFileSync } from 'node:child_process';
import { writeFileSync } from 'node:fs';

import { Command, InvalidArgumentError } from 'commander';

import { eventLoopCase, timerDelays } from './cases/event-loop.js';
import { forwardCases } from './cases/forward.js';
import { generateCases } from './cases/generate.js';
import { machineCases } from './cases/machine.js';
import { memoryCases } from './cases/memory.js';
import { operationCases } from './cases/operations.js';
import { scalingCases } from './cases/scaling.js';
import { trainStepCases } from './cases/train-step.js';
import { type BenchResult, machine, measure, named } from './harness.js';
import { type ComparisonResult, chosenComparisons, compare, nameOf } from './peers/compare.js';
import { peersLackAmx } from './peers/contenders.js';
import { missing } from './peers/installed.js';
import { header, legend, line } from './peers/table.js';

/** A whole number >= 1, for commander. */
function count(text: string): number {
	const value = Number(text);
	if (!(Number.isInteger(value) && value >= 1)) throw new InvalidArgumentError('expected a whole number >= 1');
	return value;
}

interface Options {
	json?: string;
	list?: true;
	repeats?: number;
	peers?: true;
	quick?: true;
	models?: string;
	rounds?: number;
}

const program = new Command('bench')
	.description('Times the library. Give parts of names to choose cases; those that take minutes run only when named.')
	.argument('[names...]', 'parts of the names of cases, or of comparisons with --peers (default: all)')
	.option('--list', 'print the names of the cases, with --peers of the comparisons too, and run nothing')
	.option('--json <file>', 'write machine, commit and results there, after every case')
	.option('--repeats <n>', 'time each case so often (default: as often as it says)', count)
	.option('--peers', 'compare with onnxruntime-node, llama.cpp and PyTorch where they are installed')
	.option('--quick', 'with --peers: a part of the comparisons, few rounds')
	.option('--rounds <n>', 'with --peers: turns of every contender', count)
	.option('--models <folder>', 'with --peers: keep the written models there (default: a temporary folder)')
	.parse();
const values = program.opts<Options>();
const positionals = program.args;
const { repeats } = values;
const ofMachine = [...machineCases, ...scalingCases, ...memoryCases, ...operationCases];
const all = [...ofMachine, ...forwardCases, ...trainStepCases, ...generateCases, eventLoopCase];
const offered = values.peers ? ofMachine : all;
const wanted =
	positionals.length === 0
		? offered.filter(({ onlyIfNamed }) => values.list || !onlyIfNamed)
		: named(offered, positionals);
if (!values.peers) {
	for (const option of ['quick', 'rounds', 'models'] as const)
		if (values[option] !== undefined) program.error(`error: option '--${option}' needs '--peers'`);
}
const comparisonNames = (names: readonly string[]): string[] =>
	values.peers ? chosenComparisons({ names, quick: values.quick ?? false, rounds: values.rounds }).map(nameOf) : [];
for (const part of positionals) {
	if (named(offered, [part]).length > 0 || comparisonNames([part]).length > 0) continue;
	const known = [...offered.map(({ name }) => name), ...comparisonNames([])];
	const what = values.peers ? `case or comparison${values.quick ? ' of a quick run' : ''}` : 'case';
	program.error(`error: no ${what} matches ${part}; there are\n${known.join('\n')}`);
}
if (values.list) {
	for (const name of [...wanted.map((bench) => bench.name), ...comparisonNames(positionals)]) console.log(name);
	process.exit(0);
}

const columns = ['tokens/s', 'ms', 'p10', 'p90', 'GFLOP/s', 'RSS MB'];
const results: BenchResult[] = [];
const unavailable: { name: string; dtype: string; reason: string }[] = [];
const comparisons: ComparisonResult[] = [];
const commit = currentCommit();
if (wanted.length > 0) {
	console.log('case'.padEnd(44) + columns.map((column) => column.padStart(11)).join(''));
}
for (const bench of wanted) {
	let result: BenchResult;
	try {
		result = await measure(bench, repeats);
	} catch (error) {
		const reason = (error as Error).message;
		unavailable.push({ name: bench.name, dtype: bench.dtype, reason });
		console.log(`${bench.name.padEnd(44)} not measured: ${reason}`);
		continue;
	}
	if (bench === eventLoopCase) result.extra = { ...timerDelays };
	results.push(result);
	save();
	const cells = [
		result.tokensPerSecond > 0 ? result.tokensPerSecond.toFixed(1) : '-',
		result.ms.median.toFixed(1),
		result.ms.p10.toFixed(1),
		result.ms.p90.toFixed(1),
		result.gflops?.toFixed(0) ?? '-',
		result.peakRssBytes === null ? '-' : (result.peakRssBytes / 2 ** 20).toFixed(0),
	];
	console.log(result.name.padEnd(44) + cells.map((cell) => cell.padStart(11)).join(''));
	if (result.extra) console.log(`  ${JSON.stringify(result.extra)}`);
}

if (values.peers) {
	for (const engine of ['onnxruntime', 'llama', 'torch'] as const) {
		const reason = missing(engine);
		if (reason !== undefined) console.log(reason);
	}
	if (peersLackAmx()) console.log('DN_ISA keeps ours off AMX: the peers must do without it, too');
	console.log(`\n${header()}`);
	await compare({
		names: positionals,
		quick: values.quick ?? false,
		folder: values.models,
		rounds: values.rounds,
		onRow: (row) => {
			console.log(line(row));
			comparisons.push(row);
			save();
		},
	});
	console.log(`\n${legend}`);
}

save();

/** Writes what there is so far: a run of hours that is interrupted keeps its results. */
function save(): void {
	if (!values.json) return;
	const report = {
		machine: { ...machine(), commit, ...(values.peers && peersLackAmx() ? { peers: 'without AMX' } : {}) },
		results,
		...(unavailable.length > 0 ? { unavailable } : {}),
		...(values.peers ? { comparisons } : {}),
	};
	writeFileSync(values.json, `${JSON.stringify(report, null, '\t')}\n`);
}

function currentCommit(): string {
	try {
		const commit = execFileSync('git', ['rev-parse', '--short', 'HEAD'], { encoding: 'utf8' }).trim();
		const changed = execFileSync('git', ['status', '--porcelain'], { encoding: 'utf8' }).trim() !== '';
		return changed ? `${commit}, changed` : commit;
	} catch {
		return 'unknown'; // not a git checkout
	}
}
