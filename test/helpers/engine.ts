/** An engine on a native model made of JavaScript, whose calls end when the test says so, and requests for it. */
import { resolveConfig } from '../../lib/config.js';
import { Engine, type EngineOptions } from '../../lib/engine.js';
import type { NativeBatch, NativeDenoise, NativeModel, NativeStats } from '../../lib/native-types.js';
import type { DenoiseRequest } from '../../lib/requests.js';

const config = resolveConfig({ layers: 1, heads: 1, channels: 4, vocab: 100, maskId: 99, eosId: 0 });

/** Answers every row with its own token id; an id of 66 makes the whole call fail. */
class FakeNative {
	readonly backend = 'fake';
	readonly parameters = [];
	readonly batches: NativeBatch[] = [];
	/** What each of them may go ahead by. */
	readonly ahead: NativeDenoise['ahead'][] = [];
	/** (D) of each, indices into the listed rows. */
	readonly guideRows: number[][] = [];
	inFlight = 0;
	disposed = 0;
	#gate: Promise<void> = Promise.resolve();
	#open: () => void = () => {};

	/** Calls from now on do not end before `release`. */
	hold(): void {
		this.#gate = new Promise((resolve) => {
			this.#open = resolve;
		});
	}

	release(): void {
		this.#open();
		this.#gate = Promise.resolve();
	}

	async denoise(batch: NativeBatch, denoise: NativeDenoise): Promise<NativeStats> {
		if (this.inFlight++ > 0) throw new Error('two calls at once');
		this.batches.push(batch);
		this.ahead.push(denoise.ahead);
		this.guideRows.push(Array.from(denoise.guideRow));
		await this.#gate;
		this.inFlight--;
		if (batch.ids.includes(66)) throw Object.assign(new Error('id 66'), { code: 'ERR_DN_ARGUMENT' });
		const ids = Int32Array.from(denoise.row, (row) => batch.ids[(batch.rows as Int32Array)[row] as number] as number);
		const floats = Float32Array.from(ids);
		const W = denoise.watch.length;
		const watched = Float32Array.from(
			{ length: ids.length * W },
			(_, i) => (ids[Math.floor(i / W)] as number) * 1000 + (denoise.watch[i % W] as number),
		);
		return {
			best: ids,
			drawn: ids,
			probability: floats,
			margin: floats,
			entropy: floats,
			drawnLogProb: floats,
			divergence: floats,
			watched,
			logits: Float32Array.from({ length: (denoise.logitRows?.length ?? 0) * config.vocab }, (_, i) => {
				const row = denoise.logitRows?.[Math.floor(i / config.vocab)] as number;
				return batch.ids[(batch.rows as Int32Array)[row] as number] as number;
			}),
		};
	}

	/** Caches made and not disposed of. */
	caches = 0;
	/** Runs when a cache was made. */
	onCache = (): void => {};

	createCache(capacity: number) {
		this.caches++;
		this.onCache();
		return { capacity, bytes: 0, dispose: () => void this.caches-- };
	}

	dispose(): void {
		if (this.inFlight > 0) throw new Error('disposed during a call');
		this.disposed++;
	}
}

export function make(options?: EngineOptions): { native: FakeNative; engine: Engine } {
	const native = new FakeNative();
	return { native, engine: new Engine(native as unknown as NativeModel, config, options) };
}

export function request(ids: number[], rows: number[] = [0], watch: number[] = []): DenoiseRequest {
	return {
		sequences: [Int32Array.from(ids)],
		positions: Int32Array.from(ids, (_, i) => i),
		keyLength: ids.length,
		caches: null,
		mask: { kind: 'full' },
		rowSequence: null,
		row: Int32Array.from(rows),
		rowGuide: null,
		rowPosition: Int32Array.from(rows),
		step: 0,
		seed: 1n,
		guidance: 0,
		temperature: 0,
		topK: 0,
		topP: 1,
		banned: 99,
		bannedEnd: -1,
		watch: Int32Array.from(watch),
	};
}

export const turn = (): Promise<void> => new Promise((resolve) => setImmediate(() => setImmediate(resolve)));
