/** docs/length.md and its plots hold what the committed results say, and nothing else. */
import { spawnSync } from 'node:child_process';
import { cpSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import test from 'ava';

import { root } from './helpers/fixtures.js';

const script = join(root, 'models/recipe/write-length.mjs');
const run = (...args: string[]) => spawnSync(process.execPath, [script, ...args], { cwd: root, encoding: 'utf8' });

test('the tables of docs/length.md are those of the committed results', (t) => {
	const { status, stdout, stderr } = run('--check');
	t.is(status, 0, `${stdout}${stderr}`);
});

test('a results file fills its table; without it the page says so; a changed figure is noticed', (t) => {
	const folder = mkdtempSync(join(tmpdir(), 'dn-length-docs-'));
	try {
		const docs = join(folder, 'length.md');
		const results = join(folder, 'results');
		mkdirSync(results);
		cpSync(join(root, 'docs/length.md'), docs);
		const given = ['--docs', docs, '--results', results];
		t.is(run(...given).status, 0);
		const empty = readFileSync(docs, 'utf8');
		t.true(empty.split('Not measured yet.').length > 8);
		t.false(/\| \d/.test(empty.slice(empty.indexOf('**What is asked'))), 'no figure without a file');
		const row = {
			kind: 'number',
			pairs: 7,
			atTheEnd: 0.987,
			oneBefore: 0.012,
			sureAtTheEnd: 1,
			sureOneBefore: 0,
			undecided: 1.4,
		};
		const file = (complete: boolean): void =>
			writeFileSync(
				join(results, 'length-first-step.json'),
				JSON.stringify({
					...{ stage: 'first-step', complete, seconds: 3, options: { max: 256 }, weights: { model: 'abcdef0123' } },
					...{ machine: { isa: 'avx2', threads: 2 }, parts: { number: row } },
				}),
			);
		file(false);
		run(...given);
		t.is(readFileSync(docs, 'utf8'), empty, 'half a stage is no result');
		file(true);
		t.is(run(...given, '--check').status, 1);
		t.is(readFileSync(docs, 'utf8'), empty, 'a check writes nothing');
		t.is(run(...given).status, 0);
		t.regex(readFileSync(docs, 'utf8'), /\| number \| 7 \| 0\.987 \| 0\.012 \| 100\.0 % \| 0\.0 % \| 1\.4 \|/);
		t.is(run(...given, '--check').status, 0);
		writeFileSync(docs, readFileSync(docs, 'utf8').replace('0.987', '0.999'));
		t.is(run(...given, '--check').status, 1);
	} finally {
		rmSync(folder, { recursive: true });
	}
});
