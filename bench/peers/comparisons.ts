/** What is compared with whom, and the ratio to reach. */
import type { ShapeName, WeightType } from '../shapes.js';
import type { Job } from './channel.js';
import type { Engine } from './installed.js';
import type { ModelFile } from './weights.js';

export interface Opponent {
	engine: Exclude<Engine, 'ours'>;
	/** 'F16', 'int8': how its weights are stored. */
	dtype: string;
	file: ModelFile;
	/** What it does where that is not our own job. */
	job?: Job;
	/** Smallest ratio (its time over ours) that counts as reached, against the tuned peer and the one as shipped. */
	bar?: { tuned: number; shipped?: number };
	/** Left out of a quick run. */
	fullOnly?: boolean;
}

export interface Comparison {
	name: string;
	shape: ShapeName;
	dtype: WeightType;
	job: Job;
	/** Rounds; in each every contender has one turn. */
	rounds: number;
	/** Timed calls in a turn, after an untimed one when there are several. */
	calls: number;
	/** Tokens of one call, for rates. */
	tokens: number;
	opponents: Opponent[];
	fullOnly?: boolean;
}

const onnx = (dtype: 'fp32' | 'int8', output: 'logits' | 'hidden', bar?: number, job?: Job): Opponent => ({
	engine: 'onnxruntime',
	dtype,
	file: `${dtype}-${output}.onnx`,
	...(bar === undefined ? {} : { bar: { tuned: bar } }),
	...(job ? { job } : {}),
});
const llama = (type: 'F16' | 'BF16' | 'Q8_0', rest: Partial<Opponent> = {}): Opponent => ({
	engine: 'llama',
	dtype: type,
	file: `${type}.gguf`,
	...rest,
});
const torch = (rest: Partial<Opponent> = {}): Opponent => ({
	engine: 'torch',
	dtype: 'fp32',
	file: 'checkpoint',
	...rest,
});

const logits = (T: number): Job => ({ kind: 'forward', T, output: 'logits' });
const hidden = (T: number): Job => ({ kind: 'forward', T, output: 'hidden' });
const sampling = (measured?: number): Job => ({
	kind: 'sample',
	T: 256,
	steps: 64,
	topP: 0.9,
	temperature: 0.95,
	...(measured === undefined ? {} : { measured }),
});
const decoding: Job = { kind: 'decode', prompt: 32, tokens: 128 };

function training(shape: ShapeName, B: number, T: number, rounds: number, bar: number, fullOnly = false): Comparison {
	return {
		name: `train-step/${shape}/${B}x${T}`,
		shape,
		dtype: 'fp32',
		job: { kind: 'train', B, T },
		rounds,
		calls: 1,
		tokens: B * T,
		opponents: [torch({ bar: { tuned: bar } })],
		fullOnly,
	};
}

/** Ordered so that a process is started once and ended as soon as nothing more is asked of it. */
export const comparisons: Comparison[] = [
	{
		name: 'forward/gpt2/T256/logits',
		shape: 'gpt2',
		dtype: 'fp32',
		job: logits(256),
		rounds: 5,
		calls: 3,
		tokens: 256,
		opponents: [
			onnx('fp32', 'logits', 1.19),
			llama('F16', { bar: { tuned: 3.8 } }),
			llama('BF16', { fullOnly: true }),
			torch({ fullOnly: true }),
		],
	},
	{
		name: 'forward/gpt2/T256/logits',
		shape: 'gpt2',
		dtype: 'bf16',
		job: logits(256),
		rounds: 5,
		calls: 3,
		tokens: 256,
		opponents: [llama('F16'), llama('BF16')],
		fullOnly: true,
	},
	{
		name: 'forward/gpt2/T1024/logits',
		shape: 'gpt2',
		dtype: 'fp32',
		job: logits(1024),
		rounds: 3,
		calls: 2,
		tokens: 1024,
		opponents: [onnx('fp32', 'logits', 1.2), torch()],
		fullOnly: true,
	},
	{
		name: 'denoise/gpt2/T256',
		shape: 'gpt2',
		dtype: 'fp32',
		job: { kind: 'denoise', T: 256 },
		rounds: 5,
		calls: 3,
		tokens: 256,
		opponents: [onnx('fp32', 'logits', 1.4, logits(256))],
	},
	{
		name: 'forward/gpt2/T256/hidden',
		shape: 'gpt2',
		dtype: 'fp32',
		job: hidden(256),
		rounds: 5,
		calls: 3,
		tokens: 256,
		opponents: [onnx('fp32', 'hidden', 1.12)],
	},
	{
		name: 'forward/gpt2/T256/logits',
		shape: 'gpt2',
		dtype: 'int8',
		job: logits(256),
		rounds: 5,
		calls: 3,
		tokens: 256,
		opponents: [onnx('int8', 'logits', 1.43), llama('Q8_0', { bar: { tuned: 5.5 } })],
	},
	{
		name: 'denoise/gpt2/T256',
		shape: 'gpt2',
		dtype: 'int8',
		job: { kind: 'denoise', T: 256 },
		rounds: 5,
		calls: 3,
		tokens: 256,
		opponents: [onnx('int8', 'logits', 2, logits(256))],
	},
	{
		name: 'forward/gpt2/T1024/logits',
		shape: 'gpt2',
		dtype: 'int8',
		job: logits(1024),
		rounds: 3,
		calls: 2,
		tokens: 1024,
		opponents: [onnx('int8', 'logits')],
		fullOnly: true,
	},
	{
		name: 'forward/gpt2/T256/hidden',
		shape: 'gpt2',
		dtype: 'int8',
		job: hidden(256),
		rounds: 5,
		calls: 3,
		tokens: 256,
		opponents: [onnx('int8', 'hidden', 1.45), llama('Q8_0', { fullOnly: true })],
	},
	{
		name: 'decode/gpt2/128',
		shape: 'gpt2',
		dtype: 'int8',
		job: decoding,
		rounds: 5,
		calls: 1,
		tokens: 128,
		opponents: [llama('Q8_0', { bar: { tuned: 1.8, shipped: 3 } })],
	},
	{
		name: 'decode/gpt2/128',
		shape: 'gpt2',
		dtype: 'fp32',
		job: decoding,
		rounds: 3,
		calls: 1,
		tokens: 128,
		opponents: [llama('F16')],
		fullOnly: true,
	},
	{
		name: 'decode/gpt2/128',
		shape: 'gpt2',
		dtype: 'bf16',
		job: decoding,
		rounds: 3,
		calls: 1,
		tokens: 128,
		opponents: [llama('F16'), llama('BF16')],
		fullOnly: true,
	},
	// "<= 10 s (fp32) and <= 4 s (int8) where PyTorch takes 60", as ratios. PyTorch's steps all cost the same: a part is run.
	{
		name: 'sample/gpt2/T256/64-steps/top-p',
		shape: 'gpt2',
		dtype: 'fp32',
		job: sampling(),
		rounds: 1,
		calls: 1,
		tokens: 255,
		opponents: [torch({ job: sampling(16), bar: { tuned: 6 } })],
	},
	{
		name: 'sample/gpt2/T256/64-steps/top-p',
		shape: 'gpt2',
		dtype: 'int8',
		job: sampling(),
		rounds: 1,
		calls: 1,
		tokens: 255,
		opponents: [torch({ job: sampling(16), bar: { tuned: 15 } })],
		fullOnly: true,
	},
	training('gpt2', 4, 64, 5, 1.5),
	training('gpt2', 2, 256, 3, 1.5, true),
	training('gpt2', 1, 1024, 2, 1.5, true),
	{
		name: 'forward/small/T256/logits',
		shape: 'small',
		dtype: 'fp32',
		job: logits(256),
		rounds: 9,
		calls: 5,
		tokens: 256,
		opponents: [onnx('fp32', 'logits', 1.25), torch({ fullOnly: true })],
	},
	{
		name: 'forward/small/T256/logits',
		shape: 'small',
		dtype: 'int8',
		job: logits(256),
		rounds: 9,
		calls: 5,
		tokens: 256,
		opponents: [onnx('int8', 'logits', 1.5)],
	},
	training('small', 4, 128, 7, 1.45),
	training('small', 2, 256, 7, 1.45, true),
];
