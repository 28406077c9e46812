/** onnxruntime-node as a contender. */
import { type Contender, sample, serve } from './channel.js';
import { tokensOf } from './inputs.js';
import { importPeer, peerVersion } from './installed.js';

/** The part of onnxruntime-node that is used; its own types come with it only where it is installed. */
interface OnnxRuntime {
	InferenceSession: { create(path: string, options: object): Promise<Session> };
	Tensor: new (type: string, data: BigInt64Array | Float32Array, shape: number[]) => Tensor;
}
interface Tensor {
	readonly data: Float32Array;
}
interface Session {
	readonly outputNames: readonly string[];
	run(feeds: Record<string, Tensor>, fetches: Record<string, Tensor>): Promise<unknown>;
}

let runtime: OnnxRuntime;
let session: Session;
let vocab = 0;
let channels = 0;
let work: () => Promise<unknown> = async () => undefined;

const contender: Contender = {
	async open({ path, config, tuned, threads, cores }) {
		runtime = await importPeer<OnnxRuntime>('onnxruntime-node');
		({ vocab, channels } = config);
		// The calling thread is the first of them; the others are pinned one to a core, counted from 1.
		const affinities = cores.slice(1, threads).map((core) => core + 1);
		session = await runtime.InferenceSession.create(path, {
			executionProviders: ['cpu'],
			graphOptimizationLevel: 'all',
			executionMode: 'sequential',
			...(tuned
				? {
						intraOpNumThreads: threads,
						...(affinities.length > 0
							? { extra: { session: { intra_op_thread_affinities: affinities.join(';') } } }
							: {}),
					}
				: {}),
		});
		return { version: `onnxruntime-node ${peerVersion('onnxruntime-node')}` };
	},
	async prepare(job) {
		if (job.kind !== 'forward') throw new Error(`onnxruntime: no job '${job.kind}'`);
		const { T, output } = job;
		const columns = output === 'logits' ? vocab : channels;
		const ids = new runtime.Tensor('int64', BigInt64Array.from(tokensOf(vocab, T), BigInt), [1, T]);
		// The output is handed in, so that neither its allocation nor a copy of it is timed.
		const out = new runtime.Tensor('float32', new Float32Array(T * columns), [1, T, columns]);
		const fetches = { [session.outputNames[0] as string]: out };
		work = () => session.run({ ids }, fetches);
		await work();
		return sample(out.data, T, columns);
	},
	async run() {
		await work();
		return undefined;
	},
};

await serve(contender);
