/**
 * Progress of `fromPretrained` on standard error: a bar with rate and time left on a terminal, a line every few seconds
 * elsewhere. Loading that takes less than a second shows nothing.
 */
import cliProgress from 'cli-progress';

import type { LoadProgress } from '../hub.js';
import { isTerminal } from './terminal.js';

export interface LoadViewOptions {
	/** No plain lines: standard error is read with the JSON of standard output. @default false */
	readonly json?: boolean;
	/** @default process.stderr */
	readonly stream?: NodeJS.WriteStream;
	/** Milliseconds of a clock. @default performance.now */
	readonly now?: () => number;
}

/** Milliseconds of loading before anything is shown. */
const quiet = 1000;
/** Milliseconds between lines. */
const betweenLines = 5000;

/** Runs `load`, a call of `fromPretrained` with this `onProgress`, and shows how far it is. */
export async function showLoading<T>(
	load: (onProgress: (progress: LoadProgress) => void) => Promise<T>,
	options: LoadViewOptions = {},
): Promise<T> {
	const view = new LoadView(options);
	try {
		return await load((progress) => view.progress(progress));
	} finally {
		view.stop();
	}
}

class LoadView {
	readonly #json: boolean;
	readonly #stream: NodeJS.WriteStream;
	readonly #now: () => number;
	/** Bytes of the files of a download, or of the parameters, since the stage began. */
	readonly #parts = new Map<string, { loaded: number; total: number }>();
	readonly #begun: number;
	#stage: 'download' | 'load' | undefined;
	#stageBegun = 0;
	/** When something was told last: where the next stage begins. */
	#last: number;
	/** Bytes that were there when they were first told of, from a download that was cut off before. */
	#first = 0;
	#lastLine: number;
	#bar: cliProgress.SingleBar | undefined;

	constructor(options: LoadViewOptions = {}) {
		this.#json = options.json ?? false;
		this.#stream = options.stream ?? process.stderr;
		this.#now = options.now ?? (() => performance.now());
		this.#begun = this.#now();
		this.#last = this.#begun;
		// The first line comes after the quiet time.
		this.#lastLine = this.#begun + quiet - betweenLines;
	}

	progress(progress: LoadProgress): void {
		const now = this.#now();
		const before = this.#last;
		this.#last = now;
		if (progress.status === 'ready') {
			this.stop();
			return;
		}
		const { status, loaded, total } = progress;
		if (this.#stage !== status) {
			this.stop();
			this.#stage = status;
			this.#stageBegun = before;
			this.#first = 0;
		}
		const part = status === 'download' ? progress.file : '';
		if (status === 'download' && !this.#parts.has(part)) this.#first += loaded;
		this.#parts.set(part, { loaded, total });
		if (status === 'load' && loaded === total) this.stop();
		else if (now - this.#begun >= quiet) this.#show(status, now);
	}

	/** Ends the bar: the rest of the command has the stream for itself. */
	stop(): void {
		this.#bar?.stop();
		this.#bar = undefined;
		this.#parts.clear();
		this.#stage = undefined;
	}

	#show(status: 'download' | 'load', now: number): void {
		let loaded = 0;
		let total = 0;
		for (const part of this.#parts.values()) {
			loaded += part.loaded;
			total += part.total;
		}
		const perSecond = (1000 * (loaded - this.#first)) / Math.max(1, now - this.#stageBegun);
		const facts = {
			what: status === 'download' ? 'downloading' : 'loading',
			size: `${megabytes(loaded)}/${megabytes(total)} MB`,
			rate: `${megabytes(perSecond)} MB/s`,
			left: perSecond > 0 ? `${Math.ceil((total - loaded) / perSecond)}s` : '-',
		};
		if (isTerminal(this.#stream)) {
			if (!this.#bar) {
				const format = '{what} {bar} {percentage}%  {size}  {rate}  {left} left';
				const { SingleBar } = cliProgress;
				this.#bar = new SingleBar({
					stream: this.#stream,
					format,
					barsize: 24,
					hideCursor: true,
					clearOnComplete: true,
				});
				this.#bar.start(total, loaded, facts);
			}
			this.#bar.setTotal(total);
			this.#bar.update(loaded, facts);
			return;
		}
		if (this.#json || now - this.#lastLine < betweenLines) return;
		this.#lastLine = now;
		this.#stream.write(`${facts.what}  ${facts.size}  ${facts.rate}  ${facts.left} left\n`);
	}
}

function megabytes(bytes: number): string {
	return (bytes / 1e6).toFixed(bytes < 1e8 ? 1 : 0);
}
