/** The queue and the merging of requests, on a native model made of JavaScript whose calls end when the test says so. */
import { getEventListeners } from 'node:events';

import test from 'ava';
import { resolveConfig } from '../lib/config.js';
import { Engine, type EngineOptions } from '../lib/engine.js';
import type { NativeBatch, NativeDenoise, NativeModel, NativeStats } from '../lib/native-types.js';
import type { DenoiseRequest } from '../lib/requests.js';

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

function make(options?: EngineOptions): { native: FakeNative; engine: Engine } {
	const native = new FakeNative();
	return { native, engine: new Engine(native as unknown as NativeModel, config, options) };
}

function request(ids: number[], rows: number[] = [0], watch: number[] = []): DenoiseRequest {
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

const turn = (): Promise<void> => new Promise((resolve) => setImmediate(() => setImmediate(resolve)));

test('requests that wait are served in one ragged batch, each with its own results', async (t) => {
	const { native, engine } = make();
	const results = await Promise.all([
		engine.denoise(request([1, 2, 3], [2, 0], [5])),
		engine.denoise(request([4], [0], [7, 5])),
		engine.denoise(request([8, 9], [1])),
	]);
	t.is(native.batches.length, 1);
	t.deepEqual(Array.from(native.batches[0]?.offsets ?? []), [0, 3, 4, 6]);
	t.deepEqual(
		results.map(({ best }) => Array.from(best)),
		[[3, 1], [4], [9]],
	);
	t.deepEqual(
		results.map(({ watched }) => Array.from(watched)),
		[[3005, 1005], [4007, 4005], []],
	);
	await engine.dispose();
});

test('the token budget splits batches, and a larger request runs alone', async (t) => {
	const { native, engine } = make({ batchTokens: 4 });
	await Promise.all([[1, 2], [3, 4], [5], [6, 7, 8, 9, 10, 11], [12]].map((ids) => engine.denoise(request(ids))));
	t.deepEqual(
		native.batches.map((batch) => batch.ids.length),
		[4, 1, 6, 1],
	);
	await engine.dispose();
});

test('logits come with the statistics, of the right rows, and their bound splits batches', async (t) => {
	const { native, engine } = make({ batchLogits: 5 * 100 });
	const guided = {
		...request([1, 2, 3], [2, 0]),
		sequences: [Int32Array.of(1, 2, 3), Int32Array.of(4, 5, 6)],
		rowGuide: Int32Array.of(1, 1),
		logits: true,
	};
	const [a, b, c, d] = await Promise.all([
		engine.denoise(guided),
		engine.denoise(request([7, 8], [1])),
		engine.denoise({ ...request([9], [0]), logits: true }),
		engine.denoise({ ...request([11, 12], [1, 0]), logits: true }),
	]);
	const firsts = (values: Float32Array | undefined): number[] =>
		Array.from(values ?? []).filter((_, i) => i % 100 === 0);
	t.deepEqual(
		[firsts(a?.logits), firsts(a?.guideLogits)],
		[
			[3, 1],
			[6, 4],
		],
	);
	t.deepEqual([b?.logits, b?.guideLogits, c?.guideLogits], [undefined, undefined, undefined]);
	t.deepEqual([firsts(c?.logits), firsts(d?.logits)], [[9], [12, 11]]);
	t.deepEqual(
		native.batches.map((batch) => batch.ids.length),
		[6 + 2 + 1, 2],
	);
	await engine.dispose();
});

test('rows are listed by sequence: those of a guided request, then their twins', async (t) => {
	const { native, engine } = make();
	const guided = {
		...request([1, 2, 3], [2, 0, 1]),
		sequences: [Int32Array.of(1, 2, 3), Int32Array.of(4, 5, 6)],
		rowGuide: Int32Array.of(1, 1, 1),
	};
	const results = await Promise.all([engine.denoise(request([7, 8], [1])), engine.denoise(guided)]);
	t.deepEqual(Array.from(native.batches[0]?.rows ?? []), [1, 4, 2, 3, 7, 5, 6]);
	t.deepEqual(native.guideRows, [[-1, 4, 5, 6]]);
	t.deepEqual(
		results.map(({ best }) => Array.from(best)),
		[[8], [3, 1, 2]],
	);
	await engine.dispose();
});

test('run and denoise are served first come, first served, one at a time', async (t) => {
	const { native, engine } = make();
	const order: string[] = [];
	const note = (name: string) => () => {
		order.push(name);
	};
	const all = [
		engine.denoise(request([1])).then(note('a')),
		engine.denoise(request([2])).then(note('b')),
		engine
			.run(async () => {
				t.is(native.inFlight, 0);
				await turn();
			})
			.then(note('run')),
		engine.denoise(request([3])).then(note('c')),
	];
	await Promise.all(all);
	t.deepEqual(order, ['a', 'b', 'run', 'c']);
	t.is(native.batches.length, 2);
	await engine.dispose();
});

test('a request at fault fails alone', async (t) => {
	const { engine } = make();
	const outcomes = await Promise.allSettled([[1], [66], [3]].map((ids) => engine.denoise(request(ids))));
	t.deepEqual(
		outcomes.map(({ status }) => status),
		['fulfilled', 'rejected', 'fulfilled'],
	);
	t.like((outcomes[1] as PromiseRejectedResult).reason, { name: 'DiffusionNativeError', code: 'ERR_DN_ARGUMENT' });
	await engine.dispose();
});

test('what was merged with a request at fault waits again: aborts and dispose reach it', async (t) => {
	const { native, engine } = make();
	const controller = new AbortController();
	const reason = new Error('enough');
	native.hold();
	const faulty = engine.denoise(request([66]));
	const others = Array.from({ length: 5 }, (_, i) => engine.denoise(request([i]), controller.signal));
	const served = engine.denoise(request([50]));
	const never = engine.denoise(request([51]));
	await turn();
	t.is(native.batches.length, 1);
	// The batch fails, and the first is tried again alone; the next call is held.
	native.release();
	native.hold();
	await turn();
	t.deepEqual(Array.from(native.batches[1]?.ids ?? []), [66]);
	t.is(engine.queued, 7);
	controller.abort(reason);
	for (const promise of others) t.is(await t.throwsAsync(promise), reason);
	native.release();
	native.hold();
	await t.throwsAsync(faulty, { code: 'ERR_DN_ARGUMENT' });
	await turn();
	t.deepEqual(Array.from(native.batches[2]?.ids ?? []), [50]);
	const disposal = engine.dispose();
	await t.throwsAsync(never, { code: 'ERR_DN_DISPOSED' });
	native.release();
	t.is((await served).best[0], 50);
	await disposal;
	t.is(native.batches.length, 3);
	t.is(native.disposed, 1);
});

test('an abort and dispose during a batch that fails leave nothing to try again', async (t) => {
	const { native, engine } = make();
	const controller = new AbortController();
	const reason = new Error('enough');
	native.hold();
	const aborted = [66, 1].map((id) => engine.denoise(request([id]), controller.signal));
	const disposed = [2, 3].map((id) => engine.denoise(request([id])));
	await turn();
	controller.abort(reason);
	const disposal = engine.dispose();
	native.release();
	for (const promise of aborted) t.is(await t.throwsAsync(promise), reason);
	for (const promise of disposed) await t.throwsAsync(promise, { code: 'ERR_DN_DISPOSED' });
	await disposal;
	t.is(native.batches.length, 1);
});

test('a request that is tried again does not go ahead while the rest of its batch waits', async (t) => {
	const { native, engine } = make();
	const ahead = { most: 4, stops: new Int32Array(0) };
	await Promise.allSettled([1, 66, 3].map((id) => engine.denoise({ ...request([id]), ahead })));
	t.deepEqual(
		native.ahead.map((given) => given?.most),
		[undefined, undefined, undefined, 4],
	);
	await engine.dispose();
});

test('what frees memory is not refused because many wait', async (t) => {
	const { native, engine } = make({ maxQueued: 1 });
	native.hold();
	const first = engine.denoise(request([1]));
	await turn();
	const waiting = engine.denoise(request([2]));
	await t.throwsAsync(
		engine.run(() => 1),
		{ code: 'ERR_DN_BUSY' },
	);
	const freed = engine.free(() => 'freed');
	native.release();
	await Promise.all([first, waiting]);
	t.is(await freed, 'freed');
	await engine.dispose();
});

test("a row outside a request's own sequence is an error, not another request's row", async (t) => {
	const { engine } = make();
	const ask = [request([1, 2], [1]), request([3], [-1]), request([4], [1]), request([5], [0])];
	const outcomes = await Promise.allSettled(ask.map((each) => engine.denoise(each)));
	t.deepEqual(
		outcomes.map((outcome) => (outcome.status === 'fulfilled' ? 'done' : outcome.reason.code)),
		['done', 'ERR_DN_INTERNAL', 'ERR_DN_INTERNAL', 'done'],
	);
	await engine.dispose();
});

test('more than the bound of waiting requests is refused with ERR_DN_BUSY', async (t) => {
	const { native, engine } = make({ maxQueued: 2 });
	native.hold();
	const first = engine.denoise(request([1]));
	await turn();
	const waiting = [engine.denoise(request([2])), engine.denoise(request([3]))];
	await t.throwsAsync(engine.denoise(request([4])), { code: 'ERR_DN_BUSY' });
	native.release();
	await Promise.all([first, ...waiting]);
	await t.notThrowsAsync(engine.denoise(request([4])));
	await engine.dispose();
});

test('a waiting request is aborted at once, one in flight after its call, and no listener stays', async (t) => {
	const { native, engine } = make();
	const controller = new AbortController();
	const { signal } = controller;
	const reason = new Error('enough');
	native.hold();
	const inFlight = engine.denoise(request([1]), signal);
	await turn();
	const waiting = Array.from({ length: 20 }, (_, i) => engine.denoise(request([i]), signal));
	const other = engine.denoise(request([50]));
	t.is(getEventListeners(signal, 'abort').length, 1, 'one listener, however many requests');
	controller.abort(reason);
	for (const promise of waiting) t.is(await t.throwsAsync(promise), reason);
	t.is(native.inFlight, 1);
	t.is(engine.queued, 1);
	native.release();
	t.is(await t.throwsAsync(inFlight), reason);
	t.is((await other).best[0], 50);
	t.is(await t.throwsAsync(engine.run(() => 1, signal)), reason);
	t.is(getEventListeners(signal, 'abort').length, 0);
	const fresh = new AbortController();
	await engine.denoise(request([1]), fresh.signal);
	t.is(getEventListeners(fresh.signal, 'abort').length, 0);
	await engine.dispose();
});

test('an abort ends the wait for a cache at once, and a cache made meanwhile is freed', async (t) => {
	const { native, engine } = make();
	const reason = new Error('enough');
	native.hold();
	const other = engine.denoise(request([1]));
	await turn();
	const waiting = new AbortController();
	const never = engine.createCache(8, waiting.signal);
	waiting.abort(reason);
	t.is(await t.throwsAsync(never), reason);
	t.is(native.inFlight, 1, 'nobody waited for the call in flight');
	native.release();
	await other;
	const during = new AbortController();
	native.onCache = () => during.abort(reason);
	t.is(await t.throwsAsync(engine.createCache(8, during.signal)), reason);
	t.is(native.caches, 0);
	native.onCache = () => {};
	engine.releaseCache(await engine.createCache(8));
	t.is(native.caches, 0);
	await engine.dispose();
});

test('dispose waits for the call in flight, rejects what waits, and may be repeated', async (t) => {
	const { native, engine } = make();
	native.hold();
	const inFlight = engine.denoise(request([1]));
	await turn();
	const waiting = engine.denoise(request([2]));
	t.throws(() => engine.immediately('getParameter', () => 1), { code: 'ERR_DN_BUSY' });
	const disposals = [engine.dispose(), engine.dispose()];
	await t.throwsAsync(waiting, { code: 'ERR_DN_DISPOSED' });
	t.is(native.disposed, 0);
	native.release();
	t.is((await inFlight).best[0], 1);
	await Promise.all(disposals);
	t.is(native.disposed, 1);
	await t.throwsAsync(engine.denoise(request([1])), { code: 'ERR_DN_DISPOSED' });
	t.throws(() => engine.immediately('getParameter', () => 1), { code: 'ERR_DN_DISPOSED' });
});

test('nobody starves: a long queue of steps is served in rounds', async (t) => {
	const { native, engine } = make({ batchTokens: 4 });
	const finished: number[] = [];
	await Promise.all(
		Array.from({ length: 8 }, async (_, i) => {
			for (let step = 0; step < 5; step++) await engine.denoise(request([i]));
			finished.push(i);
		}),
	);
	t.is(native.batches.length, 10);
	t.deepEqual(finished, [0, 1, 2, 3, 4, 5, 6, 7]);
	await engine.dispose();
});
