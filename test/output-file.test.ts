/** Files that commands write while they run: what is there before, after and when they fail. */
import {
	chmodSync,
	existsSync,
	lstatSync,
	mkdirSync,
	mkdtempSync,
	readdirSync,
	readFileSync,
	rmSync,
	statSync,
	symlinkSync,
	writeFileSync,
} from 'node:fs';
import promises from 'node:fs/promises';
import { syncBuiltinESMExports } from 'node:module';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';

import test from 'ava';
import { DiffusionNativeError } from 'diffusion-native';

import { OutputFile } from '../lib/cli/output-file.js';

const scratch = mkdtempSync(join(tmpdir(), 'dn-output-'));
let count = 0;
/** A path in a directory of its own. */
function fresh(): string {
	const folder = join(scratch, String(count++));
	mkdirSync(folder);
	return join(folder, 'out.jsonl');
}
test.after.always(() => rmSync(scratch, { recursive: true, force: true }));

test('a file is replaced when it is kept, not before', async (t) => {
	for (const isNew of [true, false]) {
		const path = fresh();
		if (!isNew) writeFileSync(path, 'old', { mode: 0o600 });
		const file = await OutputFile.open(path);
		file.writeLine({ big: 1n, ids: Int32Array.of(1, 2) });
		t.is(existsSync(path) ? readFileSync(path, 'utf8') : 'old', 'old');
		await file.keep();
		await file.discard();
		t.is(readFileSync(path, 'utf8'), '{"big":"1","ids":[1,2]}\n');
		if (!isNew) t.is(statSync(path).mode & 0o777, 0o600);
		t.deepEqual(readdirSync(dirname(path)), ['out.jsonl']);
	}
});

test('a file that is discarded leaves the old one', async (t) => {
	const path = fresh();
	writeFileSync(path, 'old');
	const file = await OutputFile.open(path);
	file.write('new');
	await file.discard();
	t.is(readFileSync(path, 'utf8'), 'old');
	t.deepEqual(readdirSync(dirname(path)), ['out.jsonl']);
});

test('what an unfinished run has written lies beside the old file', async (t) => {
	const path = fresh();
	writeFileSync(path, 'old');
	const file = await OutputFile.open(path);
	file.write('new');
	t.is(await file.setAside(), `${path}.partial`);
	t.is(readFileSync(path, 'utf8'), 'old');
	t.is(readFileSync(`${path}.partial`, 'utf8'), 'new');
	const empty = await OutputFile.open(path);
	t.is(await empty.setAside(), undefined);
	const kept = await OutputFile.open(path);
	kept.write('whole');
	await kept.keep();
	t.is(await kept.setAside(), undefined);
	t.is(readFileSync(path, 'utf8'), 'whole');
	t.deepEqual(readdirSync(dirname(path)).sort(), ['out.jsonl', 'out.jsonl.partial']);
});

test('a symbolic link stays, its target is replaced', async (t) => {
	const path = fresh();
	const link = fresh();
	writeFileSync(path, 'old');
	symlinkSync(path, link);
	const file = await OutputFile.open(link);
	file.write('new');
	await file.keep();
	t.true(lstatSync(link).isSymbolicLink());
	t.is(readFileSync(path, 'utf8'), 'new');
});

test('a path that cannot be written is named, the temporary one is not', async (t) => {
	const folder = dirname(fresh());
	for (const path of [folder, join(folder, 'no', 'out'), '/proc/dn/out']) {
		const error = await t.throwsAsync(OutputFile.open(path), { instanceOf: DiffusionNativeError });
		t.is(error?.code, 'ERR_DN_CHECKPOINT');
		t.true(error?.message.startsWith(`${path}: cannot write: E`), error?.message);
		t.notRegex(error?.message ?? '', /\.tmp/);
	}
});

test.serial('a file that cannot be renamed is written over', async (t) => {
	const path = fresh();
	writeFileSync(path, 'old, and longer');
	const file = await OutputFile.open(path);
	file.write('new');
	const { rename } = promises;
	promises.rename = async () => {
		throw Object.assign(new Error('EBUSY: resource busy'), { code: 'EBUSY' });
	};
	syncBuiltinESMExports();
	try {
		await file.keep();
	} finally {
		promises.rename = rename;
		syncBuiltinESMExports();
	}
	t.is(readFileSync(path, 'utf8'), 'new');
	t.deepEqual(readdirSync(dirname(path)), ['out.jsonl']);
});

(process.getuid?.() === 0 ? test.skip : test)(
	'a file in a directory that cannot be written is written over',
	async (t) => {
		const path = fresh();
		writeFileSync(path, 'old');
		chmodSync(dirname(path), 0o500);
		try {
			const file = await OutputFile.open(path);
			file.write('new');
			await file.keep();
			t.is(readFileSync(path, 'utf8'), 'new');
		} finally {
			chmodSync(dirname(path), 0o700);
		}
	},
);
