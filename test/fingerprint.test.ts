/**
 * Whether data fit a tokenizer: the vocabulary and merges must be those the data were made with, and every added token that
 * the data can hold must be the same; tokens that were added since do no harm. Token files written before the two were
 * kept apart hold one digest of everything.
 */
import { createHash } from 'node:crypto';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { crc32 } from 'node:zlib';

import test from 'ava';
import { DiffuGPT, prepare, TokenDataset, Tokenizer, Trainer } from 'diffusion-native';

const gpt2 = Tokenizer.gpt2();
const json = JSON.parse(gpt2.toJSON()) as {
	added_tokens: { id: number; content: string }[];
	model: { vocab: Record<string, number>; merges: string[] };
};
const scratch = mkdtempSync(join(tmpdir(), 'dn-fingerprint-'));
let count = 0;
const fresh = (): string => join(scratch, `${count++}.bin`);
test.after.always(() => rmSync(scratch, { recursive: true, force: true }));

/** GPT-2's tokenizer with further tokens. */
function withAdded(tokens: Record<string, number>, special = true): Tokenizer {
	const flags = { single_word: false, lstrip: false, rstrip: false, normalized: false, special };
	const added_tokens = [
		...json.added_tokens,
		...Object.entries(tokens).map(([content, id]) => ({ id, content, ...flags })),
	];
	return Tokenizer.fromString(JSON.stringify({ ...json, added_tokens }));
}

const masked = withAdded({ '<|mask|>': 50257 });
const text = [{ text: 'some text <|mask|> and more text for a window or two' }];
const prepared = (tokenizer: Tokenizer): Promise<TokenDataset> =>
	prepare(text, { tokenizer, out: fresh(), context: 4, eosId: 50256 });

/** The digest that older token files hold. */
function oldFingerprint(added: [string, number][]): string {
	const vocab = Object.entries(json.model.vocab).sort((a, b) => a[1] - b[1]);
	const merges = json.model.merges.map((merge) => merge.split(' '));
	return createHash('sha256')
		.update(JSON.stringify([vocab, merges, added]))
		.digest('hex');
}

/** The same token file as an older version of this library wrote it. */
function aged(data: TokenDataset, fingerprint: string): string {
	const bytes = readFileSync(data.path);
	bytes.fill(0, 112, 240);
	bytes.write(fingerprint, 112, 'latin1');
	bytes.writeUInt32LE(crc32(bytes.subarray(0, 252)), 252);
	const path = fresh();
	writeFileSync(path, bytes);
	return path;
}

test('the fingerprint is of vocabulary and merges; added tokens are told apart beside it', (t) => {
	t.is(masked.fingerprint, gpt2.fingerprint);
	t.is(gpt2.dataFingerprint(), gpt2.fingerprint);
	t.not(masked.dataFingerprint(), gpt2.fingerprint);
	t.is(masked.dataFingerprint(50257), gpt2.fingerprint);
	t.not(withAdded({ '<|hole|>': 50257 }).dataFingerprint(), masked.dataFingerprint());
	t.is(masked.forModel(50257).dataFingerprint(), gpt2.fingerprint);
	const [token] = Object.keys(json.model.vocab) as [string];
	const renamed: Record<string, number> = { ...json.model.vocab, 'a-b-c': json.model.vocab[token] as number };
	delete renamed[token];
	const merges = json.model.merges.filter(
		(merge) => !merge.split(' ').includes(token) && merge.replace(' ', '') !== token,
	);
	const other = Tokenizer.fromString(JSON.stringify({ ...json, model: { ...json.model, vocab: renamed, merges } }));
	t.not(other.fingerprint, gpt2.fingerprint);
});

test('data fit a tokenizer that has gained tokens, and not one that lacks or renames theirs', async (t) => {
	using plain = await prepared(gpt2);
	t.is(plain.fingerprint, gpt2.fingerprint);
	for (const tokenizer of [gpt2, masked, withAdded({ '<|a|>': 50257, '<|b|>': 50258 }, false)])
		(await TokenDataset.open(plain.path, { tokenizer })).close();
	using richer = await prepared(masked);
	for (const tokenizer of [masked, withAdded({ '<|mask|>': 50257, '<|b|>': 50258 })])
		(await TokenDataset.open(richer.path, { tokenizer })).close();
	for (const tokenizer of [gpt2, withAdded({ '<|hole|>': 50257 }), withAdded({ '<|mask|>': 50258 })]) {
		await t.throwsAsync(TokenDataset.open(richer.path, { tokenizer }), {
			code: 'ERR_DN_ARGUMENT',
			message: /prepared with 50258 ids, of which added tokens are missing from this tokenizer or spelt otherwise/,
		});
	}
	const cut = Tokenizer.fromString(
		JSON.stringify({ ...json, model: { ...json.model, merges: json.model.merges.slice(0, -1) } }),
	);
	await t.throwsAsync(TokenDataset.open(plain.path, { tokenizer: cut }), { message: /another tokenizer/ });
});

test('a model that gained a mask token trains on data of plain GPT-2, and ids it lacks are refused', async (t) => {
	using plain = await prepared(gpt2);
	const make = (tokenizer: Tokenizer): Promise<DiffuGPT> =>
		DiffuGPT.fromConfig(
			{ layers: 1, heads: 1, channels: 8, vocab: 50258, context: 8, eosId: 50256, maskId: 50257 },
			{ device: 'cpu', tokenizer },
		);
	await using model = await make(masked);
	await using trainer = new Trainer(model, { data: plain, maxSteps: 1, batchSize: 2 });
	for await (const metrics of trainer.run()) t.true(metrics.loss > 0);
	t.is(trainer.steps, 1);
	using richer = await prepared(masked);
	await using other = await make(withAdded({ '<|hole|>': 50257 }));
	t.throws(() => new Trainer(other, { data: richer, maxSteps: 1 }), {
		code: 'ERR_DN_ARGUMENT',
		message: /added tokens/,
	});
	await using small = await DiffuGPT.fromConfig(
		{ layers: 1, heads: 1, channels: 8, vocab: 50257, context: 8 },
		{ device: 'cpu', tokenizer: gpt2 },
	);
	t.throws(() => new Trainer(small, { data: richer, maxSteps: 1 }), { code: 'ERR_DN_ARGUMENT', message: /50258/ });
});

test('token files with the older digest of everything still fit whom they fitted, and gained tokens', async (t) => {
	const endOfText: [string, number] = ['<|endoftext|>', 50256];
	using plain = await prepared(gpt2);
	const old = aged(plain, oldFingerprint([endOfText]));
	for (const tokenizer of [gpt2, masked]) {
		using data = await TokenDataset.open(old, { tokenizer });
		t.deepEqual(data.get(0), plain.get(0));
	}
	using richer = await prepared(masked);
	const oldRicher = aged(richer, oldFingerprint([endOfText, ['<|mask|>', 50257]]));
	(await TokenDataset.open(oldRicher, { tokenizer: masked })).close();
	for (const tokenizer of [gpt2, withAdded({ '<|hole|>': 50257 })])
		await t.throwsAsync(TokenDataset.open(oldRicher, { tokenizer }), {
			code: 'ERR_DN_ARGUMENT',
			message: /prepare it again/,
		});
});

test('how text is prepared is part of the fingerprint, where it is not as in GPT-2', (t) => {
	const { fingerprint } = gpt2;
	const byteLevel = { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: true };
	const seen = new Set([fingerprint]);
	for (const changes of [
		{ pre_tokenizer: { ...byteLevel, add_prefix_space: true } },
		{ normalizer: { type: 'NFC' } },
		{ model: { ...json.model, ignore_merges: true } },
	]) {
		const other = Tokenizer.fromString(JSON.stringify({ ...json, ...changes }));
		t.false(seen.has(other.fingerprint), JSON.stringify(changes).slice(0, 60));
		t.is(other.fingerprint, Tokenizer.fromString(other.toJSON()).fingerprint);
		seen.add(other.fingerprint);
	}
	const same = { ...json, normalizer: null, pre_tokenizer: byteLevel };
	t.is(Tokenizer.fromString(JSON.stringify(same)).fingerprint, fingerprint);
});
