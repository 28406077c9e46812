/** Folders that are gone when the process is, also when Ctrl-C ends it. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

let watching = false;

/** Lets SIGINT and SIGTERM end the process in a way that runs the listeners of 'exit'. */
export function exitOnSignals(): void {
	if (watching) return;
	watching = true;
	for (const [signal, status] of [
		['SIGINT', 130],
		['SIGTERM', 143],
	] as const)
		process.once(signal, () => process.exit(status));
}

/** A new folder in the system's one for temporary files; `remove` gives it back before the process ends. */
export function temporaryFolder(prefix: string): { path: string; remove(): void } {
	const path = mkdtempSync(join(tmpdir(), prefix));
	const remove = (): void => rmSync(path, { recursive: true, force: true });
	exitOnSignals();
	process.once('exit', remove);
	return {
		path,
		remove() {
			process.off('exit', remove);
			remove();
		},
	};
}
