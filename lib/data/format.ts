/**
 * The token file: its header and the foreign headers it can tell apart. No input or output here, only bytes to facts.
 *
 * Layout, little-endian: a header of 256 bytes, the token ids (u16 or u32), then, unless the format is 'packed', one index
 * record of 16 bytes per sequence: u64 first token, u32 tokens, u32 prompt tokens.
 */
import { crc32 } from 'node:zlib';

import { check, DiffusionNativeError } from '../errors.js';

/** What a sequence of a token file is: a window of a stream, a whole document, or a prompt with its answer. */
export type DataFormat = 'packed' | 'documents' | 'pairs';

/**
 * How many end tokens follow an answer, so that a model learns where text ends (docs/training.md, Data).
 * 'none'; 'context': up to the model's context; 'batch': up to the longest sequence of the micro-batch (LLaDA); `multiple`: up
 * to a multiple of that many tokens; `random` and `logUniform`: 0 to that many, drawn anew for every sequence and epoch, so that the model learns the end and not the size of the canvas.
 * `random` draws every amount alike; `logUniform` every order of magnitude, floor((n + 1)^u) - 1: long canvases are seen at
 * a fraction of their cost.
 */
export type Padding =
	| 'none'
	| 'context'
	| 'batch'
	| { readonly multiple: number }
	| { readonly random: number }
	| { readonly logUniform: number };

/** @throws `ERR_DN_ARGUMENT` unless it is one of the kinds, with a positive whole number where one belongs to it. */
export function checkPadding(padding: unknown): asserts padding is Padding {
	const [[kind, amount] = [], ...more] = typeof padding === 'object' && padding !== null ? Object.entries(padding) : [];
	check(
		padding === 'none' ||
			padding === 'context' ||
			padding === 'batch' ||
			(more.length === 0 &&
				['multiple', 'random', 'logUniform'].includes(String(kind)) &&
				Number.isInteger(amount) &&
				(amount as number) > 0),
		`padding is ${JSON.stringify(padding)}, expected 'none', 'context', 'batch', { multiple: n }, { random: n } or { logUniform: n }`,
	);
}

/** Kinds of padding as a number in the header and its amount, and back. */
export function encodePadding(padding: Padding): [kind: number, amount: number] {
	if (padding === 'none') return [0, 0];
	if (padding === 'context') return [1, 0];
	if (padding === 'batch') return [5, 0];
	if ('multiple' in padding) return [2, padding.multiple];
	return 'random' in padding ? [3, padding.random] : [4, padding.logUniform];
}

function decodePadding(kind: number, amount: number): Padding | undefined {
	return (['none', 'context', { multiple: amount }, { random: amount }, { logUniform: amount }, 'batch'] as const)[
		kind
	];
}

/** Facts in the header of a token file. */
export interface DataHeader {
	/** Bytes per token: 2 or 4. */
	readonly width: 2 | 4;
	readonly format: DataFormat;
	/** Vocabulary size the ids were made for; 0: not known (foreign files). */
	readonly vocab: number;
	readonly tokens: number;
	readonly sequences: number;
	/** Tokens of the longest sequence, without padding. */
	readonly longest: number;
	/** Window length of 'packed'. */
	readonly context: number;
	/** -1: not known. */
	readonly eosId: number;
	/** -1: not known. */
	readonly padId: number;
	readonly padding: Padding;
	/** Fingerprint of the tokenizer, hexadecimal; '': not known. */
	readonly fingerprint: string;
	/** Documents or pairs that went in. */
	readonly documents: number;
	/** Byte where the token ids begin. */
	readonly tokenStart: number;
	/** Byte where the index begins. */
	readonly indexStart: number;
}

export const headerBytes = 256;
export const recordBytes = 16;
const magic = 'DNTOKENS';
const version = 1;
const formats: readonly DataFormat[] = ['packed', 'documents', 'pairs'];
const fingerprintAt = 112;
const fingerprintBytes = 128;
const checksumAt = headerBytes - 4;

/** Own header as bytes. */
export function encodeHeader(header: DataHeader): Buffer {
	const bytes = Buffer.alloc(headerBytes);
	bytes.write(magic, 0, 'latin1');
	bytes.writeUInt32LE(version, 8);
	bytes.writeUInt8(header.width, 12);
	bytes.writeUInt8(formats.indexOf(header.format), 13);
	const [kind, amount] = encodePadding(header.padding);
	bytes.writeUInt8(kind, 14);
	bytes.writeUInt32LE(amount, 16);
	bytes.writeUInt32LE(header.vocab, 20);
	bytes.writeBigUInt64LE(BigInt(header.tokens), 24);
	bytes.writeBigUInt64LE(BigInt(header.sequences), 32);
	bytes.writeBigUInt64LE(BigInt(header.documents), 40);
	bytes.writeBigUInt64LE(BigInt(header.tokenStart), 48);
	bytes.writeBigUInt64LE(BigInt(header.indexStart), 56);
	bytes.writeUInt32LE(header.longest, 64);
	bytes.writeUInt32LE(header.context, 68);
	bytes.writeInt32LE(header.eosId, 72);
	bytes.writeInt32LE(header.padId, 76);
	bytes.write(header.fingerprint, fingerprintAt, fingerprintBytes, 'latin1');
	bytes.writeUInt32LE(crc32(bytes.subarray(0, checksumAt)), checksumAt);
	return bytes;
}

/**
 * Header of a token file of this library, of llm.c (told by its magic), or of nanoGPT (no header: uint16 ids from byte 0).
 * @param head the first bytes of the file, `headerBytes` or the whole file.
 * @param context window length for files that do not say one.
 * @throws `ERR_DN_CHECKPOINT` when the file is truncated or damaged.
 */
export function decodeHeader(path: string, head: Buffer, fileBytes: number, context: number): DataHeader {
	if (head.length >= 8 && head.toString('latin1', 0, 8) === magic) return decodeOwn(path, head, fileBytes);
	const first = head.length >= 4 ? head.readInt32LE(0) : 0;
	if (first === 20240520 || first === 20240801) return decodeLlmC(path, head, fileBytes, context);
	if (fileBytes === 0) throw damaged(path, 'is empty');
	if (fileBytes % 2 !== 0) {
		throw damaged(path, `has ${fileBytes} bytes and no known header, and headerless uint16 tokens need an even number`);
	}
	return windows(path, 2, fileBytes / 2, 0, context);
}

function decodeOwn(path: string, head: Buffer, fileBytes: number): DataHeader {
	if (head.length < headerBytes) throw damaged(path, `is truncated inside its header (${fileBytes} bytes)`);
	const found = head.readUInt32LE(8);
	if (found !== version)
		throw damaged(path, `is version ${found} of the token format; this library reads version ${version}`);
	if (head.readUInt32LE(checksumAt) !== crc32(head.subarray(0, checksumAt))) {
		throw damaged(path, 'has a damaged header (its checksum does not match)');
	}
	const width = head.readUInt8(12) as 2 | 4;
	const format = formats[head.readUInt8(13)] as DataFormat;
	const amount = head.readUInt32LE(16);
	const padding = decodePadding(head.readUInt8(14), amount);
	if (!padding) throw damaged(path, `has padding of kind ${head.readUInt8(14)}, which this library does not know`);
	const tokens = Number(head.readBigUInt64LE(24));
	const sequences = Number(head.readBigUInt64LE(32));
	const tokenStart = Number(head.readBigUInt64LE(48));
	const indexStart = Number(head.readBigUInt64LE(56));
	const expected = format === 'packed' ? tokenStart + tokens * width : indexStart + sequences * recordBytes;
	if (fileBytes < expected) throw damaged(path, `is truncated: ${fileBytes} bytes, its header promises ${expected}`);
	return {
		width,
		format,
		vocab: head.readUInt32LE(20),
		tokens,
		sequences,
		longest: head.readUInt32LE(64),
		context: head.readUInt32LE(68),
		eosId: head.readInt32LE(72),
		padId: head.readInt32LE(76),
		padding,
		fingerprint: head.toString('latin1', fingerprintAt, fingerprintAt + fingerprintBytes).replace(/\0+$/, ''),
		documents: Number(head.readBigUInt64LE(40)),
		tokenStart,
		indexStart,
	};
}

function decodeLlmC(path: string, head: Buffer, fileBytes: number, context: number): DataHeader {
	if (fileBytes < 1024 || head.length < 12)
		throw damaged(path, `is truncated inside its llm.c header (${fileBytes} bytes)`);
	const width = head.readInt32LE(0) === 20240520 ? 2 : 4;
	const found = head.readInt32LE(4);
	const known = width === 2 ? 1 : 7;
	if (found !== known)
		throw damaged(path, `is version ${found} of llm.c's token file; this library reads version ${known}`);
	const tokens = head.readInt32LE(8);
	if (fileBytes < 1024 + tokens * width) {
		throw damaged(path, `is truncated: ${fileBytes} bytes, its llm.c header promises ${1024 + tokens * width}`);
	}
	return windows(path, width, tokens, 1024, context);
}

function windows(path: string, width: 2 | 4, tokens: number, tokenStart: number, context: number): DataHeader {
	if (tokens < context) {
		throw damaged(path, `has ${tokens} tokens, fewer than one window of ${context}: open it with a smaller context`);
	}
	return {
		width,
		format: 'packed',
		vocab: 0,
		tokens,
		sequences: Math.floor(tokens / context),
		longest: context,
		context,
		eosId: -1,
		padId: -1,
		padding: 'none',
		fingerprint: '',
		documents: 0,
		tokenStart,
		indexStart: tokenStart + tokens * width,
	};
}

function damaged(path: string, what: string): DiffusionNativeError {
	return new DiffusionNativeError('ERR_DN_CHECKPOINT', `token file ${path} ${what}`);
}
