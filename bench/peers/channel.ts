/**
 * How the benchmark talks to a contender, each in a process of its own with its own threads and settings: a line of JSON in,
 * a line of JSON out, the reply marked by '@' because engines print too, and by the number of its request, since one that was
 * given up may still be answered. A contender that is not being asked is stopped
 * (SIGSTOP), so that none spins or wakes beside another.
 */
import { type ChildProcessWithoutNullStreams, spawn } from 'node:child_process';
import { createInterface, type Interface } from 'node:readline';

import { exitOnSignals } from '../temporary.js';

/** What is computed; the tokens follow from `someTokens`. */
export type Job =
	| { kind: 'forward'; T: number; output: 'logits' | 'hidden' }
	/** One forward whose odd positions are masked, with statistics of the rows that predict them. */
	| { kind: 'denoise'; T: number }
	/** One optimiser step of a masked diffusion model whose odd positions are masked. */
	| { kind: 'train'; B: number; T: number }
	/** A whole generation; with `measured` only its first steps are run, and the time is scaled up. */
	| { kind: 'sample'; T: number; steps: number; topP: number; temperature: number; measured?: number }
	/** Greedy autoregressive decoding after a prompt. */
	| { kind: 'decode'; prompt: number; tokens: number };

export interface Opening {
	path: string;
	dtype: string;
	/** Of the model, where its file does not say it. */
	config: { layers: number; channels: number; heads: number; vocab: number; context: number; maskId: number };
	/** The peer's best settings. */
	tuned: boolean;
	threads: number;
	/** Cores this process may use, for a peer that pins threads itself. */
	cores: number[];
}

export interface Timing {
	ms: number;
	/** Factor that `ms` was multiplied by, when only a part was run. */
	scaled?: number;
}

/** The side of a contender. */
export interface Contender {
	open(opening: Opening): Promise<{ version: string }>;
	/** Builds the inputs, computes once, and returns values of the result that all contenders must agree on. */
	prepare(job: Job): Promise<number[]>;
	/** Computes once more; the caller keeps the time. */
	run(): Promise<{ scaled?: number } | undefined>;
}

type Request = { open: Opening } | { prepare: Job } | { run: number };
type Reply = { error: string } | { value: unknown };
type Numbered<Message> = Message & { id: number };

/** Runs in the contender's process: answers requests until the input ends. */
export async function serve(contender: Contender): Promise<void> {
	const answer = async (request: Request): Promise<unknown> => {
		if ('open' in request) return contender.open(request.open);
		if ('prepare' in request) return contender.prepare(request.prepare);
		const timings: Timing[] = [];
		for (let i = 0; i < request.run; i++) {
			const started = performance.now();
			const scaled = (await contender.run())?.scaled;
			const ms = performance.now() - started;
			timings.push(scaled === undefined ? { ms } : { ms: ms * scaled, scaled });
		}
		return { timings, peakRssBytes: process.resourceUsage().maxRSS * 1024 };
	};
	for await (const line of createInterface({ input: process.stdin })) {
		const { id, ...request } = JSON.parse(line) as Numbered<Request>;
		let reply: Reply;
		try {
			reply = { value: await answer(request) };
		} catch (error) {
			reply = { error: error instanceof Error ? error.message : String(error) };
		}
		process.stdout.write(`@${JSON.stringify({ id, ...reply })}\n`);
	}
	process.exit(0);
}

export interface Command {
	command: string;
	args: string[];
	env: Record<string, string>;
}

/** Processes to end with this one: a stopped one would not notice. */
const alive = new Set<ChildProcessWithoutNullStreams>();
const endAll = (): void => {
	for (const child of alive) child.kill('SIGKILL');
};
let watching = false;
function watch(): void {
	if (watching) return;
	watching = true;
	process.once('exit', endAll);
	exitOnSignals();
}

/** The benchmark's side: a contender's process, stopped between requests. */
export class ContenderProcess {
	readonly #child: ChildProcessWithoutNullStreams;
	readonly #lines: Interface;
	#noise = '';
	#ended: string | undefined;
	#waiting: ((reply: Reply) => void) | undefined;
	/** Of the newest request. */
	#id = 0;
	#ready: { key: string; values: number[] } | undefined;

	constructor({ command, args, env }: Command) {
		this.#child = spawn(command, args, { env: { ...process.env, ...env }, stdio: 'pipe' });
		watch();
		alive.add(this.#child);
		this.#child.stderr.on('data', (data) => {
			this.#noise = `${this.#noise}${data}`.slice(-2000);
		});
		this.#child.stdin.on('error', () => undefined);
		const end = (reason: string): void => {
			alive.delete(this.#child);
			const last = this.#noise.trim().split('\n').slice(-3).join(' | ');
			this.#ended = last === '' ? reason : `${reason}: ${last}`;
			this.#waiting?.({ error: this.#ended });
		};
		this.#child.on('error', (error) => end(error.message));
		this.#child.on('exit', (code, signal) => end(`the process ended (${signal ?? code})`));
		this.#lines = createInterface({ input: this.#child.stdout });
		this.#lines.on('line', (line) => {
			if (!line.startsWith('@')) return;
			const reply = JSON.parse(line.slice(1)) as Numbered<Reply>;
			if (reply.id === this.#id) this.#waiting?.(reply);
		});
	}

	async #ask<T>(request: Request, seconds: number): Promise<T> {
		if (this.#ended !== undefined) throw new Error(this.#ended);
		const numbered: Numbered<Request> = { id: ++this.#id, ...request };
		const reply = await new Promise<Reply>((resolve) => {
			const timer = setTimeout(() => resolve({ error: `no answer in ${seconds} s` }), seconds * 1000);
			this.#waiting = (given) => {
				clearTimeout(timer);
				resolve(given);
			};
			this.#child.kill('SIGCONT');
			this.#child.stdin.write(`${JSON.stringify(numbered)}\n`);
		});
		this.#waiting = undefined;
		this.#child.kill('SIGSTOP');
		if ('error' in reply) throw new Error(reply.error);
		return reply.value as T;
	}

	open(opening: Opening): Promise<{ version: string }> {
		return this.#ask({ open: opening }, 300);
	}

	/** Nothing is done for the job that it is ready for already: training would go on from moved weights. */
	async prepare(job: Job): Promise<number[]> {
		const key = JSON.stringify(job);
		if (this.#ready?.key !== key) {
			this.#ready = undefined;
			this.#ready = { key, values: await this.#ask({ prepare: job }, 600) };
		}
		return this.#ready.values;
	}

	/** Runs `count` times in a row; all timings. */
	run(count: number): Promise<{ timings: Timing[]; peakRssBytes: number }> {
		return this.#ask({ run: count }, 600);
	}

	async close(): Promise<void> {
		if (this.#ended !== undefined) return;
		const gone = new Promise((resolve) => this.#child.once('exit', resolve));
		this.#child.kill('SIGKILL');
		await gone;
	}
}

/** 256 entries of a (rows, columns) result: four rows, 64 columns each. */
export function sample(values: ArrayLike<number>, rows: number, columns: number): number[] {
	const picked = [0, 1, rows >> 1, rows - 1];
	return picked.flatMap((row) =>
		Array.from({ length: 64 }, (_, k) => values[row * columns + ((k * 997) % columns)] as number),
	);
}
