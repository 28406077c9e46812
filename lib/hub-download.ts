/** One file from the hub into the cache's `blobs`: resumed after a broken connection, checked, then renamed into place. */
import { createHash, type Hash } from 'node:crypto';
import { createReadStream, existsSync } from 'node:fs';
import { type FileHandle, open, rename, rm, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { downloadFile, type FileDownloadInfoOutput, fileDownloadInfo, HubApiError } from '@huggingface/hub';

import { DiffusionNativeError } from './errors.js';
import { fileError, isMissing } from './files.js';
import type { HubFile, HubRequest } from './hub-cache.js';
import { type HubCallParameters, type HubConnection, isTransient, maxAttempts, NoRanges } from './hub-connection.js';
import { claimPart, leavePart } from './hub-part.js';

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
	const ask = async (common: HubCallParameters): Promise<FileDownloadInfoOutput> => {
		const found = await fileDownloadInfo({ ...common, repo, path: file.path, revision: commit });
		if (!found) throw new DiffusionNativeError('ERR_DN_HUB', `${what}: no such file at ${request.endpoint}`);
		return found;
	};
	const info = await connection.call(what, ask);
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
	// Addresses may be signed and expire: every attempt after the first asks for a new one. Plain requests, never Xet: they
	// can start in the middle of a file, and a mirror serves them itself.
	const openRemote = async (first: boolean): Promise<Blob> => {
		const common = connection.parameters;
		const downloadInfo = first ? info : await ask(common);
		const remote = await downloadFile({ ...common, repo, path: file.path, revision: commit, downloadInfo, xet: false });
		return remote as Blob; // null only without downloadInfo
	};
	const transfer = new Transfer(request, what, { ...file, sha256 }, connection, blob, openRemote);
	for (let other = running.get(blob); other; other = running.get(blob)) {
		await waitFor(other, request.signal);
	}
	if (existsSync(blob)) return blob;
	const own = transfer.run();
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
	/** The server answers requests for the rest of the file with the whole file. */
	private wholeOnly = false;
	private attempts = 0;

	constructor(
		private readonly request: HubRequest,
		private readonly what: string,
		private readonly file: HubFile,
		private readonly connection: HubConnection,
		private readonly blob: string,
		private readonly openRemote: (first: boolean) => Promise<Blob>,
	) {}

	async run(): Promise<void> {
		const part = await claimPart(this.blob);
		try {
			await this.fill(part);
		} catch (error) {
			await leavePart(part, this.blob);
			this.request.signal?.throwIfAborted();
			if (error instanceof ListenerError) throw error.cause;
			if (error instanceof DiffusionNativeError) throw error;
			throw fileError('write', part, error);
		}
	}

	/** Completes the part and gives it the blob's name, in as many attempts as bring the file further. */
	private async fill(part: string): Promise<void> {
		let failures = 0;
		let wrong = 0;
		for (;;) {
			const before = await sizeOf(part);
			const begin = before <= this.file.size && !this.wholeOnly ? before : 0;
			try {
				const hash = await this.append(part, begin);
				await this.verify(part, hash);
				await rename(part, this.blob);
				return;
			} catch (caught) {
				this.request.signal?.throwIfAborted();
				const error = this.connection.restore(caught);
				if (error instanceof ListenerError) throw error;
				if ((isMissing(error) || error instanceof WrongBytes) && !existsSync(part)) {
					// Another process took the part for abandoned, and may be done with it.
					if (existsSync(this.blob)) return;
					if (++failures >= maxAttempts) throw fileError('write', part, new Error('it is removed again and again'));
					continue;
				}
				if (error instanceof WrongBytes) {
					await rm(part, { force: true });
					// A part from an earlier run may have been wrong; what this run fetched from the start is what the server has.
					if (begin === 0 || ++wrong > 1) {
						throw new DiffusionNativeError('ERR_DN_HUB', `${this.what}: ${error.message}`);
					}
					continue;
				}
				if (error instanceof NoRanges) this.wholeOnly = true;
				else if (!this.isWorthwhile(error)) throw this.explain(part, error);
				const kept = this.wholeOnly ? 0 : (await sizeOf(part)) - begin;
				failures = kept >= progressBytes ? 1 : failures + 1;
				if (failures >= maxAttempts) throw this.explain(part, error);
				await this.connection.pause(failures);
			}
		}
	}

	/** Whether another attempt may succeed. The first one's address may have expired; the others' are new. */
	private isWorthwhile(error: unknown): boolean {
		if (isLocal(error)) return false;
		return isTransient(error) || (error instanceof HubApiError && this.attempts === 1);
	}

	private explain(part: string, error: unknown): DiffusionNativeError {
		return isLocal(error) ? fileError('write', part, error) : this.connection.explain(this.what, error);
	}

	/** Writes the bytes from `begin` on and returns the hash of the whole file. */
	private async append(part: string, begin: number): Promise<Hash> {
		const hash = createHash('sha256');
		if (begin > 0) for await (const chunk of createReadStream(part, { end: begin - 1 })) hash.update(chunk as Buffer);
		const handle = await open(part, begin > 0 ? 'r+' : 'w');
		try {
			let at = begin;
			this.report(at, true);
			if (begin < this.file.size) at = await this.stream(handle, begin, hash);
			if (at !== this.file.size) throw new WrongBytes(`${at} bytes arrived, expected ${this.file.size}`);
			await handle.sync();
			this.report(at, true);
		} finally {
			await handle.close();
		}
		return hash;
	}

	private async stream(handle: FileHandle, begin: number, hash: Hash): Promise<number> {
		const whole = await this.openRemote(++this.attempts === 1);
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
		['open', 'write', 'read', 'fsync', 'close', 'rename'].includes(syscall) &&
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
