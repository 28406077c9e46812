/** The loggers of a run: TensorBoard, JSON lines, progress. */
import { existsSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { Writable } from 'node:stream';

import test from 'ava';
import {
	JsonlLogger,
	type MetricLogger,
	ProgressLogger,
	TensorBoardLogger,
	Trainer,
	type TrainMetrics,
} from 'diffusion-native';

import { collect, documents, fresh, tiny } from './helpers/trainer.js';

test('TensorBoard files hold the metrics', async (t) => {
	const data = await documents(20);
	const model = await tiny();
	const dir = fresh();
	await using trainer = new Trainer(model, {
		data,
		validation: data,
		maxSteps: 3,
		loggers: [new TensorBoardLogger(dir)],
	});
	const seen = await collect(trainer);
	const [name] = readdirSync(dir);
	t.regex(name as string, /^events\.out\.tfevents\.\d+\./);
	const events = readEvents(readFileSync(join(dir, name as string)));
	t.is(events[0]?.version, 'brain.Event:2');
	const losses = events.filter((event) => event.tag === 'train/loss');
	t.deepEqual(
		losses.map(({ step, value }) => [step, value]),
		seen.map(({ step, loss }) => [step, Math.fround(loss)]),
	);
	const held = events.filter((event) => event.tag === 'validation/loss');
	t.deepEqual(
		held.map(({ step, value }) => [step, value]),
		[[3, Math.fround((seen[2] as TrainMetrics).validation as number)]],
	);
	await model.dispose();
});

interface ReadEvent {
	step: number;
	version?: string;
	tag?: string;
	value?: number;
}

/** A reader written from the format's description, bit by bit where the writer uses tables. */
function readEvents(bytes: Buffer): ReadEvent[] {
	const crc32c = (part: Uint8Array): number => {
		let crc = 0xffffffffn;
		for (const byte of part) {
			crc ^= BigInt(byte);
			for (let bit = 0; bit < 8; bit++) crc = crc & 1n ? (crc >> 1n) ^ 0x82f63b78n : crc >> 1n;
		}
		const value = crc ^ 0xffffffffn;
		return Number((((value >> 15n) | (value << 17n)) + 0xa282ead8n) & 0xffffffffn);
	};
	const events: ReadEvent[] = [];
	for (let at = 0; at < bytes.length; ) {
		const length = Number(bytes.readBigUInt64LE(at));
		if (bytes.readUInt32LE(at + 8) !== crc32c(bytes.subarray(at, at + 8))) throw new Error('checksum of a length');
		const message = bytes.subarray(at + 12, at + 12 + length);
		if (bytes.readUInt32LE(at + 12 + length) !== crc32c(message)) throw new Error('checksum of a message');
		at += 16 + length;
		const event: ReadEvent = { step: 0 };
		for (const { number, payload } of fields(message)) {
			if (number === 2) event.step = payload as number;
			if (number === 3) event.version = String(payload);
			if (number !== 5) continue;
			for (const value of fields(payload as Buffer)) {
				for (const inner of fields(value.payload as Buffer)) {
					if (inner.number === 1) event.tag = String(inner.payload);
					if (inner.number === 2) event.value = (inner.payload as Buffer).readFloatLE(0);
				}
			}
		}
		events.push(event);
	}
	return events;
}

function* fields(message: Buffer): Generator<{ number: number; payload: Buffer | number }> {
	let at = 0;
	const varint = (): number => {
		let value = 0;
		for (let scale = 1; ; scale *= 128) {
			const byte = message[at++] as number;
			value += (byte & 127) * scale;
			if (byte < 128) return value;
		}
	};
	while (at < message.length) {
		const key = varint();
		const kind = key & 7;
		if (kind === 0) {
			yield { number: key >> 3, payload: varint() };
			continue;
		}
		const size = kind === 1 ? 8 : kind === 5 ? 4 : varint();
		yield { number: key >> 3, payload: message.subarray(at, at + size) };
		at += size;
	}
}

test('the JSONL log drops what lies beyond the step a run continues from, and a half-written line', async (t) => {
	const path = join(fresh(), 'metrics.jsonl');
	const logger = new JsonlLogger(path);
	await logger.start({ step: 0 });
	for (let step = 1; step <= 4; step++) logger.log({ step } as TrainMetrics);
	writeFileSync(path, `${readFileSync(path, 'utf8')}{"step":5,"lo`);
	await logger.start({ step: 3 });
	t.is(readFileSync(path, 'utf8'), '{"step":1}\n{"step":2}\n{"step":3}\n');
});

test('progress is plain lines where there is no terminal', (t) => {
	const lines: string[] = [];
	const stream = { isTTY: false, write: (text: string) => lines.push(text) } as unknown as NodeJS.WriteStream;
	const logger: Required<MetricLogger> = new ProgressLogger({ stream, everySeconds: 1000 });
	logger.start({ step: 0, maxSteps: 50 });
	for (let step = 1; step <= 50; step++) logger.log({ step, loss: 1.5, tokensPerSecond: 12345 } as TrainMetrics);
	logger.close();
	t.is(lines.length, 2);
	t.regex(lines[1] as string, /^step 50\/50 {2}loss 1\.5000 {2}12,345 tok\/s {2}0s left\n$/);
});

test('progress is a bar with loss, rate and time left on a terminal', (t) => {
	let text = '';
	const stream = new Writable({
		write: (chunk: Buffer, _encoding, done) => {
			text += chunk.toString();
			done();
		},
	});
	const terminal = Object.assign(stream, { isTTY: true, columns: 120 }) as unknown as NodeJS.WriteStream;
	const logger: Required<MetricLogger> = new ProgressLogger({ stream: terminal });
	logger.start({ step: 0, maxSteps: 4 });
	for (let step = 1; step <= 3; step++) logger.log({ step, loss: 1.5 + step, tokensPerSecond: 12345 } as TrainMetrics);
	logger.log({ step: 4, loss: 2.25, tokensPerSecond: 6789, validation: 3.125 } as TrainMetrics);
	logger.close();
	t.regex(text, /\u2588+\s+4\/4 {2}loss 2\.2500 {2}6,789 tok\/s {2}0s left {2}validation 3\.1250/);
});

const withFullDevice = existsSync('/dev/full') ? test : test.skip;

withFullDevice('a log that cannot be written is an error with its path', async (t) => {
	t.throws(() => new JsonlLogger('/dev/full').log({ step: 1 } as TrainMetrics), {
		code: 'ERR_DN_CHECKPOINT',
		message: /^\/dev\/full: cannot write: ENOSPC/,
	});
	const file = join(fresh(), 'file');
	await new JsonlLogger(file).start({ step: 0 });
	writeFileSync(file, 'in the way');
	await t.throwsAsync(new TensorBoardLogger(join(file, 'events')).log({ step: 1 } as TrainMetrics), {
		code: 'ERR_DN_CHECKPOINT',
		message: /events.*cannot write/,
	});
	await t.throwsAsync(new JsonlLogger(join(file, 'log', 'metrics.jsonl')).start({ step: 0 }), {
		code: 'ERR_DN_CHECKPOINT',
	});
});
