/**
 * The gate to one native model. A native model takes one call at a time; an `Engine` queues callers first come, first
 * served, and packs the denoising steps that are waiting when the model becomes free into one ragged batch. Many
 * `generate` calls that each await `engine.denoise` are thereby served together, step by step (continuous batching).
 * Nothing here knows what a token means; lib/generate.ts and lib/trainer.ts do.
 */
import type { ModelConfig } from './config.js';
import { DiffusionNativeError, fromNative } from './errors.js';
import { logitRowsOf, merge, split } from './merge.js';
import { mergeSteps, stepsOf } from './merge-steps.js';
import type { NativeCache, NativeModel, NativeParameter } from './native-types.js';
import type { DenoiseRequest, RowStatistics, StepRecord, StepsRequest } from './requests.js';

/** Bounds of what an engine holds and merges. */
export interface EngineOptions {
	/** Requests that may wait at once; one more is refused with `ERR_DN_BUSY`. @default 1024 */
	maxQueued?: number;
	/** Most packed tokens of one merged batch; a larger single request still runs, alone. @default 8192 */
	batchTokens?: number;
	/** Most raw logits that one merged batch returns; a larger single request still runs, alone. @default 2^25, 128 MiB */
	batchLogits?: number;
}

/** What waits is one of three: a step or several, which are merged with their like, or a call of its own. */
interface Waiting {
	request: DenoiseRequest | undefined;
	steps: StepsRequest | undefined;
	call: ((native: NativeModel) => unknown) | undefined;
	/** It was in a batch that failed, and is not merged again. */
	single: boolean;
	signal: AbortSignal | undefined;
	resolve: (value: unknown) => void;
	reject: (reason: unknown) => void;
}

/** Serialises and merges the calls of one native model. Owns it: `dispose` frees it. */
export class Engine {
	readonly config: ModelConfig;
	/** "cpu/avx512", "cuda:0/sm_90". */
	readonly backend: string;
	/** Whether the device can take several steps by itself: `denoiseSteps`. */
	readonly deviceLoop: boolean;
	/** Merged native calls so far and the requests they carried, for benchmarks and tests. */
	readonly counters = { batches: 0, requests: 0 };

	readonly #native: NativeModel;
	readonly #maxQueued: number;
	/** The bound that `EngineOptions.batchTokens` sets. */
	readonly batchTokens: number;
	readonly #batchLogits: number;
	readonly #queue: Waiting[] = [];
	/** Weak, so that a stream which is dropped half-way does not keep its caches. */
	readonly #caches = new Set<WeakRef<NativeCache>>();
	/** Waiting requests by signal: one listener per signal, however many requests share it. */
	readonly #signals = new Map<AbortSignal, { items: Set<Waiting>; listener: () => void }>();
	#running: Promise<void> | undefined;
	#scheduled = false;
	#parameters: readonly NativeParameter[] | undefined;
	#closing: Promise<void> | undefined;

	constructor(native: NativeModel, config: ModelConfig, options: EngineOptions = {}) {
		this.#native = native;
		this.config = config;
		this.backend = native.backend;
		this.deviceLoop = native.deviceLoop;
		this.#maxQueued = options.maxQueued ?? 1024;
		this.batchTokens = options.batchTokens ?? 8192;
		this.#batchLogits = options.batchLogits ?? 2 ** 25;
	}

	/** Whether `dispose` was called. */
	get disposed(): boolean {
		return this.#closing !== undefined;
	}

	/** The parameter table. */
	get parameters(): readonly NativeParameter[] {
		this.#parameters ??= this.#native.parameters;
		return this.#parameters;
	}

	/** Requests waiting for the native side. */
	get queued(): number {
		return this.#queue.length;
	}

	/** Runs `call` alone on the native model, in its turn. Rejects with `signal.reason`, `ERR_DN_BUSY` or `ERR_DN_DISPOSED`. */
	run<T>(call: (native: NativeModel) => T | Promise<T>, signal?: AbortSignal): Promise<T> {
		return this.#enqueue({ call }, signal) as Promise<T>;
	}

	/** As `run`, for a call that frees memory: it is not refused because many wait, and nothing aborts it. */
	free<T>(call: (native: NativeModel) => T | Promise<T>): Promise<T> {
		return this.#enqueue({ call }, undefined, Number.POSITIVE_INFINITY) as Promise<T>;
	}

	/** One denoising step, merged with those of others. Rejects as `run` does. */
	denoise(request: DenoiseRequest, signal?: AbortSignal): Promise<RowStatistics> {
		return this.#enqueue({ request }, signal) as Promise<RowStatistics>;
	}

	/**
	 * Up to `request.steps` steps in one native call, merged with those of others; at least one where something is open.
	 * Needs `deviceLoop`. Rejects as `run` does.
	 */
	denoiseSteps(request: StepsRequest, signal?: AbortSignal): Promise<StepRecord[]> {
		return this.#enqueue({ steps: request }, signal) as Promise<StepRecord[]>;
	}

	/**
	 * A synchronous use of the native model. Throws `ERR_DN_BUSY` while an asynchronous call is in flight (`what` names
	 * the refused one) and `ERR_DN_DISPOSED` after `dispose`.
	 */
	immediately<T>(what: string, call: (native: NativeModel) => T): T {
		this.check();
		if (this.#running) {
			throw new DiffusionNativeError(
				'ERR_DN_BUSY',
				`${what} was called while the model is computing; await that first`,
			);
		}
		try {
			return call(this.#native);
		} catch (error) {
			throw fromNative(error);
		}
	}

	/** A key-value cache, freed with `releaseCache` or, at the latest, with the model. Rejects as `run` does. */
	async createCache(capacity: number, signal?: AbortSignal): Promise<NativeCache> {
		let made = undefined as NativeCache | undefined;
		try {
			return await this.run((native) => {
				const cache = native.createCache(capacity);
				made = cache;
				for (const reference of this.#caches) if (!reference.deref()) this.#caches.delete(reference);
				this.#caches.add(new WeakRef(cache));
				return cache;
			}, signal);
		} catch (error) {
			// An abort came between its making and its delivery.
			if (made) this.releaseCache(made);
			throw error;
		}
	}

	/** Frees a cache; idempotent. No call that uses it may be in flight. */
	releaseCache(cache: NativeCache): void {
		for (const reference of this.#caches) if (reference.deref() === cache) this.#caches.delete(reference);
		cache.dispose();
	}

	/** Throws `ERR_DN_DISPOSED` after `dispose`. */
	check(): void {
		if (this.#closing) throw disposedError();
	}

	/** Waits for the call in flight, rejects what waits with `ERR_DN_DISPOSED`, frees the native model. Idempotent. */
	dispose(): Promise<void> {
		this.#closing ??= this.#close();
		return this.#closing;
	}

	async #close(): Promise<void> {
		for (const item of this.#queue.splice(0)) {
			this.#detach(item);
			item.reject(disposedError());
		}
		await this.#running;
		for (const reference of this.#caches) reference.deref()?.dispose();
		this.#caches.clear();
		this.#native.dispose();
	}

	#enqueue(
		work: Partial<Pick<Waiting, 'request' | 'steps' | 'call'>>,
		signal: AbortSignal | undefined,
		most = this.#maxQueued,
	): Promise<unknown> {
		if (this.#closing) return Promise.reject(disposedError());
		if (signal?.aborted) return Promise.reject(signal.reason);
		if (this.#queue.length >= most) {
			return Promise.reject(
				new DiffusionNativeError('ERR_DN_BUSY', `${this.#queue.length} requests are already waiting for this model`),
			);
		}
		return new Promise((resolve, reject) => {
			const { request, steps, call } = work;
			const item: Waiting = { request, steps, call, single: false, signal, resolve, reject };
			this.#attach(item);
			this.#queue.push(item);
			this.#schedule();
		});
	}

	#attach(item: Waiting): void {
		const { signal } = item;
		if (!signal) return;
		const known = this.#signals.get(signal);
		if (known) {
			known.items.add(item);
			return;
		}
		const items = new Set([item]);
		const listener = (): void => {
			this.#signals.delete(signal);
			for (const waiting of items) {
				this.#queue.splice(this.#queue.indexOf(waiting), 1);
				waiting.reject(signal.reason);
			}
		};
		signal.addEventListener('abort', listener, { once: true });
		this.#signals.set(signal, { items, listener });
	}

	/** An item that leaves the queue no longer listens. */
	#detach(item: Waiting): void {
		const known = item.signal && this.#signals.get(item.signal);
		if (!item.signal || !known?.items.delete(item) || known.items.size > 0) return;
		item.signal.removeEventListener('abort', known.listener);
		this.#signals.delete(item.signal);
	}

	/**
	 * Starts the next call in the next turn of the event loop, so that everyone whose step has just ended can ask for the
	 * next one first: that is what keeps concurrent requests in one batch.
	 */
	#schedule(): void {
		if (this.#scheduled || this.#running || this.#queue.length === 0 || exiting()) return;
		this.#scheduled = true;
		setImmediate(() => {
			this.#scheduled = false;
			if (this.#running || this.#queue.length === 0 || exiting()) return;
			const items = this.#take();
			this.#running = this.#serve(items).finally(() => {
				this.#running = undefined;
				this.#schedule();
			});
		});
	}

	/** The head of the queue, with the denoising requests of its kind right behind it that fit the budgets. */
	#take(): Waiting[] {
		const items: Waiting[] = [];
		let tokens = 0;
		let logits = 0;
		for (const next of this.#queue) {
			const { request, steps } = next;
			const first = items[0];
			if (first && (next.call || next.single || Boolean(first.steps) !== Boolean(steps))) break;
			tokens += request ? request.sequences.length * request.positions.length : (steps?.tokens.length ?? 0);
			logits += request ? logitRowsOf(request) * this.config.vocab : 0;
			if (items.length > 0 && (tokens > this.batchTokens || logits > this.#batchLogits)) break;
			items.push(next);
			if (next.call || next.single) break;
		}
		this.#queue.splice(0, items.length);
		for (const item of items) this.#detach(item);
		return items;
	}

	/** Never rejects: every outcome goes to the items. */
	async #serve(items: Waiting[]): Promise<void> {
		const first = items[0] as Waiting;
		if (first.call) {
			try {
				settle(first, await first.call(this.#native));
			} catch (error) {
				first.reject(fromNative(error));
			}
			return;
		}
		try {
			const results = first.steps
				? await this.#stepsTogether(items.map((item) => item.steps as StepsRequest))
				: await this.#denoiseTogether(items.map((item) => item.request as DenoiseRequest));
			for (const [i, item] of items.entries()) settle(item, results[i]);
		} catch (error) {
			if (items.length === 1) {
				first.reject(first.signal?.aborted ? first.signal.reason : fromNative(error));
				return;
			}
			// One of them is at fault; alone, only that one fails.
			this.#putBack(items);
		}
	}

	/** To the head of the queue, for a call each: there an abort and `dispose` reach them as they reach all who wait. */
	#putBack(items: Waiting[]): void {
		const again: Waiting[] = [];
		for (const item of items) {
			if (item.signal?.aborted) item.reject(item.signal.reason);
			else if (this.#closing) item.reject(disposedError());
			else again.push(item);
		}
		for (const item of again) {
			item.single = true;
			this.#attach(item);
		}
		this.#queue.unshift(...again);
	}

	async #denoiseTogether(requests: DenoiseRequest[]): Promise<RowStatistics[]> {
		const merged = merge(requests);
		const isAlone = requests.length === 1 && this.#queue.length === 0;
		if (isAlone) merged.denoise.ahead = requests[0]?.ahead ?? null;
		const stats = await this.#native.denoise(merged.batch, merged.denoise);
		this.counters.batches++;
		this.counters.requests += requests.length;
		return split(stats, merged, this.config.vocab);
	}

	async #stepsTogether(requests: StepsRequest[]): Promise<StepRecord[][]> {
		const log = await this.#native.denoiseSteps(mergeSteps(requests));
		this.counters.batches++;
		this.counters.requests += requests.length;
		return requests.map((_, s) => stepsOf(log, s, requests.length));
	}
}

/** A call whose signal was aborted while it ran rejects once it has ended. */
function settle(item: Waiting, value: unknown): void {
	if (item.signal?.aborted) item.reject(item.signal.reason);
	else item.resolve(value);
}

function disposedError(): DiffusionNativeError {
	return new DiffusionNativeError('ERR_DN_DISPOSED', 'the model was disposed of');
}

let exitSeen: boolean | undefined;

/** True once the process is leaving: a call started then would only delay the exit. */
function exiting(): boolean {
	if (exitSeen === undefined) {
		exitSeen = false;
		process.once('exit', () => {
			exitSeen = true;
		});
	}
	return exitSeen;
}
