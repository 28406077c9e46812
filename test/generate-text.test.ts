/** Generation from and to text, and bad options and prompts. */
import test from 'ava';
import { DiffuGPT, evaluate, type GenerateOptions, type Prompt, type SamplerPolicy, Tokenizer } from 'diffusion-native';

import { uniform } from '../lib/random.js';
import { collect, maskId, prompt, textModel } from './helpers/generate.js';
import { sharpModel } from './helpers/models.js';

test('text is continued and filled in, and characters are never split', async (t) => {
	const model = await textModel();
	const { tokenizer } = model as { tokenizer: Tokenizer };
	const prefix = 'The quick brown';
	const { result } = await collect(model, prefix, { length: 12, sampler: 'ancestral', seed: 5 });
	t.deepEqual(result.sequence.slice(0, 3), tokenizer.encode(prefix));
	t.is(result.text, tokenizer.decode(result.tokens));
	const filled = await model.generate({ prefix, suffix: ' dog.' }, { length: 4, seed: 5 });
	t.deepEqual(filled.sequence.slice(7), tokenizer.encode(' dog.'));
	t.is(filled.text, tokenizer.decode(filled.tokens));
	const headless = await model.generate({ suffix: ' dog.' }, { length: 4, seed: 5, guidance: 1 });
	t.is(headless.sequence[0], model.config.bosId, 'the beginning-of-text token is pinned');
	t.is(headless.sequence.length, 1 + 4 + 2);
	// Tokens of the four bytes of an emoji, committed one by one: the text shows it only when it is whole.
	const bytes = tokenizer.encode('a😀b');
	t.true(bytes.length > 3);
	for (let length = 1; length <= bytes.length; length++) {
		const policy: SamplerPolicy = {
			decide: ({ positions, step }) => ({
				commit: [positions[step % 2 === 0 ? 0 : positions.length - 1] as number],
				tokens: [bytes[(positions[step % 2 === 0 ? 0 : positions.length - 1] as number) - 1] as number],
			}),
		};
		const { events } = await collect(
			model,
			{ tokens: Int32Array.of(50256) },
			{ sampler: policy, length: bytes.length },
		);
		t.is(events.at(-1)?.text, 'a😀b');
		for (const { text } of events.slice(0, -1)) t.false(text.includes('\uFFFD'), text);
	}
	await model.dispose();
});

test('streams of text in many bytes never show a broken character, whatever the order, growth and revisions', async (t) => {
	const model = await textModel();
	const { tokenizer } = model as { tokenizer: Tokenizer };
	const alphabet = ['a', ' b', 'é', 'ß', '漢字', '😀', '👩‍👩‍👧', 'नमस्ते', '\u{1F1EB}\u{1F1F7}', '\n', 'ﬁ', '\u0000'];
	let hidden = 0;
	for (let seed = 0; seed < 60; seed++) {
		const draw = (n: number, i: number): number => uniform(BigInt(seed), 60, n, i);
		let text = '';
		for (let i = 0; i < 8; i++) {
			const next = text + alphabet[Math.floor(draw(0, i) * alphabet.length)];
			if (tokenizer.encode(next).length <= 40) text = next;
		}
		const ids = Array.from(tokenizer.encode(text));
		const policy: SamplerPolicy = {
			verify: ({ tentative }) => (tentative.length > 0 ? [Array.from(tentative)] : []),
			decide({ step, positions, tentative }) {
				const chosen = Array.from(positions).filter((_, k) => k === 0 || draw(2 + step, k) < 0.3);
				const commit = draw(1, step) < 0.5 ? chosen : chosen.slice(-1);
				const reopen = step > 30 ? [] : Array.from(tentative).filter((p) => draw(100 + step, p) < 0.2);
				const settle = Array.from(tentative).filter((p) => !reopen.includes(p) && draw(200 + step, p) < 0.6);
				return { commit, tokens: commit.map((p) => ids[p - 1] as number), reopen, settle, tentative: true };
			},
		};
		for (const length of [ids.length, { max: ids.length, method: 'block', block: 5 }] as const) {
			const { events, result } = await collect(model, { tokens: Int32Array.of(50256) }, { sampler: policy, length });
			t.is(result.text, text);
			t.is(events.at(-1)?.text, text);
			for (const event of events.slice(0, -1)) {
				t.false(event.text.includes('\uFFFD'), JSON.stringify(event.text));
				const committed = Array.from(event.tokens.subarray(1)).filter((id) => id !== model.config.maskId);
				if (tokenizer.decode(Int32Array.from(committed)) !== event.text) hidden++;
			}
		}
	}
	t.true(hidden > 50, `${hidden} events kept a part of a character back`);
	await model.dispose();
});

test('an id that the tokenizer does not know is U+FFFD in the text, and itself in the tokens', async (t) => {
	const model = await textModel({ vocab: 50304 });
	const { tokenizer } = model as { tokenizer: Tokenizer };
	t.is(tokenizer.vocabSize, 50257);
	const ids = [...tokenizer.encode(' fox'), 50300, ...tokenizer.encode(' jumps')];
	const sampler: SamplerPolicy = {
		decide: ({ positions, initialOpen }) => {
			const first = (positions[positions.length - 1] as number) - initialOpen + 1;
			return { commit: [positions[0] as number], tokens: [ids[(positions[0] as number) - first] as number] };
		},
	};
	const { events, result } = await collect(model, 'The quick', { sampler, length: ids.length });
	t.is(result.text, ' fox\uFFFD jumps');
	t.is(events.at(-1)?.text, result.text);
	t.deepEqual(Array.from(result.tokens), ids);
	const [both] = await model.generateBatch(['The quick', 'Another'], { sampler, length: ids.length });
	t.is(both?.text, result.text);
	// Evaluations read such texts, too; a judge sees what a reader would.
	const texts: unknown[] = [];
	const onRecord = ({ generated, text = generated }: Record<string, unknown>) => void texts.push(text);
	const strange: SamplerPolicy = {
		decide: ({ positions }) => ({ commit: [...positions], tokens: [...positions].map(() => 50300) }),
	};
	const common = { onRecord, generate: { sampler: strange } } as const;
	const fill = [{ prefix: 'The quick', middle: ' fox', suffix: ' jumps' }];
	await evaluate(model, fill, { metric: 'infilling', ...common });
	await evaluate(model, [{ text: 'The quick fox' }], { metric: 'lambada', ...common });
	const judge = await textModel({ attention: 'causal' });
	const generate = { sampler: strange, length: 2 };
	const options = { metric: 'generative-perplexity', judge, onRecord, generate } as const;
	const judged = await evaluate(model, [{ prompt: 'The quick' }], options);
	t.deepEqual(texts, ['\uFFFD', '\uFFFD', '\uFFFD\uFFFD']);
	t.is(judged.tokens, tokenizer.encode('\uFFFD\uFFFD').length);
	for (const each of [model, judge]) await each.dispose();
});

test('a text of which the normaliser leaves nothing is like an empty one', async (t) => {
	const file = JSON.parse(Tokenizer.gpt2().toJSON());
	file.normalizer = { type: 'Strip', strip_left: true, strip_right: true };
	const tokenizer = Tokenizer.fromString(JSON.stringify(file));
	t.is(tokenizer.encode('  ').length, 0);
	const model = await DiffuGPT.fromConfig(
		{ layers: 1, heads: 2, channels: 16, vocab: 50257, context: 64 },
		{ seed: 1, tokenizer, device: 'cpu' },
	);
	const refused = { code: 'ERR_DN_ARGUMENT', message: /makes no token/ };
	await t.throwsAsync(model.generate('  ', { length: 3 }), { ...refused, message: /the prompt is " {2}".*no token/ });
	await t.throwsAsync(model.generate({ prefix: '  ', suffix: ' ' }, { length: 3 }), refused);
	await t.throwsAsync(model.predictLength({ prefix: '  ' }, { max: 3 }), refused);
	const options = { length: 3, seed: 1 };
	const headless = await model.generate({ suffix: 'x' }, options);
	t.deepEqual((await model.generate({ prefix: '  ', suffix: 'x' }, options)).sequence, headless.sequence);
	t.is(headless.sequence[0], model.config.bosId);
	await model.dispose();
});

test("a prompt that spells the mask token's text is plain text", async (t) => {
	const model = await textModel();
	const { tokenizer, config } = model as { tokenizer: Tokenizer; config: { maskId: number } };
	const spelled = tokenizer.decode(Int32Array.of(config.maskId));
	const result = await model.generate(`say ${spelled} twice: ${spelled}${spelled}`, { length: 3, steps: 3 });
	t.is(result.tokens.length, 3);
	t.is(result.stats.forwards, 3);
	const special = await model.generate('<|endoftext|>', { length: 2 });
	t.true(special.sequence.length > 3, 'the special token was not recognised');
	await model.dispose();
});

test('bad options and prompts are named', async (t) => {
	const model = await sharpModel();
	const bad = async (given: unknown, options: unknown, message: RegExp): Promise<void> => {
		await t.throwsAsync(
			model.generate(given as Prompt, options as GenerateOptions),
			{ code: 'ERR_DN_ARGUMENT', message },
			String(message),
		);
		await t.throwsAsync(model.generateBatch([given as Prompt], options as GenerateOptions), {
			code: 'ERR_DN_ARGUMENT',
			message,
		});
	};
	for (const [options, message] of [
		[{ temperature: Number.NaN }, /temperature is NaN/],
		[{ temperature: -1 }, /temperature is -1/],
		[{ temperature: '1' }, /temperature/],
		[{ length: -1 }, /length is -1/],
		[{ length: 1.5 }, /length is 1.5/],
		[{ length: 61 }, /64/],
		[{ length: { max: 61 } }, /64/],
		[{ length: { max: 0 } }, /length.max/],
		[{ length: { max: 5, method: 'guess' } }, /length.method/],
		[{ length: { max: 5, method: 'head' } }, /not available/],
		[{ length: { max: 5, coverage: 0.5 } }, /length.coverage/],
		[{ length: { max: 5, method: 'expected', coverage: 2 } }, /length.coverage/],
		[{ length: { max: 5, method: 'first-step' }, sampler: 'autoregressive' }, /first-step/],
		[{ steps: 0 }, /steps is 0/],
		[{ length: 8, steps: 2, block: 2 }, /4 blocks/],
		[{ length: 8, block: 9 }, /block is 9/],
		[{ block: 0 }, /block/],
		[{ topK: -1 }, /topK/],
		[{ topK: 2 ** 32 + 1 }, /topK/],
		[{ sampler: 'confidence', block: 2 ** 31 }, /block/],
		[{ sampler: 'confidence', attention: { blockCausal: 2 ** 32 + 4 } }, /blockCausal/],
		[{ sampler: 'revocable', attempts: 256 }, /attempts/],
		[{ topP: 0 }, /topP/],
		[{ topP: 1.5 }, /topP/],
		[{ topP: 1e-50 }, /option topP is 1e-50, expected .* in fp32 too/],
		[{ temperature: 1e39 }, /option temperature is 1e\+39, expected .* fp32/],
		[{ guidance: 1e39 }, /option guidance is 1e\+39, expected .* fp32/],
		[{ guidance: Number.POSITIVE_INFINITY }, /guidance/],
		[{ seed: -1 }, /seed/],
		[{ seed: 1.5 }, /seed/],
		[{ seed: 2n ** 64n }, /seed/],
		[{ signal: {} }, /signal/],
		[{ stepz: 3 }, /stepz is not known/],
		[{ temperature: Number.POSITIVE_INFINITY }, /temperature is Infinity/],
		[{ topP: Number.NaN }, /topP is NaN/],
		[{ guidance: Number.NaN }, /guidance is NaN/],
		[{ sampler: 'threshold', threshold: Number.NaN }, /threshold is NaN/],
		[{ length: Number.NaN }, /length is NaN/],
		[{ block: 2.5 }, /block is 2.5/],
		[{ sampler: 'greedy' }, /sampler is "greedy"/],
		[{ sampler: {} }, /decide/],
		[{ sampler: null }, /sampler is null/],
		[{ sampler: () => 0 }, /sampler is function/],
		[{ sampler: 'confidence', threshold: 0.9 }, /threshold has no meaning for the sampler 'confidence'/],
		[{ sampler: 'threshold', score: 'margin' }, /score has no meaning/],
		[{ sampler: 'threshold', factor: 1 }, /factor has no meaning/],
		[{ sampler: 'autoregressive', block: 2 }, /block has no meaning/],
		[{ steps: 65537 }, /steps is 65537, expected a whole number >= 1 and <= 65536/],
		[{ sampler: 'ancestral', threshold: 0.9 }, /threshold has no meaning for the sampler 'ancestral'/],
		[{ sampler: 'autoregressive', steps: 3 }, /steps has no meaning/],
		[{ sampler: 'first-hitting', steps: 3 }, /steps has no meaning/],
		[{ score: 'best' }, /score/],
		[{ plan: 'random' }, /plan/],
		[null, /options/],
	] as [object, RegExp][]) {
		await bad(prompt, options, message);
	}
	for (const [given, message] of [
		['', /empty string/],
		['text', /no tokenizer/],
		[{ prefix: '', suffix: '' }, /both empty/],
		[{ prefx: 'a' }, /prefx/],
		[{ tokens: [1, 2] }, /Int32Array/],
		[{ tokens: new Int32Array(0) }, /empty/],
		[{ tokens: Int32Array.of(1, 61) }, /token 1 is 61/],
		[{ tokens: Int32Array.of(-1) }, /token 0 is -1/],
		[{ tokens: Int32Array.of(1, 2), open: Uint8Array.of(1) }, /2 entries/],
		[{ tokens: Int32Array.of(1, 2), open: Uint8Array.of(1, 0) }, /position 0 is open/],
		[{ tokens: Int32Array.of(1, 2), suffix: 'a' }, /suffix/],
		[{ tokens: new Int32Array(65) }, /65/],
		[null, /null/],
		[7, /number/],
	] as [unknown, RegExp][]) {
		await bad(given, {}, message);
	}
	await bad({ tokens: Int32Array.of(1, maskId) }, { length: 3 }, /length cannot be combined/);
	await bad({ tokens: Int32Array.of(1, maskId, 2) }, { sampler: 'autoregressive' }, /only continues/);
	await t.throwsAsync(model.generateBatch([prompt], [{}, {}]), {
		code: 'ERR_DN_ARGUMENT',
		message: /1 prompts but 2 options/,
	});
	await model.dispose();

	const causal = await sharpModel({ attention: 'causal', maskId: -1 });
	await t.throwsAsync(causal.generate(prompt, { sampler: 'confidence' }), {
		code: 'ERR_DN_ARGUMENT',
		message: /causal/,
	});
	await t.throwsAsync(causal.generate(prompt, { guidance: 1 }), { code: 'ERR_DN_ARGUMENT', message: /guidance/ });
	await t.throwsAsync(causal.predictLength(prompt, { max: 3 }), { code: 'ERR_DN_ARGUMENT' });
	t.is((await causal.generate(prompt, { length: 5 })).tokens.length, 5);
	await causal.dispose();
});
