/** What a run folder may hold besides checkpoints that load: damaged ones, and what killed processes left. */
import { mkdirSync, mkdtempSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import test from 'ava';
import { DiffusionNativeError } from 'diffusion-native';

import { checkpointName, findCheckpoint, prepareRunDirectory } from '../lib/training/checkpoint.js';

const scratch = mkdtempSync(join(tmpdir(), 'dn-run-folder-'));
test.after.always(() => rmSync(scratch, { recursive: true, force: true }));

test('a checkpoint whose trainer.json lacks the sizes of its files is passed over', (t) => {
	const run = join(scratch, 'run');
	const state = { format: 'diffusion-native-run', version: 1, step: 1 };
	for (const [step, files] of [
		[1, {}],
		[2, undefined],
		[3, null],
	] as const) {
		const folder = join(run, checkpointName(step));
		mkdirSync(folder, { recursive: true });
		writeFileSync(join(folder, 'trainer.json'), JSON.stringify({ ...state, step, files }));
	}
	t.is(findCheckpoint(run).state.step, 1);
	t.throws(() => findCheckpoint(join(run, checkpointName(2))), {
		instanceOf: DiffusionNativeError,
		code: 'ERR_DN_CHECKPOINT',
		message: /trainer\.json lacks files/,
	});
});

test('temporary checkpoints and metrics of dead processes are removed, those of living ones stay', async (t) => {
	const run = join(scratch, 'stale');
	// Above the largest id that Linux and macOS give a process.
	const dead = 2 ** 22 + 1;
	const names = (pid: number): string[] => [`.metrics.jsonl.${pid}-0123456789ab.tmp`, `.step-00000001.${pid}-0a.tmp`];
	mkdirSync(run);
	for (const pid of [dead, process.pid]) {
		const [metrics, checkpoint] = names(pid) as [string, string];
		writeFileSync(join(run, metrics), '');
		mkdirSync(join(run, checkpoint));
	}
	writeFileSync(join(run, 'metrics.jsonl'), '');
	await prepareRunDirectory(run, 0);
	t.deepEqual(readdirSync(run).sort(), [...names(process.pid), 'metrics.jsonl'].sort());
});
