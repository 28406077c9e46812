/**
 * Writing a model directory that this package and Hugging Face's GPT2LMHeadModel both read: `config.json`,
 * `generation_config.json`, `model.safetensors`, `tokenizer.json`, `tokenizer_config.json`. Parameters go from native memory
 * to the file one by one. Names carry the prefix `transformer.`; matrices are [in, out], as Conv1D keeps them; the tied head
 * is not written. An int8 directory is this package's own: see `int8Tensors`.
 */
import { join } from 'node:path';

import { binding } from './binding.js';
import { int8Columns, scaleSuffix } from './checkpoint.js';
import { quantMethod } from './checkpoint-config.js';
import type { ModelConfig } from './config.js';
import { fromNative } from './errors.js';
import { replaceDirectory, writeSynced } from './files.js';
import type { LengthExtras } from './length/extras.js';
import { lengthFiles, writeLengthFiles } from './length/files.js';
import type { NativeModel, NativeParameter, NativeTensorSource } from './native-types.js';
import type { Tokenizer } from './tokenizer.js';

export interface SaveOptions {
	native: NativeModel;
	config: ModelConfig;
	tokenizer: Tokenizer | undefined;
	/** Length heads and calibrations that belong to these very weights. @default none */
	length?: LengthExtras;
	/** Type of the stored values. F32 is exact, I8 too for a model that holds int8 weights. @default 'F32' */
	dtype?: 'F32' | 'F16' | 'BF16' | 'I8';
}

const torchTypes = { F32: 'float32', F16: 'float16', BF16: 'bfloat16', I8: 'float32' } as const;

/** Files of a model directory: what a save may replace or remove. Everything else in a directory is left alone. */
export function isModelFile(name: string): boolean {
	return (
		/^(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json$/.test(name) ||
		/^model(-\d+-of-\d+)?\.safetensors(\.index\.json)?$/.test(name) ||
		name === 'merges.txt' ||
		lengthFiles.includes(name)
	);
}

/**
 * Writes the directory under a temporary name, flushes it, and renames it into place (see `replaceDirectory` in files.ts for a
 * target that exists or cannot be renamed).
 * @throws `ERR_DN_CHECKPOINT` with the path and the system's reason; nothing half-written is left.
 */
export async function saveCheckpoint(
	directory: string,
	{ native, config, tokenizer, length, dtype = 'F32' }: SaveOptions,
): Promise<void> {
	const json = (value: unknown): string => `${JSON.stringify(value, null, 2)}\n`;
	const fill = async (stage: string): Promise<void> => {
		await writeSynced(join(stage, 'config.json'), json(huggingFaceConfig(config, dtype)));
		await writeSynced(join(stage, 'generation_config.json'), json(idsOf(config)));
		if (tokenizer) {
			await writeSynced(join(stage, 'tokenizer.json'), tokenizer.toJSON());
			await writeSynced(join(stage, 'tokenizer_config.json'), json(tokenizerConfig(config, tokenizer)));
		}
		if (length) await writeLengthFiles(stage, length);
		const tensors = native.parameters.flatMap((parameter): NativeTensorSource[] => {
			if (dtype === 'I8') return int8Tensors(native, parameter);
			const { name, shape } = parameter;
			return [{ name: `transformer.${name}`, shape, dtype, source: { model: native, parameter: name, kind: 'value' } }];
		});
		try {
			await binding().writeSafetensors(join(stage, 'model.safetensors'), tensors, { format: 'pt' });
		} catch (error) {
			throw fromNative(error);
		}
	};
	await replaceDirectory(directory, fill, isModelFile, 'config.json');
}

/**
 * A parameter in an int8 file: an operand of products as I8, in its own shape, followed by `<name>.scale`, F32, one per output
 * column (value = int8 * scale); any other parameter as F32.
 */
function int8Tensors(model: NativeModel, { name, shape }: NativeParameter): NativeTensorSource[] {
	const stored = `transformer.${name}`;
	const columns = int8Columns(name, shape);
	const source = (kind: 'value' | 'int8' | 'scale') => ({ model, parameter: name, kind });
	if (columns === undefined) return [{ name: stored, shape, dtype: 'F32', source: source('value') }];
	return [
		{ name: stored, shape, dtype: 'I8', source: source('int8') },
		{ name: stored + scaleSuffix, shape: [columns], dtype: 'F32', source: source('scale') },
	];
}

function idsOf(config: ModelConfig): Record<string, number> {
	return { bos_token_id: config.bosId, eos_token_id: config.eosId, pad_token_id: config.padId };
}

function huggingFaceConfig(config: ModelConfig, dtype: keyof typeof torchTypes): Record<string, unknown> {
	const { maskId, bosId, eosId, padId, shift, attention } = config;
	return {
		architectures: ['GPT2LMHeadModel'],
		model_type: 'gpt2',
		n_layer: config.layers,
		n_head: config.heads,
		n_embd: config.channels,
		n_positions: config.context,
		n_ctx: config.context,
		vocab_size: config.vocab,
		activation_function: 'gelu_new',
		layer_norm_epsilon: 1e-5,
		initializer_range: 0.02,
		tie_word_embeddings: true,
		...idsOf(config),
		torch_dtype: torchTypes[dtype],
		...(dtype === 'I8' ? { quantization_config: { quant_method: quantMethod, bits: 8 } } : {}),
		diffusion_native: { maskId, bosId, eosId, padId, shift, attention },
	};
}

function tokenizerConfig(config: ModelConfig, tokenizer: Tokenizer): Record<string, unknown> {
	const special = new Set(tokenizer.special);
	const entry = (key: string, id: number): Record<string, string> =>
		special.has(id) ? { [key]: tokenizer.decode([id]) } : {};
	return {
		tokenizer_class: 'PreTrainedTokenizerFast',
		model_max_length: config.context,
		clean_up_tokenization_spaces: false,
		...entry('bos_token', config.bosId),
		...entry('eos_token', config.eosId),
		...entry('pad_token', config.padId),
		...entry('mask_token', config.maskId),
	};
}
