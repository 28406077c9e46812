/**
 * A trainer's hold on the engine of its model, from the making of the trainer to its disposal. An engine has one buffer for
 * gradients and two for moments: two trainers, or two calls of one, would mix what they add up there.
 */

import type { Engine } from '../engine.js';
import { DiffusionNativeError } from '../errors.js';
import type { NativeModel } from '../native-types.js';
import type { Runner } from './step.js';

/** Engines that a trainer holds. */
const held = new WeakSet<Engine>();

/**
 * Keeps other trainers from an engine until it is released. Work goes through `alone`, one at a time, and makes its native
 * calls through `run`; other users of the engine get their turns in between.
 */
export class Hold implements Runner {
	readonly #engine: Engine;
	/** Gradients and moments are allocated at the first use. */
	#begun: Promise<unknown> | undefined;
	/** The work that is going on; never rejects. */
	#working: Promise<void> | undefined;
	#released: Promise<void> | undefined;

	/** @throws `ERR_DN_BUSY` while another trainer holds the engine, or one that is disposed of but not yet done with its work. */
	constructor(engine: Engine) {
		if (held.has(engine)) {
			throw new DiffusionNativeError(
				'ERR_DN_BUSY',
				'this model already has a trainer: dispose that one and await it first',
			);
		}
		held.add(engine);
		this.#engine = engine;
	}

	/**
	 * As `Engine.run`. A call whose turn comes after `release` is not made, since the buffers may be another trainer's by then:
	 * it rejects with `ERR_DN_DISPOSED`.
	 */
	run<T>(call: (native: NativeModel) => T | Promise<T>, signal?: AbortSignal): Promise<T> {
		return this.#engine.run((native) => {
			this.#check();
			return call(native);
		}, signal);
	}

	/**
	 * Does `work` with gradients and moments allocated, and nothing else of this trainer beside it.
	 * @throws `ERR_DN_BUSY` while other work is going on or too many wait for the engine; `ERR_DN_DISPOSED` after `release` or
	 * once the model is disposed of; `ERR_DN_OUT_OF_MEMORY`; what `work` throws.
	 */
	async alone<T>(work: () => Promise<T>): Promise<T> {
		this.#check();
		if (this.#working) {
			throw new DiffusionNativeError('ERR_DN_BUSY', 'this trainer is in the middle of a step: await it first');
		}
		const running = this.#begin().then(work);
		const settled = (): void => {
			this.#working = undefined;
		};
		this.#working = running.then(settled, settled);
		return running;
	}

	/** Waits for the work that is going on, lets go of the engine and frees gradients and moments. Idempotent. */
	release(): Promise<void> {
		this.#released ??= this.#free();
		return this.#released;
	}

	#check(): void {
		if (this.#released) throw new DiffusionNativeError('ERR_DN_DISPOSED', 'this trainer was disposed');
		this.#engine.check();
	}

	async #begin(): Promise<void> {
		this.#begun ??= this.#engine.run((native) => native.beginTraining());
		try {
			await this.#begun;
		} catch (error) {
			this.#begun = undefined; // the next work may try again
			throw error;
		}
	}

	async #free(): Promise<void> {
		// Until the work has ended the engine stays held: another trainer would compute in the same buffers.
		if (this.#working) await this.#working;
		held.delete(this.#engine);
		if (!this.#begun || this.#engine.disposed) return;
		try {
			await this.#engine.free((native) => native.endTraining());
		} catch (error) {
			if (!this.#engine.disposed) throw error; // the model is freed with all that it holds
		}
	}
}
