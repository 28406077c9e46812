/** One file from the hub into the cache's `blobs`: resumed after a broken connection, checked, then renamed into place. */
import { createHash, type Hash, randomBytes } from 'node:crypto';
import { createReadStream, existsSync } from 'node:fs';
import { type FileHandle, open, readdir, rename, rm, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { downloadFile, fileDownloadInfo } from '@huggingface/hub';

import { DiffusionNativeError } from './errors.js';
import { fileError } from './files.js';
import type { HubFile, HubRequest } from './hub-cache.js';
import { type HubConnection, isTransient, maxAttempts } from './hub-connection.js';

/** Bytes that make an attempt count as progress, so that it is not held against the limit of attempts. */
const progressBytes = 1 << 20;
/** Least time between two progress events of a file. */
const progressMs = 50;

/** Downloads in this thread by the path of their blob: a second wish for the same bytes waits for the first. */
const running = new Map<string, Promise<void>>();

/** Returns the path of the blob, downloading it when the cache lacks it. */
export async function fetchBlob(
	request: HubRequest,
	commit: string,
	file: HubFile,
	connection: HubConnection,
	blobs: string,
): Promise<string> {
	const what = `${file.path} of ${request.id}`;
	const repo = { type: 'model' as const, name: request.id };
	const info = await connection.call(what, async (common) => {
		const found = await fileDownloadInfo({ ...common, repo, path: file.path, revision: commit });
		if (!found) throw new DiffusionNativeError('ERR_DN_HUB', `${what}: no such file at ${request.endpoint}`);
		return found;
	});
	const etag = info.etag.replace(/^W\//, '').replace(/^"|"$/g, '');
	if (!/^[0-9A-Za-z_-]{1,128}$/.test(etag)) {
		throw new DiffusionNativeError(
			'ERR_DN_HUB',
			`${what}: the server's ETag ${JSON.stringify(info.etag)} is not a hash`,
		);
	}
	if (info.size !== file.size) {
		throw new DiffusionNativeError(
			'ERR_DN_HUB',
			`${what}: the server offers ${info.size} bytes, the file list says ${file.size}`,
		);
	}
	const sha256 = file.sha256 ?? (/^[0-9a-f]{64}$/.test(etag) ? etag : undefined);
	const blob = join(blobs, etag);
	const transfer = new Transfer(request, what, { ...file, sha256 }, connection, blob);
	for (let other = running.get(blob); other; other = running.get(blob)) {
		await waitFor(other, request.signal);
	}
	if (existsSync(blob)) return blob;
	const own = transfer.run(() =>
		downloadFile({ ...connection.parameters, repo, path: file.path, revision: commit, downloadInfo: info }),
	);
	const settled = own.then(
		() => undefined,
		() => undefined,
	);
	running.set(blob, settled);
	try {
		await own;
	} finally {
		running.delete(blob);
	}
	return blob;
}

/** Waits for another caller's download, however it ends, unless `signal` says stop. */
async function waitFor(other: Promise<void>, signal: AbortSignal | undefined): Promise<void> {
	if (!signal) return other;
	signal.throwIfAborted();
	let stop: () => void = () => undefined;
	const aborted = new Promise<void>((resolve) => {
		stop = resolve;
	});
	signal.addEventListener('abort', stop);
	await Promise.race([other, aborted]);
	signal.removeEventListener('abort', stop);
	signal.throwIfAborted();
}

class Transfer {
	private lastEvent = 0;

	constructor(
		private readonly request: HubRequest,
		private readonly what: string,
		private readonly file: HubFile,
		private readonly connection: HubConnection,
		private readonly blob: string,
	) {}

	async run(openRemote: () => Promise<Blob | null>): Promise<void> {
		const part = await this.claim();
		try {
			await this.fill(part, openRemote);
			await rename(part, this.blob);
		} catch (error) {
			// Owner 0: the next download may continue with this part.
			await rename(part, this.partName(0)).catch(() => undefined);
			this.request.signal?.throwIfAborted();
			if (error instanceof ListenerError) throw error.cause;
			if (error instanceof DiffusionNativeError) throw error;
			throw fileError('write', part, error);
		}
	}

	private partName(owner: number): string {
		return `${this.blob}.${owner}.${randomBytes(4).toString('hex')}.incomplete`;
	}

	/** Takes over a part that nobody is writing, or names a new one. The rename makes sure that only one process gets it. */
	private async claim(): Promise<string> {
		const own = this.partName(process.pid);
		const folder = join(this.blob, '..');
		const start = `${this.blob.slice(folder.length + 1)}.`;
		for (const name of await readdir(folder)) {
			if (!name.startsWith(start) || !name.endsWith('.incomplete')) continue;
			const owner = /^(\d+)\.[0-9a-f]+\.incomplete$/.exec(name.slice(start.length))?.[1];
			if (owner === undefined || isAlive(Number(owner))) continue;
			try {
				await rename(join(folder, name), own);
				return own;
			} catch {
				// Another process was faster.
			}
		}
		return own;
	}

	private async fill(part: string, openRemote: () => Promise<Blob | null>): Promise<void> {
		let failures = 0;
		for (;;) {
			const before = await sizeOf(part);
			const resumable = before > 0 && before <= this.file.size && !this.connection.ignoredRange;
			const begin = resumable ? before : 0;
			try {
				const hash = await this.append(part, begin, openRemote);
				await this.verify(part, hash);
				return;
			} catch (error) {
				this.request.signal?.throwIfAborted();
				if (error instanceof ListenerError) throw error;
				if (error instanceof WrongBytes) {
					await rm(part, { force: true });
					// A part from an earlier run may have been wrong; bytes fetched in one go are what the server has.
					if (begin === 0) throw new DiffusionNativeError('ERR_DN_HUB', `${this.what}: ${error.message}`);
					failures++;
					continue;
				}
				if (error instanceof DiffusionNativeError || isLocal(error) || !isTransient(error))
					throw this.explain(part, error);
				const gained = (await sizeOf(part)) - begin;
				failures = gained >= progressBytes ? 1 : failures + 1;
				if (failures >= maxAttempts) throw this.explain(part, error);
				await this.connection.pause(failures);
			}
		}
	}

	private explain(part: string, error: unknown): DiffusionNativeError {
		return isLocal(error) ? fileError('write', part, error) : this.connection.explain(this.what, error);
	}

	/** Writes the bytes from `begin` on and returns the hash of the whole file. */
	private async append(part: string, begin: number, openRemote: () => Promise<Blob | null>): Promise<Hash> {
		const hash = createHash('sha256');
		if (begin > 0) for await (const chunk of createReadStream(part, { end: begin - 1 })) hash.update(chunk as Buffer);
		const handle = await open(part, begin > 0 ? 'r+' : 'w');
		try {
			let at = begin;
			this.report(at, true);
			if (begin < this.file.size) at = await this.stream(handle, begin, hash, openRemote);
			if (at !== this.file.size) throw new WrongBytes(`${at} bytes arrived, expected ${this.file.size}`);
			await handle.sync();
			this.report(at, true);
		} finally {
			await handle.close();
		}
		return hash;
	}

	private async stream(
		handle: FileHandle,
		begin: number,
		hash: Hash,
		openRemote: () => Promise<Blob | null>,
	): Promise<number> {
		const whole = await openRemote();
		if (!whole) throw new DiffusionNativeError('ERR_DN_HUB', `${this.what}: no such file at ${this.request.endpoint}`);
		const reader = (begin > 0 ? whole.slice(begin) : whole).stream().getReader();
		let at = begin;
		try {
			for (;;) {
				const { done, value } = await reader.read();
				if (done) break;
				if (at + value.length > this.file.size)
					throw new WrongBytes(`more than the expected ${this.file.size} bytes arrived`);
				await writeAll(handle, value, at);
				hash.update(value);
				at += value.length;
				this.report(at, false);
			}
		} finally {
			await reader.cancel().catch(() => undefined);
		}
		// A connection that ends early without an error is a broken connection, not a short file.
		if (at < this.file.size) throw new Error(`the connection ended after ${at} of ${this.file.size} bytes`);
		return at;
	}

	private async verify(part: string, hash: Hash): Promise<void> {
		const size = await sizeOf(part);
		if (size !== this.file.size) throw new WrongBytes(`the file on disk has ${size} bytes, expected ${this.file.size}`);
		const found = hash.digest('hex');
		if (this.file.sha256 !== undefined && found !== this.file.sha256) {
			throw new WrongBytes(`wrong checksum: SHA-256 is ${found}, expected ${this.file.sha256}`);
		}
	}

	private report(loaded: number, always: boolean): void {
		const now = performance.now();
		if (!always && now - this.lastEvent < progressMs) return;
		this.lastEvent = now;
		try {
			this.request.onProgress?.({ status: 'download', file: this.file.path, loaded, total: this.file.size });
		} catch (error) {
			throw new ListenerError(error);
		}
	}
}

/** What the caller's `onProgress` threw. */
class ListenerError extends Error {
	constructor(cause: unknown) {
		super('onProgress threw', { cause });
	}
}

/** The bytes are not what the hub promised. */
class WrongBytes extends Error {}

/** A failed file operation, as against a failed connection. */
function isLocal(error: unknown): boolean {
	const { syscall, code } = (error ?? {}) as { syscall?: unknown; code?: unknown };
	return (
		typeof syscall === 'string' &&
		typeof code === 'string' &&
		['open', 'write', 'read', 'fsync', 'close'].includes(syscall) &&
		code !== 'ECONNRESET'
	);
}

async function writeAll(handle: FileHandle, bytes: Uint8Array, position: number): Promise<void> {
	for (let done = 0; done < bytes.length; ) {
		done += (await handle.write(bytes, done, bytes.length - done, position + done)).bytesWritten;
	}
}

async function sizeOf(path: string): Promise<number> {
	try {
		return (await stat(path)).size;
	} catch {
		return 0;
	}
}

function isAlive(pid: number): boolean {
	if (pid === 0) return false;
	try {
		process.kill(pid, 0);
		return true;
	} catch (error) {
		return (error as { code?: unknown }).code !== 'ESRCH';
	}
}
