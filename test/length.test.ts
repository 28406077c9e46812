/** Calibration, heads, the evaluation and its report on a model that knows where answers end; bad input. */
import { execFile } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';

import test from 'ava';
import {
	calibrateLength,
	coverageChart,
	DiffuGPT,
	evaluate,
	evaluateLength,
	type GenerateOptions,
	htmlReport,
	type LengthMethod,
	type LengthOptions,
	speedChart,
	Trainer,
	textReport,
	trainLengthHead,
} from 'diffusion-native';

import { boundMetrics } from '../lib/length/metrics.js';
import { eosId, prompt } from './helpers/length-canvas.js';
import { toyLengthModel, toyPairs } from './helpers/lengths.js';
import { sharpModel } from './helpers/models.js';

const root = fileURLToPath(new URL('../..', import.meta.url));

let toy: DiffuGPT;

test.before(async () => {
	toy = await toyLengthModel();
});

test.after.always(async () => {
	await toy?.dispose();
});

test.serial('calibrated bounds cover fresh pairs, group by group, and survive a save', async (t) => {
	const max = 14;
	const fresh = toyPairs(600, 77n);
	for (const method of ['expected', 'threshold', 'first-step', 'constant', 'quantile', 'daedal'] as const) {
		const extra = method === 'daedal' ? { initial: 4, grow: 2, window: 3 } : {};
		const report = await calibrateLength(toy, toyPairs(500, 55n), { method, max, coverage: [0.8, 0.9], ...extra });
		t.is(report.calibration.pairs, 500);
		t.deepEqual(report.warnings, []);
		for (const { coverage, share, looseness } of report.achieved) {
			t.true(share >= coverage && looseness > -2 && looseness < 12, `${method}: ${share}, ${looseness}`);
			const kinds: Record<string, number[]> = { sharp: [], loose: [] };
			for (const { prompt: ids, answer, kind } of fresh) {
				const asked = { tokens: Int32Array.from(ids) };
				const { length } = await toy.predictLength(asked, { max, method, coverage });
				kinds[kind]?.push(Number(length >= answer.length));
			}
			const shareOf = (hits: number[]): number => hits.reduce((a, b) => a + b, 0) / hits.length;
			const all = shareOf([...(kinds['sharp'] as number[]), ...(kinds['loose'] as number[])]);
			t.true(all > coverage - 0.06, `${method} ${coverage}: ${all}`);
			if (report.calibration.edges.length > 0) {
				// A margin never goes below an end at even odds, so what fixes the length is not cut to meet a low target.
				if (report.calibration.form === 'level' && method !== 'quantile')
					t.true(shareOf(kinds['sharp'] as number[]) > 0.98);
				t.true(
					shareOf(kinds['loose'] as number[]) > coverage - 0.09,
					`${method} ${coverage}: ${shareOf(kinds['loose'] as number[])}`,
				);
			}
		}
	}
	const head = await trainLengthHead(toy, toyPairs(600, 56n), { max, units: 16, epochs: 8 });
	t.is(head.pairs, 600);
	for (const kind of ['token', 'pooled', 'quantile'] as const) {
		await calibrateLength(toy, toyPairs(500, 55n), { method: 'head', head: kind, max, coverage: 0.9 });
	}
	let exact = 0;
	for (let k = 0; k < 8; k++) {
		const asked = { tokens: Int32Array.of(1, 2 + k) };
		const token = await toy.predictLength(asked, { max, method: 'head' });
		const pooled = await toy.predictLength(asked, { max, method: 'head', head: 'pooled' });
		t.is(token.probabilities.length, max);
		// The first position after the answer is as much an end as the padding behind it.
		if (token.length === k + 1 && (token.probabilities[k + 1] as number) > 0.97) exact++;
		t.true(Math.abs(pooled.length - (k + 1)) <= 3, `pooled: ${pooled.length} for ${k + 1}`);
	}
	t.true(exact >= 7, `${exact} of 8 by the token head`);
	const directory = mkdtempSync(join(tmpdir(), 'dn-length-'));
	try {
		await toy.save(join(directory, 'model'));
		const loaded = await DiffuGPT.fromPretrained(join(directory, 'model'), { device: 'cpu' });
		for (const length of [
			{ max, method: 'expected', coverage: 0.9 },
			{ max, method: 'constant', coverage: 0.8 },
			{ max, method: 'head', coverage: 0.9 },
			{ max, method: 'head', head: 'quantile', coverage: 0.9 },
			{ max, method: 'head', head: 'pooled' },
		] as const) {
			for (const ids of [
				[1, 12],
				[1, 5],
			]) {
				const asked = { tokens: Int32Array.from(ids) };
				t.deepEqual(await loaded.predictLength(asked, length), await toy.predictLength(asked, length));
			}
		}
		await loaded.dispose();
		for (const [file, text, message] of [
			['length.json', '{"version":2}', /version is 2/],
			['length.json', '{"version":1,"calibrations":[{"method":"guess"}]}', /calibration 0/],
			['length-head.json', '{"version":1,"max":3}', /expected max, pairs/],
			['length-head.json', '{"version":1,"max":14,"pairs":1,"units":5,"levels":[0.5]}', /expected \(32, 5\)/],
		] as const) {
			await toy.save(join(directory, 'model'));
			writeFileSync(join(directory, 'model', file), text);
			await t.throwsAsync(DiffuGPT.fromPretrained(join(directory, 'model')), { code: 'ERR_DN_CHECKPOINT', message });
		}
	} finally {
		rmSync(directory, { recursive: true });
	}
});

test.serial('a ragged batch equals solo calls, bit for bit, under every method', async (t) => {
	const max = 14;
	const methods: LengthOptions[] = [
		{ max, method: 'head' },
		{ max, method: 'head', head: 'quantile', coverage: 0.9 },
		{ max, method: 'expected', coverage: 0.9 },
		{ max, method: 'daedal', initial: 4, grow: 2 },
		{ max, method: 'rho-eos', initial: 4, grow: 2 },
		{ max, method: 'block', block: 3 },
		{ max },
	];
	const prompts = Array.from({ length: 21 }, (_, i) => ({
		tokens: Int32Array.from([...masksOf(i % 3), 1, 2 + (i % 11)]),
	}));
	const options = prompts.map(
		(_, i): GenerateOptions => ({
			length: methods[i % methods.length] as LengthOptions,
			sampler: 'first-hitting',
			seed: i,
		}),
	);
	const together = await toy.generateBatch(prompts, options);
	for (const [i, result] of together.entries()) {
		const alone = await toy.generate(prompts[i] as (typeof prompts)[number], options[i] as GenerateOptions);
		t.deepEqual(result.sequence, alone.sequence);
		t.is(result.stats.forwards, alone.stats.forwards);
	}
});

function masksOf(n: number): number[] {
	return new Array<number>(n).fill(1);
}

test.serial('evaluateLength: its numbers are those of the methods, and the reports hold them', async (t) => {
	const max = 14;
	const pairs = toyPairs(120, 91n);
	const found = await evaluateLength(toy, pairs, {
		max,
		calibration: toyPairs(400, 92n),
		coverage: [0.8, 0.9],
		generations: 12,
		seeds: [1, 2],
		batch: 5,
		likelihoods: 6,
		samples: 3,
		generate: { sampler: 'threshold' },
	});
	t.is(found.pairs, 120);
	t.deepEqual(Object.keys(found.kinds), ['', 'loose', 'sharp']);
	t.is(found.calibration.source, 'data');
	t.true((found.signal['sharp'] as { auc: number }).auc > 0.95);
	t.deepEqual(found.warnings, []);
	// Uncalibrated threshold, all pairs, by solo calls.
	const bounds: number[] = [];
	for (const pair of pairs) {
		bounds.push(
			(await toy.predictLength({ tokens: Int32Array.from(pair.prompt) }, { max, method: 'threshold' })).length,
		);
	}
	const expected = boundMetrics(
		bounds,
		pairs.map(({ answer }) => answer.length),
		max,
	);
	const row = found.bounds.find(
		({ method, coverage, kind }) => method === 'threshold' && coverage === null && kind === '',
	);
	t.like(row, { ...expected });
	const constant = found.bounds.find(
		({ method, coverage, kind }) => method === 'constant' && coverage === 0.9 && kind === '',
	);
	t.true((constant?.versusConstant?.mean as number) >= -1e-9, 'no constant beats the best one');
	const rowsOf = found.generations?.rows ?? [];
	const fixed = rowsOf.find(({ method, kind }) => method === 'fixed' && kind === '');
	t.is(fixed?.canvas, 16);
	t.deepEqual(fixed?.speedup, { mean: 1, min: 1, max: 1 });
	// The baseline is the plain fixed length: all steps on the whole canvas, cut afterwards.
	let forwards = 0;
	let hits = 0;
	for (const pair of pairs.slice(0, 12)) {
		const whole = await toy.generate(
			{ tokens: Int32Array.from(pair.prompt) },
			{ length: max, sampler: 'threshold', seed: 1 },
		);
		forwards += whole.stats.forwards / 12;
		t.is(whole.sequence.length, 2 + max);
		const text = Array.from(whole.tokens);
		hits += Number(text.slice(0, text.indexOf(0)).join() === pair.answer.join()) / 12;
	}
	t.true(Math.abs((fixed?.forwards as number) - forwards) < 1e-9);
	t.true(Math.abs((fixed?.exactMatch.mean as number) - hits) < 1e-9);
	t.is(fixed?.exactMatchVersusFixed, null);
	const early = rowsOf.find(({ method, kind }) => method === 'early cut' && kind === '');
	const gain = (early?.exactMatch.mean as number) - hits;
	t.true(Math.abs((early?.exactMatchVersusFixed?.mean as number) - gain) < 1e-9);
	const sharp = rowsOf.find(({ method, kind }) => method === 'expected' && kind === 'sharp');
	t.true((sharp?.exactMatch.mean as number) > 0.8, `exact match ${sharp?.exactMatch.mean}`);
	t.true((sharp?.canvas as number) < 14);
	t.is(rowsOf.find(({ method }) => method === 'rho-eos')?.nelbo, null);
	t.true((fixed?.nelbo as number) > 0);
	const html = htmlReport(found, 'Report <1>');
	t.true(html.includes('Report &#60;1&#62;') && html.includes('<svg'));
	t.is(html.replaceAll('http://www.w3.org/2000/svg', '').match(/https?:|src=|@import|url\(/), null, 'self-contained');
	t.true(html.includes(`${(100 * expected.correct).toFixed(1)} %`));
	for (const svg of [coverageChart(found), speedChart(found) as string]) {
		t.is(svg.split('<g').length - 1, svg.split('</g>').length - 1);
		t.false(/NaN|Infinity|undefined/.test(svg));
	}
	t.regex(textReport(found), /threshold +90\.0 %/);
	const {
		metric,
		records,
		bounds: same,
	} = await evaluate(toy, pairs, {
		...{ metric: 'length', max, calibration: 'split', generations: 0, methods: ['expected'] },
	});
	t.is(metric, 'length');
	t.is(records, 60);
	const split = await evaluateLength(toy, pairs, { max, calibration: 'split', generations: 0, methods: ['expected'] });
	t.is(split.pairs, 60);
	t.deepEqual(same, split.bounds);
	t.is(split.generations, null);
	const kept = { max, method: 'threshold', coverage: 0.77 } as const;
	const own = toyPairs(120, 95n);
	await t.throwsAsync(toy.predictLength({ tokens: Int32Array.of(1, 5) }, kept), { message: /0\.77/ });
	const given = { max, generations: 0, methods: ['threshold'] as const, coverage: [0.77], calibration: own };
	await evaluateLength(toy, pairs, given);
	await t.throwsAsync(toy.predictLength({ tokens: Int32Array.of(1, 5) }, kept), { message: /0\.77/ });
	await evaluateLength(toy, pairs, { ...given, keep: true });
	const prompts = Array.from({ length: 8 }, (_, k) => ({ tokens: Int32Array.of(1, 2 + k) }));
	const lengths = (): Promise<number[]> =>
		Promise.all(prompts.map(async (prompt) => (await toy.predictLength(prompt, kept)).length));
	const stored = await lengths();
	await calibrateLength(toy, own, { max, method: 'threshold', coverage: 0.77 });
	t.deepEqual(stored, await lengths());
	await t.throwsAsync(evaluateLength(toy, pairs, { max, calibration: 'stored', keep: true }), { message: /keep/ });
	await t.throwsAsync(evaluateLength(toy, [], { max }), { code: 'ERR_DN_ARGUMENT', message: /no records/ });
	await t.throwsAsync(evaluateLength(toy, pairs, { max, coverage: [2] }), { message: /coverage/ });
	await t.throwsAsync(evaluateLength(toy, pairs, { max, generations: 2, judge: toy }), { message: /judge/ });
});

test.serial('eval length on the command line', async (t) => {
	const directory = mkdtempSync(join(tmpdir(), 'dn-eval-length-'));
	const cli = join(root, 'dist/lib/cli/main.js');
	const lines = (pairs: unknown[]): string => pairs.map((pair) => `${JSON.stringify(pair)}\n`).join('');
	try {
		await toy.save(join(directory, 'model'));
		writeFileSync(join(directory, 'pairs.jsonl'), lines(toyPairs(40, 93n)));
		writeFileSync(join(directory, 'other.jsonl'), lines(toyPairs(60, 94n)));
		writeFileSync(join(directory, 'bad.jsonl'), `${lines(toyPairs(2, 93n))}{"prompt"\n`);
		writeFileSync(join(directory, 'empty.jsonl'), '');
		const run = (...args: string[]) =>
			promisify(execFile)(process.execPath, [cli, 'eval', 'length', ...args], { cwd: directory });
		const out = await run(
			...['model', 'pairs.jsonl', '--max', '14', '--limit', '30', '--calibrate', 'other.jsonl', '--save', 'calibrated'],
			...['--methods', 'constant,expected', '--coverage', '0.8', '--generations', '4', '--seeds', '1', '--json'],
			...['--html', 'report.html', '--svg', 'plots'],
		);
		const found = JSON.parse(out.stdout) as {
			pairs: number;
			bounds: { method: string }[];
			generations: { pairs: number };
		};
		t.is(found.pairs, 30);
		t.is(found.generations.pairs, 4);
		t.true(readFileSync(join(directory, 'report.html'), 'utf8').startsWith('<!doctype html>'));
		t.true(readFileSync(join(directory, 'plots', 'coverage.svg'), 'utf8').startsWith('<svg'));
		const stored = JSON.parse(readFileSync(join(directory, 'calibrated', 'length.json'), 'utf8')) as {
			calibrations: { method: string; max: number; levels: { coverage: number }[] }[];
		};
		const own = stored.calibrations.filter(
			({ levels }) => levels.some(({ coverage }) => coverage === 0.8) && levels.length === 1,
		);
		t.deepEqual(
			own.map(({ method }) => method),
			['constant', 'expected'],
		);
		for (const [code, args, message] of [
			[1, ['model', 'bad.jsonl', '--max', '14'], /bad.jsonl, line 3/],
			[1, ['model', 'empty.jsonl', '--max', '14'], /empty.jsonl/],
			[2, ['model', 'pairs.jsonl', '--max', '24'], /max is 24/],
			[2, ['model', 'pairs.jsonl', '--max', '14', '--save', 'x'], /--save/],
		] as const) {
			const error = await t.throwsAsync<Error & { code: number; stderr: string }>(run(...args));
			t.is(error?.code as unknown as number, code);
			t.regex(error?.stderr ?? '', message);
		}
	} finally {
		rmSync(directory, { recursive: true });
	}
});

test('bad input is named', async (t) => {
	const model = await sharpModel({ eosId });
	const pairs = toyPairs(20, 1n);
	const ask = (length: object): Promise<unknown> => model.predictLength(prompt, length as LengthOptions);
	for (const [length, message] of [
		[{ max: 61 }, /64/],
		[{ max: 5, method: 'head' }, /no length head/],
		[{ max: 5, method: 'constant', coverage: 0.9 }, /no calibration of 'constant'/],
		[{ max: 5, method: 'expected', probability: 0.5 }, /length.probability has no meaning/],
		[{ max: 5, method: 'rho-eos' }, /while it denoises/],
		[{ max: 5, method: 'block' }, /while it denoises/],
		[{ max: 5, method: 'rho-eos', low: 0.7, high: 0.6 }, /low is 0.7/],
		[{ max: 5, method: 'block', entropy: 1 }, /stop 'entropy'/],
		[{ max: 5, method: 'block', stop: 'never' }, /length.stop/],
		[{ max: 5, method: 'daedal', grow: 0 }, /length.grow is 0/],
		[{ max: 5, method: 'head', head: 'tail' }, /length.head/],
	] as const) {
		await t.throwsAsync(ask(length), { code: 'ERR_DN_ARGUMENT', message }, JSON.stringify(length));
	}
	for (const sampler of [{ sampler: 'autoregressive' }, { block: 2, cache: 'prefix' }] as GenerateOptions[]) {
		await t.throwsAsync(model.generate(prompt, { ...sampler, length: { max: 5, method: 'rho-eos' } }), {
			code: 'ERR_DN_ARGUMENT',
			message: /rho-eos/,
		});
	}
	const calibrate = (options: object, data: unknown = pairs): Promise<unknown> =>
		calibrateLength(model, data as typeof pairs, { method: 'expected', max: 14, ...options } as never);
	for (const [options, message] of [
		[{ method: 'block' }, /while it denoises/],
		[{ coverage: 1 }, /coverage/],
		[{ method: 'head' }, /no length head/],
		[{ form: 'additive' }, /its own knob/],
		[{ max: 64 }, /max is 64/],
		[{ max: 2 }, /none of the \d+ pairs fits|pairs fits/],
		[{ edges: [3, 1] }, /edges/],
		[{ head: 'token' }, /head has no meaning/],
	] as const) {
		if (options === undefined) continue;
		const data =
			'max' in options && options.max === 2 ? pairs.map((pair) => ({ ...pair, answer: [14, 14, 14] })) : pairs;
		await t.throwsAsync(calibrate(options, data), { code: 'ERR_DN_ARGUMENT', message }, JSON.stringify(options));
	}
	await t.throwsAsync(calibrate({}, [{ prompt: [1] }]), { message: /record 0.*answer/ });
	await calibrateLength(model, pairs, { method: 'constant', max: 14, coverage: 0.8 });
	await t.throwsAsync(ask({ max: 14, method: 'constant', coverage: 0.9 }), { message: /calibrated for 0.8/ });
	await t.throwsAsync(ask({ max: 15, method: 'constant', coverage: 0.8 }), {
		message: /calibrated for max 14, not 15/,
	});
	t.true(((await ask({ max: 14, method: 'constant', coverage: 0.8 })) as { length: number }).length < 14);
	// Other weights, other probabilities: what was fitted on the old ones is dropped.
	model.setParameter('ln_f.bias', model.getParameter('ln_f.bias'));
	await t.throwsAsync(ask({ max: 14, method: 'constant', coverage: 0.8 }), { message: /no calibration/ });
	await calibrateLength(model, pairs, { method: 'constant', max: 14, coverage: 0.8 });
	const trainer = new Trainer(model, { learningRate: 1e-6 });
	await trainer.step({ tokens: [Int32Array.of(1, 2, 3, 4)], mask: [Uint8Array.of(0, 1, 1, 0)], t: [0.5] });
	await trainer.dispose();
	await t.throwsAsync(ask({ max: 14, method: 'constant', coverage: 0.8 }), { message: /no calibration/ });
	await model.dispose();

	// Never trained on lengths: said, and measured.
	const flat = await DiffuGPT.fromConfig({
		layers: 1,
		heads: 1,
		channels: 8,
		vocab: 16,
		context: 24,
		maskId: 15,
		eosId: 0,
	});
	const report = await calibrateLength(flat, toyPairs(60, 2n), { method: 'expected' as LengthMethod, max: 14 });
	t.regex(report.warnings[0] ?? '', /flat .*area under the curve/);
	await flat.dispose();
	const endless = await DiffuGPT.fromConfig({
		layers: 1,
		heads: 1,
		channels: 8,
		vocab: 16,
		context: 24,
		maskId: 15,
		eosId: 15,
	});
	await t.throwsAsync(endless.predictLength({ tokens: Int32Array.of(1) }, { max: 4 }), { message: /no end token/ });
	await endless.dispose();
});
