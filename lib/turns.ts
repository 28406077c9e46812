/** Turns of the event loop for long loops of our own, so that timers, requests and aborts get through. */

/** A loop may hold the event loop so long, ms. */
const most = 20;

export class Turns {
	#last = performance.now();

	/** To be awaited in every round of a loop: now and then it waits for the next turn, otherwise it costs next to nothing. */
	next(): Promise<void> | undefined {
		if (performance.now() - this.#last < most) return undefined;
		return new Promise((resolve) => {
			setImmediate(() => {
				this.#last = performance.now();
				resolve();
			});
		});
	}
}
