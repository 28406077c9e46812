/**
 * A snapshot of a hub repository in the Hugging Face cache:
 *
 *     models--owner--name/blobs/<etag>                the bytes
 *     models--owner--name/snapshots/<commit>/<file>   links to them
 *     models--owner--name/refs/<revision>             the commit a branch or tag stood at
 *     models--owner--name/.no_exist/<commit>/<file>   files the commit is known not to have
 *
 * Bytes arrive in `blobs/<etag>.<pid>.<random>.incomplete`, owned by one process, and get their final name only after their
 * length and hash are checked. A part left behind is taken over by the next download. The ref is written last.
 */
import { existsSync, readFileSync } from 'node:fs';
import { symlink, writeFile } from 'node:fs/promises';
import { dirname, join, relative } from 'node:path';
import { listFiles, modelInfo } from '@huggingface/hub';

import { DiffusionNativeError } from './errors.js';
import { fileError, makeDirectories, readJsonObject, writeFileAtomic } from './files.js';
import type { LoadProgress } from './hub.js';
import { HubConnection } from './hub-connection.js';
import { fetchBlob } from './hub-download.js';
import { lengthFiles } from './length/files.js';

/** What is wanted, from where, into which cache. All names are checked. */
export interface HubRequest {
	id: string;
	revision: string;
	cacheDir: string;
	endpoint: string;
	token: string | undefined;
	onProgress: ((progress: LoadProgress) => void) | undefined;
	signal: AbortSignal | undefined;
}

/** One file of a repository as the hub lists it. */
export interface HubFile {
	path: string;
	/** Bytes. */
	size: number;
	/** SHA-256 (hex) of the content, for files in large-file storage. */
	sha256: string | undefined;
}

const commitPattern = /^[0-9a-f]{40}$/;
const tokenizerFiles = ['tokenizer.json', 'vocab.json', 'merges.txt'];
const smallFiles = [
	'config.json',
	'generation_config.json',
	'tokenizer_config.json',
	'special_tokens_map.json',
	'added_tokens.json',
	...lengthFiles,
	...tokenizerFiles,
];
const weights = 'model.safetensors';
const weightsIndex = 'model.safetensors.index.json';

export function repositoryFolder(request: HubRequest): string {
	return join(request.cacheDir, ['models', ...request.id.split('/')].join('--'));
}

/**
 * The snapshot of a revision that is already in the cache with configuration and weights. `complete`: it is also known that
 * no tokenizer file is left to fetch.
 */
export function cachedSnapshot(request: HubRequest): { directory: string; complete: boolean } | undefined {
	const folder = repositoryFolder(request);
	let commit = request.revision;
	if (!commitPattern.test(commit)) {
		try {
			commit = readFileSync(join(folder, 'refs', request.revision), 'utf8').trim();
		} catch {
			return undefined;
		}
	}
	if (!commitPattern.test(commit)) return undefined;
	const directory = join(folder, 'snapshots', commit);
	const has = (name: string): boolean => existsSync(join(directory, name));
	if (!has('config.json') || !hasWeights(directory)) return undefined;
	const without = existsSync(join(folder, '.no_exist', commit, 'tokenizer.json'));
	return { directory, complete: has('tokenizer.json') || (has('vocab.json') && has('merges.txt')) || without };
}

function hasWeights(directory: string): boolean {
	if (existsSync(join(directory, weights))) return true;
	try {
		const map = readJsonObject(join(directory, weightsIndex))?.['weight_map'];
		const shards = new Set(Object.values((map ?? {}) as Record<string, unknown>));
		return (
			shards.size > 0 && [...shards].every((shard) => typeof shard === 'string' && existsSync(join(directory, shard)))
		);
	} catch {
		return false;
	}
}

/** Fetches what is missing of a revision and returns the snapshot's directory. */
export async function downloadSnapshot(request: HubRequest): Promise<string> {
	const connection = new HubConnection(request);
	const folder = repositoryFolder(request);
	const commit = await resolveCommit(request, connection);
	const files = chooseFiles(request, await listRepository(request, commit, connection));
	const directory = join(folder, 'snapshots', commit);
	try {
		await makeDirectories(directory);
		await makeDirectories(join(folder, 'blobs'));
	} catch (error) {
		throw fileError('write the model cache', request.cacheDir, error);
	}
	for (const file of files) {
		const link = join(directory, file.path);
		if (existsSync(link)) continue;
		const blob = await fetchBlob(request, commit, file, connection, join(folder, 'blobs'));
		await linkBlob(blob, link);
	}
	try {
		if (!files.some((file) => tokenizerFiles.includes(file.path))) {
			const marker = join(folder, '.no_exist', commit, 'tokenizer.json');
			await makeDirectories(dirname(marker));
			await writeFile(marker, '');
		}
		if (request.revision !== commit) {
			const ref = join(folder, 'refs', request.revision);
			await makeDirectories(dirname(ref));
			await writeFileAtomic(ref, commit);
		}
	} catch (error) {
		throw fileError('write the model cache', folder, error);
	}
	return directory;
}

async function resolveCommit(request: HubRequest, connection: HubConnection): Promise<string> {
	const info = await connection.call(`${request.id} (revision ${request.revision})`, (common) =>
		modelInfo({ ...common, name: request.id, revision: request.revision, additionalFields: ['sha'] }),
	);
	const { sha } = info as { sha?: unknown };
	if (typeof sha !== 'string' || !commitPattern.test(sha)) {
		throw new DiffusionNativeError(
			'ERR_DN_HUB',
			`${request.endpoint} answered for ${request.id} with the commit ${JSON.stringify(sha)}, expected 40 hexadecimal digits`,
		);
	}
	return sha;
}

/** Every file at the top of the repository. Throws when one name could leave the directory. */
async function listRepository(request: HubRequest, commit: string, connection: HubConnection): Promise<HubFile[]> {
	return connection.call(`the file list of ${request.id}`, async (common) => {
		const files: HubFile[] = [];
		for await (const entry of listFiles({ ...common, repo: { type: 'model', name: request.id }, revision: commit })) {
			if (typeof entry.path !== 'string' || !isSafeName(entry.path)) {
				throw new DiffusionNativeError(
					'ERR_DN_HUB',
					`${request.id} lists a file named ${JSON.stringify(entry.path)}, which would leave its directory; nothing was written`,
				);
			}
			if (entry.type !== 'file') continue;
			const sha256 = entry.lfs?.oid;
			files.push({
				path: entry.path,
				size: entry.lfs?.size ?? entry.size,
				sha256: sha256 !== undefined && /^[0-9a-f]{64}$/.test(sha256) ? sha256 : undefined,
			});
		}
		return files;
	});
}

/** Relative, no step upwards, nothing that another operating system reads as absolute or as a separator. */
function isSafeName(path: string): boolean {
	const parts = path.split('/');
	// biome-ignore lint/suspicious/noControlCharactersInRegex: control characters in a file name are what is looked for.
	return !/[\\:\u0000-\u001f]/.test(path) && parts.every((part) => part !== '' && part !== '.' && part !== '..');
}

function chooseFiles(request: HubRequest, all: readonly HubFile[]): HubFile[] {
	const byName = new Map(all.map((file) => [file.path, file]));
	const where = `${request.id} (revision ${request.revision})`;
	if (!byName.has('config.json')) throw new DiffusionNativeError('ERR_DN_HUB', `${where} has no config.json`);
	const chosen = smallFiles.flatMap((name) => byName.get(name) ?? []);
	const single = byName.get(weights);
	const index = byName.get(weightsIndex);
	if (single) return [...chosen, single];
	if (index) return [...chosen, index, ...all.filter(isShard)];
	const other = all.find((file) => /\.(bin|pt|pth|h5|gguf)$/.test(file.path));
	throw new DiffusionNativeError(
		'ERR_DN_HUB',
		`${where} has no ${weights}${other ? `; it has ${other.path}, which is not supported: convert it to safetensors first` : ''}`,
	);
}

function isShard({ path }: HubFile): boolean {
	return /^[^/]+\.safetensors$/.test(path) && !lengthFiles.includes(path);
}

/** Links are relative, so that the cache can move. Where links are not allowed (Windows), the blob is copied. */
async function linkBlob(blob: string, link: string): Promise<void> {
	try {
		await makeDirectories(dirname(link));
		await symlink(relative(dirname(link), blob), link);
	} catch (error) {
		if (existsSync(link)) return;
		const { code } = error as { code?: string };
		if (code !== 'EPERM' && code !== 'ENOTSUP' && code !== 'EINVAL') throw fileError('link', link, error);
		try {
			await writeFileAtomic(link, readFileSync(blob));
		} catch (copyError) {
			throw fileError('write', link, copyError);
		}
	}
}
