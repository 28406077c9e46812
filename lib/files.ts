/**
 * Files and directories that appear whole or not at all: written under a temporary name beside the target, flushed to the
 * disk, then renamed. Failures are `ERR_DN_CHECKPOINT` with the path and the system's reason.
 */
import { randomBytes } from 'node:crypto';
import { readFileSync, realpathSync, statSync } from 'node:fs';
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

/** Whether there is a process of this number on this host, its own or another user's: the owner of a temporary file may be gone. */
export function isAlive(pid: number): boolean {
	try {
		process.kill(pid, 0);
		return true;
	} catch (error) {
		return (error as { code?: unknown }).code !== 'ESRCH';
	}
}

/**
 * What tells a file from others: device and inode, behind symbolic links. Of a path where nothing is: its place, so that two
 * spellings of one place are equal.
 */
export function fileIdentity(path: string): string {
	try {
		const found = statSync(path, { bigint: true, throwIfNoEntry: false });
		if (found) return `${found.dev}:${found.ino}`;
		return join(realpathSync(dirname(resolve(path))), basename(path));
	} catch {
		return resolve(path);
	}
}

/** The text without the byte order mark that some editors put in front, which JSON.parse refuses. */
export function withoutMark(text: string): string {
	return text.startsWith('\uFEFF') ? text.slice(1) : text;
}

/** Reads a UTF-8 file, without its byte order mark; undefined when it does not exist. */
export function readText(path: string): string | undefined {
	try {
		return withoutMark(readFileSync(path, 'utf8'));
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
 * Fills a temporary directory and puts it in the place of `target`.
 *
 * - `target` does not exist or is empty: the temporary directory is beside it, and one rename.
 * - `target` holds only files for which `owned` is true: the old directory is renamed aside, the new one renamed in, the old
 *   one removed. A crash between the two renames leaves both complete under their temporary names beside `target`.
 * - `target` also holds other things, is a mount point, is the working directory of this process, or is in a
 *   directory that cannot be written: it stays, and the temporary directory is inside it. The owned files are moved out of
 *   the way, then the new ones in: `key` is the first to go and the last to come. A crash meanwhile leaves `target` without
 *   `key`, and old and new files complete between them in it and its temporary directories.
 *
 * `fill` writes flat files with {@link writeSynced} or by other means that flush; where it only turns out at the end that
 * `target` cannot be renamed, `fill` is called again. When anything fails, the temporary directory is removed and `target` is
 * as it was before.
 * @param key the file without which no reader takes the directory for anything
 * @throws `ERR_DN_CHECKPOINT` with the path and the system's reason.
 */
export async function replaceDirectory(
	target: string,
	fill: (directory: string) => Promise<void>,
	owned: (name: string) => boolean,
	key: string,
): Promise<void> {
	let destination = resolve(target);
	/** Fills a new directory and places it; false when it is pinned and another place may be tried. */
	const attempt = async (stage: string, place: () => Promise<void>, isLast: boolean): Promise<boolean> => {
		try {
			await mkdir(stage).catch(asPinned);
			await fill(stage);
			await syncDirectory(stage);
			await place();
			return true;
		} catch (error) {
			await rm(stage, { recursive: true, force: true }).catch(() => undefined);
			const isPinned = error instanceof Pinned;
			if (isPinned && !isLast) return false;
			throw renamedError(fileError('write the directory', target, isPinned ? error.cause : error), stage, target);
		}
	};
	try {
		const existing = await listExisting(destination);
		if (existing) destination = await realpath(destination);
		else await makeDirectories(dirname(destination));
		if (!existing || (existing.every(owned) && !(await mustStay(destination)))) {
			const stage = temporaryName(destination);
			const place = (): Promise<void> => swap(stage, destination, existing).catch(asPinned);
			if (await attempt(stage, place, !existing)) return await syncDirectory(dirname(destination));
		}
		const stage = temporaryName(join(destination, basename(destination)));
		const old = existing?.filter(owned) ?? [];
		await attempt(stage, () => replaceFiles(stage, destination, old, key), true);
	} catch (error) {
		throw fileError('write the directory', target, error);
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

/** A directory cannot be renamed, or nothing be made beside it; the cause says why. */
class Pinned extends Error {
	constructor(override readonly cause: unknown) {
		super(reasonOf(cause));
	}
}

/**
 * True when the error says that a path cannot be renamed or replaced where it is, whatever it holds: a mount point, a
 * directory without the right to write, a read-only file system.
 */
export function isInPlaceOnly(error: unknown): boolean {
	const code = (error as { code?: unknown } | null)?.code;
	return typeof code === 'string' && ['EBUSY', 'EXDEV', 'EACCES', 'EPERM', 'EROFS'].includes(code);
}

function asPinned(error: unknown): never {
	throw isInPlaceOnly(error) ? new Pinned(error) : error;
}

/**
 * Whether a directory must keep its inode: a mount point, or the working directory, which would be gone for the process with
 * the old one. A directory above the working directory holds more than owned files.
 */
async function mustStay(directory: string): Promise<boolean> {
	const { dev, ino } = await stat(directory, { bigint: true });
	if (dev !== (await stat(dirname(directory), { bigint: true })).dev) return true;
	const working = await stat('.', { bigint: true }).catch(() => undefined);
	return dev === working?.dev && ino === working.ino;
}

async function swap(stage: string, destination: string, existing: string[] | undefined): Promise<void> {
	if (!existing || existing.length === 0) {
		// Elsewhere the rename itself replaces an empty directory.
		if (existing && process.platform === 'win32') await rmdir(destination);
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

/** Moves the files `old` of `destination` out of the way and those of `stage` in; all of them back when one cannot be moved. */
async function replaceFiles(stage: string, destination: string, old: string[], key: string): Promise<void> {
	const keyLast = (names: string[]): string[] => [
		...names.filter((name) => name !== key).sort(),
		...names.filter((name) => name === key),
	];
	const aside = temporaryName(join(destination, basename(destination)));
	const moved: (readonly [from: string, to: string])[] = [];
	const move = async (from: string, to: string, names: string[]): Promise<void> => {
		for (const name of names) {
			// On the disk, too, the directory has its key only while everything else is in place.
			if (name === key) await syncDirectory(destination);
			await rename(join(from, name), join(to, name));
			moved.push([join(from, name), join(to, name)]);
			if (name === key) await syncDirectory(destination);
		}
	};
	try {
		await mkdir(aside);
		await move(destination, aside, keyLast(old).reverse());
		await move(stage, destination, keyLast(await readdir(stage)));
		await syncDirectory(destination);
	} catch (error) {
		for (const [from, to] of moved.reverse()) await rename(to, from);
		await rmdir(aside).catch(() => undefined);
		throw renamedError(fileError('write the directory', destination, error), aside, destination);
	}
	await rm(aside, { recursive: true, force: true });
	await rmdir(stage);
}
