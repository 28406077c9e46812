// Checks who may include or import whom (docs/architecture.md): core <- cpu, cuda <- addon on the native side, the façade's
// one door to the addon, and benchmarks, examples and recipes that use the package by its public name. Tests do too, except
// where they test an internal module. And that vector code stands behind the machine it is for.
import { execFileSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';

const root = fileURLToPath(new URL('..', import.meta.url));
const files = execFileSync('git', ['ls-files', '--cached', '--others', '--exclude-standard'], {
	cwd: root,
	encoding: 'utf8',
})
	.split('\n')
	.filter(Boolean);
const problems = [];

/** Folder under native/ -> folders whose headers it may include. */
const mayInclude = {
	'native/core': ['core'],
	'native/cpu': ['core', 'cpu'],
	'native/addon': ['core', 'addon'],
	'native/test': ['core', 'cpu', 'test'],
	'native/bench': ['core', 'cpu', 'bench'],
	'cuda/test': ['core', 'cpu', 'cuda', 'test'],
	cuda: ['core', 'cuda'],
};
// The addon asks the CPU backend only for what info() reports.
const addonMaySee = new Set(['cpu/isa.h', 'cpu/thread_pool.h']);

for (const file of files) {
	const native = /\.(h|cpp|inl|cu|cuh)$/.test(file);
	const script = /\.(ts|mjs)$/.test(file);
	if (!native && !script) continue;
	let text;
	try {
		text = readFileSync(`${root}/${file}`, 'utf8');
	} catch {
		continue;
	}
	if (native) {
		const owner = Object.keys(mayInclude).find((folder) => file.startsWith(`${folder}/`));
		for (const [, header] of text.matchAll(/^\s*#\s*include\s+"([^"]+)"/gm)) {
			const folder = header.split('/')[0];
			if (owner === 'native/addon' && addonMaySee.has(header)) continue;
			if (owner && header.includes('/') && !mayInclude[owner].includes(folder)) {
				problems.push(`${file}: includes "${header}", but ${owner} may only include ${mayInclude[owner].join(', ')}`);
			}
		}
		if (/#\s*include\s+<napi\.h>/.test(text) && owner !== 'native/addon')
			problems.push(`${file}: napi.h belongs to native/addon`);
		if (/#\s*include\s+<(cuda|cublas|mma)/.test(text) && !owner?.startsWith('cuda'))
			problems.push(`${file}: CUDA headers belong to cuda/`);
		// Other machines compile the same list of sources: what needs x86-64 says so before it includes it.
		const vectors = text.search(/#\s*include\s+(<immintrin\.h>|"[^"]+\.inl")/);
		const guard = text.search(/#\s*if\s+defined\(__x86_64__\)/);
		if (/^native\/.*\.cpp$/.test(file) && vectors >= 0 && (guard < 0 || guard > vectors))
			problems.push(`${file}: includes vector code outside #if defined(__x86_64__)`);
		continue;
	}
	const imports = [...text.matchAll(/(?:from|import)\s*\(?\s*'([^']+)'/g)].map((match) => match[1]);
	if (file.startsWith('lib/')) {
		if (file !== 'lib/binding.ts' && /\.node['"`]/.test(text))
			problems.push(`${file}: only lib/binding.ts knows a .node file`);
		if (file === 'lib/errors.ts' && imports.length > 0) problems.push(`${file}: must import nothing`);
		for (const name of imports) {
			if (!file.startsWith('lib/cli/') && /(^|\/)cli\//.test(name))
				problems.push(`${file}: the library must not import the command line`);
			if (/^\.\.?\/.*(index)\.js$/.test(name) && !file.startsWith('lib/cli/'))
				problems.push(`${file}: only the command line imports index`);
		}
	}
	if (/^(bench|examples|models)\//.test(file)) {
		for (const name of imports) {
			if (/\/lib\//.test(name)) problems.push(`${file}: imports "${name}"; use the public name 'diffusion-native'`);
		}
	}
}
for (const problem of problems) console.error(problem);
process.exit(problems.length === 0 ? 0 : 1);
