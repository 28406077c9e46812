/** Chi-square test of counts against expected probabilities. */

/** log Gamma (Lanczos, g = 7, n = 9). */
function logGamma(x: number): number {
	const c = [
		0.99999999999980993, 676.5203681218851, -1259.1392167224028, 771.32342877765313, -176.61502916214059,
		12.507343278686905, -0.13857109526572012, 9.9843695780195716e-6, 1.5056327351493116e-7,
	];
	let sum = c[0] as number;
	for (let i = 1; i < 9; i++) sum += (c[i] as number) / (x - 1 + i);
	const t = x + 6.5;
	return 0.5 * Math.log(2 * Math.PI) + (x - 0.5) * Math.log(t) - t + Math.log(sum);
}

/** Upper regularised incomplete gamma Q(a, x). */
function gammaQ(a: number, x: number): number {
	if (x <= 0) return 1;
	const scale = Math.exp(-x + a * Math.log(x) - logGamma(a));
	if (x < a + 1) {
		let term = 1 / a;
		let sum = term;
		for (let n = 1; n < 1000; n++) {
			term *= x / (a + n);
			sum += term;
		}
		return 1 - sum * scale;
	}
	let b = x + 1 - a;
	let c = 1e300;
	let d = 1 / b;
	let h = d;
	for (let n = 1; n < 1000; n++) {
		const an = -n * (n - a);
		b += 2;
		d = 1 / (an * d + b);
		c = b + an / c;
		h *= d * c;
	}
	return scale * h;
}

/**
 * p-value that `counts` come from `probabilities`. Cells with an expected count below 5 are pooled.
 * Counts where the probability is 0 give 0.
 */
export function chiSquare(counts: ArrayLike<number>, probabilities: ArrayLike<number>): number {
	const n = Array.from(counts).reduce((a, b) => a + b, 0);
	let statistic = 0;
	let cells = 0;
	let pooledCount = 0;
	let pooledExpected = 0;
	for (let i = 0; i < probabilities.length; i++) {
		const expected = (probabilities[i] as number) * n;
		const count = counts[i] as number;
		if (expected === 0 && count > 0) return 0;
		if (expected < 5) {
			pooledCount += count;
			pooledExpected += expected;
			continue;
		}
		statistic += (count - expected) ** 2 / expected;
		cells++;
	}
	if (pooledExpected >= 1) {
		statistic += (pooledCount - pooledExpected) ** 2 / pooledExpected;
		cells++;
	}
	return gammaQ((cells - 1) / 2, statistic / 2);
}
