/**
 * llama.cpp, through node-llama-cpp, as a contender. Its attention is causal, where a diffusion model's is not: a forward is the
 * same work outside attention and half of it inside. Without the head means the logits of the last position only, where it
 * also leaves out the last block's feed-forward part for the other positions.
 */
import { type Contender, serve } from './channel.js';
import { tokensOf } from './inputs.js';
import { importPeer, peerVersion } from './installed.js';

/** The part of node-llama-cpp that is used; its own types come with it only where it is installed. */
interface NodeLlamaCpp {
	getLlama(options: object): Promise<{ loadModel(options: object): Promise<LlamaModel> }>;
}
interface LlamaModel {
	createContext(options: object): Promise<Context>;
}
interface Context {
	getSequence(): Sequence;
	/** The addon's own context: the public one samples at every position whose logits are asked for. */
	readonly _ctx: {
		disposeSequence(id: number): void;
		initBatch(size: number): void;
		addToBatch(sequence: number, first: number, tokens: Uint32Array, logits: Uint32Array): void;
		decodeBatch(): Promise<void>;
	};
}
interface Sequence {
	clearHistory(): Promise<void>;
	evaluate(tokens: number[], options: object): AsyncIterable<number>;
	controlledEvaluate(input: unknown[]): Promise<({ next: { probabilities?: Map<number, number> } } | undefined)[]>;
}

let context: Context;
let sequence: Sequence | undefined;
let vocab = 0;
let work: () => Promise<unknown> = async () => undefined;

/** Logits of the token after `prompt`, at the 64 columns of a sample and less their mean, by way of its probabilities. */
async function nextToken(prompt: number): Promise<number[]> {
	sequence ??= context.getSequence();
	await sequence.clearHistory();
	// What `work` of another job left there, which the sequence does not know of.
	context._ctx.disposeSequence(0);
	const tokens = Array.from(tokensOf(vocab, prompt));
	const last = tokens.pop() as number;
	const whole = { temperature: 1, topK: 0, topP: 1, minP: 0 };
	const answers = await sequence.controlledEvaluate([
		...tokens,
		[last, { generateNext: { probabilities: true, options: whole } }],
	]);
	const probabilities = answers.at(-1)?.next.probabilities;
	const picked = Array.from({ length: 64 }, (_, k) => Math.log(probabilities?.get((k * 997) % vocab) ?? Number.NaN));
	const mean = picked.reduce((sum, value) => sum + value) / picked.length;
	await sequence.clearHistory();
	return picked.map((value) => value - mean);
}

const contender: Contender = {
	async open({ path, config, threads }) {
		const { getLlama } = await importPeer<NodeLlamaCpp>('node-llama-cpp');
		vocab = config.vocab;
		const llama = await getLlama({ gpu: false, build: 'never', maxThreads: threads, logLevel: 'error' });
		const model = await llama.loadModel({ modelPath: path });
		const size = config.context;
		const options = { contextSize: size, batchSize: size, threads, sequences: 1, flashAttention: 'auto' };
		context = await model.createContext(options);
		return { version: `node-llama-cpp ${peerVersion('node-llama-cpp')}` };
	},
	async prepare(job) {
		if (job.kind === 'decode') {
			const values = await nextToken(job.prompt);
			const prompt = Array.from(tokensOf(vocab, job.prompt));
			const generate = async (count: number): Promise<void> => {
				await sequence?.clearHistory();
				let done = 0;
				for await (const _ of sequence?.evaluate(prompt, { temperature: 0, yieldEogToken: true }) ?? [])
					if (++done >= count) break;
				if (done < count) throw new Error(`llama.cpp ended after ${done} of ${count} tokens`);
			};
			work = () => generate(job.tokens);
			return values;
		}
		if (job.kind !== 'forward') throw new Error(`llama.cpp: no job '${job.kind}'`);
		const { T, output } = job;
		const values = await nextToken(32);
		const tokens = Uint32Array.from(tokensOf(vocab, T));
		const logits = output === 'logits' ? Uint32Array.from({ length: T }, (_, i) => i) : Uint32Array.of(T - 1);
		work = async () => {
			context._ctx.disposeSequence(0);
			context._ctx.initBatch(T);
			context._ctx.addToBatch(0, 0, tokens, logits);
			await context._ctx.decodeBatch();
		};
		await work();
		return values;
	},
	async run() {
		await work();
		return undefined;
	},
};

await serve(contender);
