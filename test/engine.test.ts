/** The queue of requests: its order and bound, aborts, and disposing while some wait and one is computed. */
import { getEventListeners } from 'node:events';

import test from 'ava';

import { make, request, turn } from './helpers/engine.js';

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
