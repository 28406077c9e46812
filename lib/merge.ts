/** From the denoising requests that wait to one packed native batch, and from its results back to each of them. */
import { DiffusionNativeError } from './errors.js';
import type { NativeBatch, NativeDenoise, NativeStats } from './native-types.js';
import type { DenoiseRequest, RowStatistics } from './requests.js';

/** Where one request finds its results in those of the merged batch. */
interface Part {
	/** Its rows. */
	begin: number;
	end: number;
	/** Columns of `watched` that hold its watched ids. */
	columns: number[];
	/** First of its rows of logits, the twins' behind its own; -1: none were asked for. */
	logitsBegin: number;
	/** Whether the rows have twins. */
	guided: boolean;
	/** Whether the rows are compared with those of the step before. */
	compared: boolean;
}

/** Requests as one native call. */
export interface Merged {
	batch: NativeBatch;
	denoise: NativeDenoise;
	/** One per request. */
	parts: readonly Part[];
}

/** Rows of raw logits that a request asks for. */
export function logitRowsOf(request: DenoiseRequest): number {
	return request.logits ? request.row.length * (request.rowGuide ? 2 : 1) : 0;
}

/** Lays the sequences of all requests end to end. Runs once a step for every request: plain loops, few allocations. */
export function merge(requests: readonly DenoiseRequest[]): Merged {
	let N = 0;
	let S = 0;
	let D = 0;
	for (const request of requests) {
		N += request.sequences.length * request.positions.length;
		S += request.sequences.length;
		D += request.row.length;
	}
	const batch: NativeBatch & { rows: Int32Array | null } = {
		ids: new Int32Array(N),
		positions: new Int32Array(N),
		offsets: new Int32Array(S + 1),
		keyLengths: new Int32Array(S),
		caches: [],
		masks: [],
		rows: null,
	};
	const denoise: NativeDenoise = {
		row: new Int32Array(D),
		guideRow: new Int32Array(D).fill(-1),
		scales: new Float32Array(D * 3),
		limits: new Int32Array(D * 3),
		seeds: new BigUint64Array(D),
		counters: new Uint32Array(D * 2),
		watch: new Int32Array(0),
		logitRows: null,
		keep: null,
		before: [],
		ahead: null,
	};
	if (requests.some(({ history }) => history)) {
		denoise.keep = new Array<null>(D).fill(null);
		denoise.before = new Array<null>(D).fill(null);
	}
	// Packed row to its index among the listed ones, -1: not listed yet. Rows that several statistics share are listed once.
	const indexOf = new Int32Array(N).fill(-1);
	const rows = new Int32Array(2 * D);
	let listed = 0;
	const list = (packed: number): number => {
		if (indexOf[packed] === -1) {
			rows[listed] = packed;
			indexOf[packed] = listed++;
		}
		return indexOf[packed] as number;
	};
	const watch: number[] = [];
	const logitRows: number[] = [];
	const parts: Part[] = [];
	let n = 0;
	let s = 0;
	let d = 0;
	for (const request of requests) {
		const T = request.positions.length;
		const R = request.row.length;
		const base = n;
		for (const [j, ids] of request.sequences.entries()) {
			batch.ids.set(ids, n);
			batch.positions.set(request.positions, n);
			batch.keyLengths[s] = request.keyLength;
			batch.caches.push(request.caches?.[j] ?? null);
			batch.masks.push(request.mask);
			n += T;
			s++;
			batch.offsets[s] = n;
		}
		const begin = d;
		for (let r = 0; r < R; r++, d++) {
			const row = request.row[r] as number;
			// Outside its sequences lie the rows of other requests.
			if (row < 0 || row >= T) {
				throw new DiffusionNativeError('ERR_DN_INTERNAL', `row ${row} of a sequence of ${T} tokens was asked for`);
			}
			const sequence = request.rowSequence ? (request.rowSequence[r] as number) : 0;
			denoise.row[d] = list(base + sequence * T + row);
			denoise.scales[3 * d] = request.guidance;
			denoise.scales[3 * d + 1] = request.temperature;
			denoise.scales[3 * d + 2] = request.topP;
			denoise.limits[3 * d] = request.topK;
			denoise.limits[3 * d + 1] = request.banned;
			denoise.limits[3 * d + 2] = request.bannedEnd;
			denoise.seeds[d] = request.seed;
			denoise.counters[2 * d] = request.step;
			denoise.counters[2 * d + 1] = request.rowPosition[r] as number;
		}
		// Behind the request's own rows, not between them: the core attends at once for rows of a sequence that follow each other.
		for (let r = 0; request.rowGuide && r < R; r++) {
			denoise.guideRow[begin + r] = list(base + (request.rowGuide[r] as number) * T + (request.row[r] as number));
		}
		const { history } = request;
		for (const [r, row] of (history?.keep ?? []).entries()) {
			(denoise.keep as Float32Array[])[begin + r] = row;
			denoise.before[begin + r] = history?.before[r] ?? null;
		}
		const guided = request.rowGuide !== null;
		const logitsBegin = request.logits ? logitRows.length : -1;
		if (request.logits) {
			for (let r = begin; r < d; r++) logitRows.push(denoise.row[r] as number);
			for (let r = begin; guided && r < d; r++) logitRows.push(denoise.guideRow[r] as number);
		}
		const columns = Array.from(request.watch, (id) => {
			const known = watch.indexOf(id);
			return known >= 0 ? known : watch.push(id) - 1;
		});
		parts.push({ begin, end: d, columns, logitsBegin, guided, compared: request.history !== undefined });
	}
	batch.rows = rows.slice(0, listed);
	denoise.watch = Int32Array.from(watch);
	if (logitRows.length > 0) denoise.logitRows = Int32Array.from(logitRows);
	return { batch, denoise, parts };
}

/** What each request is told: views of the batch's arrays, which live for a step, cheaper than thousands of small copies. */
export function split(stats: NativeStats, { denoise, parts }: Merged, V: number): RowStatistics[] {
	const W = denoise.watch.length;
	const view = (begin: number, end: number, columns: Part['columns']): RowStatistics => ({
		best: stats.best.subarray(begin, end),
		drawn: stats.drawn.subarray(begin, end),
		probability: stats.probability.subarray(begin, end),
		margin: stats.margin.subarray(begin, end),
		entropy: stats.entropy.subarray(begin, end),
		drawnLogProb: stats.drawnLogProb.subarray(begin, end),
		watched: pickColumns(stats.watched, W, begin, end, columns),
	});
	return parts.map(({ begin, end, columns, logitsBegin, guided, compared }): RowStatistics => {
		const R = end - begin;
		const result = view(begin, end, columns);
		if (denoise.ahead) {
			result.following = Array.from({ length: stats.best.length - 1 }, (_, i) => view(i + 1, i + 2, columns));
		}
		if (compared) result.divergence = stats.divergence.subarray(begin, end);
		if (logitsBegin >= 0) {
			result.logits = stats.logits.subarray(logitsBegin * V, (logitsBegin + R) * V);
			if (guided) result.guideLogits = stats.logits.subarray((logitsBegin + R) * V, (logitsBegin + 2 * R) * V);
		}
		return result;
	});
}

/** (rows, columns) of a (D, W) matrix. */
function pickColumns(from: Float32Array, W: number, begin: number, end: number, columns: number[]): Float32Array {
	if (columns.length === W && columns.every((column, j) => column === j)) return from.subarray(begin * W, end * W);
	const picked = new Float32Array((end - begin) * columns.length);
	let next = 0;
	for (let r = begin; r < end; r++) {
		for (const column of columns) picked[next++] = from[r * W + column] as number;
	}
	return picked;
}
