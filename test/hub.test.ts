import { existsSync, lstatSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import test from 'ava';

import { type LoadProgress, resolveModelDirectory } from '../lib/hub.js';
import { closeHub, commit, files, openHub, refuses, removeScratch, scratch, wanted, weights } from './helpers/hub.js';
import { HubServer, sha256 } from './helpers/hub-server.js';

let hub: HubServer;
let cacheDir: string;
let home: string;

test.beforeEach(async () => {
	({ hub, cacheDir, home } = await openHub());
});
test.afterEach.always(() => closeHub(hub));
test.after.always(removeScratch);

/** Files under final names in the cache: blobs and snapshot links. */
function finalFiles(): string[] {
	if (!existsSync(cacheDir)) return [];
	return (readdirSync(cacheDir, { recursive: true }) as string[]).filter(
		(name) => !name.endsWith('.incomplete') && !lstatSync(join(cacheDir, name)).isDirectory(),
	);
}

test.serial('a model is downloaded into the Hugging Face cache and found there without a request', async (t) => {
	const events: LoadProgress[] = [];
	const directory = await resolveModelDirectory('owner/model', { onProgress: (event) => events.push(event) });
	const folder = join(cacheDir, 'models--owner--model');
	t.is(directory, join(folder, 'snapshots', commit));
	t.deepEqual(readdirSync(directory).sort(), wanted);
	for (const name of wanted)
		t.deepEqual(Uint8Array.from(readFileSync(join(directory, name))), Uint8Array.from(files[name] as Uint8Array));
	t.true(lstatSync(join(directory, 'model.safetensors')).isSymbolicLink());
	t.true(existsSync(join(folder, 'blobs', sha256(weights))));
	t.is(readFileSync(join(folder, 'refs', 'main'), 'utf8'), commit);
	const loaded = events.filter((event) => event.status === 'download' && event.file === 'model.safetensors');
	t.like(loaded[0], { loaded: 0, total: weights.length });
	t.like(loaded.at(-1), { loaded: weights.length, total: weights.length });
	t.deepEqual(events.at(-1), { status: 'ready' });

	hub.requests.length = 0;
	t.is(await resolveModelDirectory('owner/model'), directory);
	t.is(await resolveModelDirectory('owner/model', { revision: commit }), directory);
	process.env['HF_HUB_OFFLINE'] = '1';
	t.is(await resolveModelDirectory('owner/model'), directory);
	t.deepEqual(hub.requests, []);
	t.is(
		await resolveModelDirectory('gpt2', { localFilesOnly: false }),
		join(cacheDir, 'models--gpt2', 'snapshots', commit),
	);
});

test.serial('offline, a model that is not in the cache is an error that says so', async (t) => {
	await refuses(t, /owner\/model \(revision main\) is not in the cache .* localFilesOnly is set/, 'owner/model', {
		localFilesOnly: true,
	});
	process.env['HF_HUB_OFFLINE'] = 'TRUE';
	await refuses(t, /HF_HUB_OFFLINE is set/);
	t.deepEqual(hub.requests, []);
});

test.serial('a revision is its own snapshot', async (t) => {
	const other = 'b'.repeat(40);
	hub.branches.set('owner/model@v1.0', other);
	const directory = await resolveModelDirectory('owner/model', { revision: 'v1.0', cacheDir: join(home, 'elsewhere') });
	t.is(directory, join(home, 'elsewhere', 'models--owner--model', 'snapshots', other));
	t.is(readFileSync(join(home, 'elsewhere', 'models--owner--model', 'refs', 'v1.0'), 'utf8'), other);
	await refuses(t, /owner\/model \(revision nope\): no such revision/, 'owner/model', { revision: 'nope' });
	for (const revision of ['../x', '/x', 'a/../b', '', 'a b']) {
		await refuses(t, /is not a branch, tag or commit name/, 'owner/model', { revision }, 'ERR_DN_ARGUMENT');
	}
});

test.serial('a moved branch is noticed when asked to refresh', async (t) => {
	await resolveModelDirectory('owner/model');
	const other = 'c'.repeat(40);
	hub.repositories.set('owner/model', { commit: other, files });
	t.regex(await resolveModelDirectory('owner/model'), /a{40}$/);
	hub.requests.length = 0;
	t.regex(await resolveModelDirectory('owner/model', { refresh: true }), /c{40}$/);
	t.deepEqual(hub.bodyRequests('model.safetensors'), [], 'the bytes are shared between snapshots');
});

test.serial('a connection dropped in the middle of a file is resumed where it broke', async (t) => {
	hub.faults.drop = { file: 'model.safetensors', after: 100_000, times: 2 };
	const directory = await resolveModelDirectory('owner/model');
	t.deepEqual(Uint8Array.from(readFileSync(join(directory, 'model.safetensors'))), weights);
	const ranges = hub.bodyRequests('model.safetensors');
	t.is(ranges.length, 3);
	for (const range of ranges.slice(1)) t.regex(range, /bytes=[1-9]\d+-299999/);
});

test.serial('a server that ignores ranges gets the file from the start again', async (t) => {
	hub.faults = { drop: { file: 'model.safetensors', after: 100_000, times: 1 }, ignoreRange: true };
	const directory = await resolveModelDirectory('owner/model');
	t.deepEqual(Uint8Array.from(readFileSync(join(directory, 'model.safetensors'))), weights);
});

test.serial(
	'a connection that always drops is an error and leaves no file, and the next attempt goes on',
	async (t) => {
		hub.faults.drop = { file: 'model.safetensors', after: 10_000, times: 1000 };
		await refuses(t, /model\.safetensors of owner\/model: .* could not be reached/);
		t.false(finalFiles().some((name) => name.includes('model.safetensors') || name.includes(sha256(weights))));
		t.false(finalFiles().some((name) => name.includes('refs')));
		hub.faults = {};
		hub.requests.length = 0;
		await resolveModelDirectory('owner/model');
		t.regex(hub.bodyRequests('model.safetensors')[0] ?? '', /bytes=[1-9]\d+-/);
	},
);

test.serial('a part left behind with wrong bytes is dropped and fetched again', async (t) => {
	const blobs = join(cacheDir, 'models--owner--model', 'blobs');
	mkdirSync(blobs, { recursive: true });
	writeFileSync(join(blobs, `${sha256(weights)}.0.0123abcd.incomplete`), new Uint8Array(1000));
	const directory = await resolveModelDirectory('owner/model');
	t.deepEqual(Uint8Array.from(readFileSync(join(directory, 'model.safetensors'))), weights);
	t.deepEqual(
		readdirSync(blobs).filter((name) => name.endsWith('.incomplete')),
		[],
	);
});

test.serial('wrong bytes and wrong lengths are errors and leave no file', async (t) => {
	const wrong = weights.slice();
	wrong[7] = (wrong[7] as number) ^ 1;
	hub.faults = { body: { file: 'model.safetensors', bytes: wrong } };
	await refuses(t, /model\.safetensors of owner\/model: wrong checksum: SHA-256 is/);
	hub.faults = { size: { file: 'model.safetensors', size: weights.length + 5 } };
	await refuses(t, /model\.safetensors of owner\/model/);
	hub.faults = { size: { file: 'model.safetensors', size: weights.length - 5 } };
	await refuses(t, /more than the expected 299995 bytes/);
	hub.faults = { body: { file: 'model.safetensors', bytes: weights.subarray(0, 1000) } };
	await refuses(t, /the server offers 1000 bytes, the file list says 300000/);
	t.false(finalFiles().some((name) => name.includes('model.safetensors') || name.includes(sha256(weights))));
	hub.faults = {};
	await resolveModelDirectory('owner/model');
	t.true(finalFiles().some((name) => name.includes(sha256(weights))));
});

test.serial('refusals name the model and say what to do', async (t) => {
	hub.faults = { token: 'hf_secret' };
	await refuses(t, /owner\/model .* refused with 401: .* set HF_TOKEN/);
	process.env['HF_TOKEN'] = 'hf_other';
	await refuses(t, /the token in HF_TOKEN may not read it/);
	process.env['HF_TOKEN'] = 'secret';
	await refuses(t, /must start with 'hf_'/);
	process.env['HF_TOKEN'] = 'hf_secret';
	await t.notThrowsAsync(resolveModelDirectory('owner/model'));
	hub.faults = { status: 403 };
	await refuses(t, /gpt2 .* refused with 403/, 'gpt2');
	hub.faults = {};
	await refuses(t, /owner\/none \(revision main\): no such model/, 'owner/none');
	const { 'config.json': _, ...without } = files;
	hub.repositories.set('no/config', { commit, files: without });
	await refuses(t, /no\/config \(revision main\) has no config\.json/, 'no/config');
	hub.repositories.set('only/pickles', {
		commit,
		files: { 'config.json': Buffer.from('{}'), 'pytorch_model.bin': weights },
	});
	await refuses(t, /has no model\.safetensors; it has pytorch_model\.bin/, 'only/pickles');
});

test.serial('an overloaded or unreachable hub is tried again a few times', async (t) => {
	hub.faults = { busy: 2 };
	await t.notThrowsAsync(resolveModelDirectory('owner/model'));
	await hub.stop();
	await refuses(t, /gpt2 \(revision main\): http.* could not be reached: .*ECONNREFUSED/, 'gpt2');
	hub = await HubServer.start();
});

test.serial('a commit that leaves the directory is refused before anything is written', async (t) => {
	hub.repositories.set('owner/model', { commit: '../../evil', files });
	await refuses(t, /expected 40 hexadecimal digits/);
	t.deepEqual(finalFiles(), []);
});

test.serial('an aborted download rejects with the reason and is resumed later', async (t) => {
	hub.faults = { slowMs: 20 };
	const controller = new AbortController();
	const reason = new Error('changed my mind');
	const onProgress = (event: LoadProgress): void => {
		if (event.status === 'download' && event.file === 'model.safetensors' && event.loaded > 0) controller.abort(reason);
	};
	await t.throwsAsync(resolveModelDirectory('owner/model', { onProgress, signal: controller.signal }), { is: reason });
	t.false(finalFiles().some((name) => name.includes(sha256(weights))));
	await t.throwsAsync(resolveModelDirectory('owner/model', { signal: AbortSignal.abort(reason) }), { is: reason });
	hub.faults = {};
	hub.requests.length = 0;
	await resolveModelDirectory('owner/model');
	t.regex(hub.bodyRequests('model.safetensors')[0] ?? '', /bytes=[1-9]\d+-/);
});

test.serial('what onProgress throws ends the download at once', async (t) => {
	const reason = new Error('a mistake of the caller');
	hub.requests.length = 0;
	const onProgress = ({ status }: LoadProgress): void => {
		if (status === 'download') throw reason;
	};
	await t.throwsAsync(resolveModelDirectory('owner/model', { onProgress }), { is: reason });
	const bodies = ['config.json', 'model.safetensors'].map((name) => hub.bodyRequests(name).length);
	t.true(
		bodies.every((count) => count <= 1),
		`${bodies}`,
	);
});

test.serial('concurrent downloads of one model fetch its weights once', async (t) => {
	hub.faults = { slowMs: 2 };
	const directories = await Promise.all(Array.from({ length: 4 }, () => resolveModelDirectory('owner/model')));
	t.is(new Set(directories).size, 1);
	t.is(hub.bodyRequests('model.safetensors').length, 1);
});

test.serial('shards are fetched with their index', async (t) => {
	const index = { weight_map: { a: 'model-00001-of-00002.safetensors', b: 'model-00002-of-00002.safetensors' } };
	hub.repositories.set('big/one', {
		commit,
		files: {
			'config.json': Buffer.from('{}'),
			'model.safetensors.index.json': Buffer.from(JSON.stringify(index)),
			'model-00001-of-00002.safetensors': weights,
			'model-00002-of-00002.safetensors': weights.slice(1),
		},
	});
	const directory = await resolveModelDirectory('big/one');
	t.is(readdirSync(directory).length, 4);
	hub.requests.length = 0;
	await resolveModelDirectory('big/one');
	t.deepEqual(hub.requests, [], 'that it has no tokenizer is remembered');
});

test.serial('length calibrations and heads are fetched when the repository has them', async (t) => {
	const length: Record<string, Uint8Array> = {
		'length.json': Buffer.from('{"version":1,"calibrations":[]}'),
		'length-head.json': Buffer.from('{"version":1}'),
		'length-head.safetensors': weights.slice(2),
	};
	hub.repositories.set('with/lengths', { commit, files: { ...files, ...length } });
	const directory = await resolveModelDirectory('with/lengths');
	t.deepEqual(readdirSync(directory).sort(), [...wanted, ...Object.keys(length)].sort());
	for (const [name, bytes] of Object.entries(length))
		t.deepEqual(Uint8Array.from(readFileSync(join(directory, name))), Uint8Array.from(bytes), name);
	// Sharded weights: the head is no shard, and is fetched once.
	const { 'model.safetensors': whole, ...rest } = files;
	const index = { weight_map: { a: 'model-00001-of-00001.safetensors' } };
	hub.repositories.set('sharded/lengths', {
		commit,
		files: {
			...rest,
			...length,
			'model.safetensors.index.json': Buffer.from(JSON.stringify(index)),
			'model-00001-of-00001.safetensors': whole as Uint8Array,
		},
	});
	const sharded = await resolveModelDirectory('sharded/lengths');
	t.true(readdirSync(sharded).includes('length-head.safetensors'));
	t.is(hub.bodyRequests('sharded/lengths/resolve/').filter((line) => line.includes('length-head')).length, 1);
});

test.serial('a directory wins, and names that are neither are refused', async (t) => {
	const directory = join(home, 'owner', 'model');
	mkdirSync(directory, { recursive: true });
	t.is(await resolveModelDirectory(directory), directory);
	await refuses(t, /no such directory/, join(home, 'nothing'), {}, 'ERR_DN_CHECKPOINT');
	await refuses(t, /no such directory/, './nothing', {}, 'ERR_DN_CHECKPOINT');
	writeFileSync(join(home, 'file'), '');
	await refuses(t, /is a file/, join(home, 'file'), {}, 'ERR_DN_ARGUMENT');
	for (const id of ['', 'a/b/c', 'a/..', 'https://huggingface.co/gpt2', 'a b', 'a--b', 'a\0b', 'x/y.git']) {
		await refuses(t, /Hugging Face id/, id, {}, 'ERR_DN_ARGUMENT');
	}
	t.deepEqual(hub.requests, []);
});

test.serial('a cache that cannot be written is an error with its path', async (t) => {
	writeFileSync(join(scratch, 'plain'), '');
	await refuses(
		t,
		/plain.*: cannot write/,
		'owner/model',
		{ cacheDir: join(scratch, 'plain', 'cache') },
		'ERR_DN_CHECKPOINT',
	);
});
