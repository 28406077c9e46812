/** From the requests whose steps the device takes by itself to one packed native call, and back. */
import type { NativeLoop, NativeLoopLog } from './native-types.js';
import type { StepRecord, StepsRequest } from './requests.js';

/** Lays the canvases end to end. The call has as few steps as the request that wants the fewest. */
export function mergeSteps(requests: readonly StepsRequest[]): NativeLoop {
	const N = requests.reduce((sum, { tokens }) => sum + tokens.length, 0);
	const batch: NativeLoop = {
		ids: new Int32Array(N),
		open: new Uint8Array(N),
		offsets: new Int32Array(requests.length + 1),
		sequences: [],
		windows: Int32Array.from(
			requests.flatMap(({ windows }) => windows.flatMap(({ begin, end, steps }) => [begin, end, steps])),
		),
		steps: Math.min(...requests.map(({ steps }) => steps)),
	};
	let n = 0;
	let w = 0;
	for (const [s, request] of requests.entries()) {
		const { tokens, open, windows, sampler, steps: _, ...rest } = request;
		batch.ids.set(tokens, n);
		batch.open.set(open, n);
		n += tokens.length;
		batch.offsets[s + 1] = n;
		batch.sequences.push({ ...sampler, ...rest, windowBegin: w, windowEnd: w + windows.length });
		w += windows.length;
	}
	return batch;
}

/** The steps of sequence s of S that looked at something. */
export function stepsOf(log: NativeLoopLog, s: number, S: number): StepRecord[] {
	const { events } = log;
	const records: StepRecord[] = [];
	for (let e = 3 * s; e < events.length; e += 3 * S) {
		const [step, begin, end] = events.subarray(e, e + 3) as unknown as [number, number, number];
		if (begin === end) continue;
		records.push({
			step,
			positions: log.position.subarray(begin, end),
			committed: log.committed.subarray(begin, end),
			stats: {
				best: log.best.subarray(begin, end),
				drawn: log.drawn.subarray(begin, end),
				probability: log.probability.subarray(begin, end),
				margin: log.margin.subarray(begin, end),
				entropy: log.entropy.subarray(begin, end),
				drawnLogProb: log.drawnLogProb.subarray(begin, end),
				watched: new Float32Array(0),
			},
		});
	}
	return records;
}
