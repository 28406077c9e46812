// Checks the C++ and CUDA sources against .clang-format; --write formats them in place.
import { spawnSync } from 'node:child_process';
import { fileURLToPath } from 'node:url';

const root = fileURLToPath(new URL('..', import.meta.url));
const write = process.argv.includes('--write');
const listed = spawnSync('git', ['ls-files', '--cached', '--others', '--exclude-standard', 'native', 'cuda'], {
	cwd: root,
	encoding: 'utf8',
});
if (listed.status !== 0) {
	console.error(`format-native: git cannot list the sources: ${listed.error?.message ?? listed.stderr.trim()}`);
	process.exit(1);
}
const files = listed.stdout.split('\n').filter((file) => /\.(h|cpp|inl|cu|cuh)$/.test(file));
const clangFormat = fileURLToPath(new URL('../node_modules/.bin/clang-format', import.meta.url));
const mode = write ? ['-i'] : ['--dry-run', '-Werror', '--ferror-limit=1'];
const { status, error } = spawnSync(clangFormat, ['--style=file', ...mode, ...files], {
	cwd: root,
	stdio: ['ignore', 'inherit', 'inherit'],
});
if (error) throw error;
if (status !== 0 && !write) console.error('sources are not formatted; run "npm run format"');
process.exit(status ?? 1);
