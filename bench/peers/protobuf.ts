/** The few pieces of protobuf's wire format that a model file needs: numbers, strings, messages. */

/** Bytes of a message, in order; large ones stay where they are. */
export type Bytes = Uint8Array[];

function varint(value: number): Uint8Array {
	let rest = BigInt.asUintN(64, BigInt(value));
	const out: number[] = [];
	do {
		const low = Number(rest & 127n);
		rest >>= 7n;
		out.push(rest > 0n ? low | 128 : low);
	} while (rest > 0n);
	return Uint8Array.from(out);
}

export function byteLength(bytes: Bytes): number {
	return bytes.reduce((sum, piece) => sum + piece.byteLength, 0);
}

export function integer(field: number, value: number): Bytes {
	return [varint(field * 8), varint(value)];
}

export function float(field: number, value: number): Bytes {
	return [varint(field * 8 + 5), new Uint8Array(Float32Array.of(value).buffer)];
}

/** A submessage, or raw bytes. */
export function message(field: number, content: Bytes): Bytes {
	return [varint(field * 8 + 2), varint(byteLength(content)), ...content];
}

export function string(field: number, value: string): Bytes {
	return message(field, [Buffer.from(value)]);
}
