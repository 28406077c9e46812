/**
 * What a model directory says a model is: `config.json` in Hugging Face's GPT-2 form, with this package's own fields under
 * `diffusion_native`, and the special ids of the tokenizer's files.
 */
import { join } from 'node:path';

import { type ModelConfig, resolveConfig } from './config.js';
import { DiffusionNativeError } from './errors.js';
import { readJsonObject } from './files.js';
import type { Tokenizer } from './tokenizer.js';

type Json = Record<string, unknown>;

/** Sizes as `config.json` gives them; the vocabulary comes from the embedding itself. */
export interface DeclaredConfig {
	path: string;
	layers: number;
	heads: number;
	channels: number;
	context: number;
	/** Ids as declared; undefined where the file says nothing. */
	bosId: number | undefined;
	eosId: number | undefined;
	padId: number | undefined;
	maskId: number | undefined;
	shift: boolean | undefined;
	attention: ModelConfig['attention'] | undefined;
	/** The file names a diffusion model as its architecture. */
	diffusion: boolean;
}

/** Id that GPT-2's configuration class writes whatever the vocabulary; beyond a small vocabulary it means nothing. */
const gpt2EndOfText = 50256;
/** Names of the tanh form of GELU. */
const activations = ['gelu_new', 'gelu_pytorch_tanh', 'gelu_fast'];

/** `quantization_config.quant_method` of this package's int8 directories; other loaders refuse what they do not know. */
export const quantMethod = 'diffusion_native';

/** Fields of `diffusion_native` in config.json. */
const ownFields = ['family', 'maskId', 'bosId', 'eosId', 'padId', 'shift', 'attention'];

/**
 * Reads and checks `config.json`; of ids, shift and attention only what `overrides` leave to the file.
 * @throws `ERR_DN_CHECKPOINT` naming the field.
 */
export function readDeclaredConfig(directory: string, overrides: Partial<ModelConfig> = {}): DeclaredConfig {
	const path = join(directory, 'config.json');
	const json = readJsonObject(path);
	if (!json) throw new DiffusionNativeError('ERR_DN_CHECKPOINT', `${path}: no such file`);
	const fail = (message: string): never => {
		throw new DiffusionNativeError('ERR_DN_CHECKPOINT', `${path}: ${message}`);
	};
	const names = architectureNames(json);
	const unknown = names.find((name) => !/^(gpt-?2|diffu|discretediffusion)/i.test(name));
	if (unknown !== undefined)
		fail(`the architecture ${JSON.stringify(unknown)} is not supported; expected GPT-2 or DiffuGPT`);

	const size = (...keys: string[]): number => {
		const given = keys.filter((key) => json[key] !== undefined && json[key] !== null);
		const [first, ...rest] = given;
		if (first === undefined) return fail(`${keys[0]} is missing`);
		const value = json[first];
		if (!Number.isInteger(value) || (value as number) <= 0)
			return fail(`${first} is ${JSON.stringify(value)}, expected a positive whole number`);
		const other = rest.find((key) => json[key] !== value);
		if (other !== undefined) fail(`${first} is ${String(value)} but ${other} is ${JSON.stringify(json[other])}`);
		return value as number;
	};
	const must = (key: string, expected: string, holds: (value: unknown) => boolean): void => {
		const value = json[key];
		if (value !== undefined && value !== null && !holds(value))
			fail(`${key} is ${JSON.stringify(value)}, expected ${expected}`);
	};
	const channels = size('n_embd', 'hidden_size');
	const layers = size('n_layer', 'num_hidden_layers');
	const heads = size('n_head', 'num_attention_heads');
	const context = size('n_positions', 'n_ctx', 'max_position_embeddings');
	if (channels % heads !== 0) fail(`n_embd ${channels} is not a multiple of n_head ${heads}`);
	must('n_inner', `4 * n_embd = ${4 * channels}`, (value) => value === 4 * channels);
	must('activation_function', `one of ${activations.join(', ')}`, (value) => activations.includes(value as string));
	must('layer_norm_epsilon', '1e-5', (value) => value === 1e-5);
	must('scale_attn_weights', 'true', (value) => value === true);
	must('scale_attn_by_inverse_layer_idx', 'false', (value) => value === false);
	must('add_cross_attention', 'false', (value) => value === false);
	must('tie_word_embeddings', 'true (the head is the embedding)', (value) => value === true);
	must('vocab_size', 'a positive whole number', (value) => Number.isInteger(value) && (value as number) > 0);

	must(
		'quantization_config',
		`a quantisation of this package ({ quant_method: '${quantMethod}', bits: 8 })`,
		(value) => (value as Json)['quant_method'] === quantMethod && (value as Json)['bits'] === 8,
	);

	const ours = json['diffusion_native'] ?? {};
	if (typeof ours !== 'object' || Array.isArray(ours)) fail('diffusion_native is not an object');
	const own = ours as Json;
	const stray = Object.keys(own).find((key) => !ownFields.includes(key));
	if (stray !== undefined) fail(`diffusion_native.${stray} is not a known field; expected ${ownFields.join(', ')}`);
	const id = (key: 'bosId' | 'eosId' | 'padId' | 'maskId', hfKey: string): number | undefined => {
		if (overrides[key] !== undefined) return undefined;
		const [name, value] = own[key] === undefined ? [hfKey, json[hfKey]] : [`diffusion_native.${key}`, own[key]];
		if (value === undefined || value === null) return undefined;
		const first: unknown = Array.isArray(value) ? value[0] : value;
		const least = key === 'maskId' ? -1 : 0;
		if (!Number.isInteger(first) || (first as number) < least)
			fail(`${name} is ${JSON.stringify(value)}, expected a token id`);
		return first as number;
	};
	const { family } = own;
	const shift = overrides.shift === undefined ? own['shift'] : undefined;
	const attention = overrides.attention === undefined ? own['attention'] : undefined;
	if (shift !== undefined && typeof shift !== 'boolean')
		fail(`diffusion_native.shift is ${JSON.stringify(shift)}, expected true or false`);
	if (attention !== undefined && attention !== 'bidirectional' && attention !== 'causal') {
		fail(`diffusion_native.attention is ${JSON.stringify(attention)}, expected 'bidirectional' or 'causal'`);
	}
	if (family !== undefined && family !== 'gpt2')
		fail(`diffusion_native.family is ${JSON.stringify(family)}, expected 'gpt2'`);
	return {
		path,
		layers,
		heads,
		channels,
		context,
		bosId: id('bosId', 'bos_token_id'),
		eosId: id('eosId', 'eos_token_id'),
		padId: id('padId', 'pad_token_id'),
		maskId: id('maskId', 'mask_token_id'),
		shift: shift as boolean | undefined,
		attention: attention as ModelConfig['attention'] | undefined,
		diffusion: names.some((name) => /^(diffu|discretediffusion)/i.test(name)),
	};
}

function architectureNames(json: Json): string[] {
	const { model_type: type, architectures } = json;
	const listed = Array.isArray(architectures)
		? architectures
		: architectures === undefined || architectures === null
			? []
			: [architectures];
	return [...(type === undefined || type === null ? [] : [type]), ...listed].map((name) =>
		typeof name === 'string' ? name : JSON.stringify(name),
	);
}

/** The id of the mask token that the tokenizer's files declare; undefined when they declare none. */
export function declaredMaskId(directory: string, tokenizer: () => Tokenizer | undefined): number | undefined {
	for (const name of ['tokenizer_config.json', 'special_tokens_map.json']) {
		const path = join(directory, name);
		const json = readJsonObject(path);
		const declared = json?.['mask_token'];
		const content = typeof declared === 'object' && declared !== null ? (declared as Json)['content'] : declared;
		if (typeof content !== 'string') continue;
		const listed = Object.entries((json?.['added_tokens_decoder'] ?? {}) as Json).find(
			([, token]) => (token as Json | null)?.['content'] === content,
		);
		const id = listed ? Number(listed[0]) : tokenizer()?.idOf(content);
		if (id === undefined || !Number.isInteger(id)) {
			throw new DiffusionNativeError(
				'ERR_DN_CHECKPOINT',
				`${path}: the mask token ${JSON.stringify(content)} is not in the vocabulary`,
			);
		}
		return id;
	}
	return undefined;
}

/** GPT-2's rule for the mask id of a diffusion checkpoint that declares none; -1: no rule. */
function maskIdByVocabulary(vocab: number): number {
	if (vocab === 50257) return 10541;
	return vocab > 50257 ? 50257 : -1;
}

/**
 * Everything decided: `overrides` over the file's own fields over the rules. A diffusion model is one that says so (its
 * architecture, its tensor names, `attention: 'bidirectional'`) or has a mask id of its own; any other is a plain GPT-2,
 * causal and without a mask id.
 * @throws `ERR_DN_CHECKPOINT` for what the file says, `ERR_DN_ARGUMENT` for what `overrides` say.
 */
export function decideConfig(
	declared: DeclaredConfig,
	vocab: number,
	diffusionTensors: boolean,
	tokenizerMaskId: number | undefined,
	overrides: Partial<ModelConfig>,
): ModelConfig {
	const given = Object.fromEntries(
		Object.entries(overrides).filter(([, value]) => value !== undefined),
	) as Partial<ModelConfig>;
	const inside = (id: number | undefined, name: string): number | undefined => {
		if (id === undefined || id < vocab) return id;
		if (id === gpt2EndOfText) return undefined;
		throw new DiffusionNativeError(
			'ERR_DN_CHECKPOINT',
			`${declared.path}: ${name} is ${id}, but the embedding has ${vocab} rows`,
		);
	};
	const attentionSaid = given.attention ?? declared.attention;
	const isDiffusion =
		attentionSaid === 'bidirectional' ||
		(attentionSaid === undefined &&
			(diffusionTensors || declared.diffusion || (given.maskId ?? declared.maskId ?? -1) >= 0));
	const maskId =
		inside(declared.maskId ?? tokenizerMaskId, 'the mask id') ?? (isDiffusion ? maskIdByVocabulary(vocab) : -1);
	const eosId = inside(declared.eosId, 'eos_token_id');
	const bosId = inside(declared.bosId, 'bos_token_id');
	const padId = inside(declared.padId, 'pad_token_id');
	const fromFile = {
		layers: declared.layers,
		heads: declared.heads,
		channels: declared.channels,
		context: declared.context,
		vocab,
		maskId,
		attention: isDiffusion ? ('bidirectional' as const) : ('causal' as const),
		...(eosId === undefined ? {} : { eosId }),
		...(bosId === undefined ? {} : { bosId }),
		...(padId === undefined ? {} : { padId }),
		...(declared.shift === undefined ? {} : { shift: declared.shift }),
	};
	try {
		resolveConfig(fromFile);
	} catch (error) {
		throw new DiffusionNativeError('ERR_DN_CHECKPOINT', `${declared.path}: ${(error as Error).message}`, {
			cause: error,
		});
	}
	return resolveConfig({ ...fromFile, ...given });
}
