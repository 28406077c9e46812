/**
 * The way the native addon is found; its types are in lib/native-types.ts. The only file that knows a .node exists. Loading
 * is lazy: importing the package costs nothing and never throws.
 */
import { existsSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';

import { DiffusionNativeError } from './errors.js';
import type { Binding } from './native-types.js';

const require = createRequire(import.meta.url);
let loaded: { binding: Binding; path: string } | undefined;

/** The package's root folder: where package.json lies, whether this file runs from dist/lib or from lib. */
export function packageRoot(): string {
	let directory = dirname(fileURLToPath(import.meta.url));
	while (!existsSync(join(directory, 'package.json'))) {
		const parent = dirname(directory);
		if (parent === directory) {
			throw new DiffusionNativeError('ERR_DN_NO_BINARY', 'the folder of diffusion-native has no package.json');
		}
		directory = parent;
	}
	return directory;
}

function load(): { binding: Binding; path: string } {
	const root = packageRoot();
	const tried: string[] = [];
	const attempt = (path: string): { binding: Binding; path: string } | undefined => {
		try {
			return { binding: require(path) as Binding, path };
		} catch (error) {
			tried.push(`${path}: ${error instanceof Error ? error.message.split('\n')[0] : String(error)}`);
			return undefined;
		}
	};
	const override = process.env['DIFFUSION_NATIVE_BINDING'];
	if (override) {
		const found = attempt(resolve(override));
		if (found) return found;
		throw new DiffusionNativeError(
			'ERR_DN_NO_BINARY',
			`DIFFUSION_NATIVE_BINDING names no addon that can be loaded: ${tried.join('; ')}`,
		);
	}
	for (const folder of ['build-cuda/Release', 'build-cmake/Release', 'build/Release']) {
		const path = join(root, folder, 'diffusion_native.node');
		if (!existsSync(path)) {
			tried.push(`${path}: no such file`);
			continue;
		}
		const found = attempt(path);
		if (found) return found;
	}
	try {
		const nodeGypBuild = require('node-gyp-build') as { path(directory: string): string };
		const found = attempt(nodeGypBuild.path(root));
		if (found) return found;
	} catch (error) {
		tried.push(`prebuilds: ${error instanceof Error ? error.message.split('\n')[0] : String(error)}`);
	}
	throw new DiffusionNativeError(
		'ERR_DN_NO_BINARY',
		`no native addon could be loaded; run "npm run build:native" in ${root}. Tried: ${tried.join('; ')}`,
	);
}

/**
 * The addon, loaded on first use: the file that the environment variable DIFFUSION_NATIVE_BINDING names, relative to the
 * working directory; without it, of build-cuda, build-cmake and build the first that loads, then a prebuilt one.
 * @throws `ERR_DN_NO_BINARY` listing what was tried
 */
export function binding(): Binding {
	loaded ??= load();
	return loaded.binding;
}

/** The path the addon was loaded from. */
export function bindingPath(): string {
	loaded ??= load();
	return loaded.path;
}
