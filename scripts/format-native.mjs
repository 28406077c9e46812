// Checks the C++ and CUDA sources against .clang-format; --write formats them in place.
import { spawnSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';

const root = fileURLToPath(new URL('..', import.meta.url));
const write = process.argv.includes('--write');
const listed = spawnSync('git', ['ls-files', '--cached', '--others', '--exclude-standard', 'native', 'cuda'], {
	cwd: root,
	encoding: 'utf8',
});
const files = listed.stdout.split('\n').filter((file) => /\.(h|cpp|inl|cu|cuh)$/.test(file));
const clangFormat = fileURLToPath(new URL('../node_modules/.bin/clang-format', import.meta.url));
let wrong = 0;
for (const file of files) {
	const { status, stdout, stderr } = spawnSync(clangFormat, ['--style=file', ...(write ? ['-i'] : []), file], {
		cwd: root,
		encoding: 'utf8',
		maxBuffer: 1 << 26,
	});
	if (status !== 0) {
		console.error(stderr);
		process.exit(1);
	}
	if (!write && stdout !== readFileSync(`${root}/${file}`, 'utf8')) {
		console.error(`${file}: not formatted; run "npm run format"`);
		wrong++;
	}
}
process.exit(wrong === 0 ? 0 : 1);
