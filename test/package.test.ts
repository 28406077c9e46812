/** What npm would publish: the tarball holds what it must, and works from a folder of its own. */
import { execFileSync, execSync, spawnSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { basename, delimiter, dirname, join } from 'node:path';

import test from 'ava';
import { info } from 'diffusion-native';

import { root } from './helpers/fixtures.js';

interface Packed {
	filename: string;
	files: { path: string; size: number }[];
}

function pack(destination: string): Packed {
	const output = execFileSync('npm', ['pack', '--json', '--ignore-scripts', '--pack-destination', destination], {
		cwd: root,
		encoding: 'utf8',
		stdio: ['ignore', 'pipe', 'ignore'],
	});
	return (JSON.parse(output) as Packed[])[0] as Packed;
}

test('the packed tarball is complete, small, and generates text with the model inside it', (t) => {
	const folder = mkdtempSync(join(tmpdir(), 'diffusion-native-pack-'));
	try {
		const { filename, files } = pack(folder);
		const names = new Set(files.map(({ path }) => path));
		const needed = [
			'dist/lib/index.js',
			'dist/lib/index.d.ts',
			'dist/lib/cli/main.js',
			'binding.gyp',
			'native/sources.gypi',
			'native/core/model.cpp',
			'assets/gpt2/tokenizer.json',
			'models/tiny/model.safetensors',
			'README.md',
			'LICENSE',
		];
		for (const name of needed) t.true(names.has(name), `${name} is packed`);
		for (const name of names) {
			t.notRegex(
				name,
				/^(test|bench|runs|build|dist\/(test|bench|examples)|native\/test|cuda\/test|models\/tiny-autoregressive)\b|\.map$/,
			);
		}
		const readme = readFileSync(join(root, 'README.md'), 'utf8');
		for (const [, link] of readme.matchAll(/\]\((?!https?:)([^)#]+)/g))
			t.true(names.has(link as string), `${link}, which the README links to, is packed`);
		t.true(files.reduce((sum, { size }) => sum + size, 0) < 60e6, 'unpacked size below 60 MB');

		execFileSync('tar', ['xzf', join(folder, filename), '-C', folder]);
		const unpacked = join(folder, 'package');
		symlinkSync(join(root, 'node_modules'), join(unpacked, 'node_modules'));
		const run = (script: string): string =>
			execFileSync(process.execPath, ['--input-type=module', '--eval', script], {
				cwd: unpacked,
				encoding: 'utf8',
				env: { ...process.env, NODE_OPTIONS: '', DIFFUSION_NATIVE_BINDING: info().binding },
			});
		const text = run(
			`
			import { DiffuGPT } from 'diffusion-native';
			await using model = await DiffuGPT.fromPretrained('diffusion-native/tiny', { localFilesOnly: true });
			const { text } = await model.generate('7 in words:', { length: 8, steps: 8, seed: 1 });
			console.log(text.trim());
		`.replace('await using model', 'const model'),
		);
		t.is(text.trim(), 'seven');
		const version = (JSON.parse(readFileSync(join(unpacked, 'package.json'), 'utf8')) as { version: string }).version;
		t.is(run("import { info } from 'diffusion-native'; console.log(info().version)").trim(), version);
	} finally {
		rmSync(folder, { recursive: true, force: true });
	}
});

test('DIFFUSION_NATIVE_BINDING is relative to the working directory, and named where it is wrong', (t) => {
	const { binding } = info();
	const load = (file: string) =>
		spawnSync(process.execPath, [join(root, 'dist', 'lib', 'cli', 'main.js'), 'info', '--json'], {
			cwd: dirname(binding),
			encoding: 'utf8',
			env: { ...process.env, DIFFUSION_NATIVE_BINDING: file },
		});
	t.is((JSON.parse(load(basename(binding)).stdout) as { binding: string }).binding, binding);
	const { status, stderr } = load('none.node');
	t.is(status, 1);
	t.regex(
		stderr,
		/ERR_DN_NO_BINARY: DIFFUSION_NATIVE_BINDING names no addon that can be loaded: \S+none\.node: Cannot find/,
	);
});

test('an installation without a usable addon compiles it once, on all cores', (t) => {
	const folder = mkdtempSync(join(tmpdir(), 'diffusion-native-install-'));
	t.teardown(() => rmSync(folder, { recursive: true, force: true }));
	const manifest = readFileSync(join(root, 'package.json'), 'utf8');
	writeFileSync(join(folder, 'package.json'), manifest);
	const bin = join(folder, 'bin');
	mkdirSync(bin);
	for (const name of ['node-gyp-build', 'node-gyp-build-test'])
		symlinkSync(join(root, 'node_modules', '.bin', name), join(bin, name));
	// Stands in for the compiler.
	writeFileSync(join(bin, 'node-gyp'), '#!/bin/sh\necho "$*" >> calls\n', { mode: 0o755 });
	const { scripts } = JSON.parse(manifest) as { scripts: { install: string } };
	execSync(scripts.install, {
		cwd: folder,
		env: { ...process.env, NODE_OPTIONS: '', PATH: `${bin}${delimiter}${process.env['PATH']}` },
		stdio: 'ignore',
	});
	t.is(readFileSync(join(folder, 'calls'), 'utf8'), 'rebuild -j max\n');
});
