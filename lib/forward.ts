/**
 * The forward of the public API: sequences as callers give them, checked and packed, and the rows of what the network says
 * of them. Results live in the memory of earlier ones where the caller gives those back.
 */
import { constants } from 'node:buffer';

import { type AttentionOption, checkMatrix, toNativeMask } from './batch.js';
import { binding } from './binding.js';
import type { ModelConfig } from './config.js';
import type { Engine } from './engine.js';
import { check } from './errors.js';
import type { NativeBatch } from './native-types.js';
import { checkOptions, show } from './option-checks.js';

/** Options of `forward`. */
export interface ForwardOptions {
	/** @default 'full' for a bidirectional model, 'causal' for a causal one */
	readonly attention?: AttentionOption;
	/**
	 * 'logits': (rows, V), network rows as they are. 'aligned-logits': (rows, V), entry i speaks of token i; under the shift
	 * nothing predicts token 0 and its row is NaN. 'hidden': (rows, C), after the final layer norm.
	 * @default 'logits'
	 */
	readonly output?: 'logits' | 'aligned-logits' | 'hidden';
	/** Only these rows of each sequence, in this order. @default all */
	readonly rows?: readonly Int32Array[];
	/**
	 * Results of earlier calls that are no longer needed, so that a loop over large ones, logits for instance, neither waits
	 * for fresh memory nor keeps the garbage collector busy. The first of a fitting size (up to a quarter larger) takes the new
	 * results in its memory: every array on its buffer then shows those, or remains of both after an error. The others are
	 * emptied (length 0). @default none
	 */
	readonly reuse?: readonly Float32Array[];
	/** Aborting rejects with `signal.reason`. @default none */
	readonly signal?: AbortSignal;
}

/** See `DiffuGPT.forward`. */
export async function forward(
	engine: Engine,
	sequences: Int32Array | readonly Int32Array[],
	options: ForwardOptions,
): Promise<Float32Array[]> {
	engine.check();
	checkOptions('forward', options, ['attention', 'output', 'rows', 'reuse', 'signal']);
	const { config } = engine;
	const { output = 'logits', reuse = [], signal } = options;
	const list = sequences instanceof Int32Array ? [sequences] : sequences;
	check(Array.isArray(list) && list.length > 0, 'forward needs an Int32Array or a list of at least one');
	check(
		output === 'logits' || output === 'aligned-logits' || output === 'hidden',
		`option output is ${show(output)}, expected 'logits', 'aligned-logits' or 'hidden'`,
	);
	const { batch, rows } = packForward(list, options, config);
	// Under the shift, token i is spoken of by row i - 1, and token 0 by none: it borrows a row, which is overwritten.
	const shift = output === 'aligned-logits' && config.shift ? 1 : 0;
	const wanted = rows.flatMap((list_, s) =>
		Array.from(list_, (row) => (batch.offsets[s] as number) + Math.max(0, row - shift)),
	);
	const width = output === 'hidden' ? config.channels : config.vocab;
	const bytes = wanted.length * width * Float32Array.BYTES_PER_ELEMENT;
	check(
		bytes <= constants.MAX_LENGTH,
		() =>
			`forward: ${wanted.length} rows of ${width} numbers are ${bytes} bytes, expected at most the ${constants.MAX_LENGTH} ` +
			'that this Node.js holds in one buffer: pass fewer sequences at a time, or list rows',
	);
	const into = takeResults(reuse, bytes, signal);
	let all: Float32Array = new Float32Array(0);
	try {
		const request = { ...batch, rows: Int32Array.from(wanted) };
		if (wanted.length > 0)
			all = await engine.run(
				(native) => native.forward(request, output === 'hidden' ? 'hidden' : 'logits', into),
				signal,
			);
	} finally {
		if (into) resultBuffers.add(into);
	}
	resultBuffers.add(all.buffer);
	if (into && all.buffer !== into) binding().detach(into);
	let next = 0;
	return rows.map((list_) => {
		const begin = next * width;
		for (const row of list_) {
			if (row < shift) all.fill(Number.NaN, next * width, (next + 1) * width);
			next++;
		}
		return all.subarray(begin, next * width);
	});
}

/** Buffers of what `forward` returned: nobody else's may be emptied. */
const resultBuffers = new WeakSet<ArrayBufferLike>();

/**
 * Empties results, unless the call is aborted already, but for one of `bytes` or little more: the caller has that for
 * itself until it adds it to `resultBuffers` again.
 */
function takeResults(
	results: readonly Float32Array[],
	bytes: number,
	signal: AbortSignal | undefined,
): ArrayBuffer | undefined {
	check(
		Array.isArray(results) && results.every((values) => values instanceof Float32Array),
		'option reuse is not a list of Float32Array, such as forward returns',
	);
	const buffers = results.map(({ buffer }) => buffer as ArrayBuffer);
	check(
		buffers.every((buffer) => resultBuffers.has(buffer)),
		'option reuse has an array that forward did not return, or that another call is using again',
	);
	signal?.throwIfAborted();
	const taken = buffers.find(({ byteLength }) => byteLength >= bytes && byteLength <= 1.25 * bytes);
	if (taken) resultBuffers.delete(taken);
	for (const buffer of buffers) if (buffer !== taken) binding().detach(buffer);
	return taken;
}

/** Packs the sequences of a forward and checks ids, lengths and rows. */
function packForward(
	list: readonly Int32Array[],
	options: ForwardOptions,
	config: ModelConfig,
): { batch: NativeBatch; rows: Int32Array[] } {
	const attention = options.attention ?? (config.attention === 'causal' ? 'causal' : 'full');
	const mask = toNativeMask(attention);
	const offsets = new Int32Array(list.length + 1);
	for (const [s, ids] of list.entries()) {
		check(ids instanceof Int32Array, `sequence ${s} is not an Int32Array`);
		check(
			ids.length > 0 && ids.length <= config.context,
			`sequence ${s} has ${ids.length} tokens, expected 1 to the model's context of ${config.context}`,
		);
		for (const [i, id] of ids.entries()) {
			check(
				id >= 0 && id < config.vocab,
				`sequence ${s}: token ${i} is ${id}, outside the vocabulary of ${config.vocab}`,
			);
		}
		offsets[s + 1] = (offsets[s] as number) + ids.length;
	}
	checkMatrix(mask, list);
	const given = options.rows;
	check(
		given === undefined || (Array.isArray(given) && given.length === list.length),
		'option rows needs one Int32Array per sequence',
	);
	const rows = list.map((ids, s) => {
		const wanted = given?.[s];
		if (!given) return Int32Array.from({ length: ids.length }, (_, i) => i);
		check(wanted instanceof Int32Array, `option rows[${s}] is not an Int32Array`);
		for (const row of wanted)
			check(row >= 0 && row < ids.length, `option rows[${s}]: row ${row} is outside the sequence's ${ids.length}`);
		return wanted;
	});
	const total = offsets[list.length] as number;
	const ids = new Int32Array(total);
	const positions = new Int32Array(total);
	for (const [s, sequence] of list.entries()) {
		const begin = offsets[s] as number;
		ids.set(sequence, begin);
		for (let i = 0; i < sequence.length; i++) positions[begin + i] = i;
	}
	return {
		batch: {
			ids,
			positions,
			offsets,
			keyLengths: Int32Array.from(list, (sequence) => sequence.length),
			caches: list.map(() => null),
			masks: list.map(() => mask),
			rows: null,
		},
		rows,
	};
}
