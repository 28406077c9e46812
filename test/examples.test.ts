/** The programs that the README and examples/ show, run as they stand. */
import { spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { readFileSync } from 'node:fs';
import { request } from 'node:http';
import { createServer } from 'node:net';
import { join } from 'node:path';

import test from 'ava';

import { root } from './helpers/fixtures.js';

test("the README's program runs as plain JavaScript on this version of Node", (t) => {
	const [, source] = /```ts\n([\s\S]*?)```/.exec(readFileSync(join(root, 'README.md'), 'utf8')) as RegExpExecArray;
	const { status, stdout, stderr } = spawnSync(process.execPath, ['--input-type=module', '--eval', source as string], {
		cwd: root,
		encoding: 'utf8',
	});
	t.is(status, 0, stderr);
	t.regex(stdout, /^8\/8 .*nine hundred/m);
});

/** A port that nobody listens on. */
async function freePort(): Promise<number> {
	const server = createServer().listen(0, '127.0.0.1');
	await once(server, 'listening');
	const { port } = server.address() as { port: number };
	server.close();
	await once(server, 'close');
	return port;
}

test('the service reads characters that come in two chunks', async (t) => {
	const port = await freePort();
	const service = spawn(
		process.execPath,
		[join(root, 'dist', 'examples', 'service.js'), 'diffusion-native/tiny', `${port}`],
		{
			stdio: ['ignore', 'pipe', 'inherit'],
		},
	);
	try {
		await once(service.stdout, 'data');
		const ask = async (prompt: string, isSplit: boolean): Promise<string> => {
			const body = Buffer.from(JSON.stringify({ prompt, length: 8 }));
			const asking = request({ host: '127.0.0.1', port, method: 'POST' });
			const cut = isSplit ? body.indexOf('é') + 1 : 0;
			// The service begins to read when the headers are there, and the rest is only sent after the first part.
			if (isSplit)
				await new Promise<void>((resolve) => asking.write(body.subarray(0, cut), () => setTimeout(resolve, 100)));
			asking.end(body.subarray(cut));
			const [response] = await once(asking, 'response');
			let text = '';
			for await (const chunk of response.setEncoding('utf8')) text += chunk;
			return text;
		};
		const whole = await ask('éé in words:', false);
		t.not(await ask('\uFFFD\uFFFDé in words:', false), whole, 'the prompt is told by the text');
		t.is(await ask('éé in words:', true), whole);
	} finally {
		service.kill();
	}
});
