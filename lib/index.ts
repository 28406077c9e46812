/** The public names of the package; nothing is defined here. */
export type { AttentionOption, DiffusionBatch, LossOptions, Objective, SpindleSchedule, TimeSampler } from './batch.js';
export type { CacheKind } from './block-cache.js';
export type { Resize } from './canvas.js';
export type { ModelConfig, ModelConfigInput } from './config.js';
export { type TrainTokenizerOptions, trainTokenizer } from './data/bpe.js';
export { type DataSequence, type OpenDatasetOptions, TokenDataset, type TokenizerIdentity } from './data/dataset.js';
export type { DataFormat, Padding } from './data/format.js';
export { prepare } from './data/prepare.js';
export {
	type DataRecord,
	type DataTokenizer,
	type PrepareInput,
	type PrepareOptions,
	type PrepareProgress,
	validationPath,
} from './data/prepare-options.js';
export type { TextSplit } from './data/readers.js';
export type { DenoiseStep } from './denoise-loop.js';
export type { Device, DType } from './device.js';
export { DiffusionNativeError, type ErrorCode } from './errors.js';
export type * from './eval/options.js';
export type { Interval } from './eval/statistics.js';
export { evaluate, metricNames } from './evaluate.js';
export type { Drift } from './evaluator.js';
export type { ForwardOptions } from './forward.js';
export type { GenerateResult, GenerateStats, PredictOptions } from './generate.js';
export type { LoadProgress } from './hub.js';
export { type Info, info } from './info.js';
export {
	type CalibrateOptions,
	type CalibrationReport,
	calibrateLength,
	type EndSignal,
} from './length/calibrate.js';
export {
	type BoundRow,
	type EvaluateLengthOptions,
	evaluateLength,
	type LengthEvaluation,
	type LengthProgress,
	type MethodChoice,
} from './length/evaluate.js';
export type { LengthCalibration } from './length/extras.js';
export type { CompareOptions, GenerationComparison, GenerationRow } from './length/generations.js';
export { type LengthHeadOptions, type LengthHeadReport, trainLengthHead } from './length/head.js';
export type { HeadKind, LengthMethod, LengthOptions, LengthPrediction } from './length/method.js';
export type { BoundMetrics, Difference, Spread } from './length/metrics.js';
export type { PairData, PairOptions } from './length/pairs.js';
export { coverageChart, htmlReport, speedChart, textReport } from './length/report.js';
export type { PretrainedOptions } from './load.js';
export { JsonlLogger } from './loggers/jsonl.js';
export { ProgressLogger, type ProgressOptions } from './loggers/progress.js';
export { TensorBoardLogger } from './loggers/tensorboard.js';
export { DiffuGPT, type FromConfigOptions, type LossResult, type SaveOptions } from './model.js';
export type { NativeParameter } from './native-types.js';
export type { GenerateOptions, SamplerName } from './options.js';
export type { Prompt } from './prompt.js';
export type { Plan, Score } from './samplers/confidence.js';
export type { CanvasView, Decision, SamplerPolicy, StepView } from './samplers/policy.js';
export { type DecodeOptions, type EncodeOptions, type TokenDecoder, Tokenizer } from './tokenizer.js';
export { type Piece, type PieceKind, traceFrames, traceHtml } from './trace-html.js';
export { type ResumeOptions, type StepOptions, Trainer } from './trainer.js';
export type {
	CheckpointOptions,
	MetricLogger,
	ResolvedTrainOptions,
	TrainMetrics,
	TrainOptions,
} from './training/options.js';
export {
	type AttentionAnnealing,
	annealingRatio,
	type Schedule,
	type ScheduledStep,
	scheduleAt,
} from './training/schedules.js';
