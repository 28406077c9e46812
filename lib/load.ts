/** From a directory or hub id to a loaded engine: find the files, open them, fill the weights, check the direction of attention. */
import { openCheckpoint } from './checkpoint.js';
import type { ModelConfig } from './config.js';
import { type DeviceOptions, type OpenedEngine, openEngine } from './device.js';
import type { Engine } from './engine.js';
import { check, DiffusionNativeError } from './errors.js';
import { type LoadProgress, type ResolveOptions, resolveModelDirectory } from './hub.js';
import { lengthExtras } from './length/extras.js';
import { readLengthFiles } from './length/files.js';
import { checkOptions } from './option-checks.js';
import type { Tokenizer } from './tokenizer.js';

/** Options of `DiffuGPT.fromPretrained`. */
export interface PretrainedOptions extends DeviceOptions, Omit<ResolveOptions, 'refresh'> {
	/** Overrides what the files say: maskId, eosId, padId, shift, attention, ... */
	readonly config?: Partial<ModelConfig>;
	/** Told about downloads and loading. */
	readonly onProgress?: ((progress: LoadProgress) => void) | undefined;
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
		await opened.engine.run((native) => checkpoint.load(native, { onProgress, signal }), signal);
		await checkDirection(opened.engine, directory);
		Object.assign(lengthExtras(opened.engine), readLengthFiles(directory, checkpoint.config.channels));
		return { opened, tokenizer: checkpoint.tokenizer ?? null };
	} catch (error) {
		checkpoint.close();
		await opened?.engine.dispose();
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
	const hidden = async (changed: number): Promise<Float32Array> => {
		const ids = new Int32Array(T);
		if (changed >= 0) ids[changed] = 1;
		const batch = {
			ids,
			positions: Int32Array.from(ids, (_, i) => i),
			offsets: Int32Array.of(0, T),
			keyLengths: Int32Array.of(T),
			caches: [null],
			masks: [{ kind: attention === 'causal' ? ('causal' as const) : ('full' as const) }],
			rows: null,
		};
		return engine.run((native) => native.forward(batch, 'hidden'));
	};
	const base = await hidden(-1);
	const C = engine.config.channels;
	const differs = (other: Float32Array, row: number): boolean => {
		for (let i = row * C; i < (row + 1) * C; i++) if (base[i] !== other[i]) return true;
		return false;
	};
	const backwards = differs(await hidden(T - 1), 0);
	const forwards = differs(await hidden(0), T - 1);
	if (attention === 'causal' ? backwards : forwards && !backwards) {
		throw new DiffusionNativeError(
			'ERR_DN_CHECKPOINT',
			`${directory}: the model was loaded as ${attention}, but a later token ${backwards ? 'changes' : 'does not change'} an earlier state`,
		);
	}
}
