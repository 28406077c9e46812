/** Texts, files and options for the tests of data preparation. */
import { mkdirSync, mkdtempSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { basename, dirname, join } from 'node:path';

import test from 'ava';
import { type PrepareOptions, type TokenDataset, Tokenizer } from 'diffusion-native';

export const gpt2 = Tokenizer.gpt2();
export const eos = 50256;
export const root = mkdtempSync(join(tmpdir(), 'dn-data-'));
test.after.always(() => rmSync(root, { recursive: true, force: true }));

let files = 0;
export function file(name: string, content: string | Buffer): string {
	const folder = join(root, String(files++));
	mkdirSync(folder);
	const path = join(folder, name);
	writeFileSync(path, content);
	return path;
}
const out = (): string => join(root, `${files++}.bin`);
export const options = (more: Partial<PrepareOptions> = {}): PrepareOptions => ({
	tokenizer: gpt2,
	out: out(),
	context: 8,
	...more,
});
export const all = (data: TokenDataset): number[][] =>
	Array.from({ length: data.sequences }, (_, i) => [...data.get(i).tokens]);

/** Temporary files beside a target. */
export const leftovers = (path: string): string[] =>
	readdirSync(dirname(path)).filter((name) => name.startsWith(`.${basename(path)}.`));

/** Words whose every GPT-2 token is told apart, in lines of different length. */
export function story(lines: number): string {
	return Array.from(
		{ length: lines },
		(_, i) => `Line ${i} says ${'word '.repeat(i % 7)}and ends, naïvely.\n${i % 5 ? '' : '\n'}`,
	).join('');
}
