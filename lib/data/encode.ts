/**
 * Records to ids, in their order. Small inputs are encoded here. When more text comes and the tokenizer is the library's own,
 * which another thread can build again, batches of records go to worker threads; as many are under way as keep the workers
 * busy, so memory does not grow with the input, and the ids do not depend on the number of threads.
 */
import { Worker } from 'node:worker_threads';

import { checkData, DiffusionNativeError, type ErrorCode } from '../errors.js';
import { Tokenizer } from '../tokenizer.js';
import { encodeDocument, encodePair } from './pack.js';
import type { DataTokenizer, PrepareSettings } from './prepare-options.js';
import type { Item } from './records.js';

/** Ids of one record, without the tokens that the format puts around them. */
export interface EncodedText {
	readonly tokens: Int32Array;
	/** Tokens of the prompt; 0 unless the format is 'pairs'. */
	readonly promptLength: number;
}

/** An item and its ids. */
export interface EncodedItem extends EncodedText {
	readonly item: Item;
}

/** What a tokenizer gets: a document, or a prompt and what stands behind it. */
export interface TextJob {
	readonly text: string;
	readonly answer?: string;
}

/** What a worker answers: ids of a batch of jobs one after the other, tokens of each job and of its prompt; or its error. */
export type EncodeReply =
	| { readonly ids: Int32Array; readonly lengths: Int32Array; readonly prompts: Int32Array }
	| { readonly code: ErrorCode; readonly message: string };

/** Characters that are encoded here before workers are worth their start. */
const charactersAlone = 1 << 18;
/** Characters of a worker's batch. */
const batchCharacters = 1 << 16;

/**
 * Encodes items.
 * @throws `ERR_DN_ARGUMENT` naming the record that does not fit the format.
 */
export async function* encodeItems(
	items: AsyncIterable<Item>,
	settings: PrepareSettings,
): AsyncGenerator<EncodedItem, void> {
	const { tokenizer, threads } = settings;
	let alone = tokenizer instanceof Tokenizer && threads > 1 ? charactersAlone : Number.POSITIVE_INFINITY;
	let workers: EncodeWorker[] = [];
	const underWay: Promise<EncodedItem[]>[] = [];
	let batches = 0;
	let batch: Prepared[] = [];
	let characters = 0;
	const send = (): void => {
		underWay.push(encodeBatch(workers[batches++ % threads] as EncodeWorker, batch));
		batch = [];
		characters = 0;
	};
	try {
		for await (const item of items) {
			const job = toJob(item, settings);
			if (alone > 0) {
				alone -= size(job);
				yield { item, ...('tokens' in job ? job : encodeText(job, tokenizer)) };
				continue;
			}
			if (workers.length === 0) {
				const json = (tokenizer as Tokenizer).toJSON();
				workers = Array.from({ length: threads }, () => new EncodeWorker(json));
			}
			batch.push({ item, job });
			characters += size(job);
			if (characters >= batchCharacters) send();
			if (underWay.length > 2 * threads) yield* await (underWay.shift() as Promise<EncodedItem[]>);
		}
		if (batch.length > 0) send();
		for (const encoded of underWay) yield* await encoded;
	} finally {
		await Promise.all(workers.map((worker) => worker.close()));
	}
}

/** Ids of one job. */
export function encodeText({ text, answer }: TextJob, tokenizer: DataTokenizer): EncodedText {
	if (answer !== undefined) return encodePair(text, answer, tokenizer);
	return { tokens: encodeDocument(text, tokenizer), promptLength: 0 };
}

interface Prepared {
	readonly item: Item;
	/** Its text, or the ids it came with. */
	readonly job: TextJob | EncodedText;
}

function toJob({ record, where }: Item, { format, separator }: PrepareSettings): Prepared['job'] {
	if (format !== 'pairs') {
		const tokens = record instanceof Int32Array ? record : 'tokens' in record ? record.tokens : undefined;
		if (tokens) return { tokens, promptLength: 0 };
		checkData('text' in record, `${where}: expected text, { text } or token ids for the format '${format}'`);
		return { text: record.text };
	}
	if (!(record instanceof Int32Array) && 'prompt' in record) {
		const { prompt, answer } = record;
		checkData(typeof prompt === 'string' && typeof answer === 'string', `${where}: prompt and answer must be text`);
		return { text: prompt, answer: separator + answer };
	}
	checkData(
		!(record instanceof Int32Array) && 'tokens' in record && record.promptLength !== undefined,
		`${where}: pairs need { prompt, answer } or { tokens, promptLength }`,
	);
	const { tokens, promptLength } = record;
	checkData(
		Number.isInteger(promptLength) && promptLength >= 0 && promptLength <= tokens.length,
		`${where}: promptLength is ${String(promptLength)}, expected 0 to the ${tokens.length} tokens`,
	);
	return { tokens, promptLength };
}

/** Characters of a job, or its ids. */
function size(job: Prepared['job']): number {
	return 'tokens' in job ? job.tokens.length : job.text.length + (job.answer?.length ?? 0);
}

function encodeBatch(worker: EncodeWorker, batch: readonly Prepared[]): Promise<EncodedItem[]> {
	const texts = batch.map(({ job }) => job).filter((job) => !('tokens' in job)) as TextJob[];
	const encoded = worker.encode(texts).then((reply) => {
		if ('code' in reply) throw new DiffusionNativeError(reply.code, reply.message);
		let number = 0;
		let from = 0;
		return batch.map(({ item, job }) => {
			if ('tokens' in job) return { item, ...job };
			const tokens = reply.ids.subarray(from, from + (reply.lengths[number] as number));
			from += tokens.length;
			return { item, tokens, promptLength: reply.prompts[number++] as number };
		});
	});
	// A failure is heard of when it is the batch's turn, or not at all when an earlier batch failed.
	encoded.catch(() => undefined);
	return encoded;
}

/** A thread with the same tokenizer; it answers batches in the order it gets them. */
class EncodeWorker {
	readonly #thread: Worker;
	readonly #waiting: ((reply: EncodeReply) => void)[] = [];
	#ended: EncodeReply | undefined;

	constructor(tokenizerJson: string) {
		this.#thread = new Worker(new URL('./encode-worker.js', import.meta.url), {
			workerData: tokenizerJson,
			execArgv: [],
		});
		this.#thread.on('message', (reply: EncodeReply) => this.#waiting.shift()?.(reply));
		this.#thread.on('error', ({ message }: Error) => {
			const ended: EncodeReply = { code: 'ERR_DN_INTERNAL', message: `a tokenizing thread ended: ${message}` };
			this.#ended = ended;
			for (const answer of this.#waiting.splice(0)) answer(ended);
		});
	}

	encode(jobs: readonly TextJob[]): Promise<EncodeReply> {
		if (this.#ended) return Promise.resolve(this.#ended);
		return new Promise((resolve) => {
			this.#waiting.push(resolve);
			this.#thread.postMessage(jobs);
		});
	}

	async close(): Promise<void> {
		await this.#thread.terminate();
	}
}
