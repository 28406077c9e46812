/**
 * Reading a model directory: configuration, tokenizer, and the mapping from the tensors of its safetensors files to the
 * parameters of a model. Everything but the values and the tokenizer is checked before a model is made; values go from the
 * files straight into native memory.
 */
import { existsSync } from 'node:fs';
import { join } from 'node:path';

import { binding } from './binding.js';
import { decideConfig, declaredMaskId, readDeclaredConfig } from './checkpoint-config.js';
import type { ModelConfig } from './config.js';
import { check, DiffusionNativeError, fromNative } from './errors.js';
import { readJsonObject } from './files.js';
import type { LoadProgress } from './hub.js';
import type { NativeModel, NativeSafetensors, NativeTensorEntry } from './native-types.js';
import { Tokenizer } from './tokenizer.js';

const weights = 'model.safetensors';
const weightsIndex = 'model.safetensors.index.json';
const readable: ReadonlySet<string> = new Set(['F32', 'F16', 'BF16', 'I8']);
/** Ends the name of the tensor with the scales of an I8 tensor. */
export const scaleSuffix = '.scale';

/** Options of {@link Checkpoint.load}. */
export interface LoadOptions {
	onProgress?: ((progress: LoadProgress) => void) | undefined;
	signal?: AbortSignal | undefined;
}

/** An opened model directory. Its files stay open until `load` has ended or `close` was called. */
export interface Checkpoint {
	readonly config: ModelConfig;
	/**
	 * Reads the tokenizer, once: undefined when the directory has none and GPT-2's does not fit. It takes the JavaScript
	 * thread about as long as the native threads need for the weights, so a loader calls it meanwhile.
	 * @throws `ERR_DN_CHECKPOINT` when it is malformed or has more tokens than the embedding has rows.
	 */
	tokenizer(): Tokenizer | undefined;
	/** Fills every parameter of a model made with `config`, then closes the files. Once. */
	load(native: NativeModel, options?: LoadOptions): Promise<void>;
	/** Closes the files; idempotent. */
	close(): void;
}

/** A tensor and the file that holds it. */
interface Stored {
	file: NativeSafetensors;
	entry: NativeTensorEntry;
	/** Stored as [out, in] (nn.Linear) where GPT-2 has [in, out]. */
	transposed: boolean;
	/** Of an I8 tensor: the tensor with a scale per output column, in the same file. */
	scales?: NativeTensorEntry;
}

/**
 * Opens a model directory and checks it against its configuration; `overrides` win over the files.
 * @throws `ERR_DN_CHECKPOINT` naming the file, field or tensor and what was expected.
 */
export function openCheckpoint(directory: string, overrides: Partial<ModelConfig> = {}): Checkpoint {
	const declared = readDeclaredConfig(directory, overrides);
	const files = openWeights(directory);
	const close = (): void => {
		for (const file of files) file.close();
	};
	try {
		const { tensors, diffusion } = collectTensors(files);
		const embedding = tensors.get('wte.weight');
		if (!embedding) {
			throw bad(
				directory,
				'no token embedding: expected wte.weight, transformer.wte.weight, embed_tokens.weight or lm_head.weight',
			);
		}
		const vocab = embedding.entry.shape[0];
		if (embedding.entry.shape.length !== 2 || !vocab) {
			throw bad(embedding.file.path, `${embedding.entry.name} is ${shapeText(embedding.entry.shape)}, expected (V, C)`);
		}
		check(
			overrides.vocab === undefined || overrides.vocab === vocab,
			`config.vocab is ${String(overrides.vocab)}, but ${embedding.entry.name} in ${embedding.file.path} has ${vocab} rows`,
		);
		let found: { tokenizer: Tokenizer | undefined } | undefined;
		const anyTokenizer = (): Tokenizer | undefined => {
			found ??= { tokenizer: findTokenizer(directory, vocab) };
			return found.tokenizer;
		};
		const maskId = overrides.maskId === undefined ? declaredMaskId(directory, anyTokenizer) : undefined;
		const config = decideConfig(declared, vocab, diffusion, maskId, overrides);
		matchTensors(directory, tensors, config);
		return {
			config,
			tokenizer: () => anyTokenizer()?.forModel(vocab, config.maskId >= 0 ? [config.maskId] : []),
			close,
			load: async (native, options = {}) => {
				try {
					await loadTensors(native, tensors, options);
				} catch (error) {
					throw fromNative(error);
				} finally {
					close();
				}
			},
		};
	} catch (error) {
		close();
		throw fromNative(error);
	}
}

function bad(path: string, message: string): DiffusionNativeError {
	return new DiffusionNativeError('ERR_DN_CHECKPOINT', `${path}: ${message}`);
}

function shapeText(shape: readonly number[]): string {
	return `(${shape.join(', ')})`;
}

function openFile(path: string): NativeSafetensors {
	try {
		return binding().openSafetensors(path);
	} catch (error) {
		throw fromNative(error);
	}
}

/** The safetensors files of a directory, opened and checked against the index when there is one. */
function openWeights(directory: string): NativeSafetensors[] {
	if (existsSync(join(directory, weights))) return [openFile(join(directory, weights))];
	const indexPath = join(directory, weightsIndex);
	const index = readJsonObject(indexPath);
	if (!index) throw bad(directory, `neither ${weights} nor ${weightsIndex} is there`);
	const map = index['weight_map'];
	if (typeof map !== 'object' || map === null || Array.isArray(map))
		throw bad(indexPath, 'weight_map is missing or not an object');
	const whereabouts = new Map(Object.entries(map as Record<string, unknown>));
	for (const [tensor, shard] of whereabouts) {
		if (typeof shard !== 'string' || !/^[^/\\:]+\.safetensors$/.test(shard) || shard.startsWith('..')) {
			throw bad(
				indexPath,
				`tensor ${tensor} is said to be in ${JSON.stringify(shard)}, expected the name of a .safetensors file beside it`,
			);
		}
	}
	if (whereabouts.size === 0) throw bad(indexPath, 'weight_map is empty');
	const files: NativeSafetensors[] = [];
	try {
		for (const shard of [...new Set(whereabouts.values())].sort() as string[]) {
			const path = join(directory, shard);
			if (!existsSync(path)) throw bad(indexPath, `the file ${shard} that it names does not exist`);
			const file = openFile(path);
			files.push(file);
			const present = new Set(file.tensors.map((tensor) => tensor.name));
			for (const name of present) {
				const said = whereabouts.get(name);
				if (said === shard) continue;
				throw bad(
					path,
					`holds the tensor ${name}, which ${weightsIndex} ${said === undefined ? 'does not list' : `says is in ${String(said)}`}`,
				);
			}
			for (const [name, said] of whereabouts) {
				if (said === shard && !present.has(name))
					throw bad(path, `lacks the tensor ${name}, which ${weightsIndex} says is in it`);
			}
		}
	} catch (error) {
		for (const file of files) file.close();
		throw error;
	}
	return files;
}

/** The parameter a tensor is, by its name in the file; null: not a parameter (attention buffers, a second copy of the model). */
function parameterName(name: string): string | null {
	if (name.startsWith('model.') || name.endsWith('.attn.bias') || name.endsWith('.attn.masked_bias')) return null;
	const plain = name.replace(/^(transformer|denoise_model)\./, '');
	return plain === 'embed_tokens.weight' || plain === 'lm_head.weight' ? 'wte.weight' : plain;
}

/**
 * The matrices that are operands of products, and so are int8 in an int8 model: all but wpe. `shape` is the parameter's,
 * (in, out), or (V, C) of wte, whose rows are the output columns of the head.
 */
export function int8Columns(name: string, shape: readonly number[]): number | undefined {
	if (shape.length !== 2 || name === 'wpe.weight') return undefined;
	return name === 'wte.weight' ? shape[0] : shape[1];
}

/** Tensors by parameter name. The embedding may be there under several names, when all copies are equal. */
function collectTensors(files: readonly NativeSafetensors[]): { tensors: Map<string, Stored>; diffusion: boolean } {
	const tensors = new Map<string, Stored>();
	let diffusion = false;
	for (const file of files) {
		for (const entry of file.tensors) {
			const name = parameterName(entry.name);
			if (name === null) continue;
			diffusion ||= entry.name.startsWith('denoise_model.') || entry.name === 'embed_tokens.weight';
			if (!readable.has(entry.dtype)) {
				throw bad(
					file.path,
					`tensor ${entry.name} is ${entry.dtype}, expected F32, F16 or BF16, or I8 with a tensor of scales`,
				);
			}
			const scaled =
				name.endsWith(scaleSuffix) && file.tensors.some((other) => other.name + scaleSuffix === entry.name);
			if (scaled) continue;
			const stored: Stored = { file, entry, transposed: false };
			if (entry.dtype === 'I8') stored.scales = scalesOf(stored);
			const other = tensors.get(name);
			if (!other) tensors.set(name, stored);
			else if (name === 'wte.weight') requireEqual(other, stored);
			else throw bad(file.path, `${entry.name} and ${other.entry.name} are the same parameter twice`);
		}
	}
	return { tensors, diffusion };
}

/** The scales of an I8 tensor. */
function scalesOf({ file, entry }: Stored): NativeTensorEntry {
	const scales = file.tensors.find((other) => other.name === entry.name + scaleSuffix);
	if (!scales)
		throw bad(file.path, `tensor ${entry.name} is I8, but its scales, ${entry.name}${scaleSuffix}, are missing`);
	return scales;
}

/** The head is tied to the embedding: copies of it must hold the same values. */
function requireEqual(a: Stored, b: Stored): void {
	const names = `${b.entry.name} ${shapeText(b.entry.shape)} and ${a.entry.name} ${shapeText(a.entry.shape)}`;
	const differ = `${names} must be the same matrix (the output head is tied to the embedding)`;
	if (shapeText(a.entry.shape) !== shapeText(b.entry.shape)) throw bad(b.file.path, differ);
	if (a.scales || b.scales) throw bad(b.file.path, `${names}: an I8 embedding is stored once`);
	const left = a.file.read(a.entry.name);
	const right = b.file.read(b.entry.name);
	if (Buffer.compare(bytesOf(left), bytesOf(right)) === 0) return;
	const at = left.findIndex((value, i) => value !== right[i]);
	if (at >= 0) throw bad(b.file.path, `${differ}, but they differ at element ${at}: ${right[at]} and ${left[at]}`);
}

function bytesOf(values: Float32Array): Uint8Array {
	return new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
}

/** Name and shape of every parameter of GPT-2, without prefix, matrices as [in, out]. */
export function parameterShapes(
	config: Pick<ModelConfig, 'layers' | 'channels' | 'context' | 'vocab'>,
): Map<string, number[]> {
	const { layers, channels: C, context, vocab } = config;
	const shapes = new Map<string, number[]>([
		['wte.weight', [vocab, C]],
		['wpe.weight', [context, C]],
	]);
	for (let i = 0; i < layers; i++) {
		const layer: [string, number[]][] = [
			['ln_1.weight', [C]],
			['ln_1.bias', [C]],
			['attn.c_attn.weight', [C, 3 * C]],
			['attn.c_attn.bias', [3 * C]],
			['attn.c_proj.weight', [C, C]],
			['attn.c_proj.bias', [C]],
			['ln_2.weight', [C]],
			['ln_2.bias', [C]],
			['mlp.c_fc.weight', [C, 4 * C]],
			['mlp.c_fc.bias', [4 * C]],
			['mlp.c_proj.weight', [4 * C, C]],
			['mlp.c_proj.bias', [C]],
		];
		for (const [name, shape] of layer) shapes.set(`h.${i}.${name}`, shape);
	}
	shapes.set('ln_f.weight', [C]);
	shapes.set('ln_f.bias', [C]);
	return shapes;
}

/**
 * Requires exactly the parameters of `config`. A file whose matrices are all [out, in] (nn.Linear) is recognised by those that
 * are not square and marked for transposing, the square ones with them; a mixture is refused.
 */
function matchTensors(directory: string, tensors: Map<string, Stored>, config: ModelConfig): void {
	const shapes = parameterShapes(config);
	const some = (names: string[]): string =>
		names.slice(0, 5).join(', ') + (names.length > 5 ? ` and ${names.length - 5} more` : '');
	const missing = [...shapes.keys()].filter((name) => !tensors.has(name));
	if (missing.length > 0) throw bad(directory, `missing tensors: ${some(missing)}`);
	const unexpected = [...tensors].filter(([name]) => !shapes.has(name)).map(([, stored]) => stored.entry.name);
	if (unexpected.length > 0)
		throw bad(directory, `tensors that a GPT-2 of ${config.layers} layers does not have: ${some(unexpected)}`);

	const straight: string[] = [];
	const turned: string[] = [];
	for (const [name, shape] of shapes) {
		const { file, entry, scales } = tensors.get(name) as Stored;
		if (scales) matchScales(file, entry, scales, name, shape);
		const isMatrix = name.startsWith('h.') && shape.length === 2;
		const matches = shapeText(entry.shape) === shapeText(shape);
		if (matches && isMatrix && shape[0] !== shape[1]) straight.push(entry.name);
		if (matches) continue;
		if (!isMatrix || shapeText(entry.shape) !== shapeText([...shape].reverse())) {
			throw bad(file.path, `${entry.name} is ${shapeText(entry.shape)}, expected ${shapeText(shape)} by config.json`);
		}
		turned.push(entry.name);
	}
	if (turned.length === 0) return;
	if (straight.length > 0) {
		throw bad(
			directory,
			`${straight[0]} is stored as [in, out] but ${turned[0]} as [out, in]; expected one layout in all layers`,
		);
	}
	for (const [name, stored] of tensors) stored.transposed = name.startsWith('h.') && stored.entry.shape.length === 2;
}

/** Requires of an I8 tensor that its parameter can be int8, in its own layout, and one F32 scale per output column. */
function matchScales(
	file: NativeSafetensors,
	entry: NativeTensorEntry,
	scales: NativeTensorEntry,
	name: string,
	shape: readonly number[],
): void {
	const columns = int8Columns(name, shape);
	if (columns === undefined) throw bad(file.path, `${entry.name} is I8, expected F32, F16 or BF16`);
	if (shapeText(entry.shape) !== shapeText(shape)) {
		throw bad(file.path, `${entry.name} is ${shapeText(entry.shape)}, expected ${shapeText(shape)} by config.json`);
	}
	if (scales.dtype !== 'F32' || shapeText(scales.shape) !== shapeText([columns])) {
		throw bad(file.path, `${scales.name} is ${scales.dtype} ${shapeText(scales.shape)}, expected F32 (${columns})`);
	}
}

/** The directory's tokenizer, else GPT-2's when the vocabulary has room for it. */
function findTokenizer(directory: string, vocab: number): Tokenizer | undefined {
	if (!Tokenizer.existsIn(directory)) return vocab >= 50257 ? Tokenizer.gpt2() : undefined;
	const tokenizer = Tokenizer.fromDirectory(directory);
	const fitting = tokenizer.forModel(vocab);
	if (fitting.vocabSize > vocab) {
		throw bad(directory, `the tokenizer has ${fitting.vocabSize} tokens, the embedding ${vocab} rows`);
	}
	// Tokens beyond the embedding stay known until the mask token is looked up; forModel leaves them away.
	return tokenizer;
}

async function loadTensors(
	native: NativeModel,
	tensors: ReadonlyMap<string, Stored>,
	options: LoadOptions,
): Promise<void> {
	const { onProgress, signal } = options;
	const total = native.parameters.reduce((sum, parameter) => sum + 4 * parameter.count, 0);
	let loaded = 0;
	for (const { name, shape, count } of native.parameters) {
		signal?.throwIfAborted();
		const stored = tensors.get(name);
		if (!stored || stored.entry.count !== count) {
			throw new DiffusionNativeError(
				'ERR_DN_INTERNAL',
				`the model's ${name} ${shapeText(shape)} has no tensor of its size`,
			);
		}
		const { file, entry, transposed, scales } = stored;
		if (transposed) native.setParameter(name, transpose(file.read(entry.name), entry.shape));
		else if (scales) await native.loadParameter(name, file, entry.name, scales.name);
		else await native.loadParameter(name, file, entry.name);
		loaded += 4 * count;
		onProgress?.({ status: 'load', loaded, total });
	}
}

function transpose(values: Float32Array, shape: readonly number[]): Float32Array {
	const [rows, columns] = shape as [number, number];
	const out = new Float32Array(values.length);
	for (let r = 0; r < rows; r++) {
		for (let c = 0; c < columns; c++) out[c * rows + r] = values[r * columns + c] as number;
	}
	return out;
}
