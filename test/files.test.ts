/** Directories replaced in place, under the conditions that forbid renaming them; files with a byte order mark. */
import { spawnSync } from 'node:child_process';
import {
	chmodSync,
	existsSync,
	mkdirSync,
	mkdtempSync,
	readdirSync,
	readFileSync,
	rmSync,
	statSync,
	writeFileSync,
} from 'node:fs';
import promises from 'node:fs/promises';
import { syncBuiltinESMExports } from 'node:module';
import { tmpdir } from 'node:os';
import { basename, dirname, join } from 'node:path';
import { pathToFileURL } from 'node:url';

import test from 'ava';
import { DiffuGPT } from 'diffusion-native';

import { readJsonObject, replaceDirectory, writeSynced } from '../lib/files.js';
import { root as repository } from './helpers/fixtures.js';

const scratch = mkdtempSync(join(tmpdir(), 'dn-files-'));
let count = 0;
/** A directory of its own. */
function fresh(): string {
	const path = join(scratch, String(count++), 'out');
	mkdirSync(path, { recursive: true });
	return path;
}
test.after.always(() => rmSync(scratch, { recursive: true, force: true }));

const key = 'config.json';
const owned = (name: string): boolean => [key, 'a', 'z', 'gone'].includes(name);
/** Replaces the files of `target` by config.json, a and z, all of the given content. */
const replace = (target: string, content = 'new'): Promise<void> =>
	replaceDirectory(
		target,
		async (directory) => {
			for (const name of ['a', key, 'z']) await writeSynced(join(directory, name), content);
		},
		owned,
		key,
	);
const contents = (folder: string): Record<string, string> =>
	Object.fromEntries(
		readdirSync(folder)
			.filter((name) => !name.startsWith('.'))
			.map((name) => [name, readFileSync(join(folder, name), 'utf8')]),
	);
const all = (content: string): Record<string, string> => ({ a: content, [key]: content, z: content });

/** An old set of files, one of which a new set lacks. */
function old(): string {
	const target = fresh();
	for (const name of [key, 'a', 'gone', 'z']) writeFileSync(join(target, name), 'old');
	return target;
}

const original = { ...promises };
/** Replaces operations of node:fs/promises while `run` runs. */
async function withOperations(operations: Partial<typeof promises>, run: () => Promise<void>): Promise<void> {
	Object.assign(promises, operations);
	syncBuiltinESMExports();
	try {
		await run();
	} finally {
		Object.assign(promises, original);
		syncBuiltinESMExports();
	}
}
const failure = (code: string, path: string): Error =>
	Object.assign(new Error(`${code}: refused, '${path}'`), { code });

/** What the system says to whoever renames, removes or crosses a mount point, and that nothing may be made beside it. */
const conditions: Record<string, (target: string) => Partial<typeof promises>> = {
	'a mount point of another device': (target) => ({
		stat: (async (path: string, options?: object) => {
			const found = await original.stat(path, options as { bigint: true });
			return path === target && options ? Object.assign(found, { dev: found.dev + 1n }) : found;
		}) as typeof promises.stat,
		rename: async (from, to) => {
			const isInside = (path: unknown): boolean => String(path).startsWith(`${target}/`);
			if (from === target || to === target) throw failure('EBUSY', target);
			if (isInside(from) !== isInside(to)) throw failure('EXDEV', target);
			await original.rename(from, to);
		},
	}),
	'a mount point of the same device': (target) => ({
		rename: async (from, to) => {
			if (from === target || to === target) throw failure('EBUSY', target);
			await original.rename(from, to);
		},
		rmdir: async (path) => {
			if (path === target) throw failure('EBUSY', target);
			await original.rmdir(path);
		},
	}),
	...Object.fromEntries(
		['EACCES', 'EROFS', 'EPERM'].map((code) => [
			`a parent that refuses with ${code}`,
			(target: string): Partial<typeof promises> => ({
				mkdir: (async (path: string) => {
					if (dirname(path) === dirname(target)) throw failure(code, path);
					return original.mkdir(path);
				}) as typeof promises.mkdir,
			}),
		]),
	),
};

for (const [name, operations] of Object.entries(conditions)) {
	test.serial(`${name} is written into`, async (t) => {
		for (const target of [fresh(), old()]) {
			const { ino } = statSync(target);
			await withOperations(operations(target), () => replace(target));
			t.deepEqual(readdirSync(target).sort(), ['a', key, 'z']);
			t.deepEqual(contents(target), all('new'));
			t.is(statSync(target).ino, ino, 'the directory itself stays');
			t.deepEqual(readdirSync(dirname(target)), [basename(target)]);
		}
	});
}

test.serial('a replacement cut off or refused at any rename leaves no mixture that can be read', async (t) => {
	for (const isKilled of [true, false]) {
		for (let at = 1; ; at++) {
			const target = old();
			writeFileSync(join(target, 'notes'), 'mine');
			let renames = 0;
			const isDead = (): boolean => isKilled && renames >= at;
			const error = await withOperations(
				{
					rename: async (from, to) => {
						renames++;
						if (renames === at || isDead()) throw failure('EIO', String(to));
						await original.rename(from, to);
					},
					rm: async (...parameters) => {
						if (!isDead()) await original.rm(...parameters);
					},
				},
				() => replace(target),
			).then(
				() => undefined,
				(error: unknown) => error as Error & { code: string },
			);
			if (!error) {
				t.is(renames, 7, 'four old files out, three new ones in');
				break;
			}
			t.is(error.code, 'ERR_DN_CHECKPOINT');
			t.true(error.message.startsWith(`${target}: cannot write the directory: EIO`), error.message);
			t.notRegex(error.message, /\.tmp/);
			const { notes, ...found } = contents(target);
			t.is(notes, 'mine');
			const before = { ...all('old'), gone: 'old' };
			if (!isKilled || at === 1) t.deepEqual(found, before, `refused at ${at}`);
			else {
				t.false(key in found, `cut off at ${at}`);
				const everywhere = readdirSync(target, { recursive: true }).map((path) => join(target, String(path)));
				const texts = everywhere.filter((path) => statSync(path).isFile()).map((path) => readFileSync(path, 'utf8'));
				t.is(texts.filter((text) => text === 'old').length, 4, 'nothing of the old set is lost');
				t.is(texts.filter((text) => text === 'new').length, 3, 'nothing of the new set is lost');
			}
			if (!isKilled) t.deepEqual(readdirSync(target).sort(), ['a', key, 'gone', 'notes', 'z']);
		}
	}
});

(process.getuid?.() === 0 ? test.skip : test)(
	'a model is saved in a directory whose parent cannot be written',
	async (t) => {
		await using model = await DiffuGPT.fromConfig({ layers: 1, heads: 1, channels: 8, vocab: 9, context: 8 });
		const target = fresh();
		chmodSync(dirname(target), 0o500);
		try {
			await model.save(target);
			await model.save(target);
		} finally {
			chmodSync(dirname(target), 0o700);
		}
		await using again = await DiffuGPT.fromPretrained(target);
		t.is(again.config.channels, 8);
	},
);

for (const place of ['.', '..']) {
	test(`save('${place}') keeps the working directory`, (t) => {
		const target = fresh();
		const cwd = place === '.' ? target : join(target, 'below');
		mkdirSync(cwd, { recursive: true });
		const source = `
			import { statSync } from 'node:fs';
			import { DiffuGPT } from ${JSON.stringify(pathToFileURL(join(repository, 'dist', 'lib', 'index.js')))};
			const model = await DiffuGPT.fromConfig({ layers: 1, heads: 1, channels: 8, vocab: 9, context: 8 }, { device: 'cpu' });
			await model.save(${JSON.stringify(place)});
			await model.save(${JSON.stringify(place)});
			process.stdout.write(String(statSync('.').ino));
			await model.dispose();
		`;
		const { stdout, stderr, status } = spawnSync(process.execPath, ['--input-type=module', '--eval', source], {
			cwd,
			encoding: 'utf8',
		});
		t.is(status, 0, stderr);
		t.is(stdout, String(statSync(cwd).ino), 'the process is still in it');
		t.true(existsSync(join(target, 'config.json')));
		t.deepEqual(
			readdirSync(target).filter((name) => name.startsWith('.')),
			[],
		);
	});
}

test('a byte order mark in front of JSON is passed over', (t) => {
	const path = join(fresh(), 'config.json');
	writeFileSync(path, '\uFEFF{"n_layer": 1}');
	t.deepEqual(readJsonObject(path), { n_layer: 1 });
});
