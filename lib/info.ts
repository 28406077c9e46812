/** What this installation is: version, addon, instruction set, devices. */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';

import { binding, bindingPath, packageRoot } from './binding.js';
import { fromNative } from './errors.js';

/** What `info` returns. */
export interface Info {
	/** Of this package. */
	version: string;
	/** Path of the loaded addon. */
	binding: string;
	/** The CPU. */
	cpu: {
		/** Instruction set in use: 'portable', 'avx2', 'avx512', ... */
		isa: string;
		/**
		 * How products of fp32 numbers are made: 'amx-bf16x3', 'avx512-pairs' (docs/numerics.md), or as `isa` says.
		 */
		fp32: string;
		/** Instructions that products with bf16 weights use: 'amx-bf16', 'avx512-bf16', or 'fp32' where weights are widened. */
		bf16: string;
		/** Instructions that int8 products use: 'portable', 'avx2', 'avx-vnni', 'avx512-vnni', 'amx-int8'. */
		int8: string;
		/** Cores that a model uses by default. */
		threads: number;
	};
	/** CUDA and its devices. */
	cuda: {
		/** The addon was built with CUDA. */
		compiled: boolean;
		/** memory: bytes. */
		devices: { name: string; memory: number; capability: string }[];
		/**
		 * What computes matrix products on a device: `'cuBLASLt 130100'`, or `'own kernels: '` and why. Missing from builds
		 * without CUDA.
		 */
		products?: string;
		/** Why there is no device. */
		reason?: string;
	};
}

/**
 * Loads the addon and describes it.
 * @throws `ERR_DN_NO_BINARY`; `ERR_DN_ARGUMENT` where the environment variable DN_ISA asks for what is not there, or DN_PAIRS is
 * neither 0 nor 1
 */
export function info(): Info {
	const native = binding();
	try {
		const { isa, fp32, bf16, int8, threads } = native.cpuInfo();
		return {
			version: version(),
			binding: bindingPath(),
			cpu: { isa, fp32, bf16, int8, threads },
			cuda: native.cudaInfo(),
		};
	} catch (error) {
		throw fromNative(error);
	}
}

/** Version of this package. */
export function version(): string {
	const { version: found } = JSON.parse(readFileSync(join(packageRoot(), 'package.json'), 'utf8')) as {
		version: string;
	};
	return found;
}
