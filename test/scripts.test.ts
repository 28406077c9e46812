/** The scripts of the repository where a tool that they need is missing. */
import { spawnSync } from 'node:child_process';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import test from 'ava';

import { root } from './helpers/fixtures.js';

const folder = mkdtempSync(join(tmpdir(), 'dn-scripts-'));
test.after.always(() => rmSync(folder, { recursive: true, force: true }));
writeFileSync(join(folder, 'nvcc'), '#!/bin/sh\n', { mode: 0o755 });

for (const [script, message] of [
	['check-cuda.mjs', /^check-cuda: there is no c\+\+filt here.*binutils\n$/],
	['format-native.mjs', /^format-native: git cannot list the sources: .*ENOENT\n$/],
] as const) {
	test(`${script} says which tool is missing`, (t) => {
		const { status, stderr } = spawnSync(process.execPath, [join(root, 'scripts', script)], {
			encoding: 'utf8',
			env: { PATH: folder, CUDACXX: join(folder, 'nvcc') },
		});
		t.is(status, 1);
		t.regex(stderr, message);
	});
}
