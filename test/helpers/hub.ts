/** The scene of hub tests: a hub on loopback with a small repository, and a cache of its own for every test. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { ExecutionContext } from 'ava';
import { DiffusionNativeError, type ErrorCode } from 'diffusion-native';

import { type ResolveOptions, resolveModelDirectory } from '../../lib/hub.js';
import { HubServer } from './hub-server.js';

export const commit = 'a'.repeat(40);
export const weights = Uint8Array.from({ length: 300_000 }, (_, i) => (i * 31 + (i >> 8)) & 255);
/** What `owner/model` and `gpt2` hold. */
export const files: Record<string, Uint8Array> = {
	'.gitattributes': Buffer.from('x'),
	'README.md': Buffer.from('read me'),
	'config.json': Buffer.from('{"model_type": "gpt2"}'),
	'merges.txt': Buffer.from('#version: 0.2\n'),
	'model.safetensors': weights,
	'pytorch_model.bin': new Uint8Array(5000),
	'tokenizer.json': Buffer.from('{}'),
	'vocab.json': Buffer.from('{}'),
};
/** What of it is downloaded. */
export const wanted = ['config.json', 'merges.txt', 'model.safetensors', 'tokenizer.json', 'vocab.json'];

const environment = [
	...['HF_ENDPOINT', 'HF_HOME', 'HF_HUB_CACHE', 'HUGGINGFACE_HUB_CACHE', 'HF_TOKEN', 'HF_HUB_OFFLINE'],
	...['HTTPS_PROXY', 'https_proxy', 'HTTP_PROXY', 'http_proxy', 'ALL_PROXY', 'all_proxy'],
];
export const scratch = mkdtempSync(join(tmpdir(), 'dn-hub-'));
let count = 0;

/** Starts a hub and points the environment at it and at an empty cache. */
export async function openHub(): Promise<{ hub: HubServer; cacheDir: string; home: string }> {
	for (const name of environment) delete process.env[name];
	const hub = await HubServer.start();
	hub.repositories.set('owner/model', { commit, files });
	hub.repositories.set('gpt2', { commit, files });
	const home = join(scratch, String(count++));
	process.env['HF_ENDPOINT'] = hub.url;
	process.env['HF_HOME'] = home;
	return { hub, home, cacheDir: join(home, 'hub') };
}

export async function closeHub(hub: HubServer): Promise<void> {
	await hub.stop();
	for (const name of environment) delete process.env[name];
}

export function removeScratch(): void {
	rmSync(scratch, { recursive: true, force: true });
}

export async function refuses(
	t: ExecutionContext,
	message: RegExp,
	id = 'owner/model',
	options: ResolveOptions = {},
	code: ErrorCode = 'ERR_DN_HUB',
): Promise<void> {
	const error = await t.throwsAsync(resolveModelDirectory(id, options), { instanceOf: DiffusionNativeError });
	t.is(error?.code, code, error?.message);
	t.regex(error?.message ?? '', message);
}
