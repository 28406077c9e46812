/**
 * Where a model's files are: a directory, the model inside the package, or a Hugging Face id. Talking to the hub is the work
 * of `@huggingface/hub`; which files, where in the cache they go, checking and resuming is done here (hub-cache.ts). The
 * cache is the one of Hugging Face's Python libraries, both ways.
 */
import { statSync } from 'node:fs';
import { homedir } from 'node:os';
import { join, resolve } from 'node:path';

import { packageRoot } from './binding.js';
import { check, DiffusionNativeError } from './errors.js';
import { cachedSnapshot, downloadSnapshot, type HubRequest } from './hub-cache.js';
import { isUnreachable } from './hub-connection.js';

/** What happens while a model is fetched and loaded; `loaded` and `total` are bytes. */
export type LoadProgress =
	/** Bytes of one file that have arrived; `total` is its size. */
	| { status: 'download'; file: string; loaded: number; total: number }
	/** Every file is there. */
	| { status: 'ready' }
	/** Parameters read into the model, bytes of fp32. */
	| { status: 'load'; loaded: number; total: number };

/** Options of {@link resolveModelDirectory}. */
export interface ResolveOptions {
	/** Branch, tag or commit. @default 'main' */
	revision?: string | undefined;
	/** Hub cache, taken as it is. @default HF_HUB_CACHE, else HF_HOME/hub, else ~/.cache/huggingface/hub */
	cacheDir?: string | undefined;
	/** Never ask the network. @default HF_HUB_OFFLINE */
	localFilesOnly?: boolean | undefined;
	/**
	 * Ask the hub whether the branch or tag has moved although the cache has it, and fetch what is new; `localFilesOnly` and
	 * HF_HUB_OFFLINE go before. @default false: a revision stays at the commit it was first fetched at
	 */
	refresh?: boolean | undefined;
	/** Told about downloads. @default none */
	onProgress?: ((progress: LoadProgress) => void) | undefined;
	/** Aborting rejects with `signal.reason`. @default none */
	signal?: AbortSignal | undefined;
}

/** The model inside the package. */
export const packagedModel = 'diffusion-native/tiny';

/** True for the values of HF_HUB_OFFLINE that mean yes. */
function isSet(value: string | undefined): boolean {
	return value !== undefined && ['1', 'on', 'yes', 'true'].includes(value.toLowerCase());
}

function cacheDirectory(): string {
	const { env } = process;
	const home = expand(env['HF_HOME'] ?? join(env['XDG_CACHE_HOME'] ?? join(homedir(), '.cache'), 'huggingface'));
	return expand(env['HF_HUB_CACHE'] ?? env['HUGGINGFACE_HUB_CACHE'] ?? join(home, 'hub'));
}

/** `~`, `$NAME` and `${NAME}` as Python's library reads them in these variables; names that are not set stay as they are. */
function expand(path: string): string {
	return path
		.replace(/^~(?=\/|$)/, () => homedir())
		.replace(
			/\$(?:(\w+)|\{([^}]*)\})/g,
			(text, name?: string, braced?: string) => process.env[name ?? braced ?? ''] ?? text,
		);
}

function kindOf(path: string): 'directory' | 'file' | 'nothing' {
	try {
		return statSync(path).isDirectory() ? 'directory' : 'file';
	} catch {
		return 'nothing';
	}
}

function checkId(id: string): void {
	const parts = id.split('/');
	const named = (part: string): boolean =>
		/^[A-Za-z0-9_][A-Za-z0-9._-]{0,95}$/.test(part) && !/\.\.|--|[.-]$|\.git$/.test(part);
	check(
		parts.length <= 2 && parts.every(named),
		`${JSON.stringify(id)} is neither an existing directory nor a Hugging Face id ('name' or 'owner/name')`,
	);
}

function checkRevision(revision: string): void {
	const parts = revision.split('/');
	check(
		revision.length <= 255 &&
			parts.every((part) => /^[A-Za-z0-9_][A-Za-z0-9._+-]*$/.test(part) && !part.includes('..')),
		`revision ${JSON.stringify(revision)} is not a branch, tag or commit name`,
	);
}

/**
 * The directory with the files of a model, downloaded first when need be. A directory wins when it exists;
 * `'diffusion-native/tiny'` is the model inside the package; anything else is a Hugging Face id. A revision that is whole in
 * the cache is used without a request; one that may lack a tokenizer file is used when the hub cannot be reached, unless
 * `refresh` asks for the hub.
 *
 * Reads HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_CACHE and HF_HUB_OFFLINE.
 * @throws `ERR_DN_ARGUMENT` for an invalid id or revision, `ERR_DN_CHECKPOINT` for a path that does not exist, an index that
 * is none and a cache that cannot be written, `ERR_DN_HUB` when the hub cannot be reached, refuses, or sends wrong bytes;
 * `signal.reason` when aborted.
 */
export async function resolveModelDirectory(pathOrHubId: string, options: ResolveOptions = {}): Promise<string> {
	check(
		typeof pathOrHubId === 'string' && pathOrHubId !== '' && !pathOrHubId.includes('\0'),
		'a model is named by a directory or a Hugging Face id, received an empty name',
	);
	options.signal?.throwIfAborted();
	const ready = (directory: string): string => {
		options.onProgress?.({ status: 'ready' });
		return directory;
	};
	const kind = kindOf(pathOrHubId);
	if (kind === 'directory') return ready(resolve(pathOrHubId));
	check(kind !== 'file', `${pathOrHubId} is a file; a model is a directory with config.json and model.safetensors`);
	if (pathOrHubId === packagedModel) {
		const directory = join(packageRoot(), 'models', 'tiny');
		if (kindOf(directory) === 'directory') return ready(directory);
		throw new DiffusionNativeError('ERR_DN_CHECKPOINT', `the packaged model is missing: ${directory} does not exist`);
	}
	if (/^[./~\\]|^[A-Za-z]:[\\/]/.test(pathOrHubId) && !pathOrHubId.includes('://')) {
		throw new DiffusionNativeError('ERR_DN_CHECKPOINT', `${pathOrHubId}: no such directory`);
	}
	checkId(pathOrHubId);
	const revision = options.revision ?? 'main';
	checkRevision(revision);

	const { env } = process;
	const request: HubRequest = {
		id: pathOrHubId,
		revision,
		cacheDir: resolve(options.cacheDir ?? cacheDirectory()),
		endpoint: (env['HF_ENDPOINT'] || 'https://huggingface.co').replace(/\/+$/, ''),
		token: env['HF_TOKEN']?.trim() || undefined,
		onProgress: options.onProgress,
		signal: options.signal,
	};
	const offline = options.localFilesOnly ?? isSet(env['HF_HUB_OFFLINE']);
	const cached = cachedSnapshot(request);
	if (cached && (offline || (cached.complete && !options.refresh))) return ready(cached.directory);
	if (offline) {
		const why = options.localFilesOnly ? 'localFilesOnly is set' : 'HF_HUB_OFFLINE is set';
		throw new DiffusionNativeError(
			'ERR_DN_HUB',
			`${pathOrHubId} (revision ${revision}) is not in the cache ${request.cacheDir}, and ${why}`,
		);
	}
	checkAccess(request);
	try {
		return ready(await downloadSnapshot(request));
	} catch (error) {
		if (cached && !options.refresh && isUnreachable(error)) return ready(cached.directory);
		throw error;
	}
}

/** What a request would fail on. */
function checkAccess({ endpoint, token }: HubRequest): void {
	if (token !== undefined && !token.startsWith('hf_')) {
		throw new DiffusionNativeError('ERR_DN_HUB', "HF_TOKEN is not a Hugging Face token: it must start with 'hf_'");
	}
	check(
		URL.canParse(endpoint) && /^https?:/.test(endpoint),
		`HF_ENDPOINT is ${JSON.stringify(endpoint)}, expected a URL`,
	);
}
