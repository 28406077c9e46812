/** Model configuration: the fields, their checks and their defaults. */
import { check } from './errors.js';
import { show } from './option-checks.js';

/** What a model is. */
export interface ModelConfig {
	/** Architecture. */
	readonly family: 'gpt2';
	/** Transformer blocks. */
	readonly layers: number;
	/** Attention heads; divides `channels`. */
	readonly heads: number;
	/** Width of the hidden state, C. */
	readonly channels: number;
	/** Longest sequence, tokens. */
	readonly context: number;
	/** Vocabulary rows, V. */
	readonly vocab: number;
	/** Token id that stands for "not known yet"; -1 when the model has none (a plain GPT-2). */
	readonly maskId: number;
	/** Beginning-of-text id. */
	readonly bosId: number;
	/** End-of-text id. */
	readonly eosId: number;
	/** Padding id; equal to `eosId` where none is set apart. */
	readonly padId: number;
	/** Network row i predicts token i + 1 (GPT-2, DiffuGPT). */
	readonly shift: boolean;
	/** 'bidirectional' for diffusion, 'causal' for GPT-2. */
	readonly attention: 'bidirectional' | 'causal';
}

/**
 * Input of `DiffuGPT.fromConfig`: sizes are needed, the rest has defaults.
 * `family` 'gpt2'; `context` 1024; `eosId` 50256 when it is inside the vocabulary, else `vocab` - 1; `bosId` and `padId` equal
 * to `eosId`; `maskId` by GPT-2's rule (10541 for a vocabulary of 50257, 50257 for a larger one), else -1; `shift` true;
 * `attention` 'bidirectional' when there is a mask id, else 'causal'.
 */
export type ModelConfigInput = Pick<ModelConfig, 'layers' | 'heads' | 'channels' | 'vocab'> & Partial<ModelConfig>;

const sizes = ['layers', 'heads', 'channels', 'context', 'vocab'] as const;
const ids = ['maskId', 'eosId', 'bosId', 'padId'] as const;
const fields: ReadonlySet<string> = new Set(['family', 'shift', 'attention', ...sizes, ...ids]);

/**
 * Fills the defaults of {@link ModelConfigInput} and checks every field.
 * @throws `ERR_DN_ARGUMENT` naming the field.
 */
export function resolveConfig(input: ModelConfigInput): ModelConfig {
	check(
		typeof input === 'object' && input !== null,
		`the config is ${String(input)}, expected an object with layers, heads, channels and vocab`,
	);
	for (const key of Object.keys(input)) check(fields.has(key), `config.${key} is not a known field`);
	const { layers, heads, channels, vocab } = input;
	const context = input.context ?? 1024;
	const family = input.family ?? 'gpt2';
	check(family === 'gpt2', `config.family is ${show(family)}, expected 'gpt2'`);
	const sized = { layers, heads, channels, context, vocab };
	for (const key of sizes) {
		check(
			Number.isInteger(sized[key]) && sized[key] > 0 && sized[key] < 2 ** 31,
			`config.${key} is ${String(sized[key])}, expected a positive whole number`,
		);
	}
	check(channels % heads === 0, `config.channels ${channels} is not a multiple of config.heads ${heads}`);
	const eosId = input.eosId ?? (vocab > 50256 ? 50256 : vocab - 1);
	const maskId = input.maskId ?? (vocab === 50257 ? 10541 : vocab > 50257 ? 50257 : -1);
	const resolved: ModelConfig = {
		family,
		...sized,
		maskId,
		bosId: input.bosId ?? eosId,
		eosId,
		padId: input.padId ?? eosId,
		shift: input.shift ?? true,
		attention: input.attention ?? (maskId >= 0 ? 'bidirectional' : 'causal'),
	};
	for (const key of ids) {
		const id = resolved[key];
		check(
			Number.isInteger(id) && id < vocab && (id >= 0 || (key === 'maskId' && id === -1)),
			`config.${key} is ${String(id)}, expected an id below the vocabulary size ${vocab}`,
		);
	}
	check(typeof resolved.shift === 'boolean', `config.shift is ${String(resolved.shift)}, expected true or false`);
	check(
		resolved.attention === 'bidirectional' || resolved.attention === 'causal',
		`config.attention is ${show(resolved.attention)}, expected 'bidirectional' or 'causal'`,
	);
	return resolved;
}

/** Throws `ERR_DN_ARGUMENT` when `what` is asked of a model without a mask token. */
export function checkMask(config: Pick<ModelConfig, 'maskId'>, what: string): void {
	check(
		config.maskId >= 0,
		`${what} needs a mask token, and the model has none (config.maskId is ${config.maskId}): give maskId, the id of ` +
			'that token, to fromConfig, or { config: { maskId } } to fromPretrained',
	);
}
