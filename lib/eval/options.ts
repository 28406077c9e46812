/** The options and results of `evaluate`, metric by metric, and what every metric is given to work with. */
import type { TokenDataset } from '../data/dataset.js';
import type { Padding } from '../data/format.js';
import type { EvaluateLengthOptions, LengthEvaluation } from '../length/evaluate.js';
import type { DiffuGPT } from '../model.js';
import type { GenerateOptions } from '../options.js';
import type { Interval } from './statistics.js';

/** A text, or ids where the model has no tokenizer. Texts that belong together are tokenised together. */
export type TextOrIds = string | Int32Array | readonly number[];

/** A record: an object with the fields that its metric reads. A string is a `{ text }`. */
export type EvaluationRecord = string | object;

/**
 * A path (.jsonl; .bin for 'nelbo' and 'perplexity'; for 'lambada' also .txt, one passage per line), a TokenDataset, or
 * records. Files are read as streams. `null` only for 'generative-perplexity': samples without a prompt.
 */
export type EvaluationData =
	| string
	| TokenDataset
	| Iterable<EvaluationRecord>
	| AsyncIterable<EvaluationRecord>
	| null;

/** How far an evaluation is. */
export interface EvaluationProgress {
	/** Records (sequences) read so far. */
	readonly records: number;
	/** Share of the data read, 0 to 1; undefined: not known. */
	readonly fraction: number | undefined;
}

/** Options of every metric. */
export interface EvaluationOptions {
	/** The result is a function of the model, the data, the options and this; 0 .. 2^64 - 1. @default 0 */
	readonly seed?: number | bigint;
	/** Only the first so many records or sequences. @default all */
	readonly limit?: number;
	/** Aborting rejects with `signal.reason`. @default none */
	readonly signal?: AbortSignal;
	/** Called after every record. @default none */
	readonly onProgress?: (progress: EvaluationProgress) => void;
	/** Called with what was found of each record, in their order. @default none */
	readonly onRecord?: (record: Readonly<Record<string, unknown>>) => void;
	/** Most tokens of one forward; changes no result. @default 4096 */
	readonly batchTokens?: number;
	/** Names of the fields, by role: `{ prompt: 'question' }`. @default the role's own name or a usual one; of two for the prompt one must be empty */
	readonly columns?: Readonly<Record<string, string>>;
	/** Text between prompt and answer (context and ending; prefix, middle and suffix), part of what follows it. @default ' ', for 'infilling' '' */
	readonly separator?: string;
}

/** Which tokens of a record are scored. */
export interface SequenceOptions extends EvaluationOptions {
	/** Close texts and answers with the end token, and score it. Token files are taken as they are. @default true */
	readonly endToken?: boolean;
	/** End tokens added after documents and answers; they are scored too. @default 'none' */
	readonly padding?: Exclude<Padding, 'batch'>;
	/**
	 * Tokens by which the windows of a `{ text }` longer than the context advance; a token is scored once, in the first
	 * window it is in. @default context - 1: one token of overlap
	 */
	readonly stride?: number;
}

/** Options of 'nelbo'. */
export interface NelboOptions extends SequenceOptions {
	/** Draws per sequence. @default 8 */
	readonly samples?: number;
	/** Sequences with at most so many scored tokens are computed exactly, by all their masks; at most 16. @default 0 */
	readonly enumerate?: number;
}

/** Options of 'likelihood'. */
export interface LikelihoodOptions extends EvaluationOptions {
	/** Draws per answer. @default 128 */
	readonly samples?: number;
	/** Answers of at most so many tokens are computed exactly, by all their masks; at most 16. @default 8 */
	readonly enumerate?: number;
	/** Score the end token after the answer too. @default false */
	readonly endToken?: boolean;
}

/** Options of 'perplexity'. */
export type PerplexityOptions = SequenceOptions;

/** Metrics that generate. */
export interface GenerationOptions extends EvaluationOptions {
	/**
	 * How to generate. The seed of a record is a function of `seed` and its number.
	 * @default the model's and the metric's defaults
	 */
	readonly generate?: Omit<GenerateOptions, 'seed' | 'signal'>;
	/** Generations in flight at once, 1 to 512; changes no result. @default 64 */
	readonly concurrency?: number;
}

/** Options of 'exact-match'. */
export interface ExactMatchOptions extends GenerationOptions {
	/**
	 * What is compared. 'all': the texts, without white space at the ends. 'after-hashes': what follows the last '####',
	 * without commas (GSM8K); an answer without it is wrong. @default 'all'
	 */
	readonly extract?: 'all' | 'after-hashes';
}

/** Options of 'multiple-choice'. */
export interface MultipleChoiceOptions extends EvaluationOptions {
	/** 'weighted': the NELBO of the ending. 'unweighted': DiffuLLaMA's mean over T masking rates. @default 'weighted' */
	readonly form?: 'weighted' | 'unweighted';
	/** Draws per ending; of 'unweighted', T. @default 32 */
	readonly samples?: number;
	/** Tokenise endings apart from the context and without a space in front, as upstream does. @default false */
	readonly compat?: boolean;
}

/** Options of 'infilling'. */
export type InfillingOptions = GenerationOptions;

/** Options of 'lambada'. */
export interface LambadaOptions extends GenerationOptions {
	/** As upstream: drawn at temperature 1, no beginning-of-text token in front. @default false */
	readonly compat?: boolean;
}

/** Options of 'generative-perplexity'. */
export interface GenerativePerplexityOptions extends GenerationOptions {
	/** The causal model that scores the texts. */
	readonly judge: DiffuGPT;
	/** Texts without data; with prompts, texts per prompt. @default 64 without data, 1 with */
	readonly samples?: number;
	/** Tokens by which the judge's window advances over a text longer than its context. @default half its context */
	readonly stride?: number;
}

/** Fields of every result. */
export interface EvaluationResult {
	/** Records or sequences that were scored. */
	readonly records: number;
	/** The seed that reproduces this result. */
	readonly seed: bigint;
	/** Time spent, milliseconds. */
	readonly ms: number;
	/** Whether a later token changes an earlier hidden state, measured: true for a bidirectional model that is loaded well. */
	readonly seesFuture: boolean;
}

/** A mean over tokens. */
export interface TokenMean {
	/** Records that the mean is over. */
	readonly records: number;
	/** Scored tokens. */
	readonly tokens: number;
	/** Nats per token. */
	readonly mean: number;
	/** Of the estimate for these very records: the Monte Carlo error, 0 when exact; null: one draw tells none. */
	readonly standardError: number | null;
	/** Of the estimate for the source of the records, which are then a sample (includes the above); null for one record. */
	readonly populationError: number | null;
}

/** Result of 'nelbo'. */
export interface NelboResult extends EvaluationResult {
	/** The metric asked for. */
	readonly metric: 'nelbo';
	/** Negative evidence lower bound, nats per token. */
	readonly nelbo: number;
	/** Of `nelbo`; see {@link TokenMean}. */
	readonly standardError: number | null;
	/** Of `nelbo`; see {@link TokenMean}. */
	readonly populationError: number | null;
	/** exp(nelbo). */
	readonly perplexityBound: number;
	/** Scored tokens. */
	readonly tokens: number;
	/** Forwarded sequences. */
	readonly draws: number;
	/** By the records' field `kind`, where there is one. */
	readonly kinds: Readonly<Record<string, TokenMean>>;
}

/** Result of 'likelihood'. */
export interface LikelihoodResult extends EvaluationResult {
	/** The metric asked for. */
	readonly metric: 'likelihood';
	/** Mean over the answers of the bound on log p(answer | prompt), nats. For a causal model it is no bound but exact. */
	readonly logLikelihood: number;
	/** Of one answer token. */
	readonly perToken: number;
	/** Of `logLikelihood`, the Monte Carlo error; null: one draw tells none. */
	readonly standardError: number | null;
	/** Scored tokens of all answers. */
	readonly tokens: number;
	/** Answers computed by all their masks (or, for a causal model, all answers). */
	readonly exact: number;
}

/** Result of 'perplexity'. */
export interface PerplexityResult extends EvaluationResult {
	/** The metric asked for. */
	readonly metric: 'perplexity';
	/** Mean negative log-likelihood, nats per token. */
	readonly nll: number;
	/** Of `nll`; see {@link TokenMean}. */
	readonly populationError: number | null;
	/** exp(nll). */
	readonly perplexity: number;
	/** Scored tokens. */
	readonly tokens: number;
	/** By the records' field `kind`, where there is one. */
	readonly kinds: Readonly<Record<string, TokenMean>>;
}

/** A share with its Wilson 95 % interval. */
export interface Rate {
	/** All of them. */
	readonly count: number;
	/** Those that are right. */
	readonly correct: number;
	/** correct / count; 0 of none. */
	readonly rate: number;
	/** Wilson's 95 % interval of `rate`. */
	readonly interval: Interval;
}

/** What the generations of a metric cost. */
export interface GenerationCosts {
	/** Mean new tokens before the end token. */
	readonly meanTokens: number;
	/** Mean forwards per record. */
	readonly meanForwards: number;
	/** New tokens of all records by the time all of it took. */
	readonly tokensPerSecond: number;
}

/** Result of 'exact-match': the share of answers that are right, and what they cost. */
export interface ExactMatchResult extends EvaluationResult, Rate, GenerationCosts {
	/** The metric asked for. */
	readonly metric: 'exact-match';
	/** Records whose answer and end token do not fit the length asked for: they cannot be right. */
	readonly unreachable: number;
	/** By the records' field `kind`, where there is one. */
	readonly kinds: Readonly<Record<string, Rate & { readonly meanTokens: number; readonly meanForwards: number }>>;
}

/** Result of 'multiple-choice': the share of records whose labelled ending has the best score. */
export interface MultipleChoiceResult extends EvaluationResult, Rate {
	/** The metric asked for. */
	readonly metric: 'multiple-choice';
	/** The form asked for; 'autoregressive' for a causal model. */
	readonly form: 'weighted' | 'unweighted' | 'autoregressive';
	/** The ending with the best score per token. */
	readonly perToken: Rate;
}

/** Result of 'infilling'. */
export interface InfillingResult extends EvaluationResult, GenerationCosts {
	/** The metric asked for. */
	readonly metric: 'infilling';
	/** Mean F1 of ROUGE-1, 0 to 1. */
	readonly rouge1: number;
	/** Mean F1 of ROUGE-2, 0 to 1. */
	readonly rouge2: number;
	/** Mean F1 of ROUGE-L, 0 to 1. */
	readonly rougeL: number;
	/** Share of middles that are equal but for white space at the ends. */
	readonly exactMatch: Rate;
	/** A causal model saw the prefix only. */
	readonly prefixOnly: boolean;
}

/** Result of 'lambada': the share of last words that are right, and what they cost. */
export interface LambadaResult extends EvaluationResult, Rate, GenerationCosts {
	/** The metric asked for. */
	readonly metric: 'lambada';
}

/** Result of 'generative-perplexity'. */
export interface GenerativePerplexityResult extends EvaluationResult, GenerationCosts {
	/** The metric asked for. */
	readonly metric: 'generative-perplexity';
	/** exp of the judge's mean negative log-likelihood per token. */
	readonly perplexity: number;
	/** Nats per token. */
	readonly nll: number;
	/** Of `nll`, over the texts; null for one text. */
	readonly populationError: number | null;
	/** Mean entropy of a text's own token counts, nats: low values betray repetition that the judge likes. */
	readonly entropy: number;
	/** Different pairs of neighbouring tokens, by all pairs of all texts. */
	readonly distinct2: number;
	/** Tokens the judge scored. */
	readonly tokens: number;
	/** Texts that ended at once and have nothing to score. */
	readonly empty: number;
}

/** Of 'length': those of `evaluateLength`; the seeds of its generations are `seeds`. */
export type LengthMetricOptions = EvaluationOptions & Omit<EvaluateLengthOptions, keyof EvaluationOptions>;

/** Result of 'length': that of `evaluateLength`. */
export type LengthMetricResult = EvaluationResult & Omit<LengthEvaluation, 'ms'> & { readonly metric: 'length' };

/** Options and result of each metric, by its name. */
export interface Metrics {
	/** Evidence bound of a diffusion model, per token. */
	nelbo: { options: NelboOptions; result: NelboResult };
	/** Perplexity of a causal model. */
	perplexity: { options: PerplexityOptions; result: PerplexityResult };
	/** Log-likelihood of answers given their prompts. */
	likelihood: { options: LikelihoodOptions; result: LikelihoodResult };
	/** Generated answers against the true ones. */
	'exact-match': { options: ExactMatchOptions; result: ExactMatchResult };
	/** Endings ranked by their likelihood. */
	'multiple-choice': { options: MultipleChoiceOptions; result: MultipleChoiceResult };
	/** Middles filled in, by ROUGE and equality. */
	infilling: { options: InfillingOptions; result: InfillingResult };
	/** The last word of a passage. */
	lambada: { options: LambadaOptions; result: LambadaResult };
	/** Generated texts under a causal judge. */
	'generative-perplexity': { options: GenerativePerplexityOptions; result: GenerativePerplexityResult };
	/** Length methods; see `evaluateLength`. */
	length: { options: LengthMetricOptions; result: LengthMetricResult };
}

/** Names of the metrics. */
export type Metric = keyof Metrics;
