/** evaluate: bad input, aborts, the command line. */
import { spawnSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';

import test from 'ava';
import {
	type DiffuGPT,
	type EvaluationData,
	evaluate,
	evaluateLength,
	type Metric,
	type Metrics,
} from 'diffusion-native';

import { file, folder, gpt2, gpt2Config, lines, range, rigged, short } from './helpers/evaluate.js';
import { root } from './helpers/fixtures.js';
import { sharpModel } from './helpers/models.js';

test('data that cannot be read are ERR_DN_CHECKPOINT with their path', async (t) => {
	const model = await sharpModel({ context: 16 });
	const missing = join(folder, 'none.jsonl');
	for (const [path, message] of [
		[missing, /none\.jsonl cannot be read/],
		[folder, /is not a file/],
		[join(folder, 'none.bin'), /none\.bin cannot be opened/],
	] as const) {
		await t.throwsAsync(evaluate(model, path, { metric: 'nelbo' }), { code: 'ERR_DN_CHECKPOINT', message }, path);
	}
	const length = { max: 4, methods: ['quantile'] } as const;
	await t.throwsAsync(evaluateLength(model, missing, length), { code: 'ERR_DN_CHECKPOINT', message: /cannot be read/ });
});

test('a second field that may be the prompt is refused where it holds something, and columns choose', async (t) => {
	const model = await sharpModel({ context: 16 });
	const greedy = { metric: 'exact-match', generate: { length: 1 } } as const;
	const both = [{ instruction: [1], input: [2], output: [3] }];
	await t.throwsAsync(evaluate(model, both, greedy), {
		code: 'ERR_DN_ARGUMENT',
		message: /^record 0: both 'instruction' and 'input' hold text.*columns: \{ prompt: 'instruction' \}/,
	});
	await t.throwsAsync(evaluate(model, both, { metric: 'nelbo' }), { message: /both 'instruction' and 'input'/ });
	const wordy = await rigged({}, gpt2Config, gpt2);
	const alpaca = { instruction: 'Translate to French.', input: 'good morning', output: 'bonjour' };
	await t.throwsAsync(evaluate(wordy, [alpaca], { metric: 'likelihood', samples: 1 }), {
		message: /both 'instruction'/,
	});
	for (const input of ['', ' \n', null, [], undefined]) {
		const { records } = await evaluate(model, [{ instruction: [1], input, output: [3] }], greedy);
		t.is(records, 1, JSON.stringify(input));
	}
	t.is((await evaluate(model, both, { ...greedy, columns: { prompt: 'input' } })).records, 1);
});

test('a kind of null is none', async (t) => {
	const model = await sharpModel({ context: 16 });
	const { records, kinds } = await evaluate(
		model,
		[
			{ tokens: [1, 2], kind: null },
			{ tokens: [1, 2], kind: 'a' },
		],
		{ metric: 'nelbo', samples: 1 },
	);
	t.is(records, 2);
	t.deepEqual(Object.keys(kinds), ['a']);
});

test('bad input is an ERR_DN_ARGUMENT that names the place', async (t) => {
	const model = await sharpModel({ context: 16 });
	const causal = await sharpModel({ attention: 'causal', maskId: -1 });
	const wordy = await rigged({}, gpt2Config, gpt2);
	const fails = async (who: DiffuGPT, data: unknown, options: object, message: RegExp): Promise<void> => {
		const error = await t.throwsAsync(evaluate(who, data as EvaluationData, options as { metric: 'nelbo' }), {
			code: 'ERR_DN_ARGUMENT',
			message,
		});
		t.true(error.message.length > 20);
	};
	await fails(model, file(''), { metric: 'nelbo' }, /\.jsonl holds no records/);
	await fails(model, [], { metric: 'nelbo' }, /the data holds no records/);
	await fails(model, file('{"tokens":[1,2]}\n{"tokens":[1,}\n'), { metric: 'nelbo' }, /line 2: not JSON/);
	await fails(model, file('{"tokens":[1,2]}\n\n[3]\n'), { metric: 'nelbo' }, /line 3: expected a JSON object/);
	await fails(model, file('hello', 'txt'), { metric: 'nelbo' }, /reads \.jsonl files/);
	await fails(model, [{ txt: 'a' }], { metric: 'nelbo' }, /record 0: there is no field 'text'; found txt/);
	await fails(model, [{ text: 'a' }], { metric: 'nelbo' }, /needs a tokenizer/);
	await fails(model, [{ tokens: [1, 61] }], { metric: 'nelbo' }, /record 0: the id 61 is outside/);
	for (const id of [2 ** 32 + 5, 2 ** 31, -1]) {
		const outside = new RegExp(`record 0: the id ${id} is outside the model's vocabulary of 61`);
		await fails(model, [{ tokens: [1, id] }], { metric: 'nelbo' }, outside);
		await fails(model, [{ prompt: [1, id], answer: [2] }], { metric: 'exact-match' }, outside);
		await fails(model, [{ context: [1], endings: [[2], [id]], label: 0 }], { metric: 'multiple-choice' }, outside);
	}
	await fails(model, [{ tokens: [1] }], { metric: 'nelbo' }, /no token to score/);
	await fails(model, [{ tokens: range(1, 18) }], { metric: 'nelbo' }, /17 tokens, more than the model's context of 16/);
	await fails(model, [{ prompt: [1], answer: range(1, 17) }], { metric: 'nelbo' }, /record 0: prompt and answer: 18/);
	await fails(model, [{ prompt: [1] }], { metric: 'likelihood' }, /no field 'answer'/);
	await fails(model, [{ tokens: [1, 2], kind: 3 }], { metric: 'nelbo' }, /the field 'kind' is 3, expected text/);
	await fails(
		model,
		[{ prompt: [1], answer: range(1, 16) }],
		{ metric: 'exact-match' },
		/more than the model's context/,
	);
	await fails(model, [{ prompt: [1], answer: [] }], { metric: 'exact-match' }, /the answer is empty/);
	await fails(
		model,
		[{ prompt: [1, 2], answer: [3] }],
		{ metric: 'exact-match', generate: { length: 15 } },
		/record 0: .*do not fit/,
	);
	await fails(
		model,
		[{ prompt: [1], answer: [3] }],
		{ metric: 'exact-match', generate: { seed: 1 } },
		/generate\.seed: the metric/,
	);
	await fails(
		model,
		[{ context: [1], endings: [[2]], label: 0 }],
		{ metric: 'multiple-choice' },
		/expected a list of 2 to/,
	);
	await fails(
		model,
		[{ context: [1], endings: [[2], [3]], label: 2 }],
		{ metric: 'multiple-choice' },
		/expected the number of an ending, 0 to 1/,
	);
	await fails(
		model,
		[{ context: [1], endings: [[2], []], label: 0 }],
		{ metric: 'multiple-choice' },
		/ending 1 is empty/,
	);
	// While other records are in flight.
	const good = { prompt: [1], answer: [3] };
	const greedy = { metric: 'exact-match', generate: { length: { max: 14 } } };
	await fails(model, [good, good, { prompt: [1] }], greedy, /record 2: there is no field 'answer'/);
	await fails(model, [good, { prompt: [1, 2, 3], answer: [3] }, good], greedy, /record 1: .*do not fit/);
	await fails(wordy, [{ prefix: 'a', suffix: 'b' }], { metric: 'infilling' }, /no field 'middle'/);
	await fails(wordy, file('one\n', 'txt'), { metric: 'lambada' }, /passage 1: .*no two words/);
	await fails(model, short, { metric: 'perplexity' }, /needs a causal model, and this one is bidirectional/);
	await fails(causal, short, { metric: 'nelbo' }, /needs a masked diffusion model/);
	await fails(model, short, { metric: 'bleu' }, /option metric is "bleu", expected 'nelbo'/);
	await fails(model, short, { metric: 'nelbo', sample: 4 }, /option sample has no meaning/);
	await fails(model, short, { metric: 'nelbo', samples: 0 }, /option samples is 0/);
	await fails(model, short, { metric: 'nelbo', enumerate: 20 }, /option enumerate is 20/);
	await fails(model, short, { metric: 'nelbo', padding: { multiple: 0 } }, /option padding/);
	await fails(model, null, { metric: 'nelbo' }, /needs data/);
	await fails({} as DiffuGPT, short, { metric: 'nelbo' }, /not a model/);
	await model.dispose();
	await t.throwsAsync(evaluate(model, short, { metric: 'nelbo' }), { code: 'ERR_DN_DISPOSED' });
	await causal.dispose();
	await wordy.dispose();
});

test('aborting stops every metric and leaves the model usable', async (t) => {
	const model = await sharpModel();
	const forever = function* (): Generator<object, void> {
		for (let i = 1; ; i++) yield { prompt: [1, 2], answer: [1 + (i % 50)], tokens: [1, 2, 3] };
	};
	for (const metric of ['nelbo', 'likelihood', 'exact-match'] satisfies Metric[]) {
		const controller = new AbortController();
		const reason = new Error('enough');
		let records = 0;
		const options: Metrics['nelbo']['options'] = {
			signal: controller.signal,
			onProgress: (progress) => {
				records = progress.records;
				if (records === 100) controller.abort(reason);
			},
		};
		t.is(
			await t.throwsAsync(evaluate(model, forever() as EvaluationData, { metric: metric as 'nelbo', ...options })),
			reason,
		);
		t.true(records >= 100 && records < 400);
	}
	t.true((await evaluate(model, short, { metric: 'nelbo' })).nelbo > 0);
	await model.dispose();
});

test('the command: a result for people or as JSON, records in a file, wrong usage', async (t) => {
	const model = await rigged({ 1: 318 }, gpt2Config, gpt2);
	const path = join(folder, 'model');
	await model.save(path);
	await model.dispose();
	const data = file(
		lines([
			{ prompt: 'It', answer: 'is' },
			{ prompt: 'It', answer: 'was' },
		]),
	);
	const run = (...parameters: string[]): { status: number | null; stdout: string; stderr: string } =>
		spawnSync(process.execPath, [join(root, 'dist', 'lib', 'cli', 'main.js'), 'eval', path, ...parameters], {
			encoding: 'utf8',
			timeout: 60_000,
		});
	const output = join(folder, 'records.jsonl');
	const json = run(
		data,
		'--metric',
		'nelbo',
		'--samples',
		'2',
		'--seed',
		'4',
		'--no-end-token',
		'--json',
		'--output',
		output,
	);
	t.is(json.status, 0, json.stderr);
	const result = JSON.parse(json.stdout) as Record<string, unknown>;
	t.is(result['metric'], 'nelbo');
	t.is(result['tokens'], 2);
	t.is(result['seed'], '4');
	t.is(readFileSync(output, 'utf8').trim().split('\n').length, 2);
	const plain = run(data, '--metric', 'exact-match', '--generate', '{"length":1}');
	t.is(plain.status, 0, plain.stderr);
	t.regex(plain.stdout, /rate\s+0\.5/);
	const wrong = run(data, '--metric', 'bleu');
	t.is(wrong.status, 2);
	t.regex(wrong.stderr, /expected 'nelbo'/);
	for (const [text, message] of [
		['{"prompt":1}\n', /line 1: .*expected text/],
		['{"prompt":"It","answer":"is"}\n{"prompt":\n', /line 2: not JSON/],
		['', /holds no records/],
	] as const) {
		const broken = run(file(text), '--metric', 'exact-match', '--json');
		t.is(broken.status, 1, 'bad data are a failure, no wrong usage');
		t.regex(broken.stderr, message);
		t.regex(broken.stderr, /^error ERR_DN_ARGUMENT: /);
	}
	const missing = run(join(folder, 'none.jsonl'), '--metric', 'nelbo');
	t.is(missing.status, 1);
	t.regex(missing.stderr, /^error ERR_DN_CHECKPOINT: .*none\.jsonl/);
	t.is(run(data).status, 2);
});
