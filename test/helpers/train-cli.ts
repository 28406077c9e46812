/** The commands `prepare` and `train` alone, as a program to spawn. */
import { Command } from 'commander';

import { register as registerPrepare } from '../../lib/cli/prepare.js';
import { stopWhenNobodyReads } from '../../lib/cli/terminal.js';
import { register as registerTrain } from '../../lib/cli/train.js';

const program = new Command('diffusion-native');
registerPrepare(program);
registerTrain(program);
stopWhenNobodyReads();
try {
	await program.parseAsync();
} catch (error) {
	process.stderr.write(`${error instanceof Error ? error.message : String(error)}\n`);
	process.exitCode = 1;
}
