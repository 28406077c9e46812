/**
 * Between the loop and a policy, which may be a user's: what it is shown of a forward, and whether its answers can be carried
 * out. A policy that breaks the rules is an `ERR_DN_ARGUMENT` with its name, never a TypeError and never a damaged canvas.
 */
import type { Canvas } from './canvas.js';
import { check } from './errors.js';
import type { Look } from './evaluator.js';
import type { ResolvedOptions } from './options.js';
import type { CanvasView, Decision, SamplerPolicy, StepView } from './samplers/policy.js';

/** Checks the shape of a user's policy before anything runs. @throws `ERR_DN_ARGUMENT` */
export function checkPolicy(policy: SamplerPolicy): void {
	const { name, decide, choose, verify, needsLogits, needsDivergence } = policy as {
		[K in keyof SamplerPolicy]: unknown;
	};
	check(typeof decide === 'function', 'sampler is an object without a method decide(view)');
	check(name === undefined || typeof name === 'string', `sampler.name is ${String(name)}, expected a string`);
	for (const [key, method] of Object.entries({ choose, verify })) {
		check(
			method === undefined || typeof method === 'function',
			`sampler.${key} is ${typeof method}, expected a method`,
		);
	}
	for (const [key, flag] of Object.entries({ needsLogits, needsDivergence })) {
		check(flag === undefined || typeof flag === 'boolean', `sampler.${key} is ${String(flag)}, expected true or false`);
	}
}

const nothing = new Int32Array(0);

/** Whose policy it is, and its name in messages. */
type Sampler = Pick<ResolvedOptions, 'policy' | 'samplerName' | 'isCustom'>;

/** A user's policy gets lists of its own, which it may sort or overwrite. */
function shown(view: CanvasView, isCustom: boolean): CanvasView {
	return isCustom ? { ...view, open: view.open.slice(), tentative: view.tentative.slice() } : view;
}

/** The positions that a policy wants to look at, without repetitions. @throws `ERR_DN_ARGUMENT` unless all are open */
export function chosenPositions({ policy, samplerName: name, isCustom }: Sampler, view: CanvasView): Int32Array {
	const choice: unknown = policy.choose ? policy.choose(shown(view, isCustom)) : view.open;
	if (choice === view.open) return view.open;
	check(isList(choice), `the policy '${name}': choose returned ${typeof choice}, expected a list of positions`);
	if (choice.length === 0) return nothing; // most steps of a sampler with many more steps than positions
	const positions = new Set(Array.from(choice));
	const open = new Set(view.open);
	for (const position of positions) {
		check(open.has(position), `the policy '${name}' chose position ${position}, which is not open`);
	}
	return Int32Array.from(positions);
}

/** The groups that a policy wants verified, empty ones left out. @throws `ERR_DN_ARGUMENT` unless all are tentative */
export function verifiedGroups(
	{ policy, samplerName: name, isCustom }: Sampler,
	view: CanvasView,
): readonly (readonly number[])[] {
	if (!policy.verify) return [];
	const groups: unknown = policy.verify(shown(view, isCustom));
	check(
		Array.isArray(groups) && groups.every(Array.isArray),
		`the policy '${name}': verify returned no list of lists of positions`,
	);
	const tentative = new Set(view.tentative);
	for (const position of groups.flat()) {
		check(
			tentative.delete(position),
			`the policy '${name}' asked to verify position ${position}, which is not tentative, or is named twice`,
		);
	}
	return groups.filter((group: number[]) => group.length > 0);
}

/** A decision that can be carried out on what was looked at. @throws `ERR_DN_ARGUMENT` naming policy, position or id */
export function checkedDecision(
	decision: Decision,
	name: string,
	view: CanvasView,
	look: Look,
	{ maskId, bannedEnd }: Pick<Canvas, 'maskId' | 'bannedEnd'>,
): Decision {
	const policy = `the policy '${name}'`;
	check(
		typeof decision === 'object' && decision !== null && Array.isArray(decision.commit),
		`${policy} returned no { commit: number[] }`,
	);
	for (const key of ['tokens', 'reopen', 'settle'] as const) {
		check(
			decision[key] === undefined || isList(decision[key]),
			`${policy} returned ${key}: ${typeof decision[key]}, expected a list of numbers`,
		);
	}
	const { commit, tokens, reopen = [], settle = [] } = decision;
	const looked = new Set(look.positions);
	const tentative = new Set(view.tentative);
	for (const position of commit) {
		check(
			looked.delete(position),
			`${policy} committed position ${position}, which is not open, was not looked at, or is named twice`,
		);
	}
	for (const position of reopen) {
		check(tentative.delete(position), `${policy} reopened position ${position}, which is not tentative`);
	}
	for (const position of settle) {
		check(tentative.delete(position), `${policy} settled position ${position}, which is not tentative`);
	}
	if (tokens) {
		check(tokens.length === commit.length, `${policy} returned ${tokens.length} tokens for ${commit.length} positions`);
		for (const id of tokens) {
			check(
				Number.isInteger(id) && id >= 0 && id < look.vocab && id !== maskId,
				`${policy} committed the id ${id}, which is no text token`,
			);
			check(
				id !== bannedEnd,
				`${policy} committed the id ${id}, the end token, where the length is drawn: expected a token of the text`,
			);
		}
	}
	return decision;
}

/** What a policy sees after a forward: written out, because it is made at every step. */
export function stepView(given: CanvasView, look: Look, isCustom: boolean): StepView {
	const view = shown(given, isCustom);
	const own = <A extends Int32Array | Float32Array>(values: A): A => (isCustom ? (values.slice() as A) : values);
	return {
		step: view.step,
		tokens: view.tokens,
		open: view.open,
		initialOpen: view.initialOpen,
		blockStep: view.blockStep,
		blockSteps: view.blockSteps,
		tentative: view.tentative,
		reopened: view.reopened,
		seed: view.seed,
		memory: view.memory,
		positions: own(look.positions),
		best: own(look.best),
		drawn: own(look.drawn),
		probability: own(look.probability),
		margin: own(look.margin),
		entropy: own(look.entropy),
		drawnLogProb: own(look.drawnLogProb),
		divergence: own(look.divergence),
		verified: look.verified,
		logProbs: look.logProbs,
	};
}

function isList(value: unknown): value is ArrayLike<number> {
	return Array.isArray(value) || (ArrayBuffer.isView(value) && 'length' in value);
}
