/** From the device and dtype a caller asks for to an engine on a real one. */
import { binding } from './binding.js';
import type { ModelConfig } from './config.js';
import { Engine } from './engine.js';
import { check, DiffusionNativeError, fromNative } from './errors.js';
import type { NativeCudaInfo } from './native-types.js';
import { show } from './option-checks.js';

/**
 * 'auto': the first GPU of compute capability 8.0 or newer, else the CPU. 'cuda': the first such GPU. 'cuda:N': that one, by
 * CUDA's numbering.
 */
export type Device = 'auto' | 'cpu' | 'cuda' | `cuda:${number}`;
/**
 * On CUDA, of activations, with fp32 parameters; 'fp32' uses no tensor cores there: it is for checking. On the CPU, of the
 * weights, with fp32 activations: 'bf16' (half the memory, products in bf16 where that is faster) and 'int8' (a quarter,
 * products in int8) are for inference. 'auto': bf16 on CUDA, fp32 on the CPU.
 */
export type DType = 'auto' | 'fp32' | 'bf16' | 'int8';

/** Where a model computes, and in what. */
export interface DeviceOptions {
	/** Device of parameters and products. @default 'auto' */
	readonly device?: Device;
	/** Type of the activations on CUDA, of the weights on the CPU. @default 'auto' */
	readonly dtype?: DType;
	/** CPU threads, at most 1024; 0: all cores. @default 0 */
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
		`option device is ${show(asked)}, expected 'auto', 'cpu', 'cuda' or 'cuda:N'`,
	);
	check(
		['auto', 'fp32', 'bf16', 'int8'].includes(askedDtype),
		`option dtype is ${show(askedDtype)}, expected 'auto', 'fp32', 'bf16' or 'int8'`,
	);
	check(
		Number.isInteger(threads) && threads >= 0 && threads <= mostThreads,
		`option threads is ${String(threads)}, expected a whole number from 0 to ${mostThreads}`,
	);
	const native = binding();
	const { device, note } = chooseDevice(asked, askedDtype, native.cudaInfo());
	const dtype = askedDtype === 'auto' ? (device === 'cpu' ? 'fp32' : 'bf16') : askedDtype;
	check(device === 'cpu' || dtype !== 'int8', "option dtype: 'int8' is for the CPU, expected 'bf16' or 'fp32'");
	const { layers, heads, channels, context, vocab } = config;
	try {
		const model = native.createModel({ layers, heads, channels, context, vocab }, { device, threads, dtype });
		return { engine: new Engine(model, config), device, dtype, note };
	} catch (error) {
		throw fromNative(error);
	}
}

/** The major compute capability from which on the kernels run; kLowestMajor in cuda/backend_cuda.cu. */
const lowestCapability = 8;

/**
 * 'cpu' or 'cuda:N' for the device asked for, and why 'auto' did not choose a GPU.
 * @throws `ERR_DN_DEVICE` when a GPU is asked for that `cuda` does not list
 */
export function chooseDevice(
	asked: Device,
	dtype: DType,
	{ compiled, devices, reason }: NativeCudaInfo,
): { device: string; note: string | undefined } {
	if (asked === 'cpu') return { device: 'cpu', note: undefined };
	if (asked === 'auto' && dtype === 'int8') return { device: 'cpu', note: 'int8 weights are for the CPU' };
	const none = reason ?? (compiled ? 'no CUDA device was found' : 'this build of the addon has no CUDA support');
	const usable = devices.findIndex(({ capability }) => Number.parseInt(capability, 10) >= lowestCapability);
	if (asked === 'auto') {
		if (usable >= 0) return { device: `cuda:${usable}`, note: undefined };
		const found = devices.map(({ name, capability }) => `${name} has ${capability}`).join(', ');
		const tooOld = `no CUDA device has compute capability ${lowestCapability}.0 or newer: ${found}`;
		return { device: 'cpu', note: devices.length > 0 ? tooOld : none };
	}
	if (devices.length === 0) throw new DiffusionNativeError('ERR_DN_DEVICE', `device '${asked}' is not usable: ${none}`);
	// One that is too old is refused by the addon, which says so.
	const index = asked === 'cuda' ? Math.max(0, usable) : Number(asked.slice('cuda:'.length));
	if (index >= devices.length) {
		throw new DiffusionNativeError(
			'ERR_DN_DEVICE',
			`device '${asked}' is not usable: there are ${devices.length} CUDA devices`,
		);
	}
	return { device: `cuda:${index}`, note: undefined };
}
