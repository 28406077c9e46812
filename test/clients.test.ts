/** Many clients on one model: results, memory, listeners, fairness, back-pressure. */
import { getEventListeners } from 'node:events';
import { join } from 'node:path';
import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';

import test from 'ava';
import { type DenoiseStep, DiffuGPT, type GenerateOptions, type GenerateResult, Tokenizer } from 'diffusion-native';

import { binding } from '../lib/binding.js';
import { uniform } from '../lib/random.js';
import { root } from './helpers/fixtures.js';
import { sharpModel } from './helpers/models.js';

const requests = 2000;
const clients = 64;

const samplers: GenerateOptions[] = [
	{ sampler: 'ancestral', steps: 5 },
	{ sampler: 'ancestral', steps: 6, block: 4, topP: 0.8 },
	{ sampler: 'confidence', steps: 5 },
	{ sampler: 'confidence', plan: 'linear', score: 'margin', temperature: 0.8, topK: 5 },
	{ sampler: 'threshold', threshold: 0.5, block: 5 },
	{ sampler: 'threshold', threshold: 0.5, block: 4, cache: 'dual' },
	{ sampler: 'factor', factor: 1.5, block: 4, cache: 'prefix' },
	{ sampler: 'entropy-bound', entropyBound: 1, temperature: 0.7 },
	{ sampler: 'entropy-bound', attention: { blockCausal: 4 }, cache: 'dual' },
	{ sampler: 'klass', threshold: 0.3, divergence: 0.5, stableSteps: 1 },
	{ sampler: 'revocable', threshold: 0.2, verify: 0.4, temperature: 1, guidance: 0.5 },
	{ sampler: 'first-hitting', guidance: 1 },
	{ sampler: 'autoregressive' },
	{ sampler: 'autoregressive', guidance: 1, temperature: 0.5 },
];

/** Draw n of request i: uniform in [0, 1). */
const draw = (n: number, i: number): number => uniform(1n, 50, n, i);

interface Job {
	prompt: { tokens: Int32Array };
	options: GenerateOptions;
	/** Aborted before this step; -1: never. */
	abortAfter: number;
}

function job(i: number): Job {
	const sampler = samplers[Math.floor(draw(0, i) * samplers.length)] as GenerateOptions;
	const most = 5 + Math.floor(draw(1, i) * 8);
	return {
		prompt: { tokens: Int32Array.from({ length: 1 + Math.floor(draw(2, i) * 6) }, (_, j) => (97 * i + 31 * j) % 8000) },
		options: { ...sampler, length: draw(3, i) < 0.5 ? most : { max: most }, seed: i },
		abortAfter: draw(4, i) < 0.3 ? Math.floor(draw(5, i) * 4) : -1,
	};
}

/** Everything that does not depend on the clock. */
function facts({ stats, ...result }: GenerateResult): object {
	return { ...result, forwards: stats.forwards, real: stats.generatedTokens, canvas: stats.canvas };
}

/** All jobs by `clients` concurrent clients; undefined where a job was aborted. */
async function serve(
	model: DiffuGPT,
	jobs: Job[],
	shared: AbortSignal,
	onLeak: (count: number) => void,
): Promise<(GenerateResult | undefined)[]> {
	const results = new Array<GenerateResult | undefined>(jobs.length).fill(undefined);
	let next = 0;
	const client = async (): Promise<void> => {
		while (next < jobs.length) {
			const i = next++;
			const { prompt, options, abortAfter } = jobs[i] as Job;
			const controller = new AbortController();
			const signal = abortAfter < 0 ? shared : controller.signal;
			const stream = model.stream(prompt, { ...options, signal });
			const reason = new Error(`job ${i}`);
			try {
				for (let step = 0; ; step++) {
					if (step === abortAfter) controller.abort(reason);
					const { done, value } = await stream.next();
					if (!done) continue;
					results[i] = value;
					break;
				}
			} catch (error) {
				if (error !== reason) throw error;
			}
			onLeak(getEventListeners(controller.signal, 'abort').length);
		}
	};
	await Promise.all(Array.from({ length: clients }, client));
	return results;
}

test.serial(
	`${clients} clients, ${requests} requests: solo results, memory as before, no listeners left`,
	async (t) => {
		t.timeout(900_000);
		const warnings: Error[] = [];
		const onWarning = (warning: Error): void => void warnings.push(warning);
		process.on('warning', onWarning);
		// The model that ships, with a full stop for an end token, so that texts end early.
		const eosId = Tokenizer.fromDirectory(join(root, 'models', 'tiny')).encode('.')[0] as number;
		const model = await DiffuGPT.fromPretrained('diffusion-native/tiny', { device: 'cpu', config: { eosId } });
		const jobs = Array.from({ length: requests }, (_, i) => job(i));
		const shared = new AbortController();
		let leaked = 0;
		const onLeak = (count: number): void => {
			leaked += count;
		};
		// The workspace and the heap grow to their working size first.
		await serve(model, jobs.slice(0, 200), shared.signal, onLeak);
		const rss = process.memoryUsage.rss();
		const { batches } = model.engine.counters;
		const started = performance.now();
		const results = await serve(model, jobs, shared.signal, onLeak);
		const ms = performance.now() - started;
		const merged = model.engine.counters.batches - batches;
		const after = process.memoryUsage.rss();
		t.log(
			`RSS ${(rss / 2 ** 20).toFixed(0)} MB before, ${(after / 2 ** 20).toFixed(0)} MB after; ${ms.toFixed(0)} ms, ${merged} batches`,
		);
		const { parameters, training, workspace } = model.engine.immediately('memory', (native) => native.memory());
		t.is(binding().externalMemory(), parameters + training + workspace, 'no cache is left');
		t.true(after - rss < 96 * 2 ** 20, `RSS grew by ${after - rss} bytes`);
		t.is(leaked, 0);
		t.is(getEventListeners(shared.signal, 'abort').length, 0);
		t.is(model.engine.queued, 0);
		const ended = results.filter((result) => result?.finishReason === 'end-of-text').length;
		t.true(ended > requests / 50, `${ended} ended at an end token`);
		const aborted = results.filter((result) => result === undefined).length;
		t.true(aborted > requests / 10 && aborted < requests / 3, `${aborted} were aborted`);
		let forwards = 0;
		for (const [i, { prompt, options }] of jobs.entries()) {
			const result = results[i];
			if (!result) continue;
			forwards += result.stats.forwards;
			const alone = await model.generate(prompt, options);
			if (JSON.stringify(facts(result), plain) !== JSON.stringify(facts(alone), plain))
				t.deepEqual(facts(result), facts(alone));
		}
		t.true(merged < forwards / 8, `${forwards} forwards in ${merged} batches`);
		process.off('warning', onWarning);
		t.deepEqual(warnings, []);
		await model.dispose();
	},
);

const plain = (_: string, value: unknown): unknown => (typeof value === 'bigint' ? String(value) : value);

test.serial('a slow consumer slows its own request only', async (t) => {
	const model = await sharpModel();
	const prompt = { tokens: Int32Array.of(5, 17) };
	let slowSteps = 0;
	let quickDone = false;
	const slow = (async () => {
		for await (const _ of model.stream(prompt, { length: 30, steps: 30, seed: 1 })) {
			if (!quickDone) slowSteps++;
			await new Promise((resolve) => setTimeout(resolve, 20));
		}
	})();
	const quick = await Promise.all(
		Array.from({ length: 8 }, (_, i) => model.generate(prompt, { length: 60, steps: 60, seed: i })),
	);
	quickDone = true;
	t.true(quick.every(({ stats }) => stats.forwards === 60));
	t.true(slowSteps < 30, `the slow stream was at step ${slowSteps} when the others had ended`);
	await slow;
	// What the consumer takes is not the generation's time.
	const stream = model.stream(prompt, { length: 4, steps: 4 });
	let result: GenerateResult | undefined;
	const waited = performance.now();
	for (;;) {
		const { done, value } = await stream.next();
		if (done) {
			result = value;
			break;
		}
		await new Promise((resolve) => setTimeout(resolve, 60));
	}
	t.true(performance.now() - waited - result.stats.ms > 200);
	await model.dispose();
});

test.serial('nothing is computed ahead of the consumer', async (t) => {
	const model = await sharpModel();
	const stream = model.stream({ tokens: Int32Array.of(5) }, { length: 8, steps: 8 });
	t.is(model.engine.counters.requests, 0);
	await stream.next();
	await new Promise((resolve) => setTimeout(resolve, 30));
	t.is(model.engine.counters.requests, 1);
	await stream.return(undefined as never);
	await model.dispose();
});

test.serial('steps of concurrent requests advance together: nobody waits for another to finish', async (t) => {
	const model = await sharpModel();
	const finished: number[] = [];
	const lengths = [40, 3, 40, 5, 40, 2];
	await Promise.all(
		lengths.map(async (length, i) => {
			await model.generate({ tokens: Int32Array.of(1 + i) }, { length, steps: length });
			finished.push(i);
		}),
	);
	t.deepEqual(finished.slice(0, 3), [5, 1, 3]);
	await model.dispose();
});

test.serial('an abort takes effect within one step and frees its place at once', async (t) => {
	const model = await sharpModel();
	const controller = new AbortController();
	const events: DenoiseStep[] = [];
	const reason = new Error('enough');
	const aborted = (async () => {
		const options = { length: 50, steps: 50, block: 50, cache: 'dual', signal: controller.signal } as const;
		for await (const event of model.stream({ tokens: Int32Array.of(5) }, options)) {
			events.push(event);
			if (event.step === 3) queueMicrotask(() => controller.abort(reason));
		}
	})();
	const other = model.generate({ tokens: Int32Array.of(9) }, { length: 50, steps: 50, seed: 2 });
	await t.throwsAsync(aborted, { is: reason });
	t.is(events.length, 3);
	t.true(model.engine.queued <= 1, 'only the other one may wait');
	t.is((await other).stats.forwards, 50);
	t.true(model.engine.counters.requests <= 50 + 4);
	t.is(getEventListeners(controller.signal, 'abort').length, 0);
	await model.dispose();
});

test.serial('more clients than the queue holds are refused, the others are served', async (t) => {
	const model = await sharpModel();
	const outcomes = await Promise.allSettled(
		Array.from({ length: 1100 }, (_, i) =>
			model.generate({ tokens: Int32Array.of(5) }, { length: 2, steps: 1, seed: i }),
		),
	);
	const refused = outcomes.filter((outcome) => outcome.status === 'rejected');
	t.is(refused.length, 1100 - 1024);
	for (const { reason } of refused as PromiseRejectedResult[]) t.is(reason.code, 'ERR_DN_BUSY');
	t.is((await model.generate({ tokens: Int32Array.of(5) }, { length: 2 })).tokens.length, 2);
	await model.dispose();
});

test.serial('dispose during many streams ends each with ERR_DN_DISPOSED and frees everything', async (t) => {
	const before = binding().externalMemory();
	const model = await sharpModel();
	const streams = Array.from({ length: 30 }, (_, i) =>
		model.stream(
			{ tokens: Int32Array.of(5) },
			{
				length: 30,
				seed: i,
				...(i % 3 === 0 ? { sampler: 'autoregressive' } : i % 3 === 1 ? { block: 5, cache: 'dual' } : {}),
			},
		),
	);
	await Promise.all(streams.map((stream) => stream.next()));
	const pending = streams.map((stream) => stream.next());
	await model.dispose();
	const outcomes = await Promise.allSettled(
		pending.map(async (next, i) => {
			await next;
			await streams[i]?.next();
		}),
	);
	for (const outcome of outcomes) t.is(outcome.status === 'rejected' && outcome.reason.code, 'ERR_DN_DISPOSED');
	t.is(binding().externalMemory(), before);
});

test.serial('a stream that is dropped half-way gives its caches back to the garbage collector', async (t) => {
	setFlagsFromString('--expose-gc');
	const collectGarbage = runInNewContext('gc') as () => void;
	const model = await sharpModel();
	const options = { length: 20, block: 5, cache: 'dual' } as const;
	await model.generate({ tokens: Int32Array.of(5) }, options);
	const before = binding().externalMemory();
	await (async () => {
		for (let i = 0; i < 10; i++) await model.stream({ tokens: Int32Array.of(5) }, options).next();
	})();
	t.true(binding().externalMemory() > before);
	for (let i = 0; i < 50 && binding().externalMemory() > before; i++) {
		collectGarbage();
		await new Promise((resolve) => setTimeout(resolve, 10));
	}
	t.is(binding().externalMemory(), before);
	await model.dispose();
});
