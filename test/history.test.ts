/** What a request remembers of the forward before, and that it forgets it when positions move. */
import test from 'ava';
import type { DenoiseStep, SamplerPolicy } from 'diffusion-native';

import { RowHistory } from '../lib/row-history.js';
import { prompt } from './helpers/generate.js';
import { sharpModel } from './helpers/models.js';

test('what a forward is compared with is not what it writes', (t) => {
	const history = new RowHistory();
	const first = history.next(Int32Array.of(4, 7), 3);
	t.deepEqual(first.before, [null, null]);
	const second = history.next(Int32Array.of(7, 9), 3);
	t.deepEqual(
		second.before.map((row) => row && first.keep.indexOf(row)),
		[1, null],
	);
	t.false(first.keep.includes(second.keep[0] as Float32Array));
	const third = history.next(Int32Array.of(7, 4), 3);
	t.is(third.before[0], second.keep[0]);
	t.is(third.keep[0], first.keep[1], 'the two take turns');
	t.is(third.before[1], null, 'position 4 was not looked at in between');
	history.clear();
	t.deepEqual(history.next(Int32Array.of(7), 3).before, [null]);
});

test('a canvas that changes while it is filled is not compared with what it was', async (t) => {
	const model = await sharpModel();
	const divergences: number[][] = [];
	const sampler: SamplerPolicy = {
		needsDivergence: true,
		decide({ divergence, positions }) {
			divergences.push([...divergence]);
			return { commit: [positions[0] as number] };
		},
	};
	const length = { max: 24, initial: 6, method: 'rho-eos', grow: 3 } as const;
	const events: DenoiseStep[] = [];
	for await (const event of model.stream(prompt, { sampler, length, seed: 4 })) events.push(event);
	let moved = 0;
	let compared = 0;
	for (const [i, values] of divergences.entries()) {
		// A change is told with the forward it followed from.
		if (i === 0 || events[i - 1]?.resized) {
			t.true(
				values.every((value) => value === Number.POSITIVE_INFINITY),
				`forward ${i}: ${values}`,
			);
			if (i > 0) moved++;
		} else {
			t.true(values.every(Number.isFinite), `forward ${i}: ${values}`);
			compared++;
		}
	}
	t.true(moved > 0 && compared > 0, `${moved} forwards after a change, ${compared} others`);
	await model.dispose();
});
