/** From the device and dtype a caller asks for to an engine on a real one. */
import { binding } from './binding.js';
import type { ModelConfig } from './config.js';
import { Engine } from './engine.js';
import { check, DiffusionNativeError, fromNative } from './errors.js';

/** 'auto': a usable GPU when there is one, else the CPU. */
export type Device = 'auto' | 'cpu' | 'cuda' | `cuda:${number}`;
/**
 * Of activations, with fp32 parameters. 'auto': bf16 on CUDA, fp32 on the CPU. 'fp32' on CUDA uses no tensor cores: it is for
 * checking. 'int8': int8 weights and products, for inference on the CPU.
 */
export type DType = 'auto' | 'fp32' | 'bf16' | 'int8';

export interface DeviceOptions {
	readonly device?: Device;
	readonly dtype?: DType;
	readonly threads?: number;
}

export interface OpenedEngine {
	engine: Engine;
	device: string;
	dtype: Exclude<DType, 'auto'>;
	/** Why 'auto' chose the CPU. */
	note: string | undefined;
}

/** Of the pool in native/cpu/thread_pool.cpp. */
const mostThreads = 1024;

/** An engine with uninitialised weights. @throws `ERR_DN_DEVICE` with the reason, `ERR_DN_ARGUMENT` */
export function openEngine(config: ModelConfig, options: DeviceOptions): OpenedEngine {
	const { device: asked = 'auto', dtype: askedDtype = 'auto', threads = 0 } = options;
	check(
		asked === 'auto' || asked === 'cpu' || asked === 'cuda' || (typeof asked === 'string' && /^cuda:\d+$/.test(asked)),
		`option device is ${JSON.stringify(asked)}, expected 'auto', 'cpu', 'cuda' or 'cuda:N'`,
	);
	check(
		['auto', 'fp32', 'bf16', 'int8'].includes(askedDtype),
		`option dtype is ${JSON.stringify(askedDtype)}, expected 'auto', 'fp32', 'bf16' or 'int8'`,
	);
	check(
		Number.isInteger(threads) && threads >= 0 && threads <= mostThreads,
		`option threads is ${String(threads)}, expected a whole number from 0 to ${mostThreads}`,
	);
	const native = binding();
	const cuda = native.cudaInfo();
	const reason =
		cuda.reason ?? (cuda.compiled ? 'no CUDA device was found' : 'this build of the addon has no CUDA support');
	let device: string = asked;
	let note: string | undefined;
	if (asked === 'auto') {
		const wanted = askedDtype !== 'int8';
		device = wanted && cuda.devices.length > 0 ? 'cuda:0' : 'cpu';
		if (device === 'cpu') note = wanted ? reason : 'int8 weights are for the CPU';
	} else if (asked === 'cuda') {
		device = 'cuda:0';
	}
	if (device !== 'cpu') {
		const index = Number(device.slice('cuda:'.length));
		if (cuda.devices.length === 0)
			throw new DiffusionNativeError('ERR_DN_DEVICE', `device '${asked}' is not usable: ${reason}`);
		if (index >= cuda.devices.length) {
			throw new DiffusionNativeError(
				'ERR_DN_DEVICE',
				`device '${asked}' is not usable: there are ${cuda.devices.length} CUDA devices`,
			);
		}
	}
	const dtype = askedDtype === 'auto' ? (device === 'cpu' ? 'fp32' : 'bf16') : askedDtype;
	check(
		device !== 'cpu' || dtype !== 'bf16',
		"option dtype: 'bf16' is not available on the CPU, expected 'fp32' or 'int8'",
	);
	check(device === 'cpu' || dtype !== 'int8', "option dtype: 'int8' is for the CPU, expected 'bf16' or 'fp32'");
	const { layers, heads, channels, context, vocab } = config;
	try {
		const model = native.createModel({ layers, heads, channels, context, vocab }, { device, threads, dtype });
		return { engine: new Engine(model, config), device, dtype, note };
	} catch (error) {
		throw fromNative(error);
	}
}
