/** `diffusion-native info`: what this installation is and can use. */
import type { Command } from 'commander';

import { info } from '../info.js';
import { action, exitStatus } from './terminal.js';

export function register(program: Command): void {
	program
		.command('info')
		.description('Show the version, the addon, the processor features and the devices in use')
		.option('--json', 'print one line of JSON')
		.addHelpText('after', exitStatus)
		.action(
			action(async (options: { json?: boolean }) => {
				const found = info();
				if (options.json) {
					process.stdout.write(`${JSON.stringify(found)}\n`);
					return;
				}
				const { version, binding, cpu, cuda } = found;
				const gibibytes = (bytes: number): string => `${(bytes / 2 ** 30).toFixed(1)} GiB`;
				const lines = [
					`diffusion-native ${version}`,
					`addon    ${binding}`,
					`cpu      ${cpu.isa}, fp32 by ${cpu.fp32}, bf16 by ${cpu.bf16}, int8 by ${cpu.int8}, ${cpu.threads} threads`,
					...cuda.devices.map(
						({ name, memory, capability }, i) =>
							`cuda:${i}   ${name}, ${gibibytes(memory)}, compute capability ${capability}, products by ${cuda.products}`,
					),
					...(cuda.devices.length === 0 ? [`cuda     none: ${cuda.reason ?? 'no device was found'}`] : []),
				];
				process.stdout.write(`${lines.join('\n')}\n`);
			}),
		);
}
