#!/usr/bin/env node
/** The command line: one file per command, each a thin call into the library. */
import { Command, CommanderError } from 'commander';

import { version } from '../info.js';
import * as evaluate from './eval.js';
import * as evaluateLength from './eval-length.js';
import * as generate from './generate.js';
import * as info from './info.js';
import * as prepare from './prepare.js';
import { fail, stopWhenNobodyReads } from './terminal.js';
import * as train from './train.js';

const program = new Command()
	.name('diffusion-native')
	.description('Masked diffusion language models: generate, train, prepare data, evaluate')
	.version(version())
	.showHelpAfterError('(add --help for all options)')
	// Options belong to the command that they follow, also where a subcommand has one of the same name.
	.enablePositionalOptions()
	.exitOverride();

for (const command of [generate, prepare, train]) command.register(program);
evaluateLength.register(evaluate.register(program));
info.register(program);
for (const command of program.commands) command.exitOverride();

stopWhenNobodyReads();
try {
	await program.parseAsync();
} catch (error) {
	// Commander has printed its own message; help and version end with 0, wrong usage with 2.
	if (error instanceof CommanderError) process.exitCode = error.exitCode === 0 ? 0 : 2;
	else fail(error);
}
