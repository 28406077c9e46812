/** "did you mean": the known name nearest to a mistyped one. */

/** ", did you mean 'maxSteps'?" or '' when nothing is near: at most a third of the letters differ. */
export function suggest(name: string, known: readonly string[]): string {
	let best: string | undefined;
	let least = Math.max(2, Math.floor(name.length / 3)) + 1;
	for (const candidate of known) {
		const distance = edits(name.toLowerCase(), candidate.toLowerCase());
		if (distance >= least) continue;
		least = distance;
		best = candidate;
	}
	return best === undefined ? '' : `, did you mean '${best}'?`;
}

/** Levenshtein distance. */
function edits(a: string, b: string): number {
	let row = Array.from({ length: b.length + 1 }, (_, j) => j);
	for (let i = 1; i <= a.length; i++) {
		const next = [i];
		for (let j = 1; j <= b.length; j++) {
			const replaced = (row[j - 1] as number) + (a[i - 1] === b[j - 1] ? 0 : 1);
			next.push(Math.min(replaced, (row[j] as number) + 1, (next[j - 1] as number) + 1));
		}
		row = next;
	}
	return row[b.length] as number;
}
