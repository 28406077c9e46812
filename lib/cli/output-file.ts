/**
 * A file that a command writes while it runs: it appears when the command has succeeded. Until then it has a temporary name
 * beside the target, and what was there before stays. Pipes and devices (`/dev/stdout`, `/dev/full`) are written directly.
 */
import { once } from 'node:events';
import { createWriteStream, type WriteStream } from 'node:fs';
import { access, constants, copyFile, realpath, rename, rm, stat } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { basename, join, resolve } from 'node:path';

import { DiffusionNativeError } from '../errors.js';
import { fileIdentity, isInPlaceOnly, isMissing, temporaryName } from '../files.js';
import { toJson, UsageError } from './terminal.js';

export class OutputFile {
	#failed: Error | undefined;
	#hasText = false;

	private constructor(
		private readonly path: string,
		/** Behind symbolic links; undefined: the stream writes to it directly. */
		private readonly target: string | undefined,
		private readonly stream: WriteStream,
	) {
		// A failure belongs to the next write or to the end, whenever it comes.
		stream.on('error', (error) => {
			this.#failed ??= error;
		});
	}

	/** @throws `ERR_DN_CHECKPOINT` when the file cannot be written, with the system's reason; so do the methods, of a failure since. */
	static async open(path: string): Promise<OutputFile> {
		try {
			const old = await stat(path).catch((error) => {
				if (isMissing(error)) return undefined;
				throw error;
			});
			if (isDescriptor(path) || (old && !old.isFile() && !old.isDirectory()))
				return new OutputFile(path, undefined, await opened(createWriteStream(path)));
			if (!old) return new OutputFile(path, path, await opened(temporary(path)));
			if (old.isDirectory()) throw new Error('EISDIR: it is a directory');
			const target = await realpath(path);
			await access(target, constants.W_OK);
			const stream = await opened(temporary(target, old.mode & 0o777)).catch((error) => {
				// In a directory that cannot be written the file itself is written, at the end.
				if (isInPlaceOnly(error)) return opened(temporary(join(tmpdir(), basename(target)), 0o600));
				throw error;
			});
			return new OutputFile(path, target, stream);
		} catch (cause) {
			throw cannotWrite(path, cause);
		}
	}

	write(text: string): void {
		if (this.#failed) throw cannotWrite(this.path, this.#failed);
		this.stream.write(text);
		this.#hasText = true;
	}

	/** A record as a line of JSON. */
	writeLine(record: object): void {
		this.write(`${toJson(record)}\n`);
	}

	/** Gives the file its name. */
	async keep(): Promise<void> {
		await this.#end();
		if (this.#failed) {
			await this.discard();
			throw cannotWrite(this.path, this.#failed);
		}
		if (this.target === undefined) return;
		const written = String(this.stream.path);
		try {
			await rename(written, this.target).catch(async (error) => {
				// A file that is a mount point, or whose directory cannot be written, is written over.
				if (!isInPlaceOnly(error)) throw error;
				await copyFile(written, this.target as string);
				await rm(written);
			});
		} catch (cause) {
			await this.discard();
			throw cannotWrite(this.path, cause);
		}
	}

	/** Leaves what was there before. Does nothing after {@link keep}. */
	async discard(): Promise<void> {
		await this.#end();
		if (this.target !== undefined) await rm(String(this.stream.path), { force: true }).catch(() => undefined);
	}

	/**
	 * Leaves what was there before, and what was written so far as `<path>.partial`.
	 * @returns that path; undefined when nothing was written, when it went to a pipe, and after {@link keep}
	 */
	async setAside(): Promise<string | undefined> {
		if (this.#hasText && this.target !== undefined && !this.#failed) {
			await this.#end();
			const partial = `${this.path}.partial`;
			const moved = await rename(String(this.stream.path), partial).then(
				() => true,
				() => false,
			);
			if (moved) return partial;
		}
		await this.discard();
		return undefined;
	}

	async #end(): Promise<void> {
		this.stream.end();
		if (!this.stream.closed) await once(this.stream, 'close').catch(() => undefined);
	}
}

/**
 * Refuses files to write that are a file to read or one another. Both by the name of their option or argument; undefined: not given.
 * @throws {@link UsageError} naming both.
 */
export function checkOutputs(
	outputs: Record<string, string | undefined>,
	inputs: Record<string, string | undefined>,
): void {
	const taken = new Map<string, string>();
	for (const [name, path] of [...Object.entries(inputs), ...Object.entries(outputs)]) {
		if (path === undefined || isDescriptor(path)) continue;
		const identity = fileIdentity(path);
		const other = taken.get(identity);
		if (other !== undefined && name in outputs) throw new UsageError(`${name} ${path} is the same file as ${other}`);
		taken.set(identity, `${name} ${path}`);
	}
}

/** Whether the path names an open file of a process or a device, behind which a name of its own means nothing. */
function isDescriptor(path: string): boolean {
	return /^\/(dev|proc)\//.test(resolve(path));
}

function temporary(target: string, mode = 0o666): WriteStream {
	return createWriteStream(temporaryName(target), { flags: 'wx', mode });
}

async function opened(stream: WriteStream): Promise<WriteStream> {
	await once(stream, 'open');
	return stream;
}

/** The reason without the temporary path, which nobody has seen. */
function cannotWrite(path: string, cause: unknown): DiffusionNativeError {
	const { code, message } = cause as NodeJS.ErrnoException;
	const reason = code === undefined || !message.includes('.tmp') ? message : message.replace(/, \w+ '.*$/, '');
	return new DiffusionNativeError('ERR_DN_CHECKPOINT', `${path}: cannot write: ${reason}`, { cause });
}
