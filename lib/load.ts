/** From a directory or hub id to a loaded engine: find the files, open them, fill the weights, check the direction of attention. */
import { type Checkpoint, type LoadOptions, openCheckpoint } from './checkpoint.js';
import type { ModelConfig } from './config.js';
import { type DeviceOptions, type OpenedEngine, openEngine } from './device.js';
import type { Engine } from './engine.js';
import { check, DiffusionNativeError } from './errors.js';
import { type LoadProgress, type ResolveOptions, resolveModelDirectory } from './hub.js';
import { lengthExtras } from './length/extras.js';
import { readLengthFiles } from './length/files.js';
import type { NativeModel } from './native-types.js';
import { checkOptions } from './option-checks.js';
import type { Tokenizer } from './tokenizer.js';

/** Options of `DiffuGPT.fromPretrained`. */
export interface PretrainedOptions extends DeviceOptions, ResolveOptions {
	/** Overrides what the files say: maskId, eosId, padId, shift, attention, ... @default {} */
	readonly config?: Partial<ModelConfig>;
	/** Told about downloads and loading. @default none */
	readonly onProgress?: ((progress: LoadProgress) => void) | undefined;
	/** Aborting rejects with `signal.reason`. @default none */
	readonly signal?: AbortSignal | undefined;
}

const pretrainedOptionNames = [
	'device',
	'dtype',
	'threads',
	'config',
	'revision',
	'cacheDir',
	'localFilesOnly',
	'refresh',
	'onProgress',
	'signal',
] as const satisfies readonly (keyof PretrainedOptions)[];

/** @throws what `DiffuGPT.fromPretrained` documents */
export async function loadPretrained(
	pathOrHubId: string,
	options: PretrainedOptions,
): Promise<{ opened: OpenedEngine; tokenizer: Tokenizer | null }> {
	checkOptions('fromPretrained', options, pretrainedOptionNames);
	const { signal, onProgress, config = {} } = options;
	check(typeof config === 'object' && config !== null, `option config is ${String(config)}, expected an object`);
	signal?.throwIfAborted();
	const directory = await resolveModelDirectory(pathOrHubId, options);
	const checkpoint = openCheckpoint(directory, config);
	let opened: OpenedEngine | undefined;
	try {
		opened = openEngine(checkpoint.config, options);
		const tokenizer = await opened.engine.run((native) => fill(native, checkpoint, { onProgress, signal }), signal);
		await checkDirection(opened.engine, directory);
		Object.assign(lengthExtras(opened.engine), readLengthFiles(directory, checkpoint.config.channels));
		return { opened, tokenizer: tokenizer ?? null };
	} catch (error) {
		checkpoint.close();
		await opened?.engine.dispose();
		throw error;
	}
}

/** Loads the weights and, while the native threads are at the first of them, the tokenizer. */
async function fill(native: NativeModel, checkpoint: Checkpoint, options: LoadOptions): Promise<Tokenizer | undefined> {
	const loading = checkpoint.load(native, options);
	try {
		const tokenizer = checkpoint.tokenizer();
		await loading;
		return tokenizer;
	} catch (error) {
		checkpoint.close(); // ends the loading at its next tensor
		await loading.catch(() => undefined);
		throw error;
	}
}

/**
 * Proves on the loaded weights that attention looks where the configuration says: in a causal model a later token must
 * not change an earlier hidden state; in a bidirectional one it must, if earlier tokens change later states at all.
 */
async function checkDirection(engine: Engine, directory: string): Promise<void> {
	const { context, vocab, attention } = engine.config;
	const T = Math.min(4, context);
	if (T < 2 || vocab < 2) return;
	// Three sequences of zeros: as they are, with another last token, with another first one.
	const ids = new Int32Array(3 * T);
	ids[2 * T - 1] = ids[2 * T] = 1;
	const mask = { kind: attention === 'causal' ? ('causal' as const) : ('full' as const) };
	const batch = {
		ids,
		positions: Int32Array.from(ids, (_, i) => i % T),
		offsets: Int32Array.of(0, T, 2 * T, 3 * T),
		keyLengths: Int32Array.of(T, T, T),
		caches: [null, null, null],
		masks: [mask, mask, mask],
		rows: null,
	};
	const hidden = await engine.run((native) => native.forward(batch, 'hidden'));
	const C = engine.config.channels;
	const differs = (sequence: number, row: number): boolean => {
		const base = row * C,
			other = (sequence * T + row) * C;
		for (let i = 0; i < C; i++) if (hidden[base + i] !== hidden[other + i]) return true;
		return false;
	};
	const backwards = differs(1, 0);
	const forwards = differs(2, T - 1);
	if (attention === 'causal' ? backwards : forwards && !backwards) {
		throw new DiffusionNativeError(
			'ERR_DN_CHECKPOINT',
			`${directory}: the model was loaded as ${attention}, but a later token ${backwards ? 'changes' : 'does not change'} an earlier state`,
		);
	}
}
