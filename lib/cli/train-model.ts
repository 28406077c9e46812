/** The model that `train` starts from. */
import { openCheckpoint } from '../checkpoint.js';
import { resolveModelDirectory } from '../hub.js';
import type { PretrainedOptions } from '../load.js';
import { DiffuGPT } from '../model.js';

/**
 * Loads a model. With `padRow`, one whose `config.padId` is its vocabulary size gets one row more: the mean of the others.
 * @throws what `DiffuGPT.fromPretrained` does
 */
export async function loadModel(
	pathOrHubId: string,
	padRow: boolean | undefined,
	options: PretrainedOptions,
): Promise<DiffuGPT> {
	const padId = options.config?.padId;
	if (!padRow || padId === undefined) return DiffuGPT.fromPretrained(pathOrHubId, options);
	const directory = await resolveModelDirectory(pathOrHubId, options);
	const inside = { ...options.config, padId: 0 };
	const checkpoint = openCheckpoint(directory, inside);
	checkpoint.close();
	if (checkpoint.config.vocab !== padId) return DiffuGPT.fromPretrained(directory, options);
	await using model = await DiffuGPT.fromPretrained(directory, { ...options, config: inside });
	return await withPadRow(model, options.threads);
}

/** A copy of `model` with one more row, which is its pad token. */
async function withPadRow(model: DiffuGPT, threads: number | undefined): Promise<DiffuGPT> {
	const { config, device, dtype, tokenizer } = model;
	const { vocab, channels } = config;
	const larger = await DiffuGPT.fromConfig(
		{ ...config, vocab: vocab + 1, padId: vocab },
		{
			device: device as PretrainedOptions['device'] & string,
			dtype,
			...(threads === undefined ? {} : { threads }),
			...(tokenizer ? { tokenizer } : {}),
		},
	);
	for (const { name } of model.parameters()) {
		const values = model.getParameter(name);
		larger.setParameter(name, name === 'wte.weight' ? withMean(values, vocab, channels) : values);
	}
	return larger;
}

/** (rows, width) values and, below them, their mean. */
function withMean(values: Float32Array, rows: number, width: number): Float32Array {
	const sums = new Float64Array(width);
	for (let i = 0; i < values.length; i++) sums[i % width] = (sums[i % width] as number) + (values[i] as number);
	const longer = new Float32Array(values.length + width);
	longer.set(values);
	longer.set(
		sums.map((sum) => sum / rows),
		values.length,
	);
	return longer;
}
