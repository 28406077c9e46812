/** Comparison of arrays that says where and by how much they differ. */
import type { ExecutionContext } from 'ava';

/** The largest |a - b|, its index, and the largest |b|. NaN anywhere gives an infinite difference. */
export function worst(
	a: ArrayLike<number>,
	b: ArrayLike<number>,
): { difference: number; index: number; scale: number } {
	let difference = 0;
	let index = -1;
	let scale = 0;
	for (let i = 0; i < b.length; i++) {
		const d = Math.abs((a[i] as number) - (b[i] as number));
		scale = Math.max(scale, Math.abs(b[i] as number));
		if (!(d <= difference)) {
			difference = Number.isNaN(d) ? Number.POSITIVE_INFINITY : d;
			index = i;
		}
	}
	return { difference, index, scale };
}

/** Asserts |actual - expected| <= tolerance for every element, and equal lengths. */
export function close(
	t: ExecutionContext,
	actual: ArrayLike<number>,
	expected: ArrayLike<number>,
	tolerance: number,
	what: string,
): void {
	t.is(actual.length, expected.length, `${what}: length`);
	const { difference, index } = worst(actual, expected);
	t.true(
		difference <= tolerance,
		`${what}: differs by ${difference} at ${index} (${actual[index]} against ${expected[index]}), allowed ${tolerance}`,
	);
}

/** Asserts bit equality. */
export function same(t: ExecutionContext, actual: ArrayLike<number>, expected: ArrayLike<number>, what: string): void {
	t.is(actual.length, expected.length, `${what}: length`);
	for (let i = 0; i < expected.length; i++) {
		if (!Object.is(actual[i], expected[i])) {
			t.fail(`${what}: element ${i} is ${actual[i]}, expected exactly ${expected[i]}`);
			return;
		}
	}
	t.pass();
}
