// The stages of measure-length.mjs. Each names the options that its figures depend on and gives its parts, [name, work] in
// order; what the work returns is written under the name. Everything is asked of the package by its public functions.
//
// Costs are forwards of a canvas: about 13 MFLOP a token, so one look at 6 + 256 positions takes 3.4 GFLOP, and a small
// canvas of 25 positions a tenth of it. The fixed canvas pays 3.4 GFLOP at every step.
import {
	calibrateLength,
	coverageChart,
	evaluate,
	evaluateLength,
	htmlReport,
	speedChart,
	textReport,
	trainLengthHead,
} from 'diffusion-native';

import { training } from './length-training.mjs';

/** Kinds of prompts: two that fix the length of the answer, one that does not. */
const kinds = ['number', 'spelling', 'definition'];

/** Shares that lengths are drawn from. */
const shares = Array.from({ length: 99 }, (_, i) => (i + 1) / 100);

const mean = (values) => values.reduce((a, b) => a + b, 0) / Math.max(1, values.length);

/** Ids of a pair's prompt, and the number of tokens of its answer when both are tokenised together. */
function measured(model, { prompt, answer }) {
	const tokens = model.tokenizer.encode(prompt);
	return { tokens, length: model.tokenizer.encode(`${prompt} ${answer}`).length - tokens.length };
}

const fits = (model, max, pair) => {
	const { tokens, length } = measured(model, pair);
	return length + 1 <= max && tokens.length + max <= model.config.context;
};

/** Heads, margins, and the bounds of every method against constants. */
const bounds = {
	uses: ['pairs', 'fitting', 'heads'],
	async parts(context) {
		const { settings } = context;
		const { max } = settings;
		const model = await context.fresh();
		return [
			[
				'heads and bounds',
				async () => {
					const heads = await trainLengthHead(model, context.path('train'), {
						...{ max, limit: settings.heads, onProgress: context.progress('heads') },
					});
					const found = await evaluateLength(model, context.read('test').slice(0, settings.pairs), {
						...{ max, calibration: context.path('validation'), calibrationLimit: settings.fitting },
						...{ generations: 0, keep: true, coverage: [0.8, 0.9, 0.95, 0.99] },
						onProgress: context.progress('bounds'),
					});
					context.report('bounds.html', htmlReport(found, 'Length methods: bounds'));
					context.report('coverage.svg', coverageChart(found));
					console.log(textReport(found));
					// What other stages generate with, and lengths are drawn from.
					const drawn = await calibrateLength(model, context.path('validation'), {
						...{ method: 'threshold', max, coverage: shares, onProgress: context.progress('shares') },
					});
					await model.save(settings['with-lengths']);
					await model.dispose();
					return { heads, ...found, drawn: { pairs: drawn.calibration.pairs, achieved: drawn.achieved } };
				},
			],
		];
	},
};

/** Calibration on definitions alone, scored on definitions alone: coverage, and pinball loss against constants. */
const definitions = {
	uses: ['definitions'],
	parts: (context) => [
		[
			'definitions',
			async () => {
				const found = await evaluateLength(
					await context.model(),
					context.read('test', 'definition').slice(0, context.settings.definitions),
					{
						...{ max: context.settings.max, calibration: context.read('validation', 'definition') },
						...{ generations: 0, coverage: [0.8, 0.9, 0.95] },
						methods: ['constant', 'first-step', 'quantile', 'threshold', 'expected'],
						onProgress: context.progress('definitions'),
					},
				);
				console.log(textReport(found));
				return found;
			},
		],
	],
};

/**
 * Mixed traffic, as many prompts of each kind: the fixed canvas, the early cut and one method under one sampler; every seed has
 * prompts of its own. `size` names the option with the prompts of each kind and seed.
 */
const mixed = (size, samplerOf) => ({
	uses: [size, 'seeds', 'sampler'],
	judge: true,
	async parts(context) {
		const { settings } = context;
		const each = settings[size];
		const model = await context.withLengths();
		const judge = await context.judge();
		const own = kinds.map((kind) =>
			context
				.read('test', kind)
				.filter((pair) => fits(model, settings.max, pair))
				.slice(0, each * settings.seeds.length),
		);
		return settings.seeds.map((seed, s) => [
			`seed ${seed}`,
			async () => {
				// In turns, so that a batch holds all kinds.
				const pairs = Array.from({ length: each * kinds.length }, (_, i) => {
					const list = own[i % kinds.length];
					return list[s * each + Math.floor(i / kinds.length)];
				}).filter(Boolean);
				const found = await evaluateLength(model, pairs, {
					...{ max: settings.max, calibration: 'stored', coverage: [0.95], methods: ['threshold'] },
					...{ generations: pairs.length, seeds: [seed], generate: samplerOf(settings), likelihoods: 0 },
					...(judge ? { judge } : {}),
					onProgress: context.progress('traffic'),
				});
				console.log(textReport(found));
				return { pairs: found.pairs, kinds: found.kinds, rows: found.generations.rows };
			},
		]);
	},
});

/** Under the sampler of all comparisons. */
const traffic = mixed('traffic', ({ sampler }) => sampler);

/** Under LLaDA's sampler, as many steps whatever the canvas: what a fixed canvas is usually denoised with. */
const plainTraffic = mixed('plain', () => ({ sampler: 'confidence', steps: 64 }));

/** Whole generations under every method at 95 % coverage, one seed at a time on the same prompts. */
const methods = {
	uses: ['methods', 'seeds', 'sampler'],
	judge: true,
	async parts(context) {
		const { settings } = context;
		const model = await context.withLengths();
		const judge = await context.judge();
		return [
			[
				'all',
				async () => {
					const found = await evaluateLength(model, context.read('test').slice(0, settings.methods), {
						...{ max: settings.max, calibration: 'stored', coverage: [0.95] },
						...{ generations: settings.methods, seeds: settings.seeds, generate: settings.sampler },
						...(judge ? { judge } : {}),
						...{ likelihoods: 48, samples: 4, onProgress: context.progress('methods') },
					});
					context.report('generations.html', htmlReport(found, 'Length methods: generations'));
					context.report('speed.svg', speedChart(found));
					console.log(textReport(found));
					return found;
				},
			],
		];
	},
};

/** Distances between the lengths of generated and true definitions, the autoregressive twin's among them. */
const twin = {
	uses: ['lengths', 'seeds', 'sampler'],
	twin: true,
	async parts(context) {
		const { settings } = context;
		const { max } = settings;
		const model = await context.withLengths();
		const other = await context.twin();
		if (!other) throw new Error(`the stage twin needs --twin: there is no ${settings.twin}`);
		const pairs = context
			.read('test', 'definition')
			.filter((pair) => fits(model, max, pair))
			.slice(0, settings.lengths)
			.map((pair) => measured(model, pair));
		const truth = pairs.map(({ length }) => length).sort((a, b) => a - b);
		const threshold = { max, method: 'threshold' };
		const contenders = {
			twin: [other, { length: { max }, sampler: 'autoregressive', temperature: 1 }],
			'length drawn': [model, { length: { ...threshold, coverage: 'draw' }, sampler: 'first-hitting' }],
			'first-hitting, early cut': [model, { length: { max }, sampler: 'first-hitting' }],
			'threshold, 95 %': [model, { length: { ...threshold, coverage: 0.95 }, ...settings.sampler }],
		};
		return settings.seeds.flatMap((seed) =>
			Object.entries(contenders).map(([name, [which, given]]) => [
				`${name}, seed ${seed}`,
				async () => {
					const results = await which.generateBatch(
						pairs.map(({ tokens }) => ({ tokens })),
						pairs.map((_, i) => ({ ...given, seed: 1000 * seed + i })),
					);
					const lengths = results.map(({ tokens }) => tokens.length).sort((a, b) => a - b);
					const row = {
						...{ name, seed, pairs: pairs.length, trueMean: mean(truth), meanLength: mean(lengths) },
						// Samples of one size: the mean difference of order statistics.
						wasserstein: mean(lengths.map((length, i) => Math.abs(length - truth[i]))),
						truncated: mean(results.map(({ finishReason }) => Number(finishReason !== 'end-of-text'))),
						forwards: mean(results.map(({ stats }) => stats.forwards)),
					};
					console.log(JSON.stringify(row));
					return row;
				},
			]),
		);
	},
};

/** How sure the model is of the end at the first step. */
const firstStep = {
	uses: ['looks'],
	async parts(context) {
		const { max, looks } = context.settings;
		const model = await context.model();
		return kinds.map((kind) => [
			kind,
			async () => {
				const pairs = context
					.read('test', kind)
					.filter((pair) => fits(model, max, pair))
					.slice(0, Math.ceil(looks / kinds.length));
				const list = await Promise.all(
					pairs.map(async (pair) => {
						const { tokens, length } = measured(model, pair);
						const { probabilities: e } = await model.predictLength({ tokens }, { max, method: 'threshold' });
						const open = e.filter((p) => p > 0.05 && p < 0.95).length;
						return { at: e[length], before: length > 0 ? e[length - 1] : 0, open };
					}),
				);
				return {
					...{ kind, pairs: list.length, atTheEnd: mean(list.map(({ at }) => at)) },
					oneBefore: mean(list.map(({ before }) => before)),
					sureAtTheEnd: mean(list.map(({ at }) => Number(at >= 0.5))),
					sureOneBefore: mean(list.map(({ before }) => Number(before >= 0.5))),
					undecided: mean(list.map(({ open }) => open)),
				};
			},
		]);
	},
};

/** Whether the end gets surer while the whole canvas is denoised: the end that each step's best guesses imply. */
const sharpening = {
	uses: ['sharpening'],
	async parts(context) {
		const { max } = context.settings;
		const model = await context.model();
		const parts = 10;
		const isEnd = (id) => id === model.config.eosId || id === model.config.padId;
		return kinds.map((kind) => [
			kind,
			async () => {
				const toFinal = Array.from({ length: parts }, () => []);
				const toTrue = Array.from({ length: parts }, () => []);
				const pairs = context
					.read('test', kind)
					.filter((pair) => fits(model, max, pair))
					.slice(0, context.settings.sharpening);
				const progress = context.progress(kind);
				for (const [i, pair] of pairs.entries()) {
					const { tokens, length } = measured(model, pair);
					const implied = [];
					for await (const { provisional, tokens: now } of model.stream(
						{ tokens },
						{ length: max, sampler: 'confidence', steps: 64, seed: i },
					)) {
						const end = Array.from((provisional ?? now).subarray(tokens.length)).findIndex(isEnd);
						implied.push(end < 0 ? max : end);
					}
					for (const [s, end] of implied.entries()) {
						const part = Math.min(parts - 1, Math.floor((parts * s) / implied.length));
						toFinal[part].push(Math.abs(end - implied.at(-1)));
						toTrue[part].push(Math.abs(end - length));
					}
					progress({ fraction: i / pairs.length });
				}
				return { kind, pairs: pairs.length, toFinal: toFinal.map(mean), toTrue: toTrue.map(mean) };
			},
		]);
	},
};

/** How many tokens one forward can take: exact match of numbers and spelling; definitions under the judge. */
const parallel = {
	uses: ['parallel'],
	judge: true,
	async parts(context) {
		const { max, parallel: limit } = context.settings;
		const model = await context.withLengths();
		const judge = await context.judge();
		const fitting = context.read('test').filter((pair) => fits(model, max, pair));
		const exact = fitting.filter(({ kind }) => kind !== 'definition').slice(0, limit);
		const open = fitting.filter(({ kind }) => kind === 'definition').slice(0, limit / 2);
		return [1.01, 0.99, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.3].map((threshold) => [
			`threshold ${threshold}`,
			async () => {
				const length = { max, method: 'threshold', coverage: 0.95 };
				const generate = { sampler: 'threshold', threshold, length };
				const found = await evaluate(model, exact, { metric: 'exact-match', generate });
				const judged = judge
					? await evaluate(model, open, { metric: 'generative-perplexity', judge, generate, seed: 1 })
					: undefined;
				// The look is no step: tokens per forward of the denoising alone.
				const tokensPerForward = (found.meanTokens + 1) / (found.meanForwards - 1);
				console.log(threshold, tokensPerForward.toFixed(2), found.rate.toFixed(4), judged?.perplexity);
				return {
					...{ threshold, tokensPerForward, exactMatch: found.rate, interval: found.interval, pairs: found.count },
					kinds: found.kinds,
					definitions: judged && {
						...{ perplexity: judged.perplexity, entropy: judged.entropy, texts: judged.records },
						tokensPerForward: (judged.meanTokens + 1) / (judged.meanForwards - 1),
					},
				};
			},
		]);
	},
};

export const stages = {
	...{
		bounds,
		definitions,
		traffic,
		'plain-traffic': plainTraffic,
		methods,
		twin,
		'first-step': firstStep,
		sharpening,
		training,
		parallel,
	},
};
