/**
 * `npm run bench [-- part of a name] [--json FILE]`: runs the cases whose name contains one of the arguments, prints a table
 * and, with --json, writes { machine, results }. Cases that take minutes run only when named.
 */
import { execFileSync } from 'node:child_process';
import { writeFileSync } from 'node:fs';
import { parseArgs } from 'node:util';

import { eventLoopCase, timerDelays } from './cases/event-loop.js';
import { forwardCases } from './cases/forward.js';
import { generateCases } from './cases/generate.js';
import { trainStepCases } from './cases/train-step.js';
import { type BenchResult, machine, measure } from './harness.js';

const { values, positionals } = parseArgs({
	options: { json: { type: 'string' }, list: { type: 'boolean', default: false } },
	allowPositionals: true,
});
const all = [...forwardCases, ...trainStepCases, ...generateCases, eventLoopCase];
const wanted = all.filter(({ name, onlyIfNamed }) =>
	positionals.length === 0 ? values.list || !onlyIfNamed : positionals.some((part) => name.includes(part)),
);
if (values.list) {
	for (const { name } of wanted) console.log(name);
	process.exit(0);
}
if (wanted.length === 0) {
	console.error(`no case matches ${positionals.join(', ')}; --list shows all`);
	process.exit(2);
}

const columns = ['tokens/s', 'ms', 'p10', 'p90', 'GFLOP/s', 'RSS MB'];
console.log('case'.padEnd(44) + columns.map((column) => column.padStart(11)).join(''));
const results: BenchResult[] = [];
for (const bench of wanted) {
	const result = await measure(bench);
	if (bench === eventLoopCase) result.extra = { ...timerDelays };
	results.push(result);
	const cells = [
		result.tokensPerSecond.toFixed(1),
		result.ms.median.toFixed(1),
		result.ms.p10.toFixed(1),
		result.ms.p90.toFixed(1),
		result.gflops?.toFixed(0) ?? '-',
		(result.peakRssBytes / 2 ** 20).toFixed(0),
	];
	console.log(result.name.padEnd(44) + cells.map((cell) => cell.padStart(11)).join(''));
	if (result.extra) console.log(`  ${JSON.stringify(result.extra)}`);
}

if (values.json) {
	let commit = 'unknown';
	try {
		commit = execFileSync('git', ['rev-parse', '--short', 'HEAD'], { encoding: 'utf8' }).trim();
	} catch {
		// Not a git checkout: the results say so.
	}
	writeFileSync(values.json, `${JSON.stringify({ machine: { ...machine(), commit }, results }, null, '\t')}\n`);
}
