/** What the configuration of `train` becomes, the original project's included; runs are in train-cli.test.ts. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import test from 'ava';
import { DiffuGPT } from 'diffusion-native';

import { originalConfigKeys } from '../lib/cli/original-config.js';
import { parseRunConfig } from '../lib/cli/train-config.js';
import { loadModel } from '../lib/cli/train-model.js';

const root = mkdtempSync(join(tmpdir(), 'dn-train-config-'));
test.after.always(() => rmSync(root, { recursive: true, force: true }));

test('own keys pass through; a typo is an error that suggests the right key', (t) => {
	const { config, mapped } = parseRunConfig({
		model: 'm',
		data: 'd.bin',
		maxSteps: 5,
		learningRate: { kind: 'constant', peak: 1 },
		seed: 3,
		device: 'cpu',
	});
	t.deepEqual(config, {
		model: 'm',
		data: 'd.bin',
		maxSteps: 5,
		learningRate: { kind: 'constant', peak: 1 },
		seed: 3,
		device: 'cpu',
	});
	t.deepEqual(mapped, []);
	t.throws(() => parseRunConfig({ maxStep: 5 }), {
		code: 'ERR_DN_ARGUMENT',
		message: /maxStep is not a key.*did you mean 'maxSteps'/,
	});
	t.throws(() => parseRunConfig({ attn_anealing_steps: 5 }), { message: /did you mean 'attn_annealing_steps'/ });
	t.throws(() => parseRunConfig({ checkpoint: { dri: 'x' } }), { message: /checkpoint\.dri.*did you mean 'dir'/ });
	t.throws(() => parseRunConfig({ zzzzzzzz: 1 }), { message: /^zzzzzzzz is not a key of the configuration$/ });
	t.throws(() => parseRunConfig({ maxSteps: '5' }), { message: /maxSteps is "5", expected a number/ });
	t.throws(() => parseRunConfig([]), { message: /not a JSON object/ });
});

test("the original project's configuration becomes ours, key by key", (t) => {
	const { config, mapped } = parseRunConfig({
		pipeline: 'diffusion',
		attn_annealing_steps: 500,
		mask_id: 10541,
		init_from: 'gpt2',
		memmap_path: './owt.bin',
		context_length: 512,
		n_embd: 768,
		n_epochs: 2,
		n_steps: 9000,
		batch_size: 4,
		accumulate_grad: 8,
		grad_clip: 1,
		betas: [0.9, 0.99],
		weight_decay: 0.1,
		max_lr: 1e-3,
		warmup_pct: 0.2,
		div_factor: 10,
		final_div_factor: 100,
		val_test_perc: 0.05,
		val_check_interval: 800,
		save_dir: './out',
		wandb: true,
		device: 'mps',
		seed: 42,
		top_k: 40,
	});
	t.like(config, {
		objective: 'diffusion',
		model: 'gpt2',
		data: './owt.bin',
		context: 512,
		epochs: 2,
		maxSteps: 9000,
		batchSize: 4,
		accumulate: 8,
		gradClip: 1,
		betas: [0.9, 0.99],
		weightDecay: 0.1,
		validation: 0.05,
		evalEvery: 100,
		tensorboard: true,
		device: 'auto',
		seed: 42,
		attentionAnnealing: { steps: 500, kind: 'seed' },
		config: { maskId: 10541, attention: 'bidirectional' },
		learningRate: { kind: 'one-cycle', peak: 1e-3, steps: 9000, warmup: 0.2, div: 10, finalDiv: 100 },
		checkpoint: { dir: './out', every: 100, keepBest: 3 },
	});
	t.true(mapped.some((line) => line === "memmap_path: data = './owt.bin'"));
	t.true(mapped.some((line) => /^top_k: no effect on training/.test(line)));
	const older = parseRunConfig({
		max_lr: 6e-4,
		min_lr: 6e-5,
		warmup_steps: 800,
		n_steps: 15000,
		init_from: '',
		n_layer: 2,
		n_embd: 64,
		n_head: 2,
	});
	t.like(older.config, {
		objective: 'autoregressive',
		learningRate: { kind: 'cosine', peak: 6e-4, final: 6e-5, warmupSteps: 800, steps: 9000 },
		scratch: { layers: 2, heads: 2, channels: 64, vocab: 50257 },
		accumulate: 16,
	});
	t.like(parseRunConfig({ init_from: 'runs/a', resume_training: true }).config, { resume: 'runs/a' });
	t.throws(() => parseRunConfig({ init_from: 'epoch_1.ckpt' }), { message: /Lightning checkpoint/ });
	t.throws(() => parseRunConfig({ pipeline: 'gan' }), { message: /'arm', 'diffusion'/ });
	// Own keys win.
	t.like(parseRunConfig({ n_steps: 10, maxSteps: 7 }).config, { maxSteps: 7 });
});

test('every original key is accepted and says what became of it', (t) => {
	const documented = [
		'pipeline',
		'attn_annealing_steps',
		'mask_id',
		'init_from',
		'resume_training',
		'memmap_path',
		'context_length',
		'n_embd',
		'n_layer',
		'n_head',
		'n_epochs',
		'n_steps',
		'batch_size',
		'accumulate_grad',
		'grad_clip',
		'betas',
		'weight_decay',
		'max_lr',
		'warmup_pct',
		'div_factor',
		'final_div_factor',
		'mask_ratio',
		'pad_id',
		'mask_value',
		'val_test_tokens',
		'val_test_perc',
		'enable_checkpointing',
		'save_dir',
		'val_check_interval',
		'wandb',
		'run_name',
		'project_name',
		'user_prompt',
		'n_samples',
		'temperature',
		'max_new_tokens',
		'top_k',
		'diffusion_steps',
		'min_lr',
		'warmup_steps',
		'lr_decay_fraction_n_steps',
		'eos_token_id',
		'pad_token_id',
		'padded_dataset',
		'pad_masked_perc',
		'pad_annealing_samples',
		'pad_annealing_steps',
		'use_pad_head',
		'use_eos_head',
		'denoising_strategy',
		'repetition_penalty',
		'do_sample',
		'random_mask_prob',
		'eos_window_max',
		'window_annealing_steps',
		'device',
		'seed',
		'task_type',
		'llada_train_path',
		'llada_test_path',
		'ckpt_path_for_eval',
		'test_data_path_for_eval',
		'eval_batch_size',
		'wandb_eval',
		'wandb_eval_run_name_suffix',
		'pretrained_model_name',
		'hidden_size',
		'pos_weight',
		'embedding_dir',
		'cache_dir',
		'learning_rate',
		'epochs',
		'max_steps',
		'patience',
		'min_delta',
		'monitor',
	];
	const strings = new Set(['memmap_path', 'save_dir', 'device', 'init_from', 'cache_dir']);
	const switches = new Set(['resume_training', 'enable_checkpointing', 'wandb']);
	const sample = (key: string): unknown => {
		if (key === 'pipeline') return 'arm';
		if (strings.has(key)) return 'cpu';
		if (switches.has(key)) return false;
		if (key === 'val_test_perc') return 0.1;
		return key === 'betas' ? [0.9, 0.95] : 1;
	};
	for (const key of documented) {
		t.true(originalConfigKeys.includes(key), key);
		const { mapped } = parseRunConfig({ n_steps: 5, [key]: sample(key) });
		t.true(
			mapped.some((line) => line.startsWith(`${key}: `) && line.length > key.length + 3),
			key,
		);
	}
});

test('original values of a wrong kind are told by their own name; TensorBoard without a run folder is told', (t) => {
	for (const [key, value] of [
		['max_lr', '6e-4'],
		['n_steps', null],
		['val_check_interval', true],
		['resume_training', 1],
		['memmap_path', 5],
	] as const) {
		const message = new RegExp(`^${key} is ${JSON.stringify(value)}, expected a (number|boolean|string)$`);
		t.throws(() => parseRunConfig({ n_layer: 2, [key]: value }), { code: 'ERR_DN_ARGUMENT', message }, key);
	}
	const { mapped } = parseRunConfig({ n_steps: 5, enable_checkpointing: false, wandb: true });
	t.true(mapped.some((line) => /^wandb: no effect.*enable_checkpointing is false/.test(line)));
	t.throws(() => parseRunConfig({ n_steps: 5, betas: 0.9 }), { message: /^betas is 0\.9/ });
});

test("what the original's file leaves out is said: taken from what ships, or left off", (t) => {
	const { config, mapped } = parseRunConfig({ pipeline: 'diffusion', n_steps: 5, n_layer: 2, batchSize: 3 });
	t.is(
		mapped[0],
		'absent, so taken from the config.json that the original ships with: context_length 1024, n_embd 768, n_head 12, ' +
			'n_epochs 1, accumulate_grad 16, betas [0.9,0.95], weight_decay 0.01, max_lr 0.0006, val_check_interval 1000, ' +
			'save_dir "./checkpoints/"',
	);
	t.regex(mapped[1] ?? '', /^attn_annealing_steps: absent, so attention is full from the first step .*1000/);
	t.regex(mapped[2] ?? '', /^val_test_perc: absent, so nothing is held out .*0\.05/);
	t.is(config.attentionAnnealing, undefined);
	t.is(config.validation, undefined);
	t.is(config.batchSize, 3);
	const said = (values: object): string => parseRunConfig(values).mapped.join('\n');
	t.notRegex(said({ pipeline: 'arm', n_steps: 5 }), /attn_annealing_steps: absent/);
	t.notRegex(said({ n_steps: 5, validation: 'held.bin' }), /val_test_perc/);
	t.notRegex(said({ n_steps: 5, val_test_tokens: 100 }), /val_test_perc/);
});

test('a pad id that is the vocabulary size makes the vocabulary one row larger', (t) => {
	const scratch = { pipeline: 'diffusion', init_from: '', n_layer: 1, n_head: 2, n_embd: 8, eos_token_id: 50256 };
	t.like(parseRunConfig({ ...scratch, pad_token_id: 50257 }).config, {
		scratch: { vocab: 50258, padId: 50257, eosId: 50256, maskId: 10541 },
	});
	t.like(parseRunConfig({ ...scratch, mask_id: 7, pad_token_id: 50257 }).config.scratch, { vocab: 50258, maskId: 7 });
	t.like(parseRunConfig({ ...scratch, pad_token_id: 50256 }).config.scratch, { vocab: 50257, padId: 50256 });
	const { config, mapped } = parseRunConfig({ ...scratch, init_from: 'gpt2', pad_token_id: 50257 });
	t.like(config, { config: { padId: 50257 }, padRow: true });
	t.true(mapped.includes('pad_token_id: padId = 50257; a model of 50257 rows gets one more, the mean of the others'));
	// Only the original's key asks for a row.
	t.is(parseRunConfig({ model: 'gpt2', config: { padId: 50257 } }).config.padRow, undefined);
	t.throws(() => parseRunConfig({ padRow: true }), { message: /padRow is not a key/ });
});

test('a loaded model gets its pad row: the mean of the others, which stay', async (t) => {
	const path = join(root, 'base');
	const sizes = { layers: 1, heads: 2, channels: 8, vocab: 40, context: 16, eosId: 39, maskId: 38 };
	await using base = await DiffuGPT.fromConfig(sizes, { device: 'cpu', seed: 5 });
	await base.save(path);
	const at = { device: 'cpu', threads: 1 } as const;
	await using larger = await loadModel(path, true, { ...at, config: { padId: 40, attention: 'bidirectional' } });
	t.like(larger.config, { ...sizes, vocab: 41, padId: 40, attention: 'bidirectional' });
	const rows = base.getParameter('wte.weight');
	const wte = larger.getParameter('wte.weight');
	t.deepEqual(wte.subarray(0, rows.length), rows);
	for (let c = 0; c < 8; c++) {
		let sum = 0;
		for (let row = 0; row < 40; row++) sum += rows[row * 8 + c] as number;
		t.true(Math.abs((wte[rows.length + c] as number) - sum / 40) < 1e-7);
	}
	for (const name of ['wpe.weight', 'h.0.attn.c_attn.weight', 'ln_f.bias'])
		t.deepEqual(larger.getParameter(name), base.getParameter(name), name);
	await using same = await loadModel(path, true, { ...at, config: { padId: 7 } });
	t.like(same.config, { vocab: 40, padId: 7 });
	const beyond = { code: 'ERR_DN_ARGUMENT', message: /config\.padId is 4[01], expected an id below/ };
	await t.throwsAsync(loadModel(path, true, { ...at, config: { padId: 41 } }), beyond);
	await t.throwsAsync(loadModel(path, undefined, { ...at, config: { padId: 40 } }), beyond);
});

test('values of validation and epochs that mean nothing, and keys that say nothing together, are refused', (t) => {
	for (const [values, message] of [
		[{ validation: true }, /^validation is true, expected a token file, or the share/],
		[{ validation: null }, /^validation is null/],
		[{ validation: -1 }, /^validation is -1/],
		[{ validation: ['a.bin'] }, /^validation is \["a\.bin"\]/],
		[{ epochs: 0 }, /^epochs is 0, expected a number above 0/],
		[{ epochs: -1 }, /^epochs is -1/],
		[{ n_steps: 5, n_epochs: -1 }, /^n_epochs is -1/],
		[{ n_steps: 5, val_test_perc: 5 }, /^val_test_perc is 5, expected a share/],
		[{ n_steps: 5, val_test_tokens: 0.5 }, /^val_test_tokens is 0\.5/],
		[{ model: 'gpt2', tokenizer: 'gpt2' }, /^tokenizer is that of scratch, and has no meaning beside model/],
		[{ model: 'gpt2', initSeed: 1 }, /^initSeed draws the weights of scratch/],
		[{ scratch: { layers: 1 }, config: { maskId: 1 } }, /^config overrides .* no meaning beside scratch/],
	] as const) {
		t.throws(() => parseRunConfig(values), { code: 'ERR_DN_ARGUMENT', message }, JSON.stringify(values));
	}
	for (const validation of [0, 0.1, 500, 'held.bin'])
		t.is(parseRunConfig({ validation }).config.validation, validation);
	t.is(parseRunConfig({ scratch: { layers: 1 }, tokenizer: 'gpt2', initSeed: 2 }).config.initSeed, 2);
	const { config, mapped } = parseRunConfig({ n_steps: 5, n_epochs: 0 });
	t.is(config.epochs, undefined);
	t.true(mapped.includes('n_epochs: epochs is not set: n_steps alone ends the run'));
});
