/**
 * A small HTTP service: POST { "prompt": "...", "length": 24 } and read the text as it is denoised, one JSON object a line.
 * Concurrent requests share one model, step by step; a client that leaves stops its own request.
 *
 * Run: node dist/examples/service.js [model directory or hub id] [port]
 */
import { once } from 'node:events';
import { createServer } from 'node:http';

import { DiffuGPT, DiffusionNativeError } from 'diffusion-native';

const [, , name = 'diffusion-native/tiny', port = '8080'] = process.argv;
const model = await DiffuGPT.fromPretrained(name);

const server = createServer(async (request, response) => {
	const abort = new AbortController();
	response.on('close', () => abort.abort());
	try {
		request.setEncoding('utf8'); // characters that two chunks share are put together
		let body = '';
		for await (const chunk of request) body += chunk;
		const { prompt, length = 24 } = JSON.parse(body) as { prompt: string; length?: number };
		for await (const { step, steps, text } of model.stream(prompt, { length, signal: abort.signal })) {
			if (!response.write(`${JSON.stringify({ step, steps, text })}\n`)) {
				await once(response, 'drain', { signal: abort.signal });
			}
		}
		response.end();
	} catch (error) {
		if (abort.signal.aborted) return;
		const known = error instanceof DiffusionNativeError || error instanceof SyntaxError;
		if (!response.headersSent) response.writeHead(known ? 400 : 500);
		response.end(`${JSON.stringify({ error: error instanceof Error ? error.message : String(error) })}\n`);
	}
});
server.listen(Number(port), '127.0.0.1', () => console.log(`listening on http://127.0.0.1:${port}`));
