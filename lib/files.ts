/**
 * Files and directories that appear whole or not at all: written under a temporary name beside the target, flushed to the
 * disk, then renamed. Failures are `ERR_DN_CHECKPOINT` with the path and the system's reason.
 */
import { randomBytes } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { constants, copyFile, mkdir, open, readdir, realpath, rename, rm, rmdir, stat } from 'node:fs/promises';
import { basename, dirname, join, resolve } from 'node:path';

import { DiffusionNativeError } from './errors.js';

/** The system's reason of a failed file operation, "ENOSPC: no space left on device, write" for instance. */
export function reasonOf(error: unknown): string {
	return error instanceof Error ? error.message : String(error);
}

/** An `ERR_DN_CHECKPOINT` about `path`; errors of this package pass unchanged. */
export function fileError(action: string, path: string, cause: unknown): DiffusionNativeError {
	if (cause instanceof DiffusionNativeError) return cause;
	return new DiffusionNativeError('ERR_DN_CHECKPOINT', `${path}: cannot ${action}: ${reasonOf(cause)}`, { cause });
}

/** The error with `to` in its message where it names `from`, a temporary path that the caller never sees. */
export function renamedError(error: unknown, from: string, to: string): unknown {
	if (!(error instanceof DiffusionNativeError) || !error.message.includes(from)) return error;
	return new DiffusionNativeError(error.code, error.message.replaceAll(from, to), { cause: error.cause ?? error });
}

/** True when the error says that a file or one of its parent directories does not exist. */
export function isMissing(error: unknown): boolean {
	const code = (error as { code?: unknown } | null)?.code;
	return code === 'ENOENT' || code === 'ENOTDIR';
}

/** A name no other process or thread uses, in the same directory as `path`. */
export function temporaryName(path: string): string {
	return join(dirname(path), `.${basename(path)}.${process.pid}-${randomBytes(6).toString('hex')}.tmp`);
}

/** Reads a UTF-8 file; undefined when it does not exist. */
export function readText(path: string): string | undefined {
	try {
		return readFileSync(path, 'utf8');
	} catch (error) {
		if (isMissing(error)) return undefined;
		throw fileError('read', path, error);
	}
}

/** Reads a JSON object; undefined when the file does not exist. */
export function readJsonObject(path: string): Record<string, unknown> | undefined {
	const text = readText(path);
	if (text === undefined) return undefined;
	let value: unknown;
	try {
		value = JSON.parse(text);
	} catch (error) {
		throw new DiffusionNativeError('ERR_DN_CHECKPOINT', `${path}: not valid JSON: ${reasonOf(error)}`, {
			cause: error,
		});
	}
	if (typeof value !== 'object' || value === null || Array.isArray(value)) {
		throw new DiffusionNativeError('ERR_DN_CHECKPOINT', `${path}: expected a JSON object`);
	}
	return value as Record<string, unknown>;
}

/**
 * Makes a directory and its parents. Node's own recursive mkdir never returns where a parent exists but refuses entries with
 * ENOENT, under /proc for instance.
 */
export async function makeDirectories(path: string): Promise<void> {
	const attempt = async (): Promise<boolean> => {
		try {
			await mkdir(path);
			return true;
		} catch (error) {
			if ((error as { code?: unknown }).code === 'EEXIST' && (await stat(path)).isDirectory()) return true;
			if ((error as { code?: unknown }).code === 'ENOENT') return false;
			throw error;
		}
	};
	if (await attempt()) return;
	const parent = dirname(path);
	if (parent !== path) await makeDirectories(parent);
	await mkdir(path).catch((error: { code?: unknown }) => {
		if (error.code !== 'EEXIST') throw error;
	});
}

/** Makes the names inside a directory durable. Does nothing where directories cannot be opened (Windows). */
export async function syncDirectory(path: string): Promise<void> {
	let handle: Awaited<ReturnType<typeof open>>;
	try {
		handle = await open(path, 'r');
	} catch (error) {
		const { code } = error as { code?: string };
		if (code === 'EISDIR' || code === 'EPERM' || code === 'EACCES') return;
		throw error;
	}
	try {
		await handle.sync();
	} catch (error) {
		const { code } = error as { code?: string };
		// Some network file systems cannot flush a directory; the rename itself is still atomic there.
		if (code !== 'EINVAL' && code !== 'EPERM' && code !== 'ENOTSUP') throw error;
	} finally {
		await handle.close();
	}
}

/** Writes a new file and flushes it. For files inside a staged directory, which nobody reads before the rename. */
export async function writeSynced(path: string, data: string | Uint8Array): Promise<void> {
	try {
		const handle = await open(path, 'wx');
		try {
			await handle.writeFile(data);
			await handle.sync();
		} finally {
			await handle.close();
		}
	} catch (error) {
		throw fileError('write', path, error);
	}
}

/** Replaces `path` by `data`: readers see the old file or the new one, never a part. */
export async function writeFileAtomic(path: string, data: string | Uint8Array): Promise<void> {
	await replaceFile(path, (temporary) => writeSynced(temporary, data));
}

/** Replaces `path` by a copy of a file of any size: readers see the old file or the new one, never a part. */
export async function copyFileAtomic(from: string, path: string): Promise<void> {
	await replaceFile(path, async (temporary) => {
		await copyFile(from, temporary, constants.COPYFILE_EXCL | constants.COPYFILE_FICLONE);
		const handle = await open(temporary, 'r+');
		try {
			await handle.sync();
		} finally {
			await handle.close();
		}
	});
}

async function replaceFile(path: string, write: (temporary: string) => Promise<void>): Promise<void> {
	const temporary = temporaryName(path);
	try {
		await write(temporary);
		await rename(temporary, path);
		await syncDirectory(dirname(path));
	} catch (error) {
		await rm(temporary, { force: true }).catch(() => undefined);
		throw fileError('write', path, error instanceof DiffusionNativeError ? (error.cause ?? error) : error);
	}
}

/**
 * Fills a temporary sibling of `target` and puts it in place.
 *
 * - `target` does not exist or is empty: one rename.
 * - `target` holds only files for which `owned` is true: the old directory is renamed aside, the new one renamed in, the old
 *   one removed. A crash between the two renames leaves both complete under their temporary names beside `target`.
 * - `target` also holds other things: those stay, and the new files replace the old ones one rename after another, in the
 *   order of their names. Owned files that the new set lacks are removed.
 *
 * `fill` writes flat files with {@link writeSynced} or by other means that flush. When anything fails, the temporary
 * directory is removed and `target` is as it was before (in the last case: except for files already replaced).
 * @throws `ERR_DN_CHECKPOINT` with the path and the system's reason.
 */
export async function replaceDirectory(
	target: string,
	fill: (directory: string) => Promise<void>,
	owned: (name: string) => boolean,
): Promise<void> {
	let destination = resolve(target);
	let stage: string | undefined;
	try {
		const existing = await listExisting(destination);
		if (existing) destination = await realpath(destination);
		else await makeDirectories(dirname(destination));
		stage = temporaryName(destination);
		await mkdir(stage);
		await fill(stage);
		await syncDirectory(stage);
		if (existing?.every(owned) === false) await replaceFiles(stage, destination, existing.filter(owned));
		else await swap(stage, destination, existing);
		await syncDirectory(dirname(destination));
	} catch (error) {
		if (!stage) throw fileError('write the directory', target, error);
		await rm(stage, { recursive: true, force: true }).catch(() => undefined);
		throw renamedError(fileError('write the directory', target, error), stage, target);
	}
}

async function listExisting(path: string): Promise<string[] | undefined> {
	try {
		if (!(await stat(path)).isDirectory()) throw new Error('it exists and is not a directory');
		return await readdir(path);
	} catch (error) {
		if ((error as { code?: unknown }).code === 'ENOENT') return undefined;
		throw error;
	}
}

async function swap(stage: string, destination: string, existing: string[] | undefined): Promise<void> {
	if (existing?.length === 0) await rmdir(destination);
	if (!existing || existing.length === 0) {
		await rename(stage, destination);
		return;
	}
	const old = temporaryName(destination);
	await rename(destination, old);
	try {
		await rename(stage, destination);
	} catch (error) {
		await rename(old, destination);
		throw error;
	}
	await rm(old, { recursive: true, force: true });
}

async function replaceFiles(stage: string, destination: string, old: string[]): Promise<void> {
	const names = (await readdir(stage)).sort();
	for (const name of names) await rename(join(stage, name), join(destination, name));
	for (const name of old) if (!names.includes(name)) await rm(join(destination, name), { force: true });
	await syncDirectory(destination);
	await rmdir(stage);
}
