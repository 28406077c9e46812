/**
 * Parts of files that are being downloaded: `<blob>.<host>-<pid>.<random>.incomplete`, beside the blob. The name says whose a
 * part is, so that caches on shared disks serve several machines and containers. Whoever gives up leaves its part to anyone
 * by pid 0.
 */
import { createHash, randomBytes } from 'node:crypto';
import { readFileSync, readlinkSync } from 'node:fs';
import { readdir, rename, stat, utimes } from 'node:fs/promises';
import { hostname } from 'node:os';
import { basename, dirname, join } from 'node:path';

import { isAlive } from './files.js';

/**
 * Time without a write after which a part belongs to nobody, whatever its name says, in ms: three times what `fetch` waits for
 * the next bytes. Process numbers of other hosts cannot be looked up, and one's own are given out again.
 */
const abandonedMs = 15 * 60_000;

/** Where process numbers mean the same processes: 12 hex digits of name, boot and, on Linux, space of process numbers. */
export const hostId: string = createHash('sha256')
	.update([hostname(), bootId(), processSpace()].join('\n'))
	.digest('hex')
	.slice(0, 12);

function bootId(): string {
	try {
		return readFileSync('/proc/sys/kernel/random/boot_id', 'utf8').trim();
	} catch {
		return '';
	}
}

function processSpace(): string {
	try {
		return readlinkSync('/proc/self/ns/pid');
	} catch {
		return '';
	}
}

function partName(blob: string, pid: number): string {
	return `${blob}.${hostId}-${pid}.${randomBytes(4).toString('hex')}.incomplete`;
}

/** Takes over a part of `blob` that nobody writes, or names a new one. The rename lets only one process have it. */
export async function claimPart(blob: string): Promise<string> {
	const own = partName(blob, process.pid);
	const folder = dirname(blob);
	const start = `${basename(blob)}.`;
	for (const name of await readdir(folder)) {
		if (!name.startsWith(start) || !name.endsWith('.incomplete')) continue;
		const path = join(folder, name);
		if (!(await isFree(path, name.slice(start.length)))) continue;
		try {
			await rename(path, own);
		} catch {
			continue; // Another process was faster.
		}
		// Its bytes are read, for their hash, before the first new ones are written.
		const now = new Date();
		await utimes(own, now, now).catch(() => undefined);
		return own;
	}
	return own;
}

/** Leaves a part to whoever downloads the blob next. Does nothing when it never came to be, or another process has it. */
export async function leavePart(part: string, blob: string): Promise<void> {
	await rename(part, partName(blob, 0)).catch(() => undefined);
}

/** `owner`: what follows the blob's name. Names of other programs are never free. */
async function isFree(path: string, owner: string): Promise<boolean> {
	const found = /^(?:([0-9a-f]{12})-)?(\d+)\.[0-9a-f]+\.incomplete$/.exec(owner);
	if (!found) return false;
	const [, host, pid] = found;
	if (Number(pid) === 0 || (host === hostId && !isAlive(Number(pid)))) return true;
	try {
		return Date.now() - (await stat(path)).mtimeMs > abandonedMs;
	} catch {
		return false;
	}
}
