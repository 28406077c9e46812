/**
 * How far a run has come: what it counts, and what its validations say. A value that is never changed in place: each step
 * and each validation makes the next one, and a checkpoint stores it as it is.
 */
import type { TrainOptions } from './options.js';
import type { LossSums } from './step.js';

/** How far a run has come. */
export interface Progress {
	/** Optimiser steps done. */
	readonly step: number;
	/** Steps that changed the weights, AdamW's own count: those that masked nothing left weights and moments as they were. */
	readonly updates: number;
	/** Tokens of all steps. */
	readonly totalTokens: number;
	/** Loss on the validation data at this step, nats per token, if it was evaluated. */
	readonly validationLoss: number | null;
	/** Validation loss that the next ones have to fall below, nats per token; null before the first. */
	readonly best: number | null;
	/** Validations since the best one. */
	readonly worse: number;
	/** Early stop has ended the run. */
	readonly stopped: boolean;
}

/** Progress before the first step. */
export const noProgress: Progress = {
	step: 0,
	updates: 0,
	totalTokens: 0,
	validationLoss: null,
	best: null,
	worse: 0,
	stopped: false,
};

/** Progress with one step more, not yet validated. @param sums of its micro-batches. */
export function afterStep(progress: Progress, sums: Pick<LossSums, 'masked' | 'tokens'>): Progress {
	const { step, updates, totalTokens } = progress;
	return {
		...progress,
		step: step + 1,
		updates: sums.masked > 0 ? updates + 1 : updates,
		totalTokens: totalTokens + sums.tokens,
		validationLoss: null,
	};
}

/**
 * Progress with the validation of its last step.
 * @param loss nats per token. A fall of no more than `earlyStop.minDelta` (default 0) leaves the best one as it was, so that a
 * slow fall still counts once it adds up.
 */
export function afterValidation(progress: Progress, loss: number, earlyStop: TrainOptions['earlyStop']): Progress {
	if (progress.best === null || loss < progress.best - (earlyStop?.minDelta ?? 0)) {
		return { ...progress, validationLoss: loss, best: loss, worse: 0 };
	}
	const worse = progress.worse + 1;
	return { ...progress, validationLoss: loss, worse, stopped: earlyStop !== undefined && worse >= earlyStop.patience };
}

/** The progress in a stored state, and nothing else of it. A run that early stop ended goes on when there is none any more. */
export function progressIn(state: Progress, earlyStop: TrainOptions['earlyStop']): Progress {
	const { step, updates, totalTokens, validationLoss, best, worse, stopped } = state;
	return { step, updates, totalTokens, validationLoss, best, worse, stopped: stopped && earlyStop !== undefined };
}
