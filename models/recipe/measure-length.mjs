// Measures everything that docs/length.md reports, on the shipped model or another: one JSON file per question, and the
// HTML report of the length methods. Margins and heads come from the validation split, scores from the test split.
//
// node models/recipe/measure-length.mjs [--model models/tiny] [--twin models/tiny-autoregressive] [--data runs/tiny/data]
//   [--out runs/tiny/length] [--stage methods|first-step|sharpening|training|twin|parallel|definitions ...] [--max 256]
//   [--pairs 2400] [--generations 256] [--seeds 1,2,3] [--steps 300] [--save DIR]
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { parseArgs } from 'node:util';

import {
	calibrateLength,
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
		data: { type: 'string', default: 'runs/tiny/data' },
		out: { type: 'string', default: 'runs/tiny/length' },
		stage: { type: 'string', multiple: true },
		max: { type: 'string', default: '256' },
		pairs: { type: 'string', default: '2400' },
		generations: { type: 'string', default: '256' },
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
const judge = options.twin
	? await DiffuGPT.fromPretrained(options.twin, { config: { attention: 'causal' } })
	: undefined;
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

const mean = (values) => values.reduce((a, b) => a + b, 0) / Math.max(1, values.length);
const ids = (pair) => model.tokenizer.encode(`${pair.prompt} ${pair.answer}`);
const promptIds = (pair) => model.tokenizer.encode(pair.prompt);
const isEnd = (id) => id === model.config.eosId || id === model.config.padId;

const stages = {
	/** Every method against constants and the whole canvas; the trained heads among them. */
	async methods() {
		console.log('heads', await trainLengthHead(model, file('train'), { max, limit: 6000 }));
		const found = await evaluateLength(model, testPairs, {
			...{ max, calibration: file('validation'), generations, seeds, generate },
			coverage: [0.8, 0.9, 0.95, 0.99],
			...(judge ? { judge } : {}),
		});
		report('methods', found);
		writeFileSync(join(options.out, 'methods.html'), htmlReport(found, 'Length methods'));
		writeFileSync(join(options.out, 'coverage.svg'), coverageChart(found));
		writeFileSync(join(options.out, 'speed.svg'), speedChart(found) ?? '');
		console.log(textReport(found));
		if (options.save) {
			for (const method of ['constant', 'first-step', 'quantile', 'threshold', 'expected', 'daedal']) {
				await calibrateLength(model, file('validation'), { method, max });
			}
			for (const head of ['token', 'pooled', 'quantile']) {
				await calibrateLength(model, file('validation'), { method: 'head', head, max });
			}
			await model.save(options.save);
		}
	},

	/** Calibration on definitions alone, scored on definitions alone. */
	async definitions() {
		const only = (split) => read(split).filter(({ kind }) => kind === 'definition');
		const found = await evaluateLength(model, only('test').slice(0, limit), {
			...{ max, calibration: only('validation'), generations: 0, coverage: [0.8, 0.9, 0.95] },
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
		for (const [i, pair] of testPairs.slice(0, 120).entries()) {
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
		if (!judge) throw new Error('the stage twin needs --twin');
		const distance = (a, b) => {
			const x = [...a].sort((p, q) => p - q);
			const y = [...b].sort((p, q) => p - q);
			// Samples of one size: the mean difference of order statistics.
			return mean(x.map((value, i) => Math.abs(value - y[i])));
		};
		const rows = [];
		for (const seed of seeds) {
			for (const kind of new Set(testPairs.map((pair) => pair.kind))) {
				const pairs = testPairs.filter(
					(pair) => pair.kind === kind && promptIds(pair).length + max <= model.config.context,
				);
				const list = pairs.slice(0, generations);
				const truth = list.map((pair) => ids(pair).length - promptIds(pair).length);
				const prompts = list.map((pair) => ({ tokens: promptIds(pair) }));
				const lengths = async (which, given) => {
					const results = await which.generateBatch(
						prompts,
						prompts.map((_, i) => ({ ...given, length: { max }, seed: 1000 * seed + i })),
					);
					return {
						wasserstein: distance(
							results.map(({ tokens }) => tokens.length),
							truth,
						),
						truncated: mean(results.map(({ finishReason }) => Number(finishReason !== 'end-of-text'))),
					};
				};
				rows.push({
					...{ seed, kind, pairs: list.length },
					twin: await lengths(judge, { sampler: 'autoregressive', temperature: 1 }),
					ancestral: await lengths(model, { sampler: 'ancestral', steps: 64 }),
					blocks: await lengths(model, { sampler: 'first-hitting', block: 32 }),
					greedy: await lengths(model, generate),
				});
			}
		}
		console.table(
			rows.map(({ twin, ancestral, blocks, greedy, ...rest }) => ({
				...rest,
				...{
					twin: twin.wasserstein,
					ancestral: ancestral.wasserstein,
					blocks: blocks.wasserstein,
					greedy: greedy.wasserstein,
				},
			})),
		);
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
	if (name === 'twin' && !judge && !options.stage) continue;
	await stages[name]();
}
await model.dispose();
await judge?.dispose();
