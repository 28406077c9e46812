/**
 * TensorBoard event files, written by hand: TFRecord framing around Event messages with one scalar each.
 *
 * Record: u64 length, u32 masked CRC-32C of the length, the message, u32 masked CRC-32C of the message.
 * Event: 1 wall_time double, 2 step varint, 3 file_version string, 5 summary; Summary: 1 repeated value;
 * Value: 1 tag string, 2 simple_value float.
 */
import { appendFileSync } from 'node:fs';
import { hostname } from 'node:os';
import { join } from 'node:path';

import { fileError, makeDirectories } from '../files.js';
import type { MetricLogger, TrainMetrics } from '../training/options.js';

const table = Uint32Array.from({ length: 256 }, (_, byte) => {
	let crc = byte;
	for (let bit = 0; bit < 8; bit++) crc = crc & 1 ? (crc >>> 1) ^ 0x82f63b78 : crc >>> 1;
	return crc >>> 0;
});

/** CRC-32C (Castagnoli), rotated and offset as the record format wants it. */
function maskedCrc(bytes: Uint8Array): number {
	let crc = 0xffffffff;
	for (const byte of bytes) crc = (crc >>> 8) ^ (table[(crc ^ byte) & 255] as number);
	crc = ~crc >>> 0;
	return (((crc >>> 15) | (crc << 17)) + 0xa282ead8) >>> 0;
}

function record(message: Buffer): Buffer {
	const framed = Buffer.alloc(message.length + 16);
	framed.writeBigUInt64LE(BigInt(message.length), 0);
	framed.writeUInt32LE(maskedCrc(framed.subarray(0, 8)), 8);
	message.copy(framed, 12);
	framed.writeUInt32LE(maskedCrc(message), 12 + message.length);
	return framed;
}

function varint(value: number): Buffer {
	const bytes: number[] = [];
	let rest = value;
	for (; rest >= 128; rest = Math.floor(rest / 128)) bytes.push((rest % 128) | 128);
	bytes.push(rest);
	return Buffer.from(bytes);
}

/** A length-delimited field. */
function field(number: number, content: Buffer): Buffer {
	return Buffer.concat([varint((number << 3) | 2), varint(content.length), content]);
}

function event(wallTime: number, step: number, content: Buffer): Buffer {
	const time = Buffer.alloc(9);
	time[0] = (1 << 3) | 1;
	time.writeDoubleLE(wallTime, 1);
	return Buffer.concat([time, Buffer.from([2 << 3]), varint(step), content]);
}

function scalar(tag: string, value: number): Buffer {
	const simple = Buffer.alloc(5);
	simple[0] = (2 << 3) | 5;
	simple.writeFloatLE(value, 1);
	return field(5, field(1, Buffer.concat([field(1, Buffer.from(tag)), simple])));
}

const tags: readonly (readonly [string, keyof TrainMetrics])[] = [
	['train/loss', 'loss'],
	['train/unweighted', 'unweighted'],
	['train/learning_rate', 'learningRate'],
	['train/grad_norm', 'gradNorm'],
	['train/tokens_per_second', 'tokensPerSecond'],
	['train/epoch', 'epoch'],
	['validation/loss', 'validation'],
	['validation/unweighted', 'validationUnweighted'],
];

/** Writes scalars into a folder that TensorBoard reads. Every run gets a file of its own. */
export class TensorBoardLogger implements MetricLogger {
	/** The folder. */
	readonly dir: string;
	#path: string | undefined;

	/** `dir`: the folder; it is made at the first step. */
	constructor(dir: string) {
		this.dir = dir;
	}

	/** The file of the current run; undefined before its first step. */
	get path(): string | undefined {
		return this.#path;
	}

	/** Appends the scalars of a step. @throws `ERR_DN_CHECKPOINT` with the system's reason, a full disk for instance. */
	async log(metrics: TrainMetrics): Promise<void> {
		const now = Date.now() / 1000;
		const messages: Buffer[] = [];
		if (this.#path === undefined) {
			this.#path = join(
				this.dir,
				`events.out.tfevents.${Math.floor(now)}.${hostname()}.${process.pid}.${metrics.step}`,
			);
			messages.push(record(event(now, 0, field(3, Buffer.from('brain.Event:2')))));
		}
		for (const [tag, name] of tags) {
			const value = metrics[name];
			if (typeof value === 'number') messages.push(record(event(now, metrics.step, scalar(tag, value))));
		}
		try {
			await makeDirectories(this.dir);
			appendFileSync(this.#path, Buffer.concat(messages));
		} catch (error) {
			throw fileError('write', this.#path, error);
		}
	}

	/** The next run gets a new file. */
	close(): void {
		this.#path = undefined;
	}
}
