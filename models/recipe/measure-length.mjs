// Measures everything that docs/length.md reports, on the shipped model or another: one JSON file per stage, in which every
// part is written as soon as it is known. A stage that was interrupted goes on behind its last part; one that is complete is
// not run again unless the model or its options have changed. write-length.mjs then fills the tables of docs/length.md.
//
// node models/recipe/measure-length.mjs [--stage bounds ...] [--model models/tiny] [--twin models/tiny-autoregressive]
//   [--judge runs/tiny/judge/model] [--data runs/tiny/data] [--out bench/results] [--with-lengths runs/tiny/length-model]
//   [--report runs/tiny/length] [--dtype auto] [sizes: see below]
//
// Stages: bounds, definitions, traffic, plain-traffic, methods, twin, first-step, sharpening, training, parallel. `bounds` comes first: it
// trains the heads and fits the margins that the others use, and writes the model that has them to --with-lengths.
//
// Margins and heads come from the validation and training splits, figures from the test split. The method that speaks for all
// in `traffic` and `twin` is 'threshold' at 95 % coverage, named here and not chosen by a figure of the test split.
import { createHash } from 'node:crypto';
import { existsSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { cpus } from 'node:os';
import { join } from 'node:path';
import { parseArgs } from 'node:util';

import { DiffuGPT, info, Tokenizer } from 'diffusion-native';

import { stages } from './length-stages.mjs';

const { values: options } = parseArgs({
	options: {
		stage: { type: 'string', multiple: true },
		model: { type: 'string', default: 'models/tiny' },
		twin: { type: 'string', default: 'models/tiny-autoregressive' },
		judge: { type: 'string', default: 'runs/tiny/judge/model' },
		data: { type: 'string', default: 'runs/tiny/data' },
		out: { type: 'string', default: 'bench/results' },
		'with-lengths': { type: 'string', default: 'runs/tiny/length-model' },
		report: { type: 'string', default: 'runs/tiny/length' },
		dtype: { type: 'string', default: 'auto' },
		max: { type: 'string', default: '256' },
		seeds: { type: 'string', default: '1,2,3' },
		// The sampler of `traffic` and `methods`, the same for every method.
		sampler: { type: 'string', default: '{"sampler":"threshold"}' },
		// Pairs: scored in `bounds`, fitting the margins, training the heads; definitions scored by themselves.
		pairs: { type: 'string', default: '2400' },
		fitting: { type: 'string', default: '3000' },
		heads: { type: 'string', default: '3000' },
		definitions: { type: 'string', default: '4000' },
		// Prompts of each kind and seed in `traffic` and `plain-traffic`, prompts of all kinds in `methods`, definitions in `twin`.
		traffic: { type: 'string', default: '200' },
		plain: { type: 'string', default: '10' },
		methods: { type: 'string', default: '96' },
		lengths: { type: 'string', default: '600' },
		// Looks of `first-step`, prompts of each kind in `sharpening`, prompts in `parallel`.
		looks: { type: 'string', default: '1000' },
		sharpening: { type: 'string', default: '30' },
		parallel: { type: 'string', default: '192' },
		// Steps of fine-tuning in `training`, and pairs that its bounds are fitted and scored on.
		steps: { type: 'string', default: '150' },
		training: { type: 'string', default: '600' },
	},
});

const names = options.stage ?? Object.keys(stages);
for (const name of names) {
	if (!stages[name]) throw new Error(`--stage ${name} is not known: ${Object.keys(stages).join(', ')}`);
}

/** Numbers where an option is one. */
const settings = Object.fromEntries(
	Object.entries(options).map(([key, value]) => [key, /^\d+$/.test(String(value)) ? Number(value) : value]),
);
settings.seeds = options.seeds.split(',').map(Number);
settings.sampler = JSON.parse(options.sampler);

/** The weights that a figure belongs to. */
function fingerprint(directory) {
	const file = join(directory, 'model.safetensors');
	return existsSync(file) ? createHash('sha256').update(readFileSync(file)).digest('hex') : null;
}

const loaded = new Map();
/** A model, loaded when first asked for. */
async function load(directory, config) {
	if (!existsSync(directory)) return undefined;
	if (!loaded.has(directory)) {
		loaded.set(
			directory,
			await DiffuGPT.fromPretrained(directory, { dtype: options.dtype, ...(config && { config }) }),
		);
	}
	return loaded.get(directory);
}
const causal = { attention: 'causal' };

const pairs = {};
const context = {
	settings,
	model: () => load(options.model),
	twin: () => load(options.twin, causal),
	judge: () => load(options.judge, causal),
	/** The model with heads and margins, which `bounds` writes. */
	async withLengths() {
		const bounds = stored('bounds');
		const fits = bounds?.complete && bounds.weights.model === fingerprint(options.model);
		if (!fits || !existsSync(options['with-lengths'])) {
			throw new Error(`run --stage bounds first: ${options['with-lengths']} has no margins for ${options.model}`);
		}
		return load(options['with-lengths']);
	},
	/** The model once more, to be changed; `configOf`: other ids, by its tokenizer. */
	fresh(configOf) {
		const config = configOf?.(Tokenizer.fromFile(join(options.model, 'tokenizer.json')));
		return DiffuGPT.fromPretrained(options.model, config && { config });
	},
	path: (split) => join(options.data, `${split}.jsonl`),
	/** The pairs of a split, in the order of the file, which is a shuffled one. */
	read(split, kind) {
		pairs[split] ??= readFileSync(context.path(split), 'utf8').split('\n').filter(Boolean).map(JSON.parse);
		return kind === undefined ? pairs[split] : pairs[split].filter((pair) => pair.kind === kind);
	},
	/** Writes a file for people beside the figures. */
	report(name, text) {
		mkdirSync(options.report, { recursive: true });
		writeFileSync(join(options.report, name), text);
		console.log(`${join(options.report, name)} written`);
	},
	/** A function that says how far a part has come, every 20 seconds. */
	progress(name) {
		let last = performance.now();
		return ({ stage, fraction }) => {
			if (performance.now() - last < 20_000) return;
			last = performance.now();
			console.log(`  ${name}: ${stage ?? ''} ${(100 * (fraction ?? 0)).toFixed(0)} %`);
		};
	},
};

const fileOf = (name) => join(options.out, `length-${name}.json`);

function stored(name) {
	return existsSync(fileOf(name)) ? JSON.parse(readFileSync(fileOf(name), 'utf8')) : undefined;
}

/** Runs the parts of a stage that are not in its file yet. */
async function run(name) {
	const stage = stages[name];
	const used = Object.fromEntries(['max', 'dtype', ...stage.uses].map((key) => [key, settings[key]]));
	const weights = {
		model: fingerprint(options.model),
		...(stage.twin ? { twin: fingerprint(options.twin) } : {}),
		...(stage.judge ? { judge: fingerprint(options.judge) } : {}),
	};
	const before = stored(name);
	const same = before && JSON.stringify([before.options, before.weights]) === JSON.stringify([used, weights]);
	const { cpu } = info();
	const file = same
		? before
		: {
				...{ stage: name, complete: false, weights, options: used, seconds: 0, parts: {} },
				machine: { cpu: cpus()[0]?.model ?? 'unknown', cores: cpus().length, isa: cpu.isa, threads: cpu.threads },
			};
	for (const [part, work] of await stage.parts(context)) {
		if (file.parts[part] !== undefined) continue;
		const begin = performance.now();
		console.log(`${name}: ${part}`);
		file.parts[part] = (await work()) ?? null;
		file.seconds += (performance.now() - begin) / 1000;
		write(name, file);
		console.log(`${name}: ${part}, ${((performance.now() - begin) / 1000).toFixed(0)} s`);
	}
	file.complete = true;
	write(name, file);
	console.log(`${name}: ${fileOf(name)}, ${file.seconds.toFixed(0)} s in all`);
}

function write(name, file) {
	mkdirSync(options.out, { recursive: true });
	const plain = (_, value) =>
		typeof value === 'bigint' ? String(value) : typeof value === 'number' ? Number(value.toPrecision(8)) : value;
	writeFileSync(fileOf(name), `${JSON.stringify(file, plain, 1)}\n`);
}

for (const name of names) await run(name);
for (const model of loaded.values()) await model.dispose();
