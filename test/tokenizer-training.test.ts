/** Learning a tokenizer from text: its merges against the plainest learner, silence, and aborts. */
import test from 'ava';
import { trainTokenizer } from 'diffusion-native';

import { file, story } from './helpers/data.js';
import { runScript } from './helpers/fork.js';

test('a tokenizer cut to k merges is the tokenizer of k merges', async (t) => {
	const text = story(60);
	const specials = ['<|endoftext|>', '<|mask|>'];
	const tokenizer = await trainTokenizer([{ text }], { vocabSize: 300, specials });
	t.is(tokenizer.vocabSize, 300);
	const { model } = JSON.parse(tokenizer.toJSON()) as {
		model: { merges: [string, string][]; vocab: Record<string, number> };
	};
	t.deepEqual(model.merges, learn(text, model.merges.length));
	t.is(model.vocab['!'], 0);
	const bytes = Array.from({ length: 256 }, (_, id) => [...tokenizer.decodeBytes([id])]).flat();
	t.deepEqual(
		bytes.sort((a, b) => a - b),
		Array.from({ length: 256 }, (_, byte) => byte),
		'all bytes are in the vocabulary',
	);
	const strange = 'naïve \u{1f600} \t\r\n\u0000 日本';
	t.is(tokenizer.decode(tokenizer.encode(strange)), strange);
	t.is(tokenizer.idOf('<|mask|>'), 299);
	// A longer cut begins with the shorter one.
	const longer = JSON.parse((await trainTokenizer([{ text }], { vocabSize: 330, specials })).toJSON()) as {
		model: { merges: string[][] };
	};
	t.deepEqual(longer.model.merges.slice(0, model.merges.length), model.merges);
	await t.throwsAsync(trainTokenizer([{ text: 'ab' }], { vocabSize: 1000 }), { message: /too small/ });
	await t.throwsAsync(trainTokenizer([{ text: '' }], { vocabSize: 1000 }), { message: /empty/ });
});

test('learning a tokenizer prints nothing and can be aborted', async (t) => {
	const path = file('corpus.txt', story(60));
	const source = `
		import { trainTokenizer } from 'diffusion-native';
		await trainTokenizer(${JSON.stringify(path)}, { vocabSize: 300 });
	`;
	const { code, stdout, stderr } = await runScript(source);
	t.deepEqual({ code, stdout, stderr }, { code: 0, stdout: '', stderr: '' });
	const reason = new Error('enough');
	const long = file('long.txt', story(60).repeat(300));
	const aborted = trainTokenizer(long, { vocabSize: 300, signal: abortAfter(60, reason) });
	await t.throwsAsync(aborted, { is: reason });
});

function abortAfter(ms: number, reason: Error): AbortSignal {
	const stop = new AbortController();
	setTimeout(() => stop.abort(reason), ms);
	return stop.signal;
}

/** The plainest byte-pair learner: count all pairs, merge the most frequent one, k times. Ties: lower ids first. */
function learn(text: string, k: number): [string, string][] {
	const pattern = /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+/gu;
	const spell = (word: string): string[] =>
		[...Buffer.from(word)].map((byte) => {
			const plain = (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
			if (plain) return String.fromCharCode(byte);
			return String.fromCharCode(256 + (byte <= 0x20 ? byte : byte <= 0xa0 ? byte - 0x7f + 33 : 67));
		});
	const counts = new Map<string, number>();
	for (const line of text.match(/[^\n]*\n|[^\n]+/g) ?? []) {
		for (const [word] of line.matchAll(pattern)) counts.set(word, (counts.get(word) ?? 0) + 1);
	}
	const words = [...counts].map(([word, count]) => ({ symbols: spell(word), count }));
	const ids = new Map([...new Set(words.flatMap((word) => word.symbols))].sort().map((symbol, id) => [symbol, id]));
	const merges: [string, string][] = [];
	while (merges.length < k) {
		const pairs = new Map<string, { pair: [string, string]; count: number }>();
		for (const { symbols, count } of words) {
			for (let i = 0; i + 1 < symbols.length; i++) {
				const pair: [string, string] = [symbols[i] as string, symbols[i + 1] as string];
				const key = pair.join('\u0000');
				const entry = pairs.get(key) ?? { pair, count: 0 };
				entry.count += count;
				pairs.set(key, entry);
			}
		}
		const id = (symbol: string): number => ids.get(symbol) as number;
		const [best] = [...pairs.values()].sort(
			(a, b) => b.count - a.count || id(a.pair[0]) - id(b.pair[0]) || id(a.pair[1]) - id(b.pair[1]),
		);
		if (!best) break;
		const [left, right] = best.pair;
		merges.push(best.pair);
		if (!ids.has(left + right)) ids.set(left + right, ids.size);
		for (const word of words) {
			const next: string[] = [];
			for (let i = 0; i < word.symbols.length; i++) {
				if (word.symbols[i] === left && word.symbols[i + 1] === right) {
					next.push(left + right);
					i++;
				} else next.push(word.symbols[i] as string);
			}
			word.symbols = next;
		}
	}
	return merges;
}
