/** The public names of the package; nothing is defined here. */
export type { AttentionOption, DiffusionBatch, LossOptions, Objective, SpindleSchedule, TimeSampler } from './batch.js';
export type { Resize } from './canvas.js';
export type { ModelConfig, ModelConfigInput } from './config.js';
export { type TrainTokenizerOptions, trainTokenizer } from './data/bpe.js';
export { type DataSequence, type OpenDatasetOptions, TokenDataset } from './data/dataset.js';
export type { DataFormat, Padding } from './data/format.js';
export {
	type DataRecord,
	type DataTokenizer,
	type PrepareInput,
	type PrepareOptions,
	type PrepareProgress,
	prepare,
	validationPath,
} from './data/prepare.js';
export type * from './eval/options.js';
export { evaluate, metricNames } from './evaluate.js';
export type { DenoiseStep } from './denoise-loop.js';
export type { Device, DType } from './device.js';
export { DiffusionNativeError, type ErrorCode } from './errors.js';
export type { GenerateResult, GenerateStats } from './generate.js';
export type { LoadProgress } from './hub.js';
export { type Info, info } from './info.js';
export type { LengthMethod, LengthOptions, LengthPrediction } from './length/method.js';
export type { PretrainedOptions } from './load.js';
export { JsonlLogger } from './loggers/jsonl.js';
export { ProgressLogger, type ProgressOptions } from './loggers/progress.js';
export { TensorBoardLogger } from './loggers/tensorboard.js';
export { DiffuGPT, type ForwardOptions, type FromConfigOptions, type LossResult } from './model.js';
export type { GenerateOptions, SamplerName } from './options.js';
export type { Prompt } from './prompt.js';
export type { Plan, Score } from './samplers/confidence.js';
export type { CanvasView, Decision, SamplerPolicy, StepView } from './samplers/policy.js';
export { type DecodeOptions, type EncodeOptions, type TokenDecoder, Tokenizer } from './tokenizer.js';
export { type ResumeOptions, Trainer } from './trainer.js';
export type { CheckpointOptions, MetricLogger, TrainMetrics, TrainOptions } from './training/options.js';
export {
	type AttentionAnnealing,
	annealingRatio,
	type Schedule,
	type ScheduledStep,
	scheduleAt,
} from './training/schedules.js';
