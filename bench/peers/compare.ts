/**
 * Runs the comparisons: every contender in a process of its own, turn by turn in one run, medians. Before anything is timed
 * each contender's results are held against ours in fp32: different work is not compared.
 */
import { mkdirSync } from 'node:fs';
import { setTimeout as pause } from 'node:timers/promises';

import { quantile } from '../harness.js';
import { shapes } from '../shapes.js';
import { temporaryFolder } from '../temporary.js';
import { ContenderProcess, type Job, type Timing } from './channel.js';
import { type Comparison, comparisons, type Opponent } from './comparisons.js';
import { allowedCores, commandOf } from './contenders.js';
import { type Engine, missing } from './installed.js';
import { type ModelFile, modelFiles } from './weights.js';

/** Times of one contender in one comparison. */
export interface Measured {
	version: string;
	ms: { median: number; p10: number; p90: number };
	tokensPerSecond: number;
	calls: number;
	/** Of its process so far; it may have done other jobs of the list before. */
	peakRssBytes: number;
	/** Largest difference from ours in fp32, relative to the size of the values. */
	difference: number;
	/** Only a part was run, and its time multiplied by this. */
	scaled?: number;
}

/** One row of the table. */
export interface ComparisonResult {
	name: string;
	shape: string;
	dtype: string;
	peer: { engine: string; dtype: string };
	/** A reason instead of figures: what is missing or went wrong. */
	ours: Measured | string;
	tuned: Measured | string;
	shipped: Measured | string;
	/** The peer's median over ours; null where one is missing. */
	ratio: { tuned: number | null; shipped: number | null };
	bar: { tuned: number; shipped?: number } | null;
	/** Null without a bar or without figures. */
	reached: boolean | null;
}

export interface CompareOptions {
	/** Parts of names; all when empty. */
	names: readonly string[];
	quick: boolean;
	/** Where the models are kept between runs. @default a temporary folder, removed at the end */
	folder: string | undefined;
	/** Rounds instead of each comparison's own. */
	rounds: number | undefined;
	onRow(row: ComparisonResult): void;
}

interface Seat {
	engine: Engine;
	tuned: boolean;
	dtype: string;
	file: ModelFile;
	job: Job;
}

/** Largest difference allowed, relative to the root mean square of the values: by how the weights are stored. */
const tolerances: Record<string, number> = { fp32: 2e-4, F16: 1e-2, BF16: 6e-2, bf16: 6e-2, Q8_0: 1e-1, int8: 2e-1 };

/** Largest difference of two lists over the root mean square of the first, and the root mean square difference. */
export function difference(
	expected: readonly number[],
	found: readonly number[],
): { largest: number; typical: number } {
	if (expected.length === 0 || expected.length !== found.length)
		throw new Error(`${found.length} values, expected ${expected.length}`);
	let squares = 0;
	let differences = 0;
	let largest = 0;
	for (const [i, value] of expected.entries()) {
		const d = Math.abs(value - (found[i] as number));
		squares += value * value;
		differences += d * d;
		// What is no number arrives as null, and is not a small difference.
		if (!Number.isFinite(found[i])) largest = Number.NaN;
		else if (d > largest) largest = d;
	}
	const size = Math.sqrt(squares / expected.length);
	return { largest: largest / size, typical: Math.sqrt(differences / expected.length) / size };
}

export async function compare(options: CompareOptions): Promise<ComparisonResult[]> {
	const temporary = options.folder === undefined ? temporaryFolder('diffusion-native-peers-') : undefined;
	const folder = temporary?.path ?? (options.folder as string);
	mkdirSync(folder, { recursive: true });
	const race = new Race(folder);
	try {
		const chosen = chosenComparisons(options);
		const results: ComparisonResult[] = [];
		for (const [i, comparison] of chosen.entries()) {
			await race.keepOnly(chosen.slice(i));
			const rows = await race.run(comparison);
			for (const row of rows) options.onRow(row);
			results.push(...rows);
		}
		return results;
	} finally {
		await race.keepOnly([]);
		temporary?.remove();
	}
}

/** 'forward/gpt2/T256/logits/fp32': what parts of names choose from. */
export function nameOf({ name, dtype }: Comparison): string {
	return `${name}/${dtype}`;
}

/** The comparisons and opponents of a run. */
export function chosenComparisons({
	names,
	quick,
	rounds,
}: Pick<CompareOptions, 'names' | 'quick' | 'rounds'>): Comparison[] {
	return comparisons
		.filter((comparison) => names.length === 0 || names.some((part) => nameOf(comparison).includes(part)))
		.filter(({ fullOnly }) => !(quick && fullOnly))
		.map((comparison) => ({
			...comparison,
			rounds: rounds ?? (quick ? Math.min(3, comparison.rounds) : comparison.rounds),
			opponents: comparison.opponents
				.filter(({ fullOnly }) => !(quick && fullOnly))
				.map((opponent) => (quick ? shortened(opponent) : opponent)),
		}));
}

function shortened(opponent: Opponent): Opponent {
	const { job } = opponent;
	return job?.kind === 'sample' ? { ...opponent, job: { ...job, measured: 4 } } : opponent;
}

function ourSeat({ dtype, job }: Comparison): Seat {
	return { engine: 'ours', tuned: false, dtype, file: 'checkpoint', job };
}

function seatsOf(comparison: Comparison): Seat[] {
	const peers = comparison.opponents.flatMap((opponent) =>
		[true, false].map((tuned) => ({ ...opponent, tuned, job: opponent.job ?? comparison.job })),
	);
	return [ourSeat(comparison), ...peers];
}

/** The contenders' processes: one per engine, settings and model, shared by the comparisons. */
class Race {
	readonly #folder: string;
	readonly #running = new Map<string, Promise<{ contender: ContenderProcess; version: string }>>();
	/** What ours computes in fp32, by job. */
	readonly #expected = new Map<string, number[]>();

	constructor(folder: string) {
		this.#folder = folder;
	}

	#key(comparison: Comparison, { engine, tuned, dtype, file }: Seat): string {
		// Training moves the weights: it gets a process of its own.
		const own = comparison.job.kind === 'train' ? comparison.name : '';
		return [engine, tuned, dtype, comparison.shape, file, own].join(' ');
	}

	#start(comparison: Comparison, seat: Seat): Promise<{ contender: ContenderProcess; version: string }> {
		const key = this.#key(comparison, seat);
		let running = this.#running.get(key);
		if (!running) {
			running = this.#open(comparison, seat);
			this.#running.set(key, running);
		}
		return running;
	}

	async #open(comparison: Comparison, seat: Seat) {
		const reason = missing(seat.engine);
		if (reason !== undefined) throw new Error(reason);
		const [path] = await modelFiles(this.#folder, comparison.shape, [seat.file]);
		const contender = new ContenderProcess(commandOf(seat.engine, seat.tuned, this.#folder));
		try {
			const cores = allowedCores();
			const { version } = await contender.open({
				path: path as string,
				dtype: seat.dtype,
				config: shapes[comparison.shape],
				tuned: seat.tuned,
				threads: cores.length,
				cores,
			});
			return { contender, version };
		} catch (error) {
			await contender.close();
			throw error;
		}
	}

	/** Ends the processes that none of `comparisons` needs. */
	async keepOnly(left: readonly Comparison[]): Promise<void> {
		const needed = new Set(
			left.flatMap((comparison) => seatsOf(comparison).map((seat) => this.#key(comparison, seat))),
		);
		const fp32 = left.map((comparison) => this.#key(comparison, { ...ourSeat(comparison), dtype: 'fp32' }));
		for (const key of fp32) needed.add(key);
		for (const [key, running] of this.#running) {
			if (needed.has(key)) continue;
			this.#running.delete(key);
			await running.then(({ contender }) => contender.close()).catch(() => undefined);
		}
	}

	/** What `seat` must agree with: ours in fp32. llama.cpp only tells the probabilities of a next token. */
	async #reference(comparison: Comparison, seat: Seat): Promise<number[]> {
		const length = seat.job.kind === 'decode' ? seat.job.prompt : 32;
		const job: Job = seat.engine === 'llama' ? { kind: 'decode', prompt: length, tokens: 4 } : seat.job;
		const key = JSON.stringify([comparison.shape, job.kind === 'sample' ? { ...job, measured: 0 } : job]);
		const known = this.#expected.get(key);
		if (known) return known;
		const { contender } = await this.#start(comparison, { ...ourSeat(comparison), dtype: 'fp32' });
		const values = await contender.prepare(job);
		this.#expected.set(key, values);
		return values;
	}

	/** Makes a contender ready for its job and checks its results. */
	async #prepare(comparison: Comparison, seat: Seat): Promise<Entrant> {
		const { contender, version } = await this.#start(comparison, seat);
		const isReference = seat.engine === 'ours' && seat.dtype === 'fp32';
		const expected = isReference ? undefined : await this.#reference(comparison, seat);
		const found = await contender.prepare(seat.job);
		const entrant = { seat, contender, version, difference: 0, timings: [], peakRssBytes: 0 };
		if (!expected) return entrant;
		const { largest, typical } = difference(expected, found);
		const allowed = tolerances[seat.dtype] as number;
		if (!(largest <= allowed))
			throw new Error(
				`does not compute the same: the largest difference is ${largest.toPrecision(2)} of the values' size (typical ` +
					`${typical.toPrecision(2)}), at most ${allowed} is allowed`,
			);
		if (seat.engine === 'ours' && largest === 0) throw new Error(`dtype '${seat.dtype}' gives the very bits of fp32`);
		return { ...entrant, difference: largest };
	}

	async run(comparison: Comparison): Promise<ComparisonResult[]> {
		const seats = seatsOf(comparison);
		const entrants = new Map<Seat, Entrant | string>();
		const attempt = async (seat: Seat, what: () => Promise<Entrant>): Promise<void> => {
			try {
				entrants.set(seat, await what());
			} catch (error) {
				entrants.set(seat, (error as Error).message);
			}
		};
		// Ours last: what the others are held against is computed in the same process.
		for (const seat of [...seats].reverse()) await attempt(seat, () => this.#prepare(comparison, seat));
		for (let round = 0; round < comparison.rounds; round++) {
			for (const seat of seats) {
				const entrant = entrants.get(seat);
				if (!entrant || typeof entrant === 'string') continue;
				// A moment for what the one before left running in the kernel.
				await pause(20);
				await attempt(seat, () => turn(entrant, comparison.calls));
			}
		}
		const figures = seats.map((seat) => summary(entrants.get(seat) ?? 'was not run', comparison.tokens));
		const [ours, ...others] = figures as [Measured | string, ...(Measured | string)[]];
		return comparison.opponents.map(({ engine, dtype, bar }, i) => {
			const tuned = others[2 * i] as Measured | string;
			const shipped = others[2 * i + 1] as Measured | string;
			const over = (peer: Measured | string): number | null =>
				typeof peer === 'string' || typeof ours === 'string' ? null : peer.ms.median / ours.ms.median;
			const ratio = { tuned: over(tuned), shipped: over(shipped) };
			const reached =
				!bar || ratio.tuned === null || (bar.shipped !== undefined && ratio.shipped === null)
					? null
					: ratio.tuned >= bar.tuned && (ratio.shipped ?? 0) >= (bar.shipped ?? 0);
			const { name, shape, dtype: our } = comparison;
			return {
				name,
				shape,
				dtype: our,
				peer: { engine, dtype },
				ours,
				tuned,
				shipped,
				ratio,
				bar: bar ?? null,
				reached,
			};
		});
	}
}

/** A contender that computes the right thing, and its times so far. */
interface Entrant {
	seat: Seat;
	contender: ContenderProcess;
	version: string;
	difference: number;
	timings: Timing[];
	peakRssBytes: number;
}

async function turn(entrant: Entrant, calls: number): Promise<Entrant> {
	const warm = calls > 1 ? 1 : 0;
	const { timings, peakRssBytes } = await entrant.contender.run(calls + warm);
	return { ...entrant, timings: [...entrant.timings, ...timings.slice(warm)], peakRssBytes };
}

function summary(entrant: Entrant | string, tokens: number): Measured | string {
	if (typeof entrant === 'string') return entrant;
	const { version, timings, peakRssBytes, difference: largest } = entrant;
	const times = timings.map(({ ms }) => ms).sort((a, b) => a - b);
	const median = quantile(times, 0.5);
	const scaled = timings[0]?.scaled;
	return {
		version,
		ms: { median, p10: quantile(times, 0.1), p90: quantile(times, 0.9) },
		tokensPerSecond: (tokens * 1000) / median,
		calls: times.length,
		peakRssBytes,
		difference: largest,
		...(scaled === undefined ? {} : { scaled }),
	};
}
