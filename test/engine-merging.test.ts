/** The merging of requests: which share a batch, whose rows and results are whose, and a request at fault among others. */
import test from 'ava';

import { make, request } from './helpers/engine.js';

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
