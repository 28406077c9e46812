import fs, { existsSync, lstatSync, readdirSync } from 'node:fs';
import promises from 'node:fs/promises';
import { syncBuiltinESMExports } from 'node:module';
import { join } from 'node:path';
import test from 'ava';

import { resolveModelDirectory } from '../lib/hub.js';
import { closeHub, commit, files, openHub, refuses, removeScratch, wanted, weights } from './helpers/hub.js';
import type { HubServer } from './helpers/hub-server.js';

let hub: HubServer;
let cacheDir: string;
let home: string;

test.beforeEach(async () => {
	({ hub, cacheDir, home } = await openHub());
});
test.afterEach.always(() => closeHub(hub));
test.after.always(removeScratch);

/** The repository `big/one`, whose index puts a tensor into each of `shards`. */
function offerShards(shards: readonly string[], present: Record<string, Uint8Array>): void {
	const index = { weight_map: Object.fromEntries(shards.map((shard, i) => [`tensor ${i}`, shard])) };
	hub.repositories.set('big/one', {
		commit,
		files: {
			'config.json': Buffer.from('{}'),
			'model.safetensors.index.json': Buffer.from(JSON.stringify(index)),
			...present,
		},
	});
}

test.serial('names of files that are not downloaded may be anything', async (t) => {
	hub.faults = { listed: ['a:b', 'results 12:30.txt', '../evil', '/etc/evil', '..\\evil', 'a\u0001b', ''] };
	const directory = await resolveModelDirectory('owner/model');
	t.deepEqual(readdirSync(directory).sort(), wanted);
	t.deepEqual(readdirSync(home), ['hub']);
});

test.serial('a shard whose name leaves the directory is refused', async (t) => {
	for (const name of ['../evil', '/etc/evil', 'a/../../evil', '..\\evil', '..', '.', '', 'a\0b']) {
		offerShards([name], { [name]: weights });
		await refuses(t, /names the file .*, expected one beside it/, 'big/one', {}, 'ERR_DN_CHECKPOINT');
		t.deepEqual(readdirSync(home), ['hub']);
		t.deepEqual(readdirSync(join(cacheDir, 'models--big--one', 'snapshots', commit)).length, 2);
	}
});

test.serial('of a sharded model the files of its index are fetched, and no others', async (t) => {
	const shards = ['model-00001-of-00002.safetensors', 'a:b.safetensors'];
	const present = { [shards[0] as string]: weights, [shards[1] as string]: weights.slice(1) };
	offerShards(shards, {
		...present,
		'consolidated.safetensors': weights.slice(2),
		'adapter.safetensors': weights.slice(3),
	});
	const directory = await resolveModelDirectory('big/one');
	t.deepEqual(readdirSync(directory).sort(), ['config.json', 'model.safetensors.index.json', ...shards].sort());
	t.is(hub.bodyRequests('safetensors').length, 2);
	offerShards([...shards, 'model-00003.safetensors'], present);
	hub.repositories.set('big/two', hub.repositories.get('big/one') as never);
	await refuses(
		t,
		/big\/two \(revision main\) has no model-00003\.safetensors, which its .*index\.json names/,
		'big/two',
	);
});

test.serial('where the file system has no links, files are copied without being held in memory', async (t) => {
	const { symlink } = promises;
	const { readFileSync: read } = fs;
	try {
		promises.symlink = () =>
			Promise.reject(Object.assign(new Error('EPERM: operation not permitted'), { code: 'EPERM' }));
		// What reading a file of 2 GiB at once throws.
		fs.readFileSync = ((path: string, ...rest: []) => {
			if (String(path).includes('/blobs/')) throw new RangeError('ERR_FS_FILE_TOO_LARGE');
			return read(path, ...rest);
		}) as typeof read;
		syncBuiltinESMExports();
		const directory = await resolveModelDirectory('owner/model');
		t.deepEqual(readdirSync(directory).sort(), wanted);
		for (const name of wanted) {
			t.false(lstatSync(join(directory, name)).isSymbolicLink());
			t.deepEqual(Uint8Array.from(read(join(directory, name))), Uint8Array.from(files[name] as Uint8Array));
		}
		t.true(existsSync(join(cacheDir, 'models--owner--model', 'refs', 'main')));
	} finally {
		promises.symlink = symlink;
		fs.readFileSync = read;
		syncBuiltinESMExports();
	}
});
