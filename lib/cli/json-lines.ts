/** A file of JSON lines that a command writes: --trace of generate, --output of eval. */
import { once } from 'node:events';
import { createWriteStream } from 'node:fs';

import { DiffusionNativeError } from '../errors.js';
import { toJson } from './terminal.js';

export class JsonLines {
	#failed: Error | undefined;

	private constructor(private readonly stream: ReturnType<typeof createWriteStream>) {
		// A failure belongs to the next write or to the close, whenever it comes.
		stream.on('error', (error) => {
			this.#failed ??= error;
		});
	}

	/** @throws `ERR_DN_CHECKPOINT` when the file cannot be written, with the system's reason; so do the methods, of a failure since. */
	static async open(path: string): Promise<JsonLines> {
		const stream = createWriteStream(path);
		try {
			await once(stream, 'open');
		} catch (cause) {
			throw cannotWrite(path, cause as Error);
		}
		return new JsonLines(stream);
	}

	write(record: object): void {
		if (this.#failed) throw cannotWrite(String(this.stream.path), this.#failed);
		this.stream.write(`${toJson(record)}\n`);
	}

	async close(): Promise<void> {
		this.stream.end();
		if (!this.stream.closed) await once(this.stream, 'close').catch(() => undefined);
		if (this.#failed) throw cannotWrite(String(this.stream.path), this.#failed);
	}
}

function cannotWrite(path: string, cause: Error): DiffusionNativeError {
	return new DiffusionNativeError('ERR_DN_CHECKPOINT', `${path}: cannot write: ${cause.message}`, { cause });
}
