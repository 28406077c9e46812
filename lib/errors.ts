/** Stable codes of {@link DiffusionNativeError}; switch on these, not on messages. */
export type ErrorCode =
	/** No compiled addon was found or could be loaded. */
	| 'ERR_DN_NO_BINARY'
	/** The requested device is not usable; the message says why. */
	| 'ERR_DN_DEVICE'
	/** Host or device memory ran out; the message says what was being allocated. */
	| 'ERR_DN_OUT_OF_MEMORY'
	/** A file of a model, dataset or training run is missing, malformed or cannot be written. */
	| 'ERR_DN_CHECKPOINT'
	/** An argument or option is invalid, or a record of the caller's data. */
	| 'ERR_DN_ARGUMENT'
	/** The object was used after `dispose()`. */
	| 'ERR_DN_DISPOSED'
	/**
	 * Taken just now: the queue of the model is full, the model has a trainer, that trainer is in a run or a step, or a
	 * parameter was read or set while the model computes. Await what is going on, or try again later.
	 */
	| 'ERR_DN_BUSY'
	/** A loss, gradient or logit is not a finite number: training diverged, or the weights are damaged. */
	| 'ERR_DN_DIVERGED'
	/** The hub could not be reached or refused the request. */
	| 'ERR_DN_HUB'
	/** A bug in this library. */
	| 'ERR_DN_INTERNAL';

/** The one error class of this package. `code` is stable; the message names the thing and what was expected. */
export class DiffusionNativeError extends Error {
	/** 'DiffusionNativeError'. */
	override readonly name = 'DiffusionNativeError';
	/** What went wrong; stable. */
	readonly code: ErrorCode;

	/** `options.cause`: the error behind this one. */
	constructor(code: ErrorCode, message: string, options?: { cause?: unknown }) {
		super(message, options);
		this.code = code;
	}
}

/** Throws `ERR_DN_ARGUMENT` with `message` unless `condition` holds; one that is costly to write is a function. */
export function check(condition: unknown, message: string | (() => string)): asserts condition {
	if (condition) return;
	throw new DiffusionNativeError('ERR_DN_ARGUMENT', typeof message === 'string' ? message : message());
}

const ofData = new WeakSet<Error>();

/** `ERR_DN_ARGUMENT` for what the caller's data hold. */
export function dataError(message: string, options?: { cause?: unknown }): DiffusionNativeError {
	const error = new DiffusionNativeError('ERR_DN_ARGUMENT', message, options);
	ofData.add(error);
	return error;
}

/** As `check`, of what the caller's data hold. */
export function checkData(condition: unknown, message: string | (() => string)): asserts condition {
	if (!condition) throw dataError(typeof message === 'string' ? message : message());
}

/** Whether an error is one of the data, which on the command line is a failure and no wrong usage. */
export function isDataError(error: Error): boolean {
	return ofData.has(error);
}

/** Of a figure that is no finite number; `what` names it and what it is. */
export function divergedError(what: string): DiffusionNativeError {
	return new DiffusionNativeError(
		'ERR_DN_DIVERGED',
		`${what}: look for a parameter that holds NaN or infinity (parameters(), getParameter) or weights so large that logits ` +
			'overflow, and go back to the last good checkpoint',
	);
}

const codes: ReadonlySet<string> = new Set<ErrorCode>([
	'ERR_DN_NO_BINARY',
	'ERR_DN_DEVICE',
	'ERR_DN_OUT_OF_MEMORY',
	'ERR_DN_CHECKPOINT',
	'ERR_DN_ARGUMENT',
	'ERR_DN_DISPOSED',
	'ERR_DN_BUSY',
	'ERR_DN_DIVERGED',
	'ERR_DN_HUB',
	'ERR_DN_INTERNAL',
]);

/** Turns an error of the addon (an `Error` with a `code` property) into a `DiffusionNativeError`; others pass unchanged. */
export function fromNative(error: unknown): unknown {
	if (error instanceof DiffusionNativeError || !(error instanceof Error)) return error;
	const { code } = error as { code?: unknown };
	if (typeof code !== 'string' || !codes.has(code)) return error;
	return new DiffusionNativeError(code as ErrorCode, error.message, { cause: error });
}
