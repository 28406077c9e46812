/** Stochastic samplers against the exact distributions of a toy that can be enumerated, and bugs that the test must see. */
import test from 'ava';
import type { DiffuGPT, GenerateOptions, SamplerPolicy } from 'diffusion-native';

import { uniform } from '../lib/random.js';
import { logSoftmax, sharpModel } from './helpers/models.js';
import { chiSquare } from './helpers/statistics.js';

/** Four text ids and a mask, four open positions after one given token: 256 texts. */
const toy = { vocab: 5, maskId: 4, eosId: 3, context: 8, channels: 16 } as const;
const L = 4;

interface Toy {
	model: DiffuGPT;
	/** p(token | canvas, position): canvas is a base-5 number of the four positions, 4 = open. */
	conditional(canvas: number[], position: number): number[];
}

/** Conditionals of the model, or of its guided mixture u + (w + 1) (l - u) with the logits u of a masked prompt. */
async function makeToy(temperature = 1, guidance = 0): Promise<Toy> {
	// So small a model has no work for a second thread, which would only wait for some.
	const model = await sharpModel(toy, 1, 16, 1);
	const canvases = Array.from({ length: 5 ** L }, (_, n) =>
		Array.from({ length: L }, (_, i) => Math.floor(n / 5 ** i) % 5),
	);
	const rowsAfter = (first: number): Promise<Float32Array[]> =>
		model.forward(
			canvases.map((canvas) => Int32Array.from([first, ...canvas])),
			{ output: 'aligned-logits' },
		);
	const rows = await rowsAfter(1);
	const twins = await rowsAfter(toy.maskId);
	return {
		model,
		conditional(canvas, position) {
			const n = canvas.reduce((sum, id, i) => sum + id * 5 ** i, 0);
			const [own, twin] = [rows[n], twins[n]].map((each) => each?.subarray((position + 1) * 5, (position + 2) * 5));
			const logits = Array.from(own as Float32Array, (l, v) => {
				const u = twin?.[v] as number;
				return (u + (guidance + 1) * (l - u)) / temperature;
			});
			return logSoftmax(logits, 4).slice(0, 4).map(Math.exp);
		},
	};
}

/** Exact distribution over the 256 texts of a process that reveals each open position with probability r(step). */
function ancestralDistribution({ conditional }: Toy, T: number): Float64Array {
	let states = new Map<number, number>([[5 ** L - 1, 1]]);
	const digits = (n: number): number[] => Array.from({ length: L }, (_, i) => Math.floor(n / 5 ** i) % 5);
	for (let step = 0; step < T; step++) {
		const r = 1 / (T - step);
		const next = new Map<number, number>();
		const visit = (before: number[], after: number[], i: number, weight: number): void => {
			if (weight === 0) return;
			if (i === L) {
				const n = after.reduce((sum, id, j) => sum + id * 5 ** j, 0);
				next.set(n, (next.get(n) ?? 0) + weight);
				return;
			}
			if (before[i] !== 4) {
				visit(before, after, i + 1, weight);
				return;
			}
			visit(before, after, i + 1, weight * (1 - r));
			for (const [id, p] of conditional(before, i).entries()) {
				visit(
					before,
					after.map((old, j) => (j === i ? id : old)),
					i + 1,
					weight * r * p,
				);
			}
		};
		for (const [n, weight] of states) visit(digits(n), digits(n), 0, weight);
		states = next;
	}
	return toTexts(states);
}

/** The model's any-order distribution: the mean over all orders of the product of conditionals. */
function anyOrderDistribution({ conditional }: Toy): Float64Array {
	const states = new Map<number, number>();
	const visit = (canvas: number[], weight: number): void => {
		const open = canvas.flatMap((id, i) => (id === 4 ? [i] : []));
		if (open.length === 0) {
			const n = canvas.reduce((sum, id, j) => sum + id * 5 ** j, 0);
			states.set(n, (states.get(n) ?? 0) + weight);
			return;
		}
		for (const i of open) {
			for (const [id, p] of conditional(canvas, i).entries()) {
				visit(
					canvas.map((old, j) => (j === i ? id : old)),
					(weight * p) / open.length,
				);
			}
		}
	};
	visit(new Array<number>(L).fill(4), 1);
	return toTexts(states);
}

function toTexts(states: Map<number, number>): Float64Array {
	const texts = new Float64Array(4 ** L);
	for (const [n, weight] of states) {
		const ids = Array.from({ length: L }, (_, i) => Math.floor(n / 5 ** i) % 5);
		const index = ids.reduce((sum, id, i) => sum + id * 4 ** i, 0);
		texts[index] = (texts[index] as number) + weight;
	}
	return texts;
}

/** Enough draws to see a temperature that is 3 % off; with DN_QUICK_TESTS=1 a tenth, and coarser bugs to be seen. */
const quick = process.env['DN_QUICK_TESTS'] === '1';
const draws = quick ? 20_000 : 200_000;
const minutes = 60_000;

/** Counts of the texts drawn with seeds 0 .. draws - 1. `enough` looks at them from time to time and may end it early. */
async function draw(
	model: DiffuGPT,
	count: number,
	options: GenerateOptions,
	enough: (counts: Float64Array) => boolean = () => false,
): Promise<Float64Array> {
	const counts = new Float64Array(4 ** L);
	const chunk = 2_000;
	for (let first = 0; first < count && !enough(counts); first += chunk) {
		const seeds = Array.from({ length: Math.min(chunk, count - first) }, (_, i) => first + i);
		const results = await model.generateBatch(
			seeds.map(() => ({ tokens: Int32Array.of(1) })),
			seeds.map((seed) => ({ ...options, length: L, seed })),
		);
		for (const { tokens } of results) {
			const index = tokens.reduce((sum, id, i) => sum + id * 4 ** i, 0);
			counts[index] = (counts[index] as number) + 1;
		}
	}
	return counts;
}

/** p-value of a sampler that should be found out within the number of draws that the true ones pass. */
async function suspect(model: DiffuGPT, options: GenerateOptions, expected: Float64Array): Promise<number> {
	let p = 1;
	const counts = await draw(model, draws, options, (some) => {
		p = some.some((n) => n > 0) ? chiSquare(some, expected) : 1;
		return p < 1e-8;
	});
	return Math.min(p, chiSquare(counts, expected));
}

test.serial('first-hitting reproduces the any-order distribution', async (t) => {
	t.timeout(20 * minutes);
	const made = await makeToy();
	const p = chiSquare(await draw(made.model, draws, { sampler: 'first-hitting' }), anyOrderDistribution(made));
	t.log(`p = ${p}`);
	t.true(p > 1e-4, `p = ${p}`);
	await made.model.dispose();
});

test.serial('ancestral reproduces its exact distribution, which tends to the any-order one', async (t) => {
	t.timeout(20 * minutes);
	const made = await makeToy();
	const anyOrder = anyOrderDistribution(made);
	const distance = (a: Float64Array): number =>
		a.reduce((sum, value, i) => sum + Math.abs(value - (anyOrder[i] as number)), 0) / 2;
	const distances = [2, 8, 32, 128].map((steps) => distance(ancestralDistribution(made, steps)));
	for (const [i, d] of distances.entries()) if (i > 0) t.true(d < (distances[i - 1] as number) / 2.5, `${distances}`);
	for (const steps of [1, 2, 8]) {
		const options = { sampler: 'ancestral', steps } as const;
		const p = chiSquare(await draw(made.model, draws / 10, options), ancestralDistribution(made, steps));
		t.log(`${steps} steps: p = ${p}`);
		t.true(p > 1e-4, `${steps} steps: p = ${p}`);
	}
	// Of 128 steps the any-order distribution is 0.003 away: less than these draws can see.
	t.true((distances.at(-1) as number) < 0.003, `${distances}`);
	const p = chiSquare(await draw(made.model, draws, { sampler: 'ancestral', steps: 128 }), anyOrder);
	t.log(`128 steps: p = ${p}`);
	t.true(p > 1e-4, `128 steps: p = ${p}`);
	const few = chiSquare(await draw(made.model, draws / 10, { sampler: 'ancestral', steps: 2 }), anyOrder);
	t.true(few < 1e-6, `2 steps are not many: p = ${few}`);
	await made.model.dispose();
});

test.serial('guided draws follow the guided conditionals', async (t) => {
	t.timeout(20 * minutes);
	const made = await makeToy(1, 0.7);
	const options = { guidance: 0.7 };
	const any = chiSquare(
		await draw(made.model, draws / 10, { ...options, sampler: 'first-hitting' }),
		anyOrderDistribution(made),
	);
	t.true(any > 1e-4, `first-hitting: p = ${any}`);
	const few = await draw(made.model, draws / 10, { ...options, sampler: 'ancestral', steps: 2 });
	const p = chiSquare(few, ancestralDistribution(made, 2));
	t.true(p > 1e-4, `ancestral: p = ${p}`);
	const unguided = await makeToy();
	t.true(chiSquare(few, ancestralDistribution(unguided, 2)) < 1e-6, 'guidance makes a difference');
	await unguided.model.dispose();
	await made.model.dispose();
});

test.serial('temperature means what it says', async (t) => {
	t.timeout(20 * minutes);
	const made = await makeToy(0.5);
	const options = { sampler: 'first-hitting', temperature: 0.5 } as const;
	const p = chiSquare(await draw(made.model, draws / 5, options), anyOrderDistribution(made));
	t.true(p > 1e-4, `p = ${p}`);
	await made.model.dispose();
});

test.serial('the test sees a temperature that is slightly off', async (t) => {
	t.timeout(20 * minutes);
	const made = await makeToy();
	const expected = anyOrderDistribution(made);
	for (const temperature of quick ? [1.12, 0.88] : [1.03, 0.97]) {
		const p = await suspect(made.model, { sampler: 'first-hitting', temperature }, expected);
		t.log(`temperature ${temperature}: p = ${p}`);
		t.true(p < 1e-6, `temperature ${temperature}: p = ${p}`);
	}
	await made.model.dispose();
});

/**
 * first-hitting with the draw of LLaDA's reference, argmax exp(l) / -ln U, in a precision of one's choice. In exact arithmetic
 * the level of the logits changes nothing. GPT-2's reach from about -30 to -130; in fp32 e^-104 is 0.
 */
function gumbelPolicy(round: (x: number) => number, level: number): SamplerPolicy {
	return {
		name: 'gumbel',
		needsLogits: true,
		choose: ({ open, seed, step }) => [open[Math.floor(uniform(seed, 77, step, 0) * open.length)] as number],
		decide(view) {
			let best = 0;
			let highest = Number.NEGATIVE_INFINITY;
			for (const [id, log] of view.logProbs(0).subarray(0, 4).entries()) {
				const u = round(uniform(view.seed, 78, view.step, id) + 2 ** -55);
				const score = round(round(Math.exp(round(log + level))) / round(-Math.log(u)));
				if (score > highest) {
					highest = score;
					best = id;
				}
			}
			return { commit: Array.from(view.positions), tokens: [best] };
		},
	};
}

test.serial('the test sees Gumbel draws in fp32, and passes the same draws in double', async (t) => {
	t.timeout(20 * minutes);
	const made = await makeToy();
	const expected = anyOrderDistribution(made);
	const good = await suspect(made.model, { sampler: gumbelPolicy((x) => x, -101) }, expected);
	const single = await suspect(made.model, { sampler: gumbelPolicy(Math.fround, -101) }, expected);
	t.log(`double: p = ${good}, fp32: p = ${single}`);
	t.true(good > 1e-5, `double: p = ${good}`);
	t.true(single < 1e-6, `fp32: p = ${single}`);
	await made.model.dispose();
});
