/**
 * Training as its callers see it: runs, single steps, evaluations and checkpoints of one model. Its parts are in lib/training:
 * hold.ts (one trainer per model, one call at a time), step.ts (an optimiser step), order.ts (its data), noise.ts (its masks),
 * progress.ts (how far the run is), checkpoint.ts (the files). Every random number is a function of the seed and the step, so
 * a run that continues from a checkpoint is the run that was never interrupted, bit for bit on the CPU.
 */
import { join } from 'node:path';

import type { DiffusionBatch } from './batch.js';
import { TokenDataset } from './data/dataset.js';
import type { Device, DType } from './device.js';
import { check, DiffusionNativeError } from './errors.js';
import type { LoadProgress } from './hub.js';
import { forgetLengths } from './length/extras.js';
import { JsonlLogger } from './loggers/jsonl.js';
import { DiffuGPT } from './model.js';
import type { NativeNoise } from './native-types.js';
import { checkOptions } from './option-checks.js';
import {
	checkpointName,
	findCheckpoint,
	prepareRunDirectory,
	prune,
	type RunState,
	readMoments,
	withMomentsToCome,
	writeCheckpoint,
} from './training/checkpoint.js';
import { Hold } from './training/hold.js';
import { noiseAt, runNoise } from './training/noise.js';
import {
	type MetricLogger,
	type ResolvedTrainOptions,
	resolveTrainOptions,
	type TrainMetrics,
	type TrainOptions,
	trainOptionNames,
} from './training/options.js';
import { type DataOrder, type DataPosition, dataBeginning, orderAt } from './training/order.js';
import { afterStep, afterValidation, noProgress, progressIn } from './training/progress.js';
import { scheduleAt } from './training/schedules.js';
import { accumulate, gradientNorm, type LossSums, lossOf, packStep, scaleOf, update } from './training/step.js';
import { isSame, reference, reopen, reviveOptions, storeRun } from './training/stored-run.js';
import { validate } from './training/validation.js';

/** Overrides of a resumed run, and where its model runs. */
export interface ResumeOptions extends TrainOptions {
	/** @default 'auto' */
	readonly device?: Device;
	/** 'bf16' or, slow and for comparing devices, 'fp32' on CUDA; 'fp32' on the CPU. @default 'auto' */
	readonly dtype?: DType;
	/** CPU threads. @default all cores */
	readonly threads?: number;
	/** Told about loading: bytes of weights and moments. @default none */
	readonly onProgress?: (progress: LoadProgress) => void;
	/** Of loading: aborting rejects with `signal.reason`. @default none */
	readonly signal?: AbortSignal;
}

/** Options of the calls of a trainer that compute. */
export interface StepOptions {
	/** Aborting rejects with `signal.reason`. @default none */
	readonly signal?: AbortSignal;
}

/**
 * Trains a model. Made with `new Trainer(model, options)` or `Trainer.resume(dir)`.
 * A model has at most one trainer at a time; `dispose` frees gradients and moments and lets go of the model;
 * what computes or saves fails with `ERR_DN_DISPOSED` from then on, a step that is going on at its next native call.
 */
export class Trainer implements AsyncDisposable {
	/** What is trained. */
	readonly model: DiffuGPT;
	readonly #options: ResolvedTrainOptions;
	readonly #hold: Hold;
	readonly #noise: NativeNoise;
	readonly #loggers: readonly MetricLogger[];
	#order: DataOrder | undefined;
	#progress = noProgress;
	#running = false;

	/**
	 * @throws `ERR_DN_ARGUMENT` naming the option; `ERR_DN_BUSY` when the model already has a trainer, or one that is disposed
	 * of but not yet done with a step.
	 */
	constructor(model: DiffuGPT, options: TrainOptions) {
		check(model instanceof DiffuGPT, 'a Trainer needs a DiffuGPT as its first argument');
		model.engine.check();
		check(
			model.dtype === 'fp32' || model.device !== 'cpu',
			`a model of dtype '${model.dtype}' cannot be trained on the CPU: load it with dtype 'fp32', which widens its weights`,
		);
		this.model = model;
		this.#options = resolveTrainOptions(options, model.config);
		const { data, validation, checkpoint } = this.#options;
		for (const set of [data, validation]) if (set && model.tokenizer) set.checkTokenizer(model.tokenizer);
		this.#noise = runNoise(this.#options, model.config);
		this.#order = orderAt(dataBeginning, this.#options, model.config);
		this.#hold = new Hold(model.engine);
		this.#loggers = checkpoint
			? [new JsonlLogger(join(checkpoint.dir, 'metrics.jsonl')), ...this.#options.loggers]
			: this.#options.loggers;
	}

	/**
	 * Continues a run from a checkpoint, or from the newest valid checkpoint in the folder of a run. Options come from the
	 * checkpoint; `overrides` replace them. The data files are opened again where they were; another data set in
	 * `overrides` starts from its beginning. Loggers and learning rate functions are not stored: pass them again.
	 * @throws `ERR_DN_CHECKPOINT` when nothing can be loaded, saying why; `ERR_DN_ARGUMENT` naming the option; `ERR_DN_DEVICE`;
	 * `ERR_DN_OUT_OF_MEMORY`; `signal.reason`
	 */
	static async resume(dir: string, overrides: ResumeOptions = {}): Promise<Trainer> {
		check(typeof dir === 'string' && dir !== '', 'Trainer.resume needs the path of a checkpoint or run folder');
		checkOptions('Trainer.resume', overrides, [
			...trainOptionNames,
			'device',
			'dtype',
			'threads',
			'onProgress',
			'signal',
		]);
		const { device, dtype, threads, onProgress, signal, ...rest } = overrides;
		check(
			dtype !== 'int8' && (dtype !== 'bf16' || device !== 'cpu'),
			`option dtype is '${dtype}', expected 'fp32' to train on the CPU`,
		);
		const { directory, state } = findCheckpoint(dir);
		// An option that is undefined is one that was not given.
		const own: TrainOptions = Object.fromEntries(Object.entries(rest).filter(([, value]) => value !== undefined));
		const stored = reviveOptions(state, directory, own);
		const data = own.data ?? (state.data ? await reopen(state.data) : undefined);
		const validation = own.validation ?? (state.validation ? await reopen(state.validation) : undefined);
		const model = await DiffuGPT.fromPretrained(directory, {
			...(device === undefined ? {} : { device }),
			...(dtype === undefined ? {} : { dtype }),
			...(threads === undefined ? {} : { threads }),
			...(onProgress === undefined ? {} : { onProgress: withMomentsToCome(onProgress) }),
			...(signal === undefined ? {} : { signal }),
		});
		try {
			signal?.throwIfAborted();
			const trainer = new Trainer(model, {
				...stored,
				...own,
				...(data ? { data } : {}),
				...(validation ? { validation } : {}),
			});
			await trainer.#hold.alone(() => readMoments(directory, model.engine, onProgress, signal));
			trainer.#restore(state);
			return trainer;
		} catch (error) {
			await model.dispose();
			throw error;
		}
	}

	/** Optimiser steps done. */
	get steps(): number {
		return this.#progress.step;
	}

	/** Options with their defaults. */
	get options(): Readonly<ResolvedTrainOptions> {
		return this.#options;
	}

	/**
	 * Trains until `maxSteps`, early stop, or the end of the loop around it; metrics of each step. Leaving the loop ends the
	 * run after the current step; another `run` goes on from there. An abort during a validation leaves the step done and
	 * its validation out.
	 * @throws `signal.reason` when aborted; `ERR_DN_ARGUMENT` without `data` or `maxSteps`; `ERR_DN_BUSY` while another `run` or
	 * step of this trainer is not over; `ERR_DN_DIVERGED` naming step and batch, with the weights as they were before that step,
	 * or for a validation loss; `ERR_DN_CHECKPOINT` when a checkpoint cannot be written (earlier ones stay);
	 * `ERR_DN_OUT_OF_MEMORY`.
	 */
	async *run(options: { readonly signal?: AbortSignal } = {}): AsyncGenerator<TrainMetrics, void, void> {
		checkOptions('run', options, ['signal']);
		const { signal } = options;
		const { maxSteps, evalEvery, earlyStop, validation, checkpoint, accumulate: microBatches } = this.#options;
		const order = this.#order;
		check(order, 'run needs the option data');
		check(maxSteps !== undefined, 'run needs the option maxSteps');
		if (this.#running) {
			throw new DiffusionNativeError('ERR_DN_BUSY', 'this trainer is running: end that run before another');
		}
		this.#running = true;
		try {
			if (checkpoint) await prepareRunDirectory(checkpoint.dir, this.steps);
			for (const logger of this.#loggers) await logger.start?.({ step: this.steps, maxSteps });
			while (this.steps < maxSteps && !this.#progress.stopped) {
				signal?.throwIfAborted();
				const before = order.position;
				let metrics: TrainMetrics;
				try {
					const batches = Array.from({ length: microBatches }, () => order.next());
					metrics = await this.#advance(batches, signal, `epoch ${before.epoch}, sequences from ${before.index}`);
				} catch (error) {
					this.#order = orderAt(before, this.#options, this.model.config);
					throw error;
				}
				const last = this.steps === maxSteps;
				let failure: { reason: unknown } | undefined;
				if (validation && (last || (evalEvery !== undefined && this.steps % evalEvery === 0))) {
					try {
						const { loss, unweighted } = await this.#hold.alone(() => this.#validate(validation, signal));
						this.#progress = afterValidation(this.#progress, loss, earlyStop);
						metrics = { ...metrics, validation: loss, validationUnweighted: unweighted };
					} catch (reason) {
						failure = { reason };
					}
				}
				// A step whose validation is aborted stands, with its checkpoint; one whose validation fails has its metrics only.
				const stands = !failure || signal?.aborted === true;
				const due =
					last || this.#progress.stopped || (checkpoint?.every !== undefined && this.steps % checkpoint.every === 0);
				if (checkpoint && due && stands) {
					try {
						metrics = { ...metrics, checkpoint: await this.checkpoint() };
					} catch (reason) {
						failure = { reason };
					}
				}
				for (const logger of this.#loggers) await logger.log(metrics);
				if (failure) throw failure.reason;
				yield metrics;
			}
		} finally {
			try {
				await this.#closeLoggers();
			} finally {
				this.#running = false;
			}
		}
	}

	/**
	 * One optimiser step on a given batch, whatever `data` is; `mask` and `t` may be given.
	 * @throws `ERR_DN_ARGUMENT` naming what is wrong with the batch; `ERR_DN_BUSY` while another step is not over;
	 * `ERR_DN_DIVERGED` when the loss or the gradient is not finite; `ERR_DN_OUT_OF_MEMORY`; `signal.reason`. Nothing is updated
	 * then.
	 */
	async step(batch: DiffusionBatch, options: StepOptions = {}): Promise<TrainMetrics> {
		checkOptions('step', options, ['signal']);
		return this.#advance([batch], options.signal, 'the given batch');
	}

	/**
	 * Gradients of the normalised loss on a batch, before clipping, by parameter name. Nothing is updated.
	 * @throws `ERR_DN_ARGUMENT` naming what is wrong with the batch; `ERR_DN_BUSY` while another step is not over;
	 * `ERR_DN_OUT_OF_MEMORY`; `signal.reason`
	 */
	async gradients(batch: DiffusionBatch, options: StepOptions = {}): Promise<Map<string, Float32Array>> {
		checkOptions('gradients', options, ['signal']);
		return this.#hold.alone(async () => {
			const sums = await this.#accumulate([batch], options.signal);
			const scale = scaleOf(sums);
			return this.#hold.run((native) => {
				const gradients = new Map<string, Float32Array>();
				for (const { name } of native.parameters) {
					const values = native.getGradient(name);
					for (let i = 0; i < values.length; i++) values[i] = (values[i] as number) * scale;
					gradients.set(name, values);
				}
				return gradients;
			});
		});
	}

	/**
	 * Loss on a data set as `run` evaluates it: the NELBO per token and the mean cross-entropy of masked tokens, nats.
	 * @throws `ERR_DN_ARGUMENT` for data of another tokenizer; `ERR_DN_BUSY` while a step is not over; `ERR_DN_DIVERGED` when the
	 * loss is not finite; `ERR_DN_OUT_OF_MEMORY`; `signal.reason`
	 */
	async evaluate(data: TokenDataset, options: StepOptions = {}): Promise<{ loss: number; unweighted: number }> {
		checkOptions('evaluate', options, ['signal']);
		check(data instanceof TokenDataset, 'evaluate needs a TokenDataset');
		if (this.model.tokenizer) data.checkTokenizer(this.model.tokenizer);
		return this.#hold.alone(() => this.#validate(data, options.signal));
	}

	/** Writes a checkpoint into `dir`, replacing what is there. @throws `ERR_DN_CHECKPOINT`; `ERR_DN_BUSY` while a step is not over */
	async save(dir: string): Promise<void> {
		check(typeof dir === 'string' && dir !== '', 'save needs the path of a directory');
		await this.#hold.alone(() =>
			writeCheckpoint(
				dir,
				this.model.engine,
				(directory) => this.model.save(directory),
				storeRun(this.#options, this.#progress, this.#position),
			),
		);
	}

	/**
	 * Writes the next checkpoint into the folder of the run and removes those not to be kept; its path.
	 * @throws `ERR_DN_CHECKPOINT`; `ERR_DN_ARGUMENT` without the option `checkpoint`; `ERR_DN_BUSY` while a step is not over
	 */
	async checkpoint(): Promise<string> {
		const { checkpoint, validation } = this.#options;
		check(checkpoint, 'checkpoint needs the option checkpoint: { dir }');
		await prepareRunDirectory(checkpoint.dir, this.steps);
		const target = join(checkpoint.dir, checkpointName(this.steps));
		await this.save(target);
		await prune(checkpoint.dir, checkpoint.keep ?? 2, checkpoint.keepBest ?? (validation ? 1 : 0));
		return target;
	}

	/**
	 * Waits for the native call of a step that is going on, which then fails with `ERR_DN_DISPOSED` unless that call was its
	 * last, or for a `save` to end; frees gradients and moments. The model stays usable. Idempotent.
	 */
	dispose(): Promise<void> {
		return this.#hold.release();
	}

	/** `dispose`, for `await using`. */
	[Symbol.asyncDispose](): Promise<void> {
		return this.dispose();
	}

	/** Closes all of them, whichever fails. */
	async #closeLoggers(): Promise<void> {
		const closed = await Promise.allSettled(this.#loggers.map(async (logger) => logger.close?.()));
		for (const outcome of closed) if (outcome.status === 'rejected') throw outcome.reason;
	}

	/** Gradients of the next step on its micro-batches, not yet normalised, and the sums of its loss. */
	#accumulate(batches: readonly DiffusionBatch[], signal: AbortSignal | undefined): Promise<LossSums> {
		const { recompute, precision } = this.#options;
		return accumulate(
			this.#hold,
			packStep(batches, this.model.config),
			noiseAt(this.#noise, this.#options, this.steps),
			{ recompute, precision, backward: true },
			signal,
		);
	}

	async #advance(
		batches: readonly DiffusionBatch[],
		signal: AbortSignal | undefined,
		what: string,
	): Promise<TrainMetrics> {
		return this.#hold.alone(async () => {
			const hold = this.#hold;
			const { learningRate: schedule, maxSteps, betas: configured, eps, weightDecay, gradClip, data } = this.#options;
			const begun = performance.now();
			const { step, updates } = this.#progress;
			const { learningRate, beta1 } = scheduleAt(schedule, step, maxSteps ?? Number.POSITIVE_INFINITY);
			const sums = await this.#accumulate(batches, signal);
			const gradNorm = await gradientNorm(hold, sums, signal);
			const { loss, unweighted } = lossOf(sums);
			if (!Number.isFinite(loss) || !Number.isFinite(gradNorm)) {
				throw new DiffusionNativeError(
					'ERR_DN_DIVERGED',
					`training diverged at step ${step + 1} (${what}): the loss is ${loss}, the gradient norm ${gradNorm}; the weights ` +
						'are those before this step. Try a lower learning rate, a longer warm-up, gradClip, more sequences per step, ' +
						"or precision 'fp32', from the last checkpoint",
				);
			}
			// Nothing masked: nothing to learn, and no reason to let decay and old moments move the weights.
			if (sums.masked > 0) {
				const betas = [beta1 ?? configured[0], configured[1]] as const;
				await update(hold, sums, gradNorm, { learningRate, betas, eps, weightDecay, gradClip, step: updates + 1 });
				forgetLengths(this.model.engine);
			}
			this.#progress = afterStep(this.#progress, sums);
			const ms = performance.now() - begun;
			const { epoch, index } = this.#position;
			return {
				step: this.steps,
				loss,
				unweighted,
				learningRate,
				gradNorm,
				tokensPerSecond: (1000 * sums.tokens) / ms,
				tokens: sums.tokens,
				totalTokens: this.#progress.totalTokens,
				epoch: epoch + (data ? index / data.sequences : 0),
				ms,
			};
		});
	}

	#validate(data: TokenDataset, signal: AbortSignal | undefined): Promise<{ loss: number; unweighted: number }> {
		return validate(this.#hold, this.model.config, data, this.#options, signal);
	}

	get #position(): DataPosition {
		return this.#order?.position ?? dataBeginning;
	}

	#restore(state: RunState): void {
		const { data, earlyStop } = this.#options;
		this.#progress = progressIn(state, earlyStop);
		if (data && state.data && isSame(reference(data), state.data)) {
			this.#order = orderAt(state.position, this.#options, this.model.config);
		}
	}
}
