/**
 * The configuration file of `train`: this library's keys, and those of the original project's config.json.
 * Each original key becomes settings of ours or is said to have none; a name that is neither is an error.
 */
import type { ModelConfig, ModelConfigInput } from '../config.js';
import { check } from '../errors.js';
import { suggest } from '../option-checks.js';
import { type TrainOptions, trainOptionNames } from '../training/options.js';

/** What `train` runs. Paths are relative to the working directory. */
export interface RunConfig extends Omit<TrainOptions, 'data' | 'validation' | 'loggers' | 'maxSteps'> {
	/** Model to start from: a directory, a hub id. Or `scratch`. */
	model?: string;
	/** Sizes of a model with random weights. */
	scratch?: ModelConfigInput;
	/** Overrides of the configuration of `model`. */
	config?: Partial<ModelConfig>;
	/** tokenizer.json, or a folder that holds one, or 'gpt2'; for `scratch`. */
	tokenizer?: string;
	/** Token file. */
	data?: string;
	/** Token file; or the share of `data` at its end, cut off by windows. */
	validation?: string | number;
	/** Window of packed data, tokens. */
	context?: number;
	maxSteps?: number;
	/** Stop after so many passes over the data, if that comes before `maxSteps`. */
	epochs?: number;
	device?: string;
	threads?: number;
	cacheDir?: string;
	/** Seed of random weights. */
	initSeed?: number;
	/** Write TensorBoard files into the run folder. */
	tensorboard?: boolean;
	/** Continue from this checkpoint or run folder. */
	resume?: string;
}

type Draft = { -readonly [K in keyof RunConfig]: RunConfig[K] };

const kinds: Record<string, string> = {
	model: 'string',
	scratch: 'object',
	config: 'object',
	tokenizer: 'string',
	data: 'string',
	context: 'number',
	maxSteps: 'number',
	epochs: 'number',
	device: 'string',
	threads: 'number',
	cacheDir: 'string',
	initSeed: 'number',
	tensorboard: 'boolean',
	resume: 'string',
	checkpoint: 'object',
	earlyStop: 'object',
	attentionAnnealing: 'object',
	spindle: 'object',
	batchSize: 'number',
	batchTokens: 'number',
	accumulate: 'number',
	weightDecay: 'number',
	betas: 'object',
	eps: 'number',
	gradClip: 'number',
	evalEvery: 'number',
	evalSequences: 'number',
	maskEnds: 'boolean',
	recompute: 'boolean',
	objective: 'string',
	normalise: 'string',
	weight: 'string',
	timeSampler: 'string',
	precision: 'string',
};

/** Keys of this library's configuration file. */
export const runConfigKeys: readonly string[] = [
	...new Set([...Object.keys(kinds), 'validation', ...trainOptionNames.filter((name) => name !== 'loggers')]),
];

const subKeys: Record<string, readonly string[]> = {
	checkpoint: ['dir', 'every', 'keep', 'keepBest'],
	earlyStop: ['patience', 'minDelta'],
	attentionAnnealing: ['steps', 'kind'],
	spindle: ['lambda'],
	scratch: [
		'family',
		'layers',
		'heads',
		'channels',
		'context',
		'vocab',
		'maskId',
		'bosId',
		'eosId',
		'padId',
		'shift',
		'attention',
	],
	config: ['maskId', 'bosId', 'eosId', 'padId', 'shift', 'attention', 'context'],
};

/** Values of original keys that only mean something together. */
interface Original {
	readonly values: Readonly<Record<string, unknown>>;
	readonly scratch: boolean;
}

/** One original key: sets ours and says so. */
type Mapping = (value: never, draft: Draft, original: Original) => string;

const unused = (): string => 'no effect (the original read it and did not use it)';
const sampling =
	(option: string): Mapping =>
	() =>
		`no effect on training; when generating: ${option}`;
const evaluation: Mapping = () => "no effect on training; see the command 'eval'";
const heads: Mapping = () => 'no effect: length heads are not trained by this command';

function nestedModel(draft: Draft, original: Original, values: Partial<ModelConfig>): void {
	if (original.scratch) draft.scratch = { ...(draft.scratch as ModelConfigInput), ...values };
	else draft.config = { ...draft.config, ...values };
}

function size(key: 'channels' | 'layers' | 'heads'): Mapping {
	return (value: number, draft, original) => {
		if (!original.scratch) return 'no effect: the size comes from init_from';
		draft.scratch = { ...(draft.scratch as ModelConfigInput), [key]: value };
		return `scratch.${key} = ${value}`;
	};
}

function learningRate(draft: Draft, { values }: Original): string {
	const peak = (values['max_lr'] ?? 6e-4) as number;
	const steps = (values['n_steps'] ?? 15000) as number;
	if (values['min_lr'] !== undefined || values['warmup_steps'] !== undefined) {
		draft.learningRate = {
			kind: 'cosine',
			peak,
			final: (values['min_lr'] ?? 6e-5) as number,
			warmupSteps: (values['warmup_steps'] ?? 800) as number,
			steps: Math.round(steps * ((values['lr_decay_fraction_n_steps'] ?? 0.6) as number)),
		};
	} else {
		draft.learningRate = {
			kind: 'one-cycle',
			peak,
			steps,
			warmup: (values['warmup_pct'] ?? 0.1) as number,
			div: (values['div_factor'] ?? 25) as number,
			finalDiv: (values['final_div_factor'] ?? 1e4) as number,
		};
	}
	return `learningRate = ${JSON.stringify(draft.learningRate)}`;
}

const rate: Mapping = (_value, draft, original) => learningRate(draft, original);

function every(draft: Draft, { values }: Original): number {
	const batches = (values['val_check_interval'] ?? 1000) as number;
	return Math.max(1, Math.round(batches / (draft.accumulate ?? ((values['accumulate_grad'] ?? 16) as number))));
}

/** The original's keys, in the order in which they are applied. */
const originalKeys: Record<string, Mapping> = {
	pipeline: (value: string, draft) => {
		check(
			['arm', 'diffusion', 'diffusion_length_head'].includes(value),
			`pipeline is ${JSON.stringify(value)}, expected 'arm', 'diffusion' or 'diffusion_length_head'`,
		);
		draft.objective = value === 'arm' ? 'autoregressive' : 'diffusion';
		return `objective = '${draft.objective}'${value === 'diffusion_length_head' ? '; the length head is not trained by this command' : ''}`;
	},
	init_from: (value: string, draft, { values }) => {
		if (values['resume_training'] === true) {
			check(value !== '', 'resume_training needs init_from');
			draft.resume = value;
			return `resume = '${value}'`;
		}
		check(
			!value.endsWith('.ckpt'),
			`init_from ${value} is a Lightning checkpoint, which is not read here: convert it to a folder with model.safetensors`,
		);
		if (value === '') return 'scratch: random weights';
		draft.model = value === 'diffugpt' ? 'diffusionfamily/diffugpt-s' : value;
		return `model = '${draft.model}'`;
	},
	resume_training: (value: boolean) => (value ? 'see init_from' : 'resume is not set'),
	memmap_path: (value: string, draft) => {
		draft.data = value;
		return `data = '${value}'`;
	},
	context_length: (value: number, draft, original) => {
		draft.context = value;
		if (original.scratch) draft.scratch = { ...(draft.scratch as ModelConfigInput), context: value };
		return `context = ${value}`;
	},
	n_embd: size('channels'),
	n_layer: size('layers'),
	n_head: size('heads'),
	mask_id: (value: number, draft, original) => {
		nestedModel(draft, original, {
			maskId: value,
			...(draft.objective === 'diffusion' ? { attention: 'bidirectional' } : {}),
		});
		return `maskId = ${value}`;
	},
	eos_token_id: (value: number, draft, original) => {
		nestedModel(draft, original, { eosId: value });
		return `eosId = ${value}`;
	},
	pad_token_id: (value: number, draft, original) => {
		nestedModel(draft, original, { padId: value });
		return `padId = ${value}`;
	},
	attn_annealing_steps: (value: number, draft) => {
		if (draft.objective === 'autoregressive') return "no effect: the pipeline is 'arm'";
		draft.attentionAnnealing = { steps: value, kind: 'seed' };
		return `attentionAnnealing = { steps: ${value}, kind: 'seed' }`;
	},
	n_steps: (value: number, draft) => {
		draft.maxSteps = value;
		return `maxSteps = ${value}`;
	},
	n_epochs: (value: number, draft) => {
		draft.epochs = value;
		return `epochs = ${value}`;
	},
	batch_size: (value: number, draft) => {
		draft.batchSize = value;
		return `batchSize = ${value}`;
	},
	accumulate_grad: (value: number, draft) => {
		draft.accumulate = value;
		return `accumulate = ${value}`;
	},
	grad_clip: (value: number, draft) => {
		draft.gradClip = value;
		return `gradClip = ${value} (the original declared it and did not clip)`;
	},
	betas: (value: [number, number], draft) => {
		draft.betas = value;
		return `betas = ${JSON.stringify(value)}`;
	},
	weight_decay: (value: number, draft) => {
		draft.weightDecay = value;
		return `weightDecay = ${value}`;
	},
	max_lr: rate,
	warmup_pct: rate,
	div_factor: rate,
	final_div_factor: rate,
	min_lr: rate,
	warmup_steps: rate,
	lr_decay_fraction_n_steps: rate,
	mask_ratio: unused,
	pad_id: unused,
	mask_value: unused,
	val_test_perc: (value: number, draft) => {
		draft.validation = value;
		return `validation = ${value} (windows at the end of the data, none overlaps a training window)`;
	},
	val_test_tokens: (value: number, draft) => {
		draft.validation = value;
		return `validation = ${value} tokens at the end of the data`;
	},
	val_check_interval: (_value: number, draft, original) => {
		draft.evalEvery = every(draft, original);
		return `evalEvery = ${draft.evalEvery} steps (the original counted micro-batches)`;
	},
	enable_checkpointing: (value: boolean, _draft, { values }) =>
		value && values['save_dir'] === undefined
			? "checkpoint.dir = './checkpoints/'"
			: value
				? 'see save_dir'
				: 'no checkpoints',
	save_dir: (value: string, draft, original) => {
		if (original.values['enable_checkpointing'] === false) return 'no effect: enable_checkpointing is false';
		draft.checkpoint = { dir: value, every: every(draft, original), keepBest: 3 };
		return `checkpoint = ${JSON.stringify(draft.checkpoint)}`;
	},
	wandb: (value: boolean, draft, { values }) => {
		draft.tensorboard = value;
		if (value && values['enable_checkpointing'] === false) {
			return 'no effect: TensorBoard files, which W&B syncs, go into the run folder, and enable_checkpointing is false';
		}
		return `tensorboard = ${value} (W&B syncs TensorBoard files; metrics.jsonl is always written)`;
	},
	run_name: () => 'no effect: the run folder is checkpoint.dir',
	project_name: () => 'no effect: the run folder is checkpoint.dir',
	seed: (value: number, draft) => {
		draft.seed = value;
		return `seed = ${value}`;
	},
	device: (value: string, draft) => {
		draft.device = value === 'mps' || value === 'gpu' ? 'auto' : value;
		return `device = '${draft.device}'`;
	},
	cache_dir: (value: string, draft) => {
		draft.cacheDir = value;
		return `cacheDir = '${value}'`;
	},
	learning_rate: (value: number, draft) => {
		draft.learningRate = value;
		return `learningRate = ${value}`;
	},
	epochs: (value: number, draft) => {
		draft.epochs = value;
		return `epochs = ${value}`;
	},
	max_steps: (value: number, draft) => {
		draft.maxSteps = value;
		return `maxSteps = ${value}`;
	},
	patience: (value: number, draft, { values }) => {
		draft.earlyStop = { patience: value, minDelta: (values['min_delta'] ?? 1e-3) as number };
		return `earlyStop = ${JSON.stringify(draft.earlyStop)}`;
	},
	min_delta: (_value: number, _draft, { values }) =>
		values['patience'] === undefined ? 'no effect without patience' : 'see patience',
	monitor: () => 'no effect: the validation loss is what early stop watches',
	padded_dataset: () => 'no effect: windows never overlap, so rows of context_length tokens are windows',
	pad_masked_perc: () => 'no effect: a pad token may be masked like any other and enters the loss',
	pad_annealing_samples: () => 'no effect: a pad token may be masked like any other from the start',
	pad_annealing_steps: () => 'no effect: a pad token may be masked like any other from the start',
	use_pad_head: heads,
	use_eos_head: heads,
	random_mask_prob: unused,
	eos_window_max: unused,
	window_annealing_steps: unused,
	user_prompt: sampling('the prompt'),
	n_samples: sampling('the number of prompts of generateBatch'),
	temperature: sampling('temperature'),
	max_new_tokens: sampling('length'),
	top_k: sampling('topK'),
	diffusion_steps: sampling('steps'),
	denoising_strategy: sampling("score 'random' or 'entropy'"),
	repetition_penalty: sampling('no such option'),
	do_sample: sampling('temperature 0 is greedy'),
	task_type: heads,
	llada_train_path: heads,
	llada_test_path: heads,
	pretrained_model_name: heads,
	hidden_size: heads,
	pos_weight: heads,
	embedding_dir: heads,
	ckpt_path_for_eval: evaluation,
	test_data_path_for_eval: evaluation,
	eval_batch_size: evaluation,
	wandb_eval: evaluation,
	wandb_eval_run_name_suffix: evaluation,
};

/** Kinds of the original values that set something here; a wrong one is told by its own name. */
const originalKinds: ReadonlyMap<string, string> = new Map([
	...['pipeline', 'init_from', 'memmap_path', 'save_dir', 'device', 'cache_dir'].map((key) => [key, 'string'] as const),
	...['resume_training', 'enable_checkpointing', 'wandb'].map((key) => [key, 'boolean'] as const),
	...['context_length', 'n_embd', 'n_layer', 'n_head', 'mask_id', 'eos_token_id', 'pad_token_id']
		.concat('attn_annealing_steps', 'n_steps', 'n_epochs', 'batch_size', 'accumulate_grad', 'grad_clip', 'weight_decay')
		.concat('max_lr', 'warmup_pct', 'div_factor', 'final_div_factor', 'min_lr', 'warmup_steps')
		.concat('lr_decay_fraction_n_steps', 'val_test_perc', 'val_test_tokens', 'val_check_interval', 'seed')
		.concat('learning_rate', 'epochs', 'max_steps', 'patience', 'min_delta')
		.map((key) => [key, 'number'] as const),
]);

/** Original names that are also ours with the same meaning, and so tell nothing about the file. */
const shared: ReadonlySet<string> = new Set(runConfigKeys.filter((key) => key in originalKeys));

/** Every key of the original project's config.json. */
export const originalConfigKeys: readonly string[] = Object.keys(originalKeys);

/**
 * Reads a configuration. Own keys win over original ones.
 * @returns the configuration, and what each original key was mapped to, one sentence each.
 * @throws `ERR_DN_ARGUMENT` for an unknown key, with the nearest known one, and for a value of the wrong kind.
 */
export function parseRunConfig(json: unknown): { config: RunConfig; mapped: string[] } {
	check(typeof json === 'object' && json !== null && !Array.isArray(json), 'the configuration is not a JSON object');
	const values = json as Record<string, unknown>;
	const isOriginal = Object.keys(values).some((key) => Object.hasOwn(originalKeys, key) && !shared.has(key));
	const known = [...new Set([...runConfigKeys, ...Object.keys(originalKeys)])];
	for (const key of Object.keys(values)) {
		check(known.includes(key), () => `${key} is not a key of the configuration${suggest(key, known)}`);
	}
	const draft: Draft = {};
	const mapped: string[] = [];
	if (isOriginal) {
		for (const [key, kind] of originalKinds) {
			const value = values[key];
			check(value === undefined || typeof value === kind, `${key} is ${JSON.stringify(value)}, expected a ${kind}`);
		}
		const scratch = (values['init_from'] ?? '') === '' && values['model'] === undefined;
		const original: Original = { values, scratch };
		applyDefaults(draft, original);
		for (const [key, mapping] of Object.entries(originalKeys)) {
			if (values[key] === undefined) continue;
			mapped.push(`${key}: ${mapping(values[key] as never, draft, original)}`);
		}
	}
	for (const key of runConfigKeys) {
		const value = values[key];
		if (value === undefined || (isOriginal && key === 'device')) continue;
		const kind = kinds[key];
		check(
			kind === undefined || (typeof value === kind && value !== null),
			`${key} is ${JSON.stringify(value)}, expected a ${kind === 'object' ? 'JSON object or array' : kind}`,
		);
		const inner = subKeys[key];
		if (inner) {
			for (const name of Object.keys(value as object)) {
				check(inner.includes(name), () => `${key}.${name} is not a key of the configuration${suggest(name, inner)}`);
			}
		}
		(draft as Record<string, unknown>)[key] = value;
	}
	return { config: draft, mapped };
}

/** What the original did where a key is absent. */
function applyDefaults(draft: Draft, original: Original): void {
	const { values, scratch } = original;
	draft.objective = 'autoregressive';
	draft.batchSize = 8;
	draft.accumulate = (values['accumulate_grad'] as number | undefined) ?? 16;
	draft.maxSteps = 15000;
	draft.epochs = 1;
	draft.weightDecay = 0.01;
	draft.betas = [0.9, 0.95];
	draft.context = 1024;
	draft.evalEvery = every(draft, original);
	learningRate(draft, original);
	if (scratch) {
		draft.scratch = { layers: 12, heads: 12, channels: 768, vocab: 50257, context: 1024 };
		draft.tokenizer = 'gpt2';
	}
	if (values['enable_checkpointing'] !== false) {
		draft.checkpoint = { dir: './checkpoints/', every: draft.evalEvery, keepBest: 3 };
	}
}
