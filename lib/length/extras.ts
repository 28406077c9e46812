/**
 * What a model has besides its weights for choosing lengths: trained heads and calibrations. Kept beside the engine, so
 * that every way to a generation finds it; saved and loaded with the model.
 */
import type { Engine } from '../engine.js';
import type { LengthHead } from './head.js';
import type { HeadKind, LengthMethod, LengthOptions } from './method.js';

/** A fitted safety margin; see `calibrateLength`. */
export interface LengthCalibration {
	/** The method it is of. */
	readonly method: LengthMethod;
	/** Canvas it was fitted on: it holds for this `max` only. */
	readonly max: number;
	/**
	 * What a margin is: 'level', the method's own knob (a probability, a quantile, -log of the survival product);
	 * 'additive', tokens added; 'multiplicative', a factor of length + 1.
	 */
	readonly form: 'level' | 'additive' | 'multiplicative';
	/** Options of the method that it was fitted with. */
	readonly settings: {
		readonly head?: HeadKind;
		readonly initial?: number;
		readonly grow?: number;
		readonly window?: number;
		readonly low?: number;
		readonly high?: number;
		readonly form?: 'multiplicative';
	};
	/** Held-out pairs it was fitted on. */
	readonly pairs: number;
	/**
	 * Prompts are told apart by how sharply the end probabilities rise (`spreadOfEnds`): a spread of at most `edges[0]` is
	 * group 0, and so on. None: one group.
	 */
	readonly edges: readonly number[];
	/** One margin per group; null: too few pairs for that coverage, the canvas stays whole. */
	readonly levels: readonly { readonly coverage: number; readonly margins: readonly (number | null)[] }[];
}

export interface LengthExtras {
	head: LengthHead | undefined;
	calibrations: LengthCalibration[];
}

const extras = new WeakMap<Engine, LengthExtras>();

/** Options of a method that a margin depends on, as a calibration holds them. */
export function calibrationSettings(
	method: LengthMethod,
	options: Omit<LengthOptions, 'max' | 'coverage'>,
): LengthCalibration['settings'] {
	if (method === 'head') return { head: options.head ?? 'token' };
	const settings: Record<string, unknown> = {};
	for (const key of ['initial', 'grow', 'window', 'low', 'high'] as const) {
		if (method === 'daedal' && options[key] !== undefined) settings[key] = options[key];
	}
	return settings;
}

/** Whether margins were fitted for the method with these very options. */
export function isCalibrationOf(
	{ method, max, settings }: LengthCalibration,
	wanted: LengthMethod,
	options: Omit<LengthOptions, 'max' | 'coverage'>,
	size: number,
): boolean {
	if (method !== wanted || max !== size) return false;
	const own = calibrationSettings(wanted, options);
	return (['head', 'initial', 'grow', 'window', 'low', 'high'] as const).every((key) => settings[key] === own[key]);
}

/** Adds a calibration; it replaces an earlier one of the same method, head and `max`. */
export function storeCalibration(extras: LengthExtras, fitted: LengthCalibration): void {
	extras.calibrations = [
		...extras.calibrations.filter(
			(entry) =>
				entry.method !== fitted.method || entry.max !== fitted.max || entry.settings.head !== fitted.settings.head,
		),
		fitted,
	];
}

/** Drops heads and calibrations: the weights they were fitted on have changed. */
export function forgetLengths(engine: Engine): void {
	extras.delete(engine);
}

/** The extras of a model's engine; made empty at the first call. */
export function lengthExtras(engine: Engine): LengthExtras {
	let found = extras.get(engine);
	if (!found) {
		found = { head: undefined, calibrations: [] };
		extras.set(engine, found);
	}
	return found;
}
