/** Progress for people: a bar with loss, rate and time left on a terminal, plain lines elsewhere. */
import cliProgress from 'cli-progress';

import type { MetricLogger, TrainMetrics } from '../training/options.js';

/** Options of {@link ProgressLogger}. */
export interface ProgressOptions {
	/** Where it is shown. @default process.stderr */
	readonly stream?: NodeJS.WriteStream;
	/** Seconds between plain lines. @default 10 */
	readonly everySeconds?: number;
}

/** Shows a run. */
export class ProgressLogger implements MetricLogger {
	readonly #stream: NodeJS.WriteStream;
	readonly #everyMs: number;
	#bar: cliProgress.SingleBar | undefined;
	#maxSteps = 0;
	#first: { step: number; at: number } | undefined;
	#lastLine = Number.NEGATIVE_INFINITY;

	/** See {@link ProgressOptions}. */
	constructor(options: ProgressOptions = {}) {
		this.#stream = options.stream ?? process.stderr;
		this.#everyMs = (options.everySeconds ?? 10) * 1000;
	}

	/** Shows the bar, on a terminal. */
	start({ step, maxSteps }: { readonly step: number; readonly maxSteps: number }): void {
		this.#maxSteps = maxSteps;
		this.#first = { step, at: performance.now() };
		if (!this.#stream.isTTY) return;
		this.#bar = new cliProgress.SingleBar(
			{
				stream: this.#stream,
				format: '{bar} {value}/{total}  loss {loss}  {rate} tok/s  {left} left  {note}',
				barsize: 24,
				hideCursor: true,
				clearOnComplete: false,
			},
			cliProgress.Presets.shades_classic,
		);
		this.#bar.start(maxSteps, step, { loss: '-', rate: '-', left: '-', note: '' });
	}

	/** Moves the bar, or writes a line when one is due. */
	log(metrics: TrainMetrics): void {
		const left = duration(this.#secondsLeft(metrics.step));
		const loss = metrics.loss.toFixed(4);
		const rate = Math.round(metrics.tokensPerSecond).toLocaleString('en');
		const note = metrics.validation === undefined ? undefined : `validation ${metrics.validation.toFixed(4)}`;
		if (this.#bar) {
			this.#bar.update(metrics.step, { loss, rate, left, ...(note === undefined ? {} : { note }) });
			return;
		}
		const now = performance.now();
		const last = metrics.step === this.#maxSteps;
		if (!last && note === undefined && metrics.checkpoint === undefined && now - this.#lastLine < this.#everyMs) return;
		this.#lastLine = now;
		const parts = [`step ${metrics.step}/${this.#maxSteps}`, `loss ${loss}`, `${rate} tok/s`, `${left} left`];
		if (note !== undefined) parts.push(note);
		if (metrics.checkpoint !== undefined) parts.push(`saved ${metrics.checkpoint}`);
		this.#stream.write(`${parts.join('  ')}\n`);
	}

	/** Ends the bar. */
	close(): void {
		this.#bar?.stop();
		this.#bar = undefined;
	}

	#secondsLeft(step: number): number {
		if (!this.#first || step <= this.#first.step) return 0;
		const perStep = (performance.now() - this.#first.at) / 1000 / (step - this.#first.step);
		return perStep * (this.#maxSteps - step);
	}
}

/** "2h05m", "3m20s", "45s". */
function duration(seconds: number): string {
	const whole = Math.round(seconds);
	const pad = (value: number): string => String(value).padStart(2, '0');
	if (whole >= 3600) return `${Math.floor(whole / 3600)}h${pad(Math.floor((whole % 3600) / 60))}m`;
	return whole >= 60 ? `${Math.floor(whole / 60)}m${pad(whole % 60)}s` : `${whole}s`;
}
