/**
 * ROUGE-1, ROUGE-2 and ROUGE-L as F1 (Lin, ROUGE: A Package for Automatic Evaluation of Summaries, 2004).
 * Words: the text in lower case, cut at everything that is neither a letter nor a digit; no stemming, no stop words.
 * ROUGE-N: common n-grams, each at most as often as in the other text, over those of the candidate (precision) and of the
 * reference (recall). ROUGE-L: the same with the longest common subsequence of words. F1 = 2PR / (P + R), 0 when nothing is
 * common.
 */

export interface Rouge {
	readonly rouge1: number;
	readonly rouge2: number;
	readonly rougeL: number;
}

export function words(text: string): string[] {
	return text.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? [];
}

export function rouge(candidate: string, reference: string): Rouge {
	const a = words(candidate);
	const b = words(reference);
	return { rouge1: ngramF1(a, b, 1), rouge2: ngramF1(a, b, 2), rougeL: f1(longestCommon(a, b), a.length, b.length) };
}

function f1(common: number, candidate: number, reference: number): number {
	// 2PR / (P + R) with P = common / candidate and R = common / reference.
	return common === 0 ? 0 : (2 * common) / (candidate + reference);
}

function ngramF1(a: readonly string[], b: readonly string[], n: number): number {
	const ofA = ngrams(a, n);
	const ofB = ngrams(b, n);
	let common = 0;
	for (const [gram, count] of ofA) common += Math.min(count, ofB.get(gram) ?? 0);
	return f1(common, Math.max(0, a.length - n + 1), Math.max(0, b.length - n + 1));
}

function ngrams(list: readonly string[], n: number): Map<string, number> {
	const counts = new Map<string, number>();
	for (let i = 0; i + n <= list.length; i++) {
		const gram = list.slice(i, i + n).join(' ');
		counts.set(gram, (counts.get(gram) ?? 0) + 1);
	}
	return counts;
}

/** Length of the longest common subsequence; memory of one row. */
function longestCommon(a: readonly string[], b: readonly string[]): number {
	const row = new Uint32Array(b.length + 1);
	for (const word of a) {
		let diagonal = 0;
		for (let j = 0; j < b.length; j++) {
			const above = row[j + 1] as number;
			row[j + 1] = word === b[j] ? diagonal + 1 : Math.max(above, row[j] as number);
			diagonal = above;
		}
	}
	return row[b.length] as number;
}
