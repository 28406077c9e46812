import { readdirSync, readFileSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import test from 'ava';
import { DiffuGPT } from 'diffusion-native';

import { resolveModelDirectory } from '../lib/hub.js';
import { closeHub, commit, files, openHub, refuses, removeScratch } from './helpers/hub.js';
import type { HubServer } from './helpers/hub-server.js';
import { smallConfig } from './helpers/models.js';

let hub: HubServer;
let cacheDir: string;
let home: string;

test.beforeEach(async () => {
	({ hub, cacheDir, home } = await openHub());
});
test.afterEach.always(() => closeHub(hub));
test.after.always(removeScratch);

test.serial('a token that is none matters only when the hub is asked', async (t) => {
	process.env['HF_TOKEN'] = 'secret';
	await refuses(t, /must start with 'hf_'/);
	t.deepEqual(hub.requests, []);
	delete process.env['HF_TOKEN'];
	const directory = await resolveModelDirectory('owner/model');
	process.env['HF_TOKEN'] = 'secret';
	process.env['HF_ENDPOINT'] = 'no address';
	t.is(await resolveModelDirectory('owner/model', { localFilesOnly: true }), directory);
	t.is(await resolveModelDirectory('owner/model'), directory);
});

test.serial('a cached model that may lack a tokenizer is used when the hub cannot be reached', async (t) => {
	const { 'tokenizer.json': _, 'vocab.json': __, 'merges.txt': ___, ...without } = files;
	hub.repositories.set('owner/model', { commit, files: without });
	const directory = await resolveModelDirectory('owner/model');
	rmSync(join(cacheDir, 'models--owner--model', '.no_exist'), { recursive: true });
	hub.faults = { status: 403 };
	await refuses(t, /refused with 403/);
	hub.faults = { busy: 1000 };
	t.is(await resolveModelDirectory('owner/model'), directory);
	await hub.stop();
	t.is(await resolveModelDirectory('owner/model'), directory);
	await refuses(t, /could not be reached/, 'owner/model', { refresh: true });
});

test.serial('fromPretrained follows a branch when asked to refresh', async (t) => {
	const served: Record<string, Uint8Array> = {};
	await using model = await DiffuGPT.fromConfig(smallConfig, { device: 'cpu', seed: 1 });
	const saved = join(home, 'saved');
	const offer = async (at: string): Promise<void> => {
		await model.save(saved);
		for (const name of readdirSync(saved)) served[name] = readFileSync(join(saved, name));
		hub.repositories.set('owner/model', { commit: at, files: { ...served } });
	};
	const bias = async (options: { refresh?: boolean }): Promise<number | undefined> => {
		await using loaded = await DiffuGPT.fromPretrained('owner/model', { device: 'cpu', ...options });
		return loaded.getParameter('ln_f.bias')[0];
	};
	const values = model.getParameter('ln_f.bias');
	model.setParameter('ln_f.bias', values.fill(1));
	await offer(commit);
	t.is(await bias({}), 1);
	model.setParameter('ln_f.bias', values.fill(2));
	await offer('c'.repeat(40));
	t.is(await bias({}), 1);
	t.is(await bias({ refresh: true }), 2);
});

test.serial('~ and variables in HF_HOME and HF_HUB_CACHE are expanded', async (t) => {
	const { HOME = '' } = process.env;
	try {
		process.env['HOME'] = home;
		process.env['DN_HUB_PLACE'] = 'place';
		process.env['HF_HOME'] = '~/of/$DN_HUB_PLACE';
		t.regex(await resolveModelDirectory('owner/model'), new RegExp(`^${home}/of/place/hub/models--owner`));
		// biome-ignore lint/suspicious/noTemplateCurlyInString: the text of the variable, not a template.
		process.env['HF_HUB_CACHE'] = join(home, '${DN_HUB_PLACE}~', '$DN_HUB_NOTHING');
		t.regex(await resolveModelDirectory('owner/model'), new RegExp(`^${home}/place~/\\$DN_HUB_NOTHING/models--owner`));
	} finally {
		process.env['HOME'] = HOME;
		delete process.env['DN_HUB_PLACE'];
	}
});
