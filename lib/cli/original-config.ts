/**
 * The configuration file of the original project (giacomo-ciro/diffusion-llms, config.json): what each of its keys
 * becomes here, or that it has no meaning here.
 */
import type { ModelConfig, ModelConfigInput } from '../config.js';
import { check } from '../errors.js';
import type { RunConfig } from './train-config.js';

/** A configuration that is being put together. */
export type Draft = { -readonly [K in keyof RunConfig]: RunConfig[K] };

/** The mask id of DiffuGPT-S, and of the original. */
const gpt2MaskId = 10541;

/**
 * What the original's config.json ships with, and the key of ours that says the same. Its code has no defaults: a key that is
 * absent ended it. Without these there is no run.
 */
const shipped = {
	pipeline: ['arm', 'objective'],
	context_length: [1024, 'context'],
	n_embd: [768, 'scratch'],
	n_layer: [12, 'scratch'],
	n_head: [12, 'scratch'],
	n_epochs: [1, 'epochs'],
	n_steps: [15000, 'maxSteps'],
	batch_size: [8, 'batchSize'],
	accumulate_grad: [16, 'accumulate'],
	betas: [[0.9, 0.95], 'betas'],
	weight_decay: [0.01, 'weightDecay'],
	max_lr: [6e-4, 'learningRate'],
	val_check_interval: [1000, 'evalEvery'],
	save_dir: ['./checkpoints/', 'checkpoint'],
} as const satisfies Record<string, readonly [unknown, keyof RunConfig]>;

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
	const peak = (values['max_lr'] ?? shipped.max_lr[0]) as number;
	const steps = (values['n_steps'] ?? shipped.n_steps[0]) as number;
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
	const batches = (values['val_check_interval'] ?? shipped.val_check_interval[0]) as number;
	return Math.max(
		1,
		Math.round(batches / (draft.accumulate ?? ((values['accumulate_grad'] ?? shipped.accumulate_grad[0]) as number))),
	);
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
		const { scratch } = draft;
		if (original.scratch && scratch?.vocab === value) {
			// By the rule of the larger vocabulary the new row would be the mask token.
			const maskId = scratch.maskId ?? gpt2MaskId;
			draft.scratch = { ...scratch, padId: value, vocab: value + 1, maskId };
			return `padId = ${value}, scratch.vocab = ${value + 1}: one row more`;
		}
		nestedModel(draft, original, { padId: value });
		if (original.scratch) return `padId = ${value}`;
		if (original.values['config'] === undefined) draft.padRow = true;
		return `padId = ${value}; a model of ${value} rows gets one more, the mean of the others`;
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
		check(value >= 0, `n_epochs is ${value}, expected a number >= 0`);
		if (value > 0) {
			draft.epochs = value;
			return `epochs = ${value}`;
		}
		delete draft.epochs;
		return 'epochs is not set: n_steps alone ends the run';
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
		check(value >= 0 && value < 1, `val_test_perc is ${value}, expected a share from 0 to 1`);
		draft.validation = value;
		return `validation = ${value} (windows at the end of the data, none overlaps a training window)`;
	},
	val_test_tokens: (value: number, draft) => {
		check(Number.isInteger(value) && value >= 0, `val_test_tokens is ${value}, expected a whole number of tokens`);
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

/** Every key of the original project's config.json. */
export const originalConfigKeys: readonly string[] = Object.keys(originalKeys);

/**
 * Reads the original keys of a configuration.
 * @returns our keys, and what became of each original one, one sentence each; absent ones that matter are named too.
 * @throws `ERR_DN_ARGUMENT` naming a key of the wrong kind.
 */
export function readOriginal(values: Readonly<Record<string, unknown>>): { draft: Draft; mapped: string[] } {
	for (const [key, kind] of originalKinds) {
		const value = values[key];
		check(value === undefined || typeof value === kind, `${key} is ${JSON.stringify(value)}, expected a ${kind}`);
	}
	const draft: Draft = {};
	const scratch = (values['init_from'] ?? '') === '' && values['model'] === undefined;
	const original: Original = { values, scratch };
	applyShipped(draft, original);
	const mapped = absent(original);
	for (const [key, mapping] of Object.entries(originalKeys)) {
		if (values[key] === undefined) continue;
		mapped.push(`${key}: ${mapping(values[key] as never, draft, original)}`);
	}
	return { draft, mapped };
}

/** The values of `shipped`; keys that are there replace them. */
function applyShipped(draft: Draft, original: Original): void {
	const { values, scratch } = original;
	draft.objective = 'autoregressive';
	draft.batchSize = shipped.batch_size[0];
	draft.accumulate = (values['accumulate_grad'] as number | undefined) ?? shipped.accumulate_grad[0];
	draft.maxSteps = shipped.n_steps[0];
	draft.epochs = shipped.n_epochs[0];
	draft.weightDecay = shipped.weight_decay[0];
	draft.betas = [...shipped.betas[0]];
	draft.context = shipped.context_length[0];
	draft.evalEvery = every(draft, original);
	learningRate(draft, original);
	if (scratch) {
		const sizes = { layers: shipped.n_layer[0], heads: shipped.n_head[0], channels: shipped.n_embd[0] };
		draft.scratch = { ...sizes, vocab: 50257, context: shipped.context_length[0] };
		draft.tokenizer = 'gpt2';
	}
	if (values['enable_checkpointing'] !== false) {
		draft.checkpoint = { dir: shipped.save_dir[0], every: draft.evalEvery, keepBest: 3 };
	}
}

/** Says which keys are absent and what that means; one that a key of ours replaces is not missed. */
function absent({ values, scratch }: Original): string[] {
	const missed = (...keys: string[]): boolean => keys.every((key) => values[key] === undefined);
	const replaced: Partial<Record<string, string>> = {
		n_epochs: 'epochs',
		n_steps: 'max_steps',
		max_lr: 'learning_rate',
	};
	const taken = Object.entries(shipped).filter(([key, [, own]]) => {
		if (own === 'scratch' && !scratch) return false;
		if (key === 'save_dir' && values['enable_checkpointing'] === false) return false;
		return missed(key, own, replaced[key] ?? key);
	});
	const lines: string[] = [];
	if (taken.length > 0) {
		const said = taken.map(([key, [value]]) => `${key} ${JSON.stringify(value)}`).join(', ');
		lines.push(`absent, so taken from the config.json that the original ships with: ${said}`);
	}
	if ((values['pipeline'] ?? 'arm') !== 'arm' && missed('attn_annealing_steps', 'attentionAnnealing'))
		lines.push('attn_annealing_steps: absent, so attention is full from the first step (the original ships with 1000)');
	if (missed('val_test_perc', 'val_test_tokens', 'validation'))
		lines.push('val_test_perc: absent, so nothing is held out for validation (the original ships with 0.05)');
	return lines;
}
