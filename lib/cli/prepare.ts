/** `diffusion-native prepare`: text, JSONL or CSV files to a token file, with a tokenizer of the corpus's own if asked. */
import cliProgress from 'cli-progress';
import type { Command } from 'commander';

import { trainTokenizer } from '../data/bpe.js';
import { TokenDataset } from '../data/dataset.js';
import type { DataFormat, Padding } from '../data/format.js';
import { prepare } from '../data/prepare.js';
import { type PrepareOptions, type PrepareProgress, validationPath } from '../data/prepare-options.js';
import { check } from '../errors.js';
import { exitStatus, interruptible, number, padding, paddingKinds } from './terminal.js';
import { loadTokenizer } from './train.js';

interface Flags {
	readonly out: string;
	readonly tokenizer: string;
	readonly trainTokenizer?: number;
	readonly format: DataFormat;
	readonly context: number;
	readonly padding: Padding;
	readonly separator: string;
	readonly splitText: string;
	readonly textColumn?: string;
	readonly promptColumn?: string;
	readonly answerColumn?: string;
	readonly splitColumn?: string;
	readonly overlong?: NonNullable<PrepareOptions['overlong']>;
	readonly validation: number;
	readonly validationOut?: string;
	readonly splitSeed?: number;
	readonly eosId?: number;
	readonly bosId?: number | false;
	readonly padId?: number;
	readonly maxLine?: number;
	readonly threads?: number;
	readonly container: 'own' | 'nanogpt';
	readonly json?: boolean;
}

/** Of --padding, without an amount. */
const paddings = ['none', 'context', 'batch'] as const;

export function register(program: Command): void {
	program
		.command('prepare')
		.description('turn text, JSONL or CSV files (or folders of them) into a token file')
		.argument('<inputs...>', 'files or folders: .txt, .md, .jsonl, .csv')
		.requiredOption('-o, --out <file>', 'token file to write; the validation part goes beside it')
		.option(
			'-t, --tokenizer <spec>',
			"'gpt2', a tokenizer.json, or a model folder; written to with --train-tokenizer",
			'gpt2',
		)
		.option(
			'--train-tokenizer <n>',
			'learn a byte-level BPE of n entries from the inputs first and write it to --tokenizer',
			number('train-tokenizer'),
		)
		.option('-f, --format <format>', 'packed, documents or pairs', 'packed')
		.option('--context <n>', 'window of packed data, longest sequence otherwise, tokens', number('context'), 1024)
		.option('--padding <kind>', `end tokens that teach length: ${paddingKinds(paddings)}`, padding(paddings), 'none')
		.option('--separator <text>', 'between prompt and answer; part of the answer', ' ')
		.option(
			'--split-text <how>',
			'documents of a text file: file, line, paragraph, or a line that separates them',
			'file',
		)
		.option('--text-column <name>', 'column of the text')
		.option('--prompt-column <name>', 'column of the prompt')
		.option('--answer-column <name>', 'column of the answer')
		.option('--split-column <name>', 'rows with equal values stay on one side of the validation split')
		.option(
			'--overlong <how>',
			'a sequence beyond the context: split, truncate, drop or error (default: split; pairs: error)',
		)
		.option(
			'--validation <share>',
			'share of the documents held out, by a hash of the document',
			number('validation'),
			0,
		)
		.option('--validation-out <file>', "token file of the documents held out (default: --out with '.validation')")
		.option('--split-seed <n>', 'changes which documents are held out (default: 0)', number('split-seed'))
		.option('--eos-id <id>', "end token (default: the tokenizer's <|endoftext|>)", number('eos-id'))
		.option(
			'--bos-id <id>',
			"token in front of documents and pairs, or 'none' (default: the end token for documents, else none)",
			(text) => (text === 'none' ? false : number('bos-id')(text)),
		)
		.option('--pad-id <id>', 'token that pads (default: the end token)', number('pad-id'))
		.option(
			'--max-line <n>',
			'longest line or document held in memory, characters (default: 16777216)',
			number('max-line'),
		)
		.option('--threads <n>', 'threads that tokenize long inputs (default: all cores, at most 8)', number('threads'))
		.option('--container <kind>', "'own', or 'nanogpt' for headerless uint16", 'own')
		.option('--json', 'one JSON object per report on stdout')
		.addHelpText('after', exitStatus)
		.action((inputs: string[], flags: Flags) => run(inputs, flags));
}

async function run(inputs: string[], flags: Flags): Promise<void> {
	const interrupt = interruptible('interrupted; nothing was written');
	const { signal } = interrupt;
	const { validationOut, splitSeed, eosId, bosId, padId, maxLine, threads, overlong } = flags;
	const reading = maxLine === undefined ? {} : { maxLine };
	const view = new View(flags.json === true);
	try {
		const named = (column: string | undefined, key: string): object => (column === undefined ? {} : { [key]: column });
		const columns = {
			...named(flags.textColumn, 'text'),
			...named(flags.promptColumn, 'prompt'),
			...named(flags.answerColumn, 'answer'),
			...named(flags.splitColumn, 'split'),
		};
		if (flags.trainTokenizer !== undefined) {
			check(flags.tokenizer.endsWith('.json'), '--train-tokenizer needs --tokenizer <file.json>, the file to write');
			const { text, prompt, answer } = columns as Record<string, string | undefined>;
			const learnt = [text, prompt, answer].filter((name) => name !== undefined);
			await trainTokenizer(inputs, {
				vocabSize: flags.trainTokenizer,
				out: flags.tokenizer,
				signal,
				...reading,
				...(learnt.length > 0 ? { columns: learnt } : {}),
			});
			view.line(`tokenizer of ${flags.trainTokenizer} entries: ${flags.tokenizer}`, { tokenizer: flags.tokenizer });
		}
		using data = await prepare(inputs, {
			tokenizer: loadTokenizer(flags.tokenizer),
			out: flags.out,
			format: flags.format,
			context: flags.context,
			padding: flags.padding,
			separator: flags.separator,
			splitText: flags.splitText,
			columns,
			validation: flags.validation,
			container: flags.container,
			...reading,
			...(threads === undefined ? {} : { threads }),
			...(overlong === undefined ? {} : { overlong }),
			...(validationOut === undefined ? {} : { validationOut }),
			...(splitSeed === undefined ? {} : { splitSeed }),
			...(eosId === undefined ? {} : { eosId }),
			...(bosId === undefined ? {} : { bosId }),
			...(padId === undefined ? {} : { padId }),
			onProgress: (progress) => view.progress(progress),
			signal,
		});
		view.stop();
		report(view, data);
		if (flags.validation > 0) {
			using held = await TokenDataset.open(
				validationOut ?? validationPath(flags.out),
				flags.container === 'nanogpt' ? { context: 1 } : {},
			);
			report(view, held);
		}
	} finally {
		view.stop();
		interrupt.end();
	}
}

function report(view: View, data: TokenDataset): void {
	const { path, tokens, sequences, longest, format } = data;
	view.line(`${path}: ${tokens} tokens, ${sequences} sequences (${format}), the longest has ${longest}`, {
		path,
		tokens,
		sequences,
		longest,
		format,
	});
}

/** A bar on a terminal, lines elsewhere, JSON lines when asked. */
class View {
	readonly #json: boolean;
	#bar: cliProgress.SingleBar | undefined;
	#lastLine = 0;

	constructor(json: boolean) {
		this.#json = json;
	}

	progress({ bytes, totalBytes, documents, tokens, dropped, file }: PrepareProgress): void {
		const facts = `${documents} documents, ${tokens} tokens${dropped > 0 ? `, ${dropped} left out` : ''}`;
		if (process.stderr.isTTY && !this.#json) {
			if (!this.#bar) {
				this.#bar = new cliProgress.SingleBar({
					format: '{bar} {percentage}%  {eta_formatted} left  {facts}',
					barsize: 24,
					hideCursor: true,
				});
				this.#bar.start(totalBytes, 0, { facts });
			}
			this.#bar.update(bytes, { facts });
			return;
		}
		const now = performance.now();
		if (file !== '' && now - this.#lastLine < 5000) return;
		this.#lastLine = now;
		this.line(`${facts}${file === '' ? '' : ` (${file})`}`, { bytes, totalBytes, documents, tokens, dropped });
	}

	line(text: string, json: object): void {
		if (this.#json) process.stdout.write(`${JSON.stringify(json)}\n`);
		else process.stderr.write(`${text}\n`);
	}

	stop(): void {
		this.#bar?.stop();
		this.#bar = undefined;
	}
}
