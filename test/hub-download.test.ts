import { spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, utimesSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import test from 'ava';

import { type LoadProgress, resolveModelDirectory } from '../lib/hub.js';
import { hostId } from '../lib/hub-part.js';
import { closeHub, commit, files, openHub, refuses, removeScratch, weights } from './helpers/hub.js';
import { type HubServer, sha256 } from './helpers/hub-server.js';

const file = 'model.safetensors';
const hour = 3600;
let hub: HubServer;
let blobs: string;

test.beforeEach(async () => {
	const scene = await openHub();
	hub = scene.hub;
	blobs = join(scene.cacheDir, 'models--owner--model', 'blobs');
});
test.afterEach.always(() => closeHub(hub));
test.after.always(removeScratch);

function loaded(directory: string): Uint8Array {
	return Uint8Array.from(readFileSync(join(directory, file)));
}

/** Leaves the first 1000 bytes of the weights in a part of this owner, last written so many seconds ago. */
function leavePart(owner: string, age: number): string {
	mkdirSync(blobs, { recursive: true });
	const part = join(blobs, `${sha256(weights)}.${owner}.0123abcd.incomplete`);
	writeFileSync(part, weights.subarray(0, 1000));
	const then = Date.now() / 1000 - age;
	utimesSync(part, then, then);
	return part;
}

test.serial('a file in Xet storage is downloaded, and resumed, by plain requests to the endpoint', async (t) => {
	hub.faults = { xet: true, drop: { file, after: 100_000, times: 1 } };
	leavePart('0', 0);
	t.deepEqual(loaded(await resolveModelDirectory('owner/model')), weights);
	const ranges = hub.bodyRequests(file);
	t.is(ranges.length, 2);
	t.regex(ranges[0] ?? '', /bytes=1000-/);
	t.regex(ranges[1] ?? '', /bytes=(?!1000-)[1-9]\d+-/);
	t.false(hub.requests.some((line) => line.includes('/xet/')));
});

test.serial('a connection that always drops is given up where the server sends whole files only', async (t) => {
	const large = new Uint8Array(5 << 19);
	hub.repositories.set('owner/model', { commit, files: { ...files, [file]: large } });
	hub.faults = { ignoreRange: true, drop: { file, after: 3 << 19, times: 1000 } };
	await refuses(t, /could not be reached/, 'owner/model', { signal: AbortSignal.timeout(30_000) });
	t.true(hub.bodyRequests(file).length <= 6);
});

test.serial('wrong bytes over a connection that drops are given up after the second whole file', async (t) => {
	const large = Uint8Array.from({ length: 5 << 19 }, (_, i) => i & 255);
	hub.repositories.set('owner/model', { commit, files: { ...files, [file]: large } });
	const bytes = large.slice().fill(1, 5, 6);
	hub.faults = { body: { file, bytes }, drop: { file, after: 3 << 19, times: 1000 } };
	await refuses(t, /wrong checksum/, 'owner/model', { signal: AbortSignal.timeout(30_000) });
	t.is(hub.bodyRequests(file).length, 4);
});

test.serial('a refused body is told with its status, after one new address', async (t) => {
	hub.faults = { refuseBody: { file, status: 403, times: 1000 } };
	await refuses(t, /model\.safetensors of owner\/model: .* refused with 403/);
	t.is(hub.bodyRequests(file).length, 2);
	hub.requests.length = 0;
	hub.faults = { refuseBody: { file, status: 404, times: 1000 } };
	await refuses(t, /model\.safetensors of owner\/model: not found \(404\)/);
	t.is(hub.bodyRequests(file).length, 2);
	hub.faults = { refuseBody: { file, status: 503, times: 2 } };
	t.deepEqual(loaded(await resolveModelDirectory('owner/model')), weights);
});

test.serial('an address that has expired is asked for again', async (t) => {
	hub.faults = { expire: true, drop: { file, after: 100_000, times: 2 } };
	t.deepEqual(loaded(await resolveModelDirectory('owner/model')), weights);
	t.is(hub.bodyRequests(file).length, 3);
});

test.serial('a server that does not tell the size of a file is asked once, and its body is left', async (t) => {
	hub.faults = { wholeOnly: file, slowMs: 20 };
	await refuses(t, /model\.safetensors of owner\/model: .* a part of a file was asked for and the whole file sent/);
	t.is(hub.requests.filter((line) => line.includes('/cdn/') && line.includes(file)).length, 1);
	for (let waited = 0; hub.left.length === 0 && waited < 5000; waited += 10) {
		await new Promise((resolve) => setTimeout(resolve, 10));
	}
	t.true(hub.left.some((path) => path.includes(file)));
});

test.serial('an unreachable hub and a proxy in the environment: the error says how to go through it', async (t) => {
	await hub.stop();
	process.env['https_proxy'] = 'http://127.0.0.1:9';
	await refuses(t, /could not be reached: .*; https_proxy is set: .* NODE_USE_ENV_PROXY=1/);
});

test.serial('a part is taken over from the dead and from those who have not written for long', async (t) => {
	const dead = spawnSync(process.execPath, ['-e', '']).pid;
	const owners: [owner: string, age: number][] = [
		[`${hostId}-${dead}`, 0],
		[`${hostId}-${process.ppid}`, hour],
		[`${'f'.repeat(12)}-${dead}`, hour],
		[`${process.ppid}`, hour],
		[`${hostId}-0`, 0],
	];
	for (const [owner, age] of owners) {
		const part = leavePart(owner, age);
		hub.requests.length = 0;
		t.deepEqual(loaded(await resolveModelDirectory('owner/model')), weights);
		t.regex(hub.bodyRequests(file)[0] ?? '', /bytes=1000-/, owner);
		t.false(existsSync(part), owner);
		rmSync(join(blobs, '..'), { recursive: true });
	}
});

test.serial('a part that another machine or a living process writes is left alone', async (t) => {
	const dead = spawnSync(process.execPath, ['-e', '']).pid;
	for (const owner of [`${'f'.repeat(12)}-${dead}`, `${hostId}-${process.ppid}`, `${dead}`]) {
		const part = leavePart(owner, 60);
		hub.requests.length = 0;
		t.deepEqual(loaded(await resolveModelDirectory('owner/model')), weights);
		t.notRegex(hub.bodyRequests(file)[0] ?? '', /bytes=/, owner);
		t.true(existsSync(part), owner);
		rmSync(join(blobs, '..'), { recursive: true });
	}
});

test.serial('a part that vanishes during the download is begun again', async (t) => {
	hub.faults = { slowMs: 10 };
	let removed = 0;
	const onProgress = (event: LoadProgress): void => {
		if (removed > 0 || event.status !== 'download' || event.file !== file || event.loaded === 0) return;
		for (const name of readdirSync(blobs).filter((each) => each.endsWith('.incomplete'))) {
			rmSync(join(blobs, name));
			removed++;
		}
	};
	t.deepEqual(loaded(await resolveModelDirectory('owner/model', { onProgress })), weights);
	t.is(removed, 1);
	t.is(hub.bodyRequests(file).length, 2);
});
