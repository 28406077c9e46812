/** A worker thread of lib/data/encode.ts: builds the tokenizer once, then answers batches of texts with their ids. */
import { parentPort, workerData } from 'node:worker_threads';

import { DiffusionNativeError } from '../errors.js';
import { reasonOf } from '../files.js';
import { Tokenizer } from '../tokenizer.js';
import { type EncodeReply, encodeText, type TextJob } from './encode.js';
import { concatenate } from './pack.js';

const tokenizer = Tokenizer.fromString(workerData as string);

function encode(jobs: readonly TextJob[]): EncodeReply {
	try {
		const encoded = jobs.map((job) => encodeText(job, tokenizer));
		return {
			ids: concatenate(encoded.map(({ tokens }) => tokens)),
			lengths: Int32Array.from(encoded, ({ tokens }) => tokens.length),
			prompts: Int32Array.from(encoded, ({ promptLength }) => promptLength),
		};
	} catch (error) {
		return { code: error instanceof DiffusionNativeError ? error.code : 'ERR_DN_INTERNAL', message: reasonOf(error) };
	}
}

parentPort?.on('message', (jobs: readonly TextJob[]) => {
	const reply = encode(jobs);
	const sent = 'code' in reply ? [] : [reply.ids, reply.lengths, reply.prompts];
	parentPort?.postMessage(
		reply,
		sent.map(({ buffer }) => buffer as ArrayBuffer),
	);
});
