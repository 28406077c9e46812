/**
 * A snapshot of a hub repository in the Hugging Face cache:
 *
 *     models--owner--name/blobs/<etag>                the bytes
 *     models--owner--name/snapshots/<commit>/<file>   links to them
 *     models--owner--name/refs/<revision>             the commit a branch or tag stood at
 *     models--owner--name/.no_exist/<commit>/<file>   files the commit is known not to have
 *
 * Bytes arrive in a part beside the blob, owned by one process (hub-part.ts), and get their final name only after their length
 * and hash are checked. A part left behind is taken over by the next download. The ref is written last.
 */
import { existsSync, readFileSync } from 'node:fs';
import { symlink, writeFile } from 'node:fs/promises';
import { dirname, join, relative } from 'node:path';
import { listFiles, modelInfo } from '@huggingface/hub';

import { DiffusionNativeError } from './errors.js';
import { copyFileAtomic, fileError, makeDirectories, readJsonObject, writeFileAtomic } from './files.js';
import type { LoadProgress } from './hub.js';
import { HubConnection } from './hub-connection.js';
import { fetchBlob } from './hub-download.js';
import { lengthFiles } from './length/files.js';

/** What is wanted, from where, into which cache. The names are checked; token and endpoint are, too, before a download. */
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
		const shards = shardsOf(directory);
		return shards.length > 0 && shards.every((shard) => existsSync(join(directory, shard)));
	} catch {
		return false;
	}
}

/** The files that the index of a snapshot names. Throws when one could leave the directory. */
function shardsOf(directory: string): string[] {
	const path = join(directory, weightsIndex);
	const map = readJsonObject(path)?.['weight_map'] ?? {};
	const shards = [...new Set(Object.values(map as Record<string, unknown>))];
	return shards.map((shard) => {
		if (typeof shard === 'string' && isPlainName(shard)) return shard;
		throw new DiffusionNativeError(
			'ERR_DN_CHECKPOINT',
			`${path} names the file ${JSON.stringify(shard)}, expected one beside it`,
		);
	});
}

/** A file directly in its directory. */
function isPlainName(name: string): boolean {
	return (
		!['', '.', '..'].includes(name) && !/[/\\\0]/.test(name) && !(process.platform === 'win32' && name.includes(':'))
	);
}

/** Fetches what is missing of a revision and returns the snapshot's directory. */
export async function downloadSnapshot(request: HubRequest): Promise<string> {
	const connection = new HubConnection(request);
	const folder = repositoryFolder(request);
	const commit = await resolveCommit(request, connection);
	const listed = await listRepository(request, commit, connection);
	const files = chooseFiles(request, listed);
	const directory = join(folder, 'snapshots', commit);
	try {
		await makeDirectories(directory);
		await makeDirectories(join(folder, 'blobs'));
	} catch (error) {
		throw fileError('write the model cache', request.cacheDir, error);
	}
	const fetchAll = async (wanted: readonly HubFile[]): Promise<void> => {
		for (const file of wanted) {
			const link = join(directory, file.path);
			if (existsSync(link)) continue;
			const blob = await fetchBlob(request, commit, file, connection, join(folder, 'blobs'));
			await linkBlob(blob, link);
		}
	};
	await fetchAll(files);
	if (!files.some((file) => file.path === weights)) await fetchAll(chooseShards(request, listed, directory));
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

/** Every file at the top of the repository, by names that are not checked. */
async function listRepository(request: HubRequest, commit: string, connection: HubConnection): Promise<HubFile[]> {
	return connection.call(`the file list of ${request.id}`, async (common) => {
		const files: HubFile[] = [];
		for await (const entry of listFiles({ ...common, repo: { type: 'model', name: request.id }, revision: commit })) {
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

/** Files with names known here: what is small, and the weights or the index of their shards. */
function chooseFiles(request: HubRequest, all: readonly HubFile[]): HubFile[] {
	const byName = new Map(all.map((file) => [file.path, file]));
	const where = `${request.id} (revision ${request.revision})`;
	if (!byName.has('config.json')) throw new DiffusionNativeError('ERR_DN_HUB', `${where} has no config.json`);
	const chosen = smallFiles.flatMap((name) => byName.get(name) ?? []);
	const single = byName.get(weights);
	const index = byName.get(weightsIndex);
	if (single) return [...chosen, single];
	if (index) return [...chosen, index];
	const other = all.find((file) => /\.(bin|pt|pth|h5|gguf)$/.test(file.path));
	throw new DiffusionNativeError(
		'ERR_DN_HUB',
		`${where} has no ${weights}${other ? `; it has ${other.path}, which is not supported: convert it to safetensors first` : ''}`,
	);
}

/** The shards that the snapshot's index names. */
function chooseShards(request: HubRequest, all: readonly HubFile[], directory: string): HubFile[] {
	return shardsOf(directory).map((name) => {
		const file = all.find(({ path }) => path === name);
		if (file) return file;
		throw new DiffusionNativeError(
			'ERR_DN_HUB',
			`${request.id} (revision ${request.revision}) has no ${name}, which its ${weightsIndex} names`,
		);
	});
}

/** Links are relative, so that the cache can move. Where the file system has none (exFAT, some SMB shares), the blob is copied. */
async function linkBlob(blob: string, link: string): Promise<void> {
	try {
		await makeDirectories(dirname(link));
		await symlink(relative(dirname(link), blob), link);
	} catch (error) {
		if (existsSync(link)) return;
		const { code } = error as { code?: string };
		if (!['EPERM', 'ENOTSUP', 'EOPNOTSUPP', 'ENOSYS', 'EINVAL'].includes(code ?? ''))
			throw fileError('link', link, error);
		await copyFileAtomic(blob, link);
	}
}
