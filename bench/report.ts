/**
 * The tables of docs/performance.md from results files of `npm run bench -- --peers --json FILE`:
 *   node dist/bench/report.js FILE... [--write docs/performance.md]
 * Prints them, or puts them in their places in the document. What a later file measured again replaces what an earlier one
 * says; a row is never made from two files.
 */
import { readFileSync, writeFileSync } from 'node:fs';
import { parseArgs } from 'node:util';

import { fill, merge, type Results, tables } from './tables.js';

const { values, positionals } = parseArgs({ options: { write: { type: 'string' } }, allowPositionals: true });
if (positionals.length === 0) {
	console.error('usage: node dist/bench/report.js RESULTS.json... [--write DOCUMENT.md]');
	process.exit(2);
}
const results = merge(positionals.map((file) => JSON.parse(readFileSync(file, 'utf8')) as Results));
if (values.write === undefined) {
	for (const [name, make] of Object.entries(tables)) console.log(`## ${name}\n\n${make(results)}\n`);
} else {
	writeFileSync(values.write, fill(readFileSync(values.write, 'utf8'), results));
}
