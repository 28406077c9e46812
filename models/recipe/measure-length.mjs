// Measures everything that docs/length.md reports, on the shipped model or another: one JSON file per question, and the
// HTML report of the length methods. Margins and heads come from the validation split, scores from the test split.
//
// node models/recipe/measure-length.mjs [--model models/tiny] [--twin models/tiny-autoregressive] [--data runs/tiny/data]
//   [--judge DIR] [--out runs/tiny/length] [--stage bounds|generations|definitions|first-step|sharpening|training|twin|parallel ...]
//   [--max 256] [--pairs 2400] [--generations 192] [--seeds 1,2,3] [--steps 300] [--save DIR]
//
// `bounds` trains the heads, fits all margins and, with --save, writes the model that has them; the other stages take the
// margins of the model that they are given, or fit their own. --twin is the autoregressive model that lengths are compared
// with, --judge one of another seed, which scores generated answers.
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { parseArgs } from 'node:util';

import {
	coverageChart,
	DiffuGPT,
	evaluate,
	evaluateLength,
	htmlReport,
	speedChart,
	Trainer,
	textReport,
	trainLengthHead,
} from 'diffusion-native';

const { values: options } = parseArgs({
	options: {
		model: { type: 'string', default: 'models/tiny' },
		twin: { type: 'string' },
		judge: { type: 'string' },
		data: { type: 'string', default: 'runs/tiny/data' },
		out: { type: 'string', default: 'runs/tiny/length' },
		stage: { type: 'string', multiple: true },
		max: { type: 'string', default: '256' },
		pairs: { type: 'string', default: '2400' },
		generations: { type: 'string', default: '192' },
		seeds: { type: 'string', default: '1,2,3' },
		steps: { type: 'string', default: '300' },
		sampler: { type: 'string', default: '{"sampler":"threshold"}' },
		save: { type: 'string' },
	},
});
const max = Number(options.max);
const limit = Number(options.pairs);
const generations = Number(options.generations);
const seeds = options.seeds.split(',').map(Number);
const generate = JSON.parse(options.sampler);
const file = (split) => join(options.data, `${split}.jsonl`);
const read = (split) =>
	readFileSync(file(split), 'utf8')
		.split('\n')
		.filter(Boolean)
		.map((line) => JSON.parse(line));
const testPairs = read('test').slice(0, limit);
const model = await DiffuGPT.fromPretrained(options.model);
const causal = async (path) =>
	path === undefined ? undefined : await DiffuGPT.fromPretrained(path, { config: { attention: 'causal' } });
const twin = await causal(options.twin);
const judge = await causal(options.judge);
mkdirSync(options.out, { recursive: true });

/** Writes what a stage found, with the options it was run with. */
function report(name, found) {
	const text = JSON.stringify(
		{ options: { ...options }, ...found },
		(_, v) => (typeof v === 'bigint' ? String(v) : v),
		1,
	);
	writeFileSync(join(options.out, `${name}.json`), `${text}\n`);
	console.log(`${name}: ${join(options.out, `${name}.json`)}`);
}

/** Reports how far a stage has come, every 20 seconds. */
function progress(name) {
	let last = performance.now();
	return ({ stage, fraction }) => {
		if (performance.now() - last < 20_000) return;
		last = performance.now();
		console.log(`${name}: ${stage} ${(100 * fraction).toFixed(0)} %`);
	};
}

const mean = (values) => values.reduce((a, b) => a + b, 0) / Math.max(1, values.length);
const ids = (pair) => model.tokenizer.encode(`${pair.prompt} ${pair.answer}`);
const promptIds = (pair) => model.tokenizer.encode(pair.prompt);
const isEnd = (id) => id === model.config.eosId || id === model.config.padId;

const stages = {
	/** Heads, margins, and the bounds of every method against constants. */
	async bounds() {
		const limited = { max, limit: 6000, onProgress: progress('heads') };
		console.log('heads', await trainLengthHead(model, file('train'), limited));
		const found = await evaluateLength(model, testPairs, {
			...{ max, calibration: file('validation'), generations: 0, keep: true },
			coverage: [0.8, 0.9, 0.95, 0.99],
			onProgress: progress('bounds'),
		});
		report('bounds', found);
		writeFileSync(join(options.out, 'bounds.html'), htmlReport(found, 'Length methods: bounds'));
		writeFileSync(join(options.out, 'coverage.svg'), coverageChart(found));
		console.log(textReport(found));
		if (options.save) await model.save(options.save);
	},

	/** Whole generations under every method, at 95 % coverage, against the whole canvas. */
	async generations() {
		const found = await evaluateLength(model, testPairs.slice(0, generations), {
			...{ max, calibration: 'stored', coverage: [0.95], generations, seeds, generate },
			...(judge ? { judge } : {}),
			onProgress: progress('generations'),
		});
		report('generations', found);
		writeFileSync(join(options.out, 'generations.html'), htmlReport(found, 'Length methods: generations'));
		writeFileSync(join(options.out, 'speed.svg'), speedChart(found));
		console.log(textReport(found));
	},

	/** Calibration on definitions alone, scored on definitions alone. */
	async definitions() {
		const only = (split) => read(split).filter(({ kind }) => kind === 'definition');
		const found = await evaluateLength(model, only('test').slice(0, limit), {
			...{ max, calibration: only('validation'), generations: 0, coverage: [0.8, 0.9, 0.95] },
			methods: ['constant', 'quantile', 'threshold', 'expected'],
			onProgress: progress('definitions'),
		});
		report('definitions', found);
		console.log(textReport(found));
	},

	/** How sure the model is of the end at the first step. */
	async 'first-step'() {
		const kinds = {};
		for (const pair of testPairs.slice(0, 1000)) {
			const prompt = promptIds(pair);
			const length = ids(pair).length - prompt.length;
			if (length + 1 > max || prompt.length + max > model.config.context) continue;
			const { probabilities } = await model.predictLength({ tokens: prompt }, { max, method: 'threshold' });
			const rank = Array.from(probabilities).filter((p) => p > probabilities[length]).length;
			kinds[pair.kind] ??= [];
			const list = kinds[pair.kind];
			list.push({ at: probabilities[length], before: length > 0 ? probabilities[length - 1] : 0, rank });
		}
		const rows = Object.entries(kinds).map(([kind, list]) => ({
			kind,
			pairs: list.length,
			atTheEnd: mean(list.map(({ at }) => at)),
			oneBefore: mean(list.map(({ before }) => before)),
			sureAtTheEnd: mean(list.map(({ at }) => Number(at >= 0.5))),
			sureOneBefore: mean(list.map(({ before }) => Number(before >= 0.5))),
		}));
		console.table(rows);
		report('first-step', { rows });
	},

	/** Whether the end gets surer while the answer is denoised: the end implied by each step against the final one. */
	async sharpening() {
		const parts = 10;
		const kinds = {};
		for (const [i, pair] of testPairs.slice(0, 60).entries()) {
			const prompt = promptIds(pair);
			if (prompt.length + max > model.config.context) continue;
			const implied = [];
			let result;
			const stream = model.stream({ tokens: prompt }, { length: { max }, sampler: 'confidence', steps: 64, seed: i });
			for (;;) {
				const { done, value } = await stream.next();
				if (done) {
					result = value;
					break;
				}
				const guess = value.provisional ?? value.tokens;
				const end = Array.from(guess.subarray(prompt.length)).findIndex(isEnd);
				implied.push(end < 0 ? max : end);
			}
			kinds[pair.kind] ??= Array.from({ length: parts }, () => []);
			const sums = kinds[pair.kind];
			for (const [s, length] of implied.entries()) {
				sums[Math.min(parts - 1, Math.floor((parts * s) / implied.length))].push(
					Math.abs(length - result.tokens.length),
				);
			}
		}
		const rows = Object.entries(kinds).map(([kind, sums]) => ({ kind, error: sums.map(mean) }));
		console.table(rows.map(({ kind, error }) => ({ kind, ...error.map((e) => e.toFixed(2)) })));
		report('sharpening', { rows });
	},

	/** What the training recipe adds: fine-tuning with different paddings and masks, then the bounds. */
	async training() {
		const steps = Number(options.steps);
		const train = read('train');
		const rows = [];
		for (const recipe of ['none', 'padding', 'end always masked', 'prompt + mask + end + mask']) {
			const tuned = await DiffuGPT.fromPretrained(options.model);
			const trainer = new Trainer(tuned, { learningRate: 1e-4, weight: 'none', seed: 1 });
			let next = 0;
			for (let step = 0; step < steps; step++) {
				const batch = { tokens: [], maskable: [], mask: [], t: [] };
				while (batch.tokens.length < 32) {
					const pair = train[next++ % train.length];
					const prompt = promptIds(pair);
					const answer = ids(pair);
					// Fixed pseudo-random numbers of the step and row, the same for every recipe.
					const random = (k) => (((Math.sin(1 + 12.9898 * next + 78.233 * k) * 43758.5453) % 1) + 1) % 1;
					const padding = recipe === 'none' ? 0 : Math.floor((max + 1) ** random(0)) - 1;
					const size = Math.min(answer.length + 1 + padding, tuned.config.context);
					if (answer.length + 1 > size) continue;
					const tokens = new Int32Array(size).fill(tuned.config.padId);
					tokens.set(answer);
					tokens[answer.length] = tuned.config.eosId;
					const t = Math.max(1e-3, random(1));
					const mask = Uint8Array.from(tokens, (_, i) => {
						if (i < prompt.length) return 0;
						if (recipe === 'prompt + mask + end + mask') return Number(i !== answer.length);
						if (recipe === 'end always masked' && i >= answer.length) return 1;
						return Number(random(2 + i) < t);
					});
					batch.tokens.push(tokens);
					batch.maskable.push(Uint8Array.from(tokens, (_, i) => Number(i >= prompt.length)));
					batch.mask.push(mask);
					batch.t.push(t);
				}
				await trainer.step(batch);
			}
			await trainer.dispose();
			const found = await evaluateLength(tuned, testPairs.slice(0, 1000), {
				...{
					max,
					calibration: file('validation'),
					calibrationLimit: 1000,
					generations: 0,
					coverage: [0.95],
					methods: ['constant', 'threshold', 'expected'],
				},
			});
			for (const row of found.bounds) rows.push({ recipe, ...row });
			rows.push({ recipe, signal: found.signal });
			console.log(recipe);
			console.log(textReport(found));
			await tuned.dispose();
		}
		report('training', { rows });
	},

	/** Whether lengths come out as natural as an autoregressive model's: distances to the true lengths. */
	async twin() {
		if (!twin) throw new Error('the stage twin needs --twin');
		const kind = 'definition';
		const distance = (a, b) => {
			const x = [...a].sort((p, q) => p - q);
			const y = [...b].sort((p, q) => p - q);
			// Samples of one size: the mean difference of order statistics.
			return mean(x.map((value, i) => Math.abs(value - y[i])));
		};
		const rows = [];
		for (const seed of seeds) {
			const fitting = testPairs.filter(
				(pair) => pair.kind === kind && promptIds(pair).length + max <= model.config.context,
			);
			const list = fitting.slice(0, generations);
			const truth = list.map((pair) => ids(pair).length - promptIds(pair).length);
			const prompts = list.map((pair) => ({ tokens: promptIds(pair) }));
			const lengths = async (which, given) => {
				const results = await which.generateBatch(
					prompts,
					prompts.map((_, i) => ({ length: { max }, ...given(i), seed: 1000 * seed + i })),
				);
				return {
					wasserstein: distance(
						results.map(({ tokens }) => tokens.length),
						truth,
					),
					mean: mean(results.map(({ tokens }) => tokens.length)),
					truncated: mean(results.map(({ finishReason }) => Number(finishReason !== 'end-of-text'))),
				};
			};
			// Evenly spread quantiles in an order that does not follow the prompts: each canvas is a draw from the model's own
			// distribution of the length.
			const drawn = list.map((_, i) => (((i * 61 + 17 * seed) % list.length) + 0.5) / list.length);
			const contenders = {
				twin: () => lengths(twin, () => ({ sampler: 'autoregressive', temperature: 1 })),
				ancestral: () => lengths(model, () => ({ sampler: 'ancestral', steps: 64 })),
				'first-hitting, blocks': () => lengths(model, () => ({ sampler: 'first-hitting', block: 32 })),
				'ancestral, drawn length': () =>
					lengths(model, (i) => ({
						...{ sampler: 'ancestral', steps: 64 },
						length: { max, method: 'threshold', probability: drawn[i] },
					})),
				threshold: () => lengths(model, () => generate),
			};
			for (const [name, run] of Object.entries(contenders)) {
				rows.push({ name, seed, pairs: list.length, ...(await run()) });
				console.log(JSON.stringify(rows.at(-1)));
			}
		}
		report('twin', { rows });
	},

	/** How many tokens one forward can take before quality drops. */
	async parallel() {
		const rows = [];
		for (const threshold of [1.01, 0.99, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.3]) {
			const found = await evaluate(model, testPairs.slice(0, generations), {
				metric: 'exact-match',
				generate: {
					sampler: 'threshold',
					threshold,
					length: { max: Math.min(max, 128), method: 'threshold', probability: 0.9 },
				},
			});
			const tokensPerForward = found.meanTokens / found.meanForwards;
			rows.push({ threshold, tokensPerForward, exactMatch: found.rate, kinds: found.kinds });
			console.log(threshold, tokensPerForward.toFixed(2), found.rate.toFixed(4));
		}
		report('parallel', { rows });
	},
};

for (const name of options.stage ?? Object.keys(stages)) {
	if (!stages[name]) throw new Error(`--stage ${name} is not known: ${Object.keys(stages).join(', ')}`);
	if (name === 'twin' && !twin && !options.stage) continue;
	await stages[name]();
}
await model.dispose();
await twin?.dispose();
await judge?.dispose();
